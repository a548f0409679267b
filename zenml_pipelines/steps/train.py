"Run train.ipynb."
from typing import Annotated

from zenml import step

from zenml_pipelines.context import step_run
from zenml_pipelines.run_notebook import run_notebook


@step(experiment_tracker=True, enable_cache=False)
def train(
    data_dir:str, # Dataset
    artifacts_dir:str, # Everything is written below
    preset:str, # Named configuration
    seed:int,
)->tuple[Annotated[str, 'train_dir'], Annotated[int, 'version']]:
    "A dataset becomes a registered challenger."
    run = step_run(artifacts_dir)
    result = run_notebook('train', run.out_dir, run.run_id, data_dir=data_dir, preset=preset, seed=seed)
    return str(run.out_dir), result['version']
