"From deliveries and corrections since the last training to a model that earns its promotion."
from zenml import pipeline

from zenml_pipelines.steps.check_new_data import check_new_data
from zenml_pipelines.steps.collect_feedback import collect_feedback
from zenml_pipelines.steps.evaluate import evaluate
from zenml_pipelines.steps.fetch import fetch
from zenml_pipelines.steps.ingest import ingest
from zenml_pipelines.steps.promote import promote
from zenml_pipelines.steps.train import train


@pipeline(enable_cache=False, dynamic=True)
def retraining(
    raw_dir:str='artifacts/quickstart/raw', # Deliveries arrive here; empty, or no such folder: there are none
    data_dir:str='artifacts/quickstart/data', # Dataset
    artifacts_dir:str='artifacts', # Everything is written below
    remote:str='', # rclone remote or folder to fetch into raw_dir first; empty fetches nothing
    preset:str='cpu', # Named configuration of rakuten_mm.core.config
    config:str='', # JSON file with a configuration, used instead of the preset
    seed:int=42,
    max_quarantine:float=.05, # Largest share of a delivery's records that may be refused
    gate:dict|None=None, # Overrides of rakuten_mm.registry.gate.GateConfig
):
    "Fetch, ingest, take corrections in; if that is new data, train from where the champion stands, evaluate, promote."
    fetch(remote=remote, raw_dir=raw_dir)
    ingest(raw_dir=raw_dir, data_dir=data_dir, max_quarantine=max_quarantine, if_there=True)
    feedback = collect_feedback(data_dir=data_dir, artifacts_dir=artifacts_dir).load()
    if feedback['raw_dir']:
        ingest(raw_dir=feedback['raw_dir'], data_dir=data_dir, max_quarantine=1., id='ingest_corrections')
    if not check_new_data(data_dir=data_dir, artifacts_dir=artifacts_dir).load(): return
    train_dir,version,_ = train(data_dir=data_dir, artifacts_dir=artifacts_dir, preset=preset, seed=seed,
                                config=config, go_on=True)
    scores,_ = evaluate(data_dir=data_dir, artifacts_dir=artifacts_dir, train_dir=train_dir)
    promote(data_dir=data_dir, artifacts_dir=artifacts_dir, version=version, test_scores=scores, train_dir=train_dir,
            corrections=feedback['table'], gate=gate)
