"Run evaluate.ipynb."
from typing import Annotated

from zenml import step
from zenml.types import HTMLString

from zenml_pipelines.context import step_run


@step(experiment_tracker=True, enable_cache=False)
def evaluate(
    data_dir:str, # Dataset
    artifacts_dir:str, # Everything is written below
    train_dir:str, # What the training step wrote
)->tuple[Annotated[dict, 'test_scores'], Annotated[HTMLString, 'model_card']]:
    "Scores of the challenger and of its references on the test split."
    result,page = step_run(artifacts_dir).notebook('evaluate', data_dir=data_dir, train_dir=train_dir)
    return result['table'], page
