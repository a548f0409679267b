"""Register the ZenML stack `rakuten_local`: local orchestrator, local artifacts, MLflow tracker. Safe to run again.

The tracker gets MLFLOW_TRACKING_URI, or SQLite in the artifacts folder; run this again after changing either.
"""
import os
from pathlib import Path

from rakuten_mm.core.environment import load_environment

load_environment()

from zenml.client import Client  # noqa: E402
from zenml.config.global_config import GlobalConfiguration  # noqa: E402
from zenml.enums import StackComponentType as Kind  # noqa: E402
from zenml.utils.source_utils import set_custom_source_root  # noqa: E402

from rakuten_mm.core.tracking import EXPERIMENT, EXPERIMENTS, experiment_id, mlflow_client, tracking_uri  # noqa: E402

STACK,TRACKER = 'rakuten_local','rakuten_mlflow'


def tracker_config()->dict:
    "Address that the tracker logs to, with credentials for a server that asks for them."
    login = {f'tracking_{k}': os.environ.get(f'MLFLOW_TRACKING_{k.upper()}') for k in ('username', 'password', 'token')}
    return dict(tracking_uri=tracking_uri(), experiment_name=EXPERIMENT) | {k: v for k,v in login.items() if v}


def main():
    "Create or update the tracker and the stack."
    GlobalConfiguration().analytics_opt_in = False
    set_custom_source_root(str(Path.cwd()))
    # creates the experiments with their artifact location, before ZenML would without
    for name in EXPERIMENTS: experiment_id(mlflow_client(), name)
    if Client.find_repository() is None: Client.initialize()
    client = Client()
    if client.list_stack_components(type=Kind.EXPERIMENT_TRACKER, name=TRACKER):
        client.update_stack_component(TRACKER, Kind.EXPERIMENT_TRACKER, configuration=tracker_config())
    else: client.create_stack_component(TRACKER, 'mlflow', Kind.EXPERIMENT_TRACKER, tracker_config())
    parts = {Kind.ORCHESTRATOR: 'default', Kind.ARTIFACT_STORE: 'default', Kind.EXPERIMENT_TRACKER: TRACKER}
    if not client.list_stacks(name=STACK): client.create_stack(STACK, parts)
    print(f'stack {STACK} tracks to {tracking_uri()}')


if __name__ == '__main__': main()
