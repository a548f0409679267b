"Run drift.ipynb, and ask for a training if it says so."
import time
from typing import Annotated

import mlflow
from zenml import step
from zenml.logger import get_logger
from zenml.types import HTMLString

from zenml_pipelines.context import step_run

logger = get_logger(__name__)


@step(experiment_tracker=True, enable_cache=False)
def detect(
    data_dir:str, # Dataset; it must hold the champion's version
    artifacts_dir:str, # Everything is written below
    days:float, # How far to look back
    min_predictions:int, # Served listings below which nothing is said
    max_reference:int, # Held-out listings to compare with, at most
    levels:dict, # Alarm levels that differ from `rakuten_mm.monitoring.drift.Thresholds`
    retrain:bool, # Ask for a training when the content moved
    again_days:float, # Not again for the same champion before so many days
)->tuple[Annotated[dict, 'drift'], Annotated[HTMLString, 'drift_report']]:
    "A report of what moved; with too little traffic it says so and ends."
    from rakuten_mm.core.config import from_dict
    from rakuten_mm.monitoring.drift import Thresholds
    from rakuten_mm.registry.versions import alias_version
    from serving.store import Store
    run = step_run(artifacts_dir)
    from_dict(Thresholds, levels)  # a wrong name fails before any work
    champion = alias_version('champion')
    with Store.from_environment() as store:
        served = store.count_recent(days, f'rakuten-mm/{champion}') if champion else 0
    if champion and served >= min_predictions:
        report,page = run.notebook('drift', data_dir=data_dir, days=days, min_predictions=min_predictions,
                                   max_reference=max_reference, levels=levels)
    else:
        few = f'{served} answers by version {champion} in {days:g} days, {min_predictions} are needed'
        why = few if champion else 'there is no champion'
        report = dict(advice='wait', causes=[], summary=f'nothing is compared: {why}', n_window=served)
        page = HTMLString(f"<p>{report['summary']}</p>")
    logger.info(report['summary'])
    if run.run_id:
        told = dict(causes=', '.join(report['causes']), advice=report['advice'], summary=report['summary'])
        mlflow.set_tags({f'drift.{k}': v for k,v in told.items()})
    if champion and retrain and report['advice'] == 'retrain':
        ask(champion, report['summary'].splitlines()[0], again_days)
    return report, page


def ask(
    champion:int, # Version
    why:str,
    again_days:float, # Not again before so many days
):
    "Leave a request for a training, unless one for the same champion was left in that time."
    from rakuten_mm.core.tracking import mlflow_client
    from rakuten_mm.monitoring.drift import request_retraining
    from rakuten_mm.registry.versions import MODEL
    client = mlflow_client()
    asked = float(client.get_model_version(MODEL, str(champion)).tags.get('drift.asked_at', 0))
    if time.time()-asked < 86_400*again_days: logger.info('a training was asked for already'); return
    logger.info('asked for a training: %s', request_retraining(why))
    client.set_model_version_tag(MODEL, str(champion), 'drift.asked_at', str(time.time()))
