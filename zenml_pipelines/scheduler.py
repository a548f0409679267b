"""Pipelines at their times, on one machine: `rakuten-mm scheduler run`.

A job is due when its cron expression has fired since it was last started or refused. That time is in the run history,
so a scheduler that was down, or a machine that slept, makes up for what it missed, once. Runs end with their scheduler;
those are in the history too, and the next scheduler starts them again.
"""
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat

from rakuten_mm.core.environment import artifacts_dir
from rakuten_mm.core.files import write_atomic
from zenml_pipelines.history import Run, scheduler_dir
from zenml_pipelines.runner import Runner, call
from zenml_pipelines.schedule import Job, Schedule

log = logging.getLogger('rakuten_mm.scheduler')
BEAT_S,LATE_S = 10, 120 # Between two heartbeats, and age at which the scheduler counts as dead
PAUSE_S = 3600 # Between two tries for a first model, at most
KILLS = 3 # A job that was killed so often in a row waits for its time: it may be what kills the machine
MISSING = 'no champion yet'
CHAMPION = '''from rakuten_mm.registry.versions import alias_version
raise SystemExit(0 if alias_version('champion') else 3)'''


def heartbeat_path()->Path:
    "File by which others see that a scheduler is at work."
    return scheduler_dir()/'heartbeat.json'


def one_line(text:str)->str:
    "`text`; raises `ValueError` unless a terminal shows it as one line."
    if not text.isprintable(): raise ValueError('it has characters that cannot be shown')
    return text


Line = Annotated[str, AfterValidator(one_line)]


class Heartbeat(BaseModel):
    "What a scheduler does, as it says every few seconds."
    time:FiniteFloat
    pid:int
    host:Line
    active:dict[Line, Line] # What it is at, by job
    next:dict[Line, FiniteFloat] = Field(min_length=1) # When it is due, by job


