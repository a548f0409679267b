"Is there anything to learn that no model has seen?"
from typing import Annotated

from zenml import step
from zenml.logger import get_logger

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def news(
    data_dir:str, # Dataset, after all ingestions
    artifacts_dir:str, # Everything is written below
)->Annotated[bool, 'news']:
    "Whether the dataset has changed since the newest registered model was trained."
    from rakuten_mm.data.dataset import Dataset
    from rakuten_mm.registry.champion import model_versions
    step_run(artifacts_dir)
    version,trained = Dataset.open(data_dir).manifest['version'], [v.tags.get('data_version') for v in model_versions()][-1:]
    if [version] == trained: logger.info('nothing new: the newest model was trained on data %s, which is the current version', version)
    return [version] != trained
