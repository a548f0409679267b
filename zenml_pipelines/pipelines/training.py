"A dataset version to a registered, evaluated and perhaps promoted model."
from zenml import pipeline

from zenml_pipelines.steps.evaluate import evaluate
from zenml_pipelines.steps.promote import promote
from zenml_pipelines.steps.train import train


@pipeline(enable_cache=False)
def training(
    data_dir:str='artifacts/quickstart/data', # Dataset, from the ingestion
    artifacts_dir:str='artifacts', # Everything is written below
    preset:str='cpu', # Named configuration of rakuten_mm.core.config
    config:str='', # JSON file with a configuration, used instead of the preset
    seed:int=42,
    gate:dict|None=None, # Overrides of rakuten_mm.registry.gate.GateConfig
):
    "Train, evaluate on the test split, promote if better."
    train_dir,version,_ = train(data_dir=data_dir, artifacts_dir=artifacts_dir, preset=preset, seed=seed, config=config)
    scores,_ = evaluate(data_dir=data_dir, artifacts_dir=artifacts_dir, train_dir=train_dir)
    promote(data_dir=data_dir, artifacts_dir=artifacts_dir, version=version, test_scores=scores, gate=gate)