class Scheduler:
    "Decides when to run what. A job runs in a thread of its own."
    def __init__(self,
        schedule:Schedule,
        runner:Runner|None = None,
        has_champion:Callable[[], bool]|None = None, # Default: ask the registry
        now:Callable[[], float] = time.time,
        tick_s:float = 1,
    ):
        self.schedule,self.runner,self.now,self.tick_s = schedule, runner or Runner(schedule), now, tick_s
        self.history,self.stopping = self.runner.history, self.runner.stopping
        self.has_champion = has_champion or self._ask_registry
        self.active:dict[str, str] = {} # `waiting` or `running`, by job
        # For a first model: how often in vain, and when next
        self.tries = {j.name: (0, 0.) for j in schedule.jobs if j.at_start}
        self.pool = ThreadPoolExecutor(len(schedule.jobs)+1)
        self.beaten = self.settled = 0.

    def run(self):
        "Work until `stopping` is set; runs that are at work then are ended."
        for j in self.schedule.jobs:
            at = datetime.fromtimestamp(j.next_time(self.now()), UTC).isoformat(' ', 'minutes')
            log.info('%s: %s %s, next %s', j.name, j.cron, j.timezone, at)
        self.pool.submit(self.runner.clean_up)
        while True:
            try: self.tick()
            except Exception: log.exception('the scheduler goes on after')
            if self.stopping.wait(self.tick_s): break
        self.pool.shutdown(cancel_futures=True)
        with suppress(OSError): heartbeat_path().unlink()

    def tick(self):
        "Start what is due, asked for, interrupted or missing."
        now = self.now()
        if abs(now-self.beaten) >= BEAT_S: self.beaten = now; self._beat(now)
        if abs(now-self.settled) >= 30:
            self.settled = now
            for r in self.history.end_orphans()[0]: self.runner.say(f'{r.job}: {r.outcome}, {r.note}')
        for job in self.schedule.jobs:
            due = self._due(job, now)
            state = self.active.get(job.name)
            if not state: self._start(job, due, now)
            elif due <= now and state == 'running':
                self.history.claim(job.name, job.cron, now)
                self.runner.refuse(Run(job.name, job.pipeline, 'schedule', due))

    def _due(self, job:Job, now:float)->float:
        "When a job is due. After the clock was set back, not again at a time that it had, if it can wait for the next."
        return job.next_time(self.history.claimed_until(job.name, job.cron, now, job.period(now)))

    def _start(self, job:Job, due:float, now:float):
        "Start a job if there is a reason."
        if due <= now: self._submit(job, 'schedule', self._claim_due, due)
        elif request_path(job.name).is_file(): self._submit(job, read_request(job.name), self._claim_request, wait=True)
        elif ended := self.history.interrupted(job.name):
            if sum(r.outcome == 'abandoned' for r in ended) < KILLS:
                self._submit(job, ended[0].why, self._claim_again, ended[0].scheduled)
        elif job.name in self.tries and not 0 < self.tries[job.name][1]-now <= PAUSE_S and job.delivered():
            self._submit(job, MISSING, self._claim_missing)

    def _submit(self, job:Job, why:str, claim:Callable, scheduled:float|None = None, wait:bool = False):
        def claimed(refused):
            "Called when the run is about to start, or refused."
            if not claim(job, refused): return False
            if not refused: self.active[job.name] = 'running'
            return True
        def work():
            run = None
            try: run = self.runner.run(job, why, scheduled, wait, claimed)
            except Exception: log.exception('job %s', job.name)
            finally:
                if why == MISSING and job.name in self.tries: self._pause(job, run)
                self.active.pop(job.name, None)
        self.active[job.name] = 'waiting'
        self.pool.submit(work)

    def _claim_due(self, job:Job, refused:bool)->bool:
        now = self.now()
        if self._due(job, now) > now: return False # another has done it
        # Who holds the lock may still step back: ask again.
        if refused and not self.history.runs(1, pipeline=job.pipeline, outcome='running'): return False
        self.history.claim(job.name, job.cron, now)
        return True

    def _claim_request(self, job:Job, refused:bool)->bool: request_path(job.name).unlink(missing_ok=True); return True

    def _claim_again(self, job:Job, refused:bool)->bool: return not refused and bool(self.history.interrupted(job.name))

    def _claim_missing(self, job:Job, refused:bool)->bool:
        if refused: return False  # whoever is at work may bring one
        there = self.has_champion()
        if there: self.tries[job.name] = (0, self.now()+PAUSE_S)
        return not there

    def _pause(self, job:Job, run:Run|None):
        "Try again for a first model with growing pauses, because what is wrong may mend itself."
        failed,until = self.tries[job.name]
        failed = failed+1 if run else 0
        self.tries[job.name] = (failed, max(until, self.now()+min(30*2**failed, PAUSE_S)))

    def _ask_registry(self)->bool:
        code,out = call([sys.executable, '-c', CHAMPION], self.stopping, 120)
        if code not in (0, 3): raise RuntimeError(f'the registry does not answer: {out[-300:]}')
        return code == 0

    def _beat(self, now:float):
        beat = Heartbeat(time=now, pid=os.getpid(), host=socket.gethostname(), active=dict(self.active),
                         next={j.name: j.next_time(now) for j in self.schedule.jobs})
        try: write_atomic(heartbeat_path(), beat.model_dump_json().encode())
        except OSError as e: log.error('no heartbeat: %s', e)


def request_path(name:str)->Path:
    "A file that asks for a job, with `why` and `asked_at`."
    return artifacts_dir()/'requests'/f'{name}.json'


def read_request(name:str)->str:
    "Reason that a request gives."
    try:
        with request_path(name).open('rb') as f: why = str(json.loads(f.read(100_000))['why'])
    except (OSError, ValueError, KeyError, TypeError, RecursionError): return 'request'
    return ''.join(c if c.isprintable() else ' ' for c in why).strip()[:500] or 'request'


def health()->tuple[bool, str]: # True if a scheduler is at work, and what it does
    "Tell by the age of its heartbeat; one that is from the future was written before the clock was set back."
    path = heartbeat_path()
    if not path.exists(): return False, 'no scheduler is running'
    try:
        if not path.is_file(): raise ValueError
        beat = Heartbeat.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return False, f'{path} cannot be read; a scheduler that is running writes it anew within {BEAT_S} s'
    age = time.time()-beat.time
    doing = ', '.join(f'{j} {s}' for j,s in beat.active.items())
    doing = doing or f'waiting for {min(beat.next, key=lambda j: beat.next[j])}'
    return abs(age) < LATE_S, f'heartbeat of process {beat.pid} on {beat.host} {age:.0f} s ago; {doing}'
