"Turn corrections into a delivery."
from dataclasses import asdict
from typing import Annotated

from zenml import step
from zenml.logger import get_logger

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def collect_feedback(
    data_dir:str, # Dataset that some of the corrected listings are in already
    artifacts_dir:str, # Everything is written below
)->Annotated[dict, 'collected']:
    "All corrections: a delivery in `raw_dir` (empty if there is nothing to learn), and `table`, to measure their gain."
    from pathlib import Path

    from rakuten_mm.data.dataset import Dataset
    from rakuten_mm.data.feedback import reviewed, write_delivery
    from serving.store import Store
    run = step_run(artifacts_dir)
    with Store.from_environment() as store: corrections = store.verdicts()
    data = Dataset.open(data_dir) if Path(data_dir, 'CURRENT').exists() else None
    home,table = run.out_dir.parents[2]/'feedback', run.out_dir/'judged.parquet'
    run.out_dir.mkdir(parents=True, exist_ok=True)
    reviewed(corrections, data).to_parquet(table, index=False)
    counts = write_delivery(corrections, data, home/'raw')
    logger.info('%s corrections of listings that the dataset holds, %s new listings; %s of them were misfiled',
                counts.corrected, counts.added, counts.misfiled)
    logger.info('not learnt from: %s listings without an image, %s that nobody kept',
                counts.without_image, counts.not_kept)
    return asdict(counts) | dict(raw_dir=str(home/'raw') if counts.used else '', table=str(table))
