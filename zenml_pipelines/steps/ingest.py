"Run ingest.ipynb."
from pathlib import Path
from typing import Annotated

from zenml import step
from zenml.logger import get_logger
from zenml.types import HTMLString

from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.parsing import holds_delivery
from zenml_pipelines.context import TRACKED_AS_INGESTION, step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False, settings=TRACKED_AS_INGESTION)
def ingest(
    raw_dir:str, # Delivery: tables, and images
    data_dir:str, # Receives the dataset
    snapshot:bool=False, # The delivery is the whole catalogue
    columns:str='', # The files' names of our columns; kept for later deliveries
    max_quarantine:float=.05, # Largest share of a file's records that may be refused
    if_there:bool=False, # Without a delivery the dataset stays as it is
)->tuple[Annotated[str, 'data_version'], Annotated[HTMLString, 'ingestion_report']]:
    "A delivery becomes a dataset version."
    run = step_run()
    if if_there and not (raw_dir and holds_delivery(raw_dir)):
        logger.info('no delivery in %r', raw_dir)
        version = Dataset.open(data_dir).manifest['version'] if Path(data_dir, 'CURRENT').exists() else ''
        return version, HTMLString('<p>There was no delivery.</p>')
    delivery = dict(raw_dir=raw_dir, snapshot=snapshot, columns=columns, max_quarantine=max_quarantine)
    result,page = run.notebook('ingest', data_dir=data_dir, **delivery)
    return result['version'], page
