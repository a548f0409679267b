"""Commands for those who look after the pipelines: `rakuten-mm scheduler` and `runs`.

Each imports what it needs when it runs: `rakuten-mm --help` must not wait for ZenML.
"""
import logging
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from rakuten_mm.cli.output import shown_by, table


@click.group()
def scheduler():
    "Run pipelines at their times."


schedule_file = click.option(
    '--schedule', 'path', type=click.Path(exists=True, dir_okay=False, path_type=Path), envvar='RAKUTEN_MM_SCHEDULE',
    help='YAML; default: zenml_pipelines/configs/schedule.yaml, or RAKUTEN_MM_SCHEDULE.', show_default=False)


def read(path:Path|None):
    "A schedule, or the one in the checkout."
    from zenml_pipelines.schedule import SCHEDULE, read_schedule
    return read_schedule(path or SCHEDULE)


def stop_on_signal(stopping):
    "Let SIGTERM and Ctrl-C set an event."
    for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda *_: stopping.set())


@scheduler.command('run')
@schedule_file
def run_scheduler(path):
    """Work until stopped (SIGTERM or Ctrl+C).

    A run that is at work then is ended, and started again by the next scheduler."""
    from zenml_pipelines.scheduler import Scheduler
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(asctime)s %(message)s')
    s = Scheduler(read(path))
    stop_on_signal(s.stopping)
    s.run()


def show_jobs(jobs:list[dict]):
    "The list of jobs."
    columns = 'job', 'pipeline', 'cron', 'timezone', 'next', 'config'
    click.echo(table(' '.join(columns), [[j[c] for c in columns] for j in jobs]))


@scheduler.command('list')
@schedule_file
@shown_by(show_jobs)
def list_jobs(path):
    "The jobs of the schedule, and when each is due (UTC)."
    now = time.time()
    return [dict(job=j.name, pipeline=j.pipeline, cron=j.cron, timezone=j.timezone, config=str(j.config),
                 next=datetime.fromtimestamp(j.next_time(now), UTC)) for j in read(path).jobs]


@scheduler.command('health')
@shown_by(lambda told: click.echo(told['doing']), exit_code=lambda told: int(not told['well']))
def show_health():
    "Exit code 0 if a scheduler is at work, by its heartbeat."
    from zenml_pipelines.scheduler import health
    well,doing = health()
    return dict(well=bool(well), doing=doing)


@scheduler.command()
@click.argument('name')
@click.option('--wait', is_flag=True, help='For a run of the same pipeline that is at work, rather than be refused.')
@schedule_file
def trigger(name, wait, path):
    """Run the job NAME of the schedule now.

    Exit code 75 if another run of its pipeline is at work."""
    from zenml_pipelines.history import BY_HAND
    from zenml_pipelines.runner import Runner
    schedule = read(path)
    job,runner = schedule.job(name), Runner(schedule, say=click.echo)
    stop_on_signal(runner.stopping)
    run = runner.run(job, BY_HAND, wait=wait)
    raise SystemExit(75 if run is None or run.outcome == 'refused' else run.exit_code or int(run.outcome != 'ok'))


@scheduler.command()
@schedule_file
def register(path):
    "Hand the times to an orchestrator that runs schedules."
    from zenml_pipelines.schedule import native_schedules
    for line in native_schedules(read(path)): click.echo(line)


def show_runs(found:list[dict]):
    "The list of runs."
    if not found: click.echo('nothing was run yet'); return
    def line(r):
        took = None if r['ended'] is None or r['outcome'] == 'refused' else f"{r['seconds']:,.0f} s"
        why = r['why']+(f" ({r['note']})" if r['note'] else '')
        return datetime.fromtimestamp(r['started'], UTC), r['job'], r['outcome'], took, r['exit_code'], why
    click.echo(table('started job outcome took exit why', map(line, found)))


@click.group(invoke_without_command=True)
@click.option('--limit', default=20, type=click.IntRange(1), show_default=True)
@click.option('--pipeline', default='', help='Only runs of this one.')
@click.pass_context
@shown_by(show_runs)
def runs(ctx, limit, pipeline):
    """List what ran (UTC), for how long, and how it ended; the latest first.

    As JSON, times are seconds since 1970."""
    from zenml_pipelines.history import History
    if ctx.invoked_subcommand: return None
    return [vars(r) | dict(seconds=r.seconds) for r in History().runs(limit, pipeline=pipeline)]


def show_orphans(found:dict):
    "What was marked, and what was left alone."
    for r in found['ended']: click.echo(f"{'would mark' if found['dry_run'] else 'marked'} {r}")
    for r in found['unknown']: click.echo(f'left alone {r}')
    for r in found['errors']: click.echo(f'Error: {r}', err=True)
    ended,unknown = len(found['ended']), len(found['unknown'])
    click.echo(f"{ended} orphaned, {found['alive']} at work, {unknown} nobody here can tell")


@runs.command('abandon')
@click.option('--dry-run', is_flag=True, help='Only say what would be marked.')
@click.option('--gone-host', 'hosts', multiple=True, help='A machine that will not come back; its runs are gone too.')
@shown_by(show_orphans, exit_code=lambda found: int(bool(found['errors'])))
def abandon_orphans(dry_run, hosts):
    """Mark runs whose process is gone.

    In the run history, in ZenML and in MLflow; runs of other machines are left alone."""
    from zenml_pipelines.orphaned import abandon
    return asdict(abandon(dry_run, hosts)) | dict(dry_run=dry_run)
