"Jobs and their times: configs/schedule.yaml, checked before anything starts."
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

import yaml
from apscheduler.triggers.cron import CronTrigger
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zenml_pipelines import PIPELINES

SCHEDULE = Path(__file__).parent/'configs'/'schedule.yaml'


def cron_trigger(
    expression:str, # minute, hour, day of month, month, day of week
    timezone:str,
)->CronTrigger:
    "Moments at which a job is due; raises `ValueError` where schedulers read an expression differently."
    day,weekday = [*expression.split(), '', '', '', '', ''][2:5:2]
    # To APScheduler 0 is Monday, to cron Sunday; of two days cron wants either, APScheduler both.
    if any(c.isdigit() for c in weekday):
        raise ValueError(f'{expression!r}: write days of the week as names, e.g. mon-fri')
    if not {day, weekday} & {'*', ''}:
        raise ValueError(f'{expression!r} has a day of the month and a day of the week; '
                         'schedulers disagree on what that means')
    trigger = CronTrigger.from_crontab(expression, timezone)
    if trigger.get_next_fire_time(None, datetime.now(UTC)) is None:
        raise ValueError(f'{expression!r} is never due: there is no such day in those months')
    return trigger


def fire_time(
    trigger:CronTrigger,
    since:datetime,
)->datetime:
    "The first moment at which a trigger is due, `since` included."
    when = trigger.get_next_fire_time(None, since)
    assert when, 'cron_trigger has found one'
    return when


class Job(BaseModel):
    "A pipeline, and when to run it."
    model_config = ConfigDict(extra='forbid', frozen=True)
    name:str = Field(pattern='^[a-z][a-z0-9_]*$')
    pipeline:str
    config:Path # Its YAML; relative to the working directory
    cron:str
    timezone:str = 'UTC'
    timeout_s:float = Field(21_600, gt=0) # After which it is killed
    alone:bool = True # Waits for other such jobs on this machine, and they for it
    at_start:Literal['', 'until_champion'] = '' # Run as soon as there is a delivery, until the registry has a champion

    @field_validator('pipeline')
    @classmethod
    def known(cls, name):
        if name not in PIPELINES: raise ValueError(f"no pipeline {name!r}; there are {', '.join(PIPELINES)}")
        return name

    @field_validator('config')
    @classmethod
    def there(cls, path):
        if not path.is_file(): raise ValueError(f'{path}: no such file (working directory {Path.cwd()})')
        return path

    @model_validator(mode='after')
    def readable(self):
        try: cron_trigger(self.cron, self.timezone)
        except (ValueError, LookupError) as e: raise ValueError(str(e)) from None  # LookupError: an unknown time zone
        return self

    def next_time(self, after:float)->float:
        "The first time that it is due after a moment. A time of day is due once a day, whatever the clocks do there."
        tick,zone = timedelta(microseconds=1), ZoneInfo(self.timezone)
        if self.cron.split()[1] == '*':  # through every hour, those that come twice too
            since = datetime.fromtimestamp(after, UTC)+tick
            return fire_time(cron_trigger(self.cron, self.timezone), since).timestamp()
        # By the local clock as if it was never changed: of an hour that comes twice the first one counts, and a time
        # that is left out in spring is as long after the last hour before as it says.
        trigger = cron_trigger(self.cron, 'UTC')
        local = datetime.fromtimestamp(after, zone).replace(tzinfo=UTC)-timedelta(hours=2)
        while (when := (local := fire_time(trigger, local+tick)).replace(tzinfo=zone).timestamp()) <= after: pass
        return when

    def period(self, now:float)->float:
        "Seconds between its next two times."
        first = self.next_time(now)
        return self.next_time(first)-first

    def delivered(self)->bool:
        "True if the raw folder of its configuration holds a complete delivery, or it fetches one itself."
        from rakuten_mm.sources.fetch import STATE, WHOLE
        params = (yaml.safe_load(self.config.read_text()) or {}).get('parameters') or {}
        raw = Path(params.get('raw_dir') or '.')
        complete = not (raw/STATE).is_dir() or (raw/WHOLE).exists()
        tables = [p for depth in ('*', '*/*') for p in raw.glob(depth) if p.is_file() and not
                  p.name.lower().startswith(('.', 'corrections', 'classes'))]  # in a folder, as archives pack it
        return bool(params.get('remote')) or (bool(tables) and complete)


class Schedule(BaseModel):
    "All jobs."
    model_config = ConfigDict(extra='forbid', frozen=True)
    jobs:tuple[Job, ...] = Field(min_length=1)
    stack:str = 'rakuten_local'
    grace_s:float = Field(30, ge=0) # A run has so long to end when it is asked to

    @field_validator('jobs')
    @classmethod
    def distinct(cls, jobs):
        if len({j.name for j in jobs}) < len(jobs): raise ValueError('two jobs have the same name')
        return jobs

    def job(self, name:str)->Job:
        "By name; raises `ValueError`."
        for j in self.jobs:
            if j.name == name: return j
        raise ValueError(f"no job {name!r}; there are {', '.join(j.name for j in self.jobs)}")

    def command(self, job:Job)->list[str]:
        "Command line that runs a job."
        zenml = str(Path(sys.executable).with_name('zenml'))
        return [zenml, 'pipeline', 'run', f'zenml_pipelines.{job.pipeline}', '-c', str(job.config), '-s', self.stack]


def read_schedule(path:str|Path = SCHEDULE)->Schedule:
    "The schedule in a YAML file; raises `ValueError` with all that is wrong with it."
    try: return Schedule.model_validate(yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {})
    except yaml.YAMLError as e: raise ValueError(f'{path}: {e}') from None
    except ValidationError as e:
        say = lambda m: 'unknown key' if m['type'] == 'extra_forbidden' else m['msg'].removeprefix('Value error, ')
        wrong = [f"{path}: {'.'.join(map(str, m['loc']))}: {say(m)}" for m in e.errors()]
        raise ValueError('\n'.join(wrong)) from None


def native_schedules(schedule:Schedule)->list[str]: # A line about each job
    "Hand the times over to the stack's orchestrator; raises `ValueError` before anything is registered."
    from zenml.cli.utils import temporary_active_stack
    from zenml.client import Client
    from zenml.config.schedule import Schedule as Native

    import zenml_pipelines
    with temporary_active_stack(schedule.stack) as stack:
        if not stack.orchestrator.config.is_schedulable:
            raise ValueError(f'nothing was registered: the {stack.orchestrator.flavor} orchestrator of stack '
                             f'{schedule.stack} runs no schedules. On one machine `rakuten-mm scheduler run` does')
        if odd := [j.name for j in schedule.jobs if j.timezone != 'UTC']:
            raise ValueError('nothing was registered: orchestrators run in UTC, '
                             f"and {', '.join(odd)} in another time zone")
        lines = []
        for job in schedule.jobs:
            there = next(iter(Client().list_schedules(name=job.name)), None)
            if there is None:
                native = Native(name=job.name, cron_expression=job.cron)
                getattr(zenml_pipelines, job.pipeline).with_options(config_path=str(job.config), schedule=native)()
            if there is None: how = 'registered'
            elif there.cron_expression == job.cron: how = 'unchanged'
            else: how = (f'still has {there.cron_expression}; run `zenml pipeline schedule delete {job.name}`, '
                         'then this again')
            lines.append(f'{job.name}: {job.cron} {how}')
    return lines
