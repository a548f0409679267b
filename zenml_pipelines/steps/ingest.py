"Run ingest.ipynb."
from pathlib import Path
from typing import Annotated

from zenml import step
from zenml.logger import get_logger

from rakuten_mm.data.dataset import Dataset
from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def ingest(
    raw_dir:str, # Delivery in the challenge's format
    data_dir:str, # Receives the dataset
    snapshot:bool=False, # The delivery is the whole catalogue
    max_quarantine:float=.05, # Largest share of a file's records that may be refused
    if_there:bool=False, # Without a delivery the dataset stays as it is
)->Annotated[str, 'data_version']:
    "A delivery becomes a dataset version."
    run = step_run()
    if if_there and not (raw_dir and Path(raw_dir).is_dir() and any(Path(raw_dir).glob('*.csv'))):
        logger.info('no delivery in %r', raw_dir)
        return Dataset.open(data_dir).manifest['version'] if Path(data_dir, 'CURRENT').exists() else ''
    delivery = dict(raw_dir=raw_dir, snapshot=snapshot, max_quarantine=max_quarantine)
    return run.notebook('ingest', data_dir=data_dir, **delivery)['version']
