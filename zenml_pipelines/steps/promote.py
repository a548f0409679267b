"Run promote.ipynb."
from typing import Annotated

from zenml import step
from zenml.logger import get_logger
from zenml.types import HTMLString

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def promote(
    data_dir:str, # Dataset whose test split decides
    artifacts_dir:str, # Everything is written below
    version:int, # Registered challenger
    test_scores:dict, # From the evaluation, which must have succeeded
    train_dir:str='', # What the training step wrote
    corrections:str='', # Table of the collected corrections, to measure their gain
    gate:dict|None=None, # Overrides of rakuten_mm.registry.gate.GateConfig
)->tuple[Annotated[bool, 'promoted'], Annotated[HTMLString, 'decision']]:
    "Make the challenger champion if it passes the gate."
    run = step_run(artifacts_dir)
    result,page = run.notebook('promote', data_dir=data_dir, version=version, train_dir=train_dir,
                               corrections=corrections, gate=gate or {})
    verdict = 'is now champion' if result['promoted'] else 'stays challenger'
    logger.info('version %s %s: %s; report in %s', version, verdict, result['reason'], run.out_dir)
    return result['promoted'], page
