"""ZenML pipelines.

    zenml pipeline run zenml_pipelines.training -c zenml_pipelines/configs/training.yaml -s rakuten_local

The pipelines are imported when asked for, because importing ZenML takes seconds that `run_notebook` does not need.
"""
from dataclasses import asdict
from importlib import import_module

from rakuten_mm.core.environment import load_environment

load_environment()

PIPELINES = ('ingestion', 'training', 'retraining', 'drift', 'api_check')


def __getattr__(name):
    if name not in PIPELINES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from zenml.enums import ExecutionMode

    from rakuten_mm.core.process import identity_of
    from zenml_pipelines.failure import end_with_cause, offer_no_dashboard
    end_with_cause(); offer_no_dashboard()
    made = getattr(import_module(f'{__name__}.pipelines.{name}'), name)
    # A run names its process from its first moment on: `rakuten-mm runs abandon` looks for those that are gone.
    # It ends with the error of the step that failed, rather than with the news that one has.
    return made.with_options(extra=dict(process=asdict(identity_of())), execution_mode=ExecutionMode.FAIL_FAST)
