"""Commands for those who look after the pipelines: `rakuten-mm scheduler run|health|trigger|register` and `runs`.

Each imports what it needs when it runs: `rakuten-mm --help` must not wait for ZenML.
"""
import json
import logging
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import click


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
    "Work until stopped (SIGTERM); a run that is at work then is ended, and started again by the next scheduler."
    from zenml_pipelines.scheduler import Scheduler
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(asctime)s %(message)s')
    s = Scheduler(read(path))
    stop_on_signal(s.stopping)
    s.run()


@scheduler.command('health')
def show_health():
    "Exit code 0 if a scheduler is at work, by its heartbeat."
    from zenml_pipelines.scheduler import health
    well,doing = health()
    click.echo(doing)
    raise SystemExit(not well)


@scheduler.command()
@click.argument('name')
@click.option('--wait', is_flag=True, help='For a run of the same pipeline that is at work, rather than be refused.')
@schedule_file
def trigger(name, wait, path):
    "Run the job NAME of the schedule now; exit code 75 if another run of its pipeline is at work."
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
    "Hand the expressions over to an orchestrator that runs schedules itself."
    from zenml_pipelines.schedule import native_schedules
    for line in native_schedules(read(path)): click.echo(line)


def describe(r)->str:
    "A run, for people."
    took = '' if r.ended is None or r.outcome == 'refused' else f'{r.seconds:,.0f} s'
    code = '' if r.exit_code is None else f'exit {r.exit_code}'
    began,why = datetime.fromtimestamp(r.started, UTC), r.why+(f' ({r.note})' if r.note else '')
    return f'{began:%Y-%m-%d %H:%M:%S}  {r.job:12} {r.outcome:9} {took:>9}  {code:8}  {why}'


@click.group(invoke_without_command=True)
@click.option('--limit', default=20, type=click.IntRange(1), show_default=True)
@click.option('--pipeline', default='', help='Only runs of this one.')
@click.option('--json', 'as_json', is_flag=True, help='One JSON object a line, times in seconds since 1970.')
@click.pass_context
def runs(ctx, limit, pipeline, as_json):
    "List what ran (UTC), for how long, and how it ended; the latest first."
    from zenml_pipelines.history import History
    if ctx.invoked_subcommand: return
    found = History().runs(limit, pipeline=pipeline)
    for r in found: click.echo(json.dumps(vars(r)) if as_json else describe(r))
    if not found and not as_json: click.echo('nothing was run yet')


@runs.command('abandon')
@click.option('--dry-run', is_flag=True, help='Only say what would be marked.')
@click.option('--gone-host', 'hosts', multiple=True, help='A machine that will not come back; its runs are gone too.')
def abandon_orphans(dry_run, hosts):
    "Mark runs whose process is gone, in the run history, ZenML and MLflow; those of other machines are left alone."
    from zenml_pipelines.orphaned import abandon
    found = abandon(dry_run, hosts)
    for r in found.ended: click.echo(f"{'would mark' if dry_run else 'marked'} {r}")
    for r in found.unknown: click.echo(f'left alone {r}')
    for r in found.errors: click.echo(r, err=True)
    click.echo(f'{len(found.ended)} orphaned, {found.alive} at work, {len(found.unknown)} nobody here can tell')
    raise SystemExit(bool(found.errors))
