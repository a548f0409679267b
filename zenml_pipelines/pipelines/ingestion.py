"From where the listings live to a dataset version."
from zenml import pipeline

from zenml_pipelines.steps.fetch import fetch
from zenml_pipelines.steps.ingest import ingest


@pipeline(enable_cache=False)
def ingestion(
    raw_dir:str='artifacts/quickstart/raw', # Delivery: tables, and images
    data_dir:str='artifacts/quickstart/data', # Receives the dataset
    remote:str='', # rclone remote or folder to fetch into raw_dir first; empty fetches nothing
    snapshot:bool=False, # The delivery is the whole catalogue: remove products that it does not hold
    columns:str='', # The files' names of our columns, e.g. title=Libellé,code=Rayon; kept for later deliveries
    max_quarantine:float=.05, # Largest share of a file's records that may be refused
):
    "Fetch, validate, clean, deduplicate, split and publish a delivery."
    fetch(remote=remote, raw_dir=raw_dir)
    ingest(raw_dir=raw_dir, data_dir=data_dir, snapshot=snapshot, columns=columns, max_quarantine=max_quarantine,
           after='fetch')
