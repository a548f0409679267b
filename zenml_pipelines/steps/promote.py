"Compare first, move the alias after."
import json
from dataclasses import asdict
from typing import Annotated

import mlflow
from zenml import step
from zenml.logger import get_logger

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def promote(
    data_dir:str, # Dataset whose test split decides
    artifacts_dir:str, # Everything is written below
    version:int, # Registered challenger
    test_scores:dict, # From the evaluation, which must have succeeded
)->Annotated[bool, 'promoted']:
    "Make the challenger champion if it is better on the test split."
    from rakuten_mm import promotion
    from rakuten_mm.dataset import Dataset
    run = step_run(artifacts_dir)
    decision = promotion.promote(version, Dataset.open(data_dir))
    mlflow.set_tags({f'promotion.{k}': v for k,v in asdict(decision).items()})
    run.out_dir.mkdir(parents=True, exist_ok=True)
    (run.out_dir/'decision.json').write_text(json.dumps(dict(asdict(decision), test=test_scores), indent=1))
    logger.info('version %s %s: %s', version, 'is now champion' if decision.promoted else 'stays challenger', decision.reason)
    return decision.promoted
