"""Pipelines at their times, on one machine: `rakuten-mm scheduler run`.

A job is due when its cron expression has fired since it was last started or refused. What that time was is in the run history, so a
scheduler that was down, or a machine that slept, makes up for what it missed, once.
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

from rakuten_mm.core.config import artifacts_dir
from rakuten_mm.core.files import write_atomic
from rakuten_mm.core.process import end_tree
from zenml_pipelines.history import Run, scheduler_dir
from zenml_pipelines.runner import Runner, call
from zenml_pipelines.schedule import Job, Schedule

log = logging.getLogger('rakuten_mm.scheduler')
BEAT_S,LATE_S = 10, 120 # Between two heartbeats, and age at which the scheduler counts as dead
CHAMPION = "from rakuten_mm.core.tracking import alias_version; raise SystemExit(0 if alias_version('champion') else 3)"


class Scheduler:
    "Decides when to run what. Jobs that must be alone run one after another in one thread, others in threads of their own."
    def __init__(self,
        schedule:Schedule,
        runner:Runner|None = None,
        has_champion:Callable[[], bool]|None = None, # Default: ask the registry
        now:Callable[[], float] = time.time,
        tick_s:float = 1,
    ):
        self.schedule,self.runner,self.now,self.tick_s = schedule, runner or Runner(schedule), now, tick_s
        self.history,self.stopping,self.has_champion = self.runner.history, self.runner.stopping, has_champion or self._ask_registry
        self.active:dict[str, str] = {} # `waiting` or `running`, by job
        self.tries = {j.name: (0, 0.) for j in schedule.jobs if j.at_start} # For a first model: how often in vain, and when next
        self.lane,self.others = ThreadPoolExecutor(1, 'alone'), ThreadPoolExecutor(8, 'others')
        self.beaten = self.settled = 0.

    def run(self):
        "Work until `stopping` is set; runs that are at work then are ended."
        for j in self.schedule.jobs:
            log.info('%s: %s %s, next %s', j.name, j.cron, j.timezone, datetime.fromtimestamp(j.next_time(self.now()), UTC).isoformat(' ', 'minutes'))
        self.others.submit(self.runner.clean_up)
        while True:
            try: self.tick()
            except Exception: log.exception('the scheduler goes on after')
            if self.stopping.wait(self.tick_s): break
        for pool in (self.lane, self.others): pool.shutdown(cancel_futures=True)
        (scheduler_dir()/'heartbeat.json').unlink(missing_ok=True)

    def tick(self):
        "Start what is due, asked for or missing."
        now = self.now()
        if abs(now-self.beaten) >= BEAT_S: self.beaten = now; self._beat(now)
        if abs(now-self.settled) >= 30: self.settled = now; self._settle(now)
        for job in self.schedule.jobs:
            state,due = self.active.get(job.name), job.next_time(self.history.claimed_until(job.name, job.cron, now))
            if due <= now and state == 'running':
                self.history.claim(job.name, job.cron, now)
                self.runner.refuse(Run(job.name, job.pipeline, 'schedule', due))
            elif state: pass
            elif due <= now: self._submit(job, Due(self, job, due))
            elif request_path(job.name).exists(): self._submit(job, Asked(self, job))
            elif job.name in self.tries and now >= self.tries[job.name][1] and job.delivered(): self._submit(job, Missing(self, job))

    def _submit(self, job:Job, start:'Start'):
        self.active[job.name] = 'waiting'
        (self.lane if job.alone else self.others).submit(self._work, job, start)

    def _work(self, job:Job, start:'Start'):
        run = None
        try:
            run = self.runner.run(job, start.why, start.scheduled, start.wait, start.claim)
            if run and run.outcome == 'stopped': start.put_back()
        except Exception: log.exception('job %s', job.name)
        finally:
            start.done(run)
            self.active.pop(job.name, None)

    def _ask_registry(self)->bool:
        code,out = call([sys.executable, '-c', CHAMPION], self.stopping, 120)
        if code not in (0, 3): raise RuntimeError(f'the registry does not answer: {out[-300:]}')
        return code == 0

    def _beat(self, now:float):
        state = dict(time=now, pid=os.getpid(), host=socket.gethostname(), active=self.active, next={j.name: j.next_time(now) for j in self.schedule.jobs})
        try: write_atomic(scheduler_dir()/'heartbeat.json', json.dumps(state).encode())
        except OSError as e: log.error('no heartbeat: %s', e)

    def _settle(self, now:float):
        "Look after runs that an earlier scheduler left: note how they ended, and keep them to their time limit."
        for r in self.history.settle()[0]: self.runner.say(f'{r.job}: {r.outcome}, {r.note}')
        limits = {j.name: j.timeout_s for j in self.schedule.jobs}
        for r in self.history.runs(-1, outcome='running'):
            if r.is_left() and now-r.started > limits.get(r.job, float('inf')):
                end_tree(r.pid, self.schedule.grace_s)
                self.history.save(r.end('timed out', note='its scheduler was gone'))


def request_path(name:str)->Path:
    "A file that asks for a job, with `why` and `asked_at`."
    return artifacts_dir()/'requests'/f'{name}.json'


class Start:
    "A reason to run a job."
    why,scheduled,wait = '', None, False
    def __init__(self, scheduler:Scheduler, job:Job): self.scheduler,self.history,self.job = scheduler, scheduler.history, job
    def claim(self, refused:bool)->bool: return True
    def put_back(self): "Called if the scheduler was stopped before the end."
    def done(self, run:Run|None): "Called in any case."
    def running(self): self.scheduler.active[self.job.name] = 'running'


class Due(Start):
    "Its time has come, or passed."
    why = 'schedule'
    def __init__(self, scheduler, job, due): super().__init__(scheduler, job); self.scheduled = due

    def claim(self, refused):
        now = self.scheduler.now()
        self.before = self.history.claimed_until(self.job.name, self.job.cron, now)
        if self.job.next_time(self.before) > now: return False  # another scheduler has done it
        if refused and not self.history.runs(1, self.job.pipeline, 'running'): return False  # who holds the lock may still step back: ask again
        self.history.claim(self.job.name, self.job.cron, now)
        if not refused: self.running()
        return True

    def put_back(self): self.history.claim(self.job.name, self.job.cron, self.before)


class Asked(Start):
    "Another process wants it, and must not be told to come again."
    wait = True
    def __init__(self, scheduler, job):
        super().__init__(scheduler, job)
        self.path,self.text = request_path(job.name), ''
        with suppress(OSError): self.text = self.path.read_text(errors='replace')
        try: self.why = str(json.loads(self.text)['why'])[:500]
        except (ValueError, KeyError, TypeError): self.why = 'request'

    def claim(self, refused): self.path.unlink(missing_ok=True); self.running(); return True

    def put_back(self):
        if not self.path.exists(): write_atomic(self.path, self.text.encode())


class Missing(Start):
    "There is a delivery and no champion yet. Tried with growing pauses, because what is wrong may mend itself."
    why,pause_s = 'no champion yet', 30
    def claim(self, refused):
        if refused: return False  # whoever is at work may bring one
        if self.scheduler.has_champion(): self.pause_s = 3600; return False
        self.running()
        return True

    def done(self, run):
        failed = self.scheduler.tries[self.job.name][0]+1 if run else 0
        self.scheduler.tries[self.job.name] = (failed, self.scheduler.now()+(min(30*2**failed, 3600) if run else self.pause_s))


def health()->tuple[bool, str]: # Whether a scheduler is at work, and what it does
    "By the age of its heartbeat."
    try: beat = json.loads((scheduler_dir()/'heartbeat.json').read_text())
    except (OSError, ValueError): return False, 'no scheduler is running'
    age = time.time()-beat['time']
    doing = ', '.join(f'{j} {s}' for j,s in beat['active'].items()) or 'waiting for '+min(beat['next'], key=beat['next'].get)
    return age < LATE_S, f"heartbeat of process {beat['pid']} on {beat['host']} {age:.0f} s ago; {doing}"
