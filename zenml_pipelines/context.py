"""The run that a step belongs to: its MLflow run and its folder."""
import os
from pathlib import Path
from typing import NamedTuple

import mlflow
from zenml import get_step_context, log_metadata
from zenml.types import HTMLString

from rakuten_mm.core.environment import artifacts_dir
from rakuten_mm.core.process import identity_of
from rakuten_mm.core.tracking import INGESTION
from zenml_pipelines.run_notebook import run_notebook

TRACKED_AS_INGESTION = dict(experiment_tracker=dict(experiment_name=INGESTION)) # Settings of a step


class StepRun(NamedTuple):
    "Where a step logs and writes."
    run_id:str # MLflow run that ZenML's tracker started, or empty without a tracker
    out_dir:Path

    def notebook(self, name:str, **params)->tuple[dict, HTMLString]: # Its result and its page
        "Execute a run notebook, see `run_notebook`; the plain values of its result become metadata of the step."
        result = run_notebook(name, self.out_dir, self.run_id, **params)
        page = self.out_dir/f'{name}.html'
        log_metadata({k: v for k,v in result.items() if isinstance(v, str | int | float)} | dict(page=str(page)))
        return result, HTMLString(page.read_text(encoding='utf-8'))


def step_run(
    artifacts:str='', # Artifacts folder; empty keeps `RAKUTEN_MM_ARTIFACTS` or its default
)->StepRun:
    "The current step's MLflow run and output folder. Kernels and the library learn both from the environment."
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(Path(artifacts).resolve() if artifacts else artifacts_dir())
    run = mlflow.active_run()
    if run:
        os.environ['MLFLOW_TRACKING_URI'] = mlflow.get_tracking_uri()
        mlflow.set_tags(identity_of().tags())
    context = get_step_context()
    out_dir = artifacts_dir()/'runs'/context.pipeline_run.name/context.step_run.name
    return StepRun(run.info.run_id if run else '', out_dir)
