"Raw listings to a dataset version."
from zenml import pipeline

from zenml_pipelines.steps.ingest import ingest


@pipeline(enable_cache=False)
def ingestion(
    raw_dir:str='artifacts/quickstart/raw', # Delivery in the challenge's format
    data_dir:str='artifacts/quickstart/data', # Receives the dataset
):
    "Check, clean, deduplicate, split and publish a delivery."
    ingest(raw_dir=raw_dir, data_dir=data_dir)
