"Look for data that no model has seen."
from typing import Annotated

from zenml import step
from zenml.logger import get_logger

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def check_new_data(
    data_dir:str, # Dataset, after all ingestions
    artifacts_dir:str, # Everything is written below
)->Annotated[bool, 'new_data']:
    "True if the dataset has changed since the newest registered model was trained."
    from rakuten_mm.data.dataset import Dataset
    from rakuten_mm.registry.champion import model_versions
    step_run(artifacts_dir)
    version = Dataset.open(data_dir).manifest['version']
    trained = [v.tags.get('data_version') for v in model_versions()][-1:]
    if [version] == trained: logger.info('nothing new: the newest model was trained on version %s', version)
    return [version] != trained
