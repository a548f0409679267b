"Bring the raw folder up to date with a partner's storage."
from dataclasses import asdict
from typing import Annotated

from zenml import step
from zenml.logger import get_logger

from zenml_pipelines.context import TRACKED_AS_INGESTION, step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False, settings=TRACKED_AS_INGESTION)
def fetch(
    remote:str, # rclone's name:path, or a folder or archive on this machine; empty to use `raw_dir` as it is
    raw_dir:str, # Receives the delivery
)->Annotated[dict, 'fetched']:
    "Counts of what was transferred and unpacked; raises if the delivery is not complete."
    from rakuten_mm.sources.fetch import fetch as fetch_delivery
    step_run()
    if not remote:
        logger.info('nothing to fetch: no remote is given')
        return {}
    return asdict(fetch_delivery(remote, raw_dir))
