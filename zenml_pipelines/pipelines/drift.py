"From served traffic to a report of what moved since the champion was trained."
from zenml import pipeline

from zenml_pipelines.steps.detect import detect


@pipeline(enable_cache=False)
def drift(
    data_dir:str='artifacts/quickstart/data', # Dataset; it must hold the champion's version
    artifacts_dir:str='artifacts', # Everything is written below
    days:float=7., # How far to look back
    min_predictions:int=300, # Served listings below which nothing is said
    max_reference:int=5_000, # Held-out listings to compare with, at most
    levels:dict|None=None, # Alarm levels that differ from `rakuten_mm.monitoring.drift.Thresholds`
    retrain:bool=False, # Ask the scheduler for a training when the content moved
    again_days:float=7., # Not again for the same champion before so many days
):
    "Compare served traffic with the version the champion was trained on."
    detect(data_dir=data_dir, artifacts_dir=artifacts_dir, days=days, min_predictions=min_predictions,
           max_reference=max_reference, levels=levels or {}, retrain=retrain, again_days=again_days)
