"What was served in the last days, for those who look at it from outside the server."
from contextlib import closing
from datetime import timedelta

from sqlalchemy import func, select

from serving.config import ServeConfig, kept_images
from serving.store import Prediction, Store, now


def served_lately(
    days:float,
    version:str, # Model that answered
    most:int = 50_000, # About so many; of more, a sample
)->list[dict]: # As `Store.served`
    "Figures of what a model served in the last `days`, oldest first."
    with closing(Store(ServeConfig.from_environment().url, kept_images())) as store: return store.served(now()-timedelta(days=days), None, version, most)


def count_lately(
    days:float,
    version:str, # Model that answered
)->int:
    "How many answers with figures a model gave in the last `days`."
    with closing(Store(ServeConfig.from_environment().url, kept_images())) as store, store.engine.connect() as c:
        wanted = (Prediction.created_at >= now()-timedelta(days=days)) & (Prediction.model_version == version) & Prediction.facts.is_not(None)
        return c.execute(select(func.count()).select_from(Prediction).where(wanted)).scalar()
