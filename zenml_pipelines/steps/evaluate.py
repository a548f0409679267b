"Run evaluate.ipynb."
from typing import Annotated

from zenml import step

from zenml_pipelines.context import step_run
from zenml_pipelines.run_notebook import run_notebook


@step(experiment_tracker=True, enable_cache=False)
def evaluate(
    data_dir:str, # Dataset
    artifacts_dir:str, # Everything is written below
    train_dir:str, # What the training step wrote
)->Annotated[dict, 'test_scores']:
    "Scores of the challenger and of its references on the test split."
    run = step_run(artifacts_dir)
    return run_notebook('evaluate', run.out_dir, run.run_id, data_dir=data_dir, train_dir=train_dir)['table']
