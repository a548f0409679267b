"Run ingest.ipynb."
from typing import Annotated

from zenml import step

from zenml_pipelines.context import step_run
from zenml_pipelines.run_notebook import run_notebook


@step(experiment_tracker=True, enable_cache=False)
def ingest(
    raw_dir:str, # Delivery in the challenge's format
    data_dir:str, # Receives the dataset
    snapshot:bool=False, # The delivery is the whole catalogue
    max_quarantine:float=.05, # Largest share of a file's records that may be refused
)->Annotated[str, 'data_version']:
    "A delivery becomes a dataset version."
    run = step_run()
    return run_notebook('ingest', run.out_dir, run.run_id, raw_dir=raw_dir, data_dir=data_dir, snapshot=snapshot, max_quarantine=max_quarantine)['version']
