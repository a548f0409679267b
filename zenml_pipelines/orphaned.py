"""Runs that were killed and could not say so: found by the process that they name, and ended in the run history, in
ZenML and in MLflow.

Runs of other machines, and runs that name no process, are listed and left alone.
"""
from dataclasses import dataclass, field

from rakuten_mm.core.process import ProcessIdentity, from_tags, is_gone
from zenml_pipelines.history import History

WHY = 'its process is gone'


@dataclass
class Orphans:
    "Counts and names of the runs that were found."
    ended:list[str] = field(default_factory=list) # Marked, or to be marked
    alive:int = 0 # Runs that are at work
    unknown:list[str] = field(default_factory=list) # Left alone, with the reason
    errors:list[str] = field(default_factory=list) # Records that could not be read

    def add(self, gone:bool|None, name:str, process:ProcessIdentity|None):
        "Note how a run is."
        if gone: self.ended.append(name)
        elif gone is None:
            self.unknown.append(f'{name}: '+(f'of host {process.host}' if process else 'names no process'))
        else: self.alive += 1


def abandon(
    dry_run:bool = False, # Only look
    gone_hosts:tuple[str, ...] = (), # Machines that are known not to come back
)->Orphans:
    "Mark all runs whose process is gone."
    found,names = Orphans(), set[str]()
    for end in (end_history, end_zenml, end_mlflow):
        try: end(found, names, dry_run, gone_hosts)
        except Exception as e: found.errors.append(f"{end.__name__.removeprefix('end_')}: {type(e).__name__}: {e}")
    return found


def end_history(found:Orphans, names:set[str], dry_run:bool, gone_hosts:tuple[str, ...]):
    "Rows of the run history."
    history = History()
    n = len(history.runs(-1, outcome='running'))
    orphans,unknown = history.end_orphans(gone_hosts, dry_run)
    found.alive += n-len(orphans)-len(unknown)
    found.ended += [f'history {r.job} {r.id[:8]}: {r.outcome}' for r in orphans]
    found.unknown += [f'history {r.job} {r.id[:8]}: of host {r.host}' for r in unknown]


def end_zenml(found:Orphans, names:set[str], dry_run:bool, gone_hosts:tuple[str, ...]):
    "Runs and steps in ZenML, of the local orchestrator only: others do not run them in the process that starts them."
    from zenml.client import Client
    from zenml.enums import ExecutionStatus, StackComponentType
    from zenml.models import PipelineRunUpdate, StepRunUpdate
    from zenml.utils.pagination_utils import depaginate
    from zenml.utils.time_utils import utc_now
    client = Client()
    open_states = [s.value for s in ExecutionStatus if not s.is_finished and s != ExecutionStatus.PAUSED]
    states = f"oneof:{open_states}".replace("'", '"')
    for run in depaginate(client.list_pipeline_runs, status=states, hydrate=True):
        orchestrators = run.stack.components[StackComponentType.ORCHESTRATOR] if run.stack else []
        local,extra = all(c.flavor_name == 'local' for c in orchestrators), run.config.extra
        process = ProcessIdentity(**extra['process']) if run.stack and local and 'process' in extra else None
        found.add(gone := is_gone(process, gone_hosts) if process else None, f'ZenML {run.name}', process)
        if not gone: continue
        names.add(run.name)
        if dry_run: continue
        failed = StepRunUpdate(status=ExecutionStatus.FAILED, end_time=utc_now())
        for step in run.steps.values():
            if not step.status.is_finished: client.zen_store.update_run_step(step.id, failed)
        update = PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=f'abandoned: {WHY}')
        client.zen_store.update_run(run.id, update)


def running_mlflow()->list:
    "All runs that MLflow believes to be at work."
    from rakuten_mm.core.tracking import EXPERIMENTS, mlflow_client
    experiments = [e.experiment_id for e in mlflow_client().search_experiments() if e.name in EXPERIMENTS]
    return mlflow_client().search_runs(experiments, "attributes.status = 'RUNNING'", max_results=50_000)


def end_mlflow(found:Orphans, names:set[str], dry_run:bool, gone_hosts:tuple[str, ...]):
    "Runs in MLflow, those of a pipeline run that was killed before it could name its process too."
    from rakuten_mm.core.tracking import mlflow_client
    for run in running_mlflow():
        process = from_tags(run.data.tags)
        gone = is_gone(process, gone_hosts) if process else (run.info.run_name in names or None)
        found.add(gone, f'MLflow {run.info.run_name}', process)
        if not gone or dry_run: continue
        mlflow_client().set_tag(run.info.run_id, 'abandoned', WHY)
        mlflow_client().set_terminated(run.info.run_id, 'KILLED')
