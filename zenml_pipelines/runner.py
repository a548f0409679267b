"""One run of a job: the locks it needs, its process, its time limit, and its record.

The process ends with whoever started it, so the locks are theirs, and the next scheduler starts it again.
"""
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

from rakuten_mm.core.process import end_tree, identity_of
from zenml_pipelines.history import RUN_ID, History, Run, scheduler_dir
from zenml_pipelines.schedule import Job, Schedule

log = logging.getLogger('rakuten_mm.scheduler')
KEPT_LOGS = 500 # The newest; older ones are deleted
LIBC = ctypes.CDLL(None)


def lock_path(name:str)->Path:
    "File of one of the scheduler's locks: a pipeline's name, or `alone`."
    return scheduler_dir()/'locks'/f'{name}.lock'


def die_with_parent():
    "Where the system can, be killed with the thread that started this process; elsewhere the next scheduler does it."
    if sys.platform == 'linux': LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start(command:list[str], out, **env)->subprocess.Popen:
    "Start a process that prints to a file."
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=die_with_parent, env=os.environ | env)


def watch(
    child:subprocess.Popen,
    limit_s:float,
    stopping:threading.Event, # Ends the process when it is set
    grace_s:float = 1, # Between asking it to end and killing it
    meanwhile:Callable[[], None] = lambda: None, # Called again and again
)->str: # `timed out`, `stopped`, or empty if it ended by itself
    "Wait for a process, or end it with all below it."
    why,end = '', time.monotonic()+limit_s
    while child.poll() is None and not why:
        meanwhile()
        why = 'timed out' if time.monotonic() > end else 'stopped' if stopping.wait(.1) else ''
    if why: end_tree(child.pid, grace_s)
    child.wait()
    return why


def call(command:list[str], stopping:threading.Event, limit_s:float = 300)->tuple[int, str]: # Exit code and output
    "Run something short in a process of its own, so that neither its memory nor its failing is ours."
    with TemporaryFile() as out:
        child = start(command, out)
        watch(child, limit_s, stopping)
        out.seek(0)
        return child.returncode, out.read().decode(errors='replace').strip()


class Runner:
    "Runs jobs, and writes down how they ended."
    def __init__(self,
        schedule:Schedule,
        command:Callable[[Job], list[str]]|None = None, # Runs a job; default: `zenml pipeline run`
        say:Callable[[str], None] = log.info, # Gets what happens, and what runs print
        clean_up:Callable[[], None]|None = None, # After a run that was killed; default: `rakuten-mm runs abandon`
    ):
        self.schedule,self.command,self.say = schedule, command or schedule.command, say
        self.history,self.stopping,self.clean_up = History(), threading.Event(), clean_up or self._abandon

    def _abandon(self):
        code,out = call([sys.executable, '-m', 'rakuten_mm', 'runs', 'abandon'], self.stopping)
        if out: self.say(out)
        if code: log.error('orphaned runs could not be marked: exit code %s', code)

    def _take(self, name:str, job:Job, wait:bool):
        "Take a lock; raises `Timeout` if it may not wait, or the scheduler stops."
        lock,told = FileLock(lock_path(name)), False
        while True:
            try: return lock.acquire(timeout=.2 if told else 0)
            except Timeout:
                if not wait or self.stopping.is_set(): raise
                if not told: self.say(f'{job.name} waits until another run has ended'); told = True

    def run(self,
        job:Job,
        why:str, # What started it
        scheduled:float|None = None, # When it was due
        wait:bool = False, # For another run of the same pipeline, rather than be refused
        # Called when it is about to start, or (True) refused. False: there is nothing to do any more.
        claim:Callable[[bool], bool] = lambda refused: True,
    )->Run|None: # None if it was neither started nor refused
        "Run a job to its end."
        run = Run(job.name, job.pipeline, why, scheduled)
        with ExitStack() as held:
            try: held.enter_context(self._take(job.pipeline, job, wait))
            except Timeout: return self.refuse(run) if not self.stopping.is_set() and claim(True) else None
            if job.alone:
                try: held.enter_context(self._take('alone', job, wait=True))
                except Timeout: return None
            return self._work(job, run) if not self.stopping.is_set() and claim(False) else None

    def refuse(self, run:Run)->Run:
        "Note that a run was not started."
        self.history.save(run.end('refused', note=f'another run of {run.pipeline} is at work', ended=run.started))
        self.say(f'{run.job} is refused: {run.note}')
        return run

    def _open_log(self, run:Run):
        logs,run.started = scheduler_dir()/'logs', time.time()
        logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(logs.glob('*.log'), key=lambda p: p.stat().st_mtime)[:-KEPT_LOGS]: old.unlink(missing_ok=True)
        path = logs/f'{run.job}-{datetime.fromtimestamp(run.started, UTC):%Y%m%dT%H%M%S}-{run.id[:6]}.log'
        run.log = str(path)
        return path.open('wb')

    def _work(self, job:Job, run:Run)->Run:
        try:
            with self._open_log(run) as out:
                own = {RUN_ID: run.id, 'ZENML_LOGGING_COLORS_DISABLED': 'true', 'PYTHONUNBUFFERED': '1'}
                child = start(self.command(job), out, **own)
        except OSError as e:
            self.history.save(run.end('failed', 127, str(e))); self.say(f'{job.name} could not be started: {e}')
            return run
        run.pid,run.process_started = child.pid, identity_of(child.pid).started
        self.history.save(run)
        self.say(f'{job.name} has started ({run.why}); it prints to {run.log}')
        with Path(run.log).open('rb') as printed:
            rest = b''
            def echo():
                nonlocal rest
                *lines,rest = (rest+printed.read()).split(b'\n')
                for line in lines: self._echo(job, line)
            why = watch(child, job.timeout_s, self.stopping, self.schedule.grace_s, echo)
            echo()
            if rest: self._echo(job, rest)
        code = 128-child.returncode if child.returncode < 0 else child.returncode
        note = f'ended by signal {code-128}' if code > 128 else ''
        self.history.save(run.end(why or ('failed' if code else 'ok'), code, note))
        self.say(f'{job.name}: {run.outcome} after {run.seconds:.0f} s, exit code {code}'+(f', {note}' if note else ''))
        if code > 128 and not self.stopping.is_set(): self.clean_up()
        return run

    def _echo(self, job:Job, line:bytes):
        # Progress bars rewrite their line: its last state says it all.
        self.say(f"[{job.name}] {line.decode(errors='replace').rstrip().rpartition(chr(13))[2]}")
