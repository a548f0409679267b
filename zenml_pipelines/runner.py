"""One run of a job: the locks it needs, the process it is, its time limit, and what is written down of it.

The process goes on if whoever started it dies, and holds the locks until it ends.
"""
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from rakuten_mm.core.process import end_tree, identity_of
from zenml_pipelines.history import History, Run, scheduler_dir
from zenml_pipelines.schedule import Job, Schedule

log = logging.getLogger('rakuten_mm.scheduler')
KEPT_LOGS = 500 # The newest; older ones are deleted


class Locked(Exception):
    "Somebody else holds the lock."


def take(
    name:str,
    stopping:threading.Event|None = None, # Wait until this is set; None does not wait
    waits:Callable = lambda: None, # Called once if it has to wait
)->int: # File descriptor; closing it everywhere, in children too, lets go
    "Take one of the scheduler's locks; raises `Locked`."
    path = scheduler_dir()/'locks'/name
    path.parent.mkdir(parents=True, exist_ok=True)
    fd,told = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False
    while True:
        try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); return fd
        except BlockingIOError:
            if stopping is None or stopping.is_set(): os.close(fd); raise Locked(name) from None
        if not told: waits(); told = True
        stopping.wait(.2)


def call(command:list[str], stopping:threading.Event, timeout_s:float = 300)->tuple[int, str]: # Exit code and output
    "Run something short in a process of its own, so that neither its memory nor its failing is ours."
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as child:
        killer = threading.Thread(target=lambda: _kill_when(child, stopping, timeout_s), daemon=True); killer.start()
        out = child.stdout.read()
    return child.returncode, out.strip()


def _kill_when(child:subprocess.Popen, stopping:threading.Event, timeout_s:float):
    end = time.monotonic()+timeout_s
    while child.poll() is None and not stopping.wait(.2):
        if time.monotonic() > end: break
    if child.poll() is None: end_tree(child.pid, 1)


# The shell outlives a scheduler that is killed, and leaves the exit code where the next one finds it. It catches the signal that its
# whole group gets, or it would be gone before the pipeline has ended.
SHELL = ['/bin/sh', '-c', 'trap : TERM INT; "$@"; code=$?; echo $code > "$0"; exit $code']


class Runner:
    "Runs jobs, and writes down how they ended."
    def __init__(self,
        schedule:Schedule,
        command:Callable[[Job], list[str]]|None = None, # What runs a job; default: `zenml pipeline run`
        say:Callable[[str], None] = log.info, # Gets what happens, and what runs print
        clean_up:Callable[[], None]|None = None, # Called after a run that was killed; default: `rakuten-mm runs abandon`
    ):
        self.schedule,self.command,self.say = schedule, command or schedule.command, say
        self.history,self.stopping,self.clean_up = History(), threading.Event(), clean_up or self._abandon

    def _abandon(self):
        code,out = call([sys.executable, '-m', 'rakuten_mm', 'runs', 'abandon'], self.stopping)
        if out: self.say(out)
        if code: log.error('runs left behind could not be marked: exit code %s', code)

    def run(self,
        job:Job,
        why:str, # What started it
        scheduled:float|None = None, # When it was due
        wait:bool = False, # For another run of the same pipeline, rather than be refused
        claim:Callable[[bool], bool] = lambda refused: True, # Called when it is about to start, or refused; False: there is nothing to do any more
    )->Run|None: # None if it was neither started nor refused
        "Run a job to its end."
        run,locks = Run(job.name, job.pipeline, why, scheduled), []
        waits = lambda: self.say(f'{job.name} waits until another run has ended')
        try:
            try: locks.append(take(f'{job.pipeline}.lock', self.stopping if wait else None, waits))
            except Locked:
                if not self.stopping.is_set() and claim(True): return self.refuse(run)
                return
            if job.alone:
                try: locks.append(take('alone', self.stopping, waits))
                except Locked: return
            if not self.stopping.is_set() and claim(False): return self._watch(job, run, locks)
        finally:
            for fd in locks: os.close(fd)

    def refuse(self, run:Run)->Run:
        "Note that a run was not started."
        self.history.save(run.end('refused', note=f'another run of {run.pipeline} is at work', ended=run.started))
        self.say(f'{run.job} is refused: {run.note}')
        return run

    def _start(self, job:Job, run:Run, locks:list[int])->subprocess.Popen:
        "Start the process; it holds the locks as long as it lives."
        logs,run.started = scheduler_dir()/'logs', time.time()
        logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(logs.glob('*.log'), key=lambda p: p.stat().st_mtime)[:-KEPT_LOGS]: old.unlink(missing_ok=True)
        run.log = str(logs/f'{job.name}-{datetime.fromtimestamp(run.started, UTC):%Y%m%dT%H%M%S}-{run.id[:6]}.log')
        with open(run.log, 'wb') as out:
            child = subprocess.Popen([*SHELL, str(run.exit_path), *self.command(job)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                     start_new_session=True, pass_fds=locks, env=dict(ZENML_LOGGING_COLORS_DISABLED='true', PYTHONUNBUFFERED='1') | os.environ)
        card = identity_of(child.pid)
        run.pid,run.process_started = card.pid, card.started
        return child

    def _watch(self, job:Job, run:Run, locks:list[int])->Run:
        try: child = self._start(job, run, locks)
        except OSError as e:
            self.history.save(run.end('failed', note=str(e))); self.say(f'{job.name} could not be started: {e}')
            return run
        self.history.save(run)
        self.say(f'{job.name} has started ({run.why}); it prints to {run.log}')
        outcome,rest,limit = '', b'', time.monotonic()+job.timeout_s
        with open(run.log, 'rb') as printed:
            while child.poll() is None and not outcome:
                rest = self._echo(job, printed, rest)
                outcome = 'timed out' if time.monotonic() > limit else 'stopped' if self.stopping.wait(.2) else ''
            if outcome: end_tree(child.pid, self.schedule.grace_s)
            code = child.wait()
            self._echo(job, printed, rest, end=True)
        code = 128-code if code < 0 else code
        note = f'ended by signal {code-128}' if code > 128 else ''
        self.history.save(run.end(outcome or ('failed' if code else 'ok'), code, note))
        run.exit_path.unlink(missing_ok=True)
        self.say(f'{job.name}: {run.outcome} after {run.ended-run.started:.0f} s, exit code {code}'+(f', {note}' if note else ''))
        if code > 128 and not self.stopping.is_set(): self.clean_up()
        return run

    def _echo(self, job:Job, printed, rest:bytes = b'', end:bool = False)->bytes: # What is not a whole line yet
        *lines,rest = (rest+printed.read()).split(b'\n')
        # Progress bars rewrite their line: its last state says it all.
        for line in [*lines, rest] if end and rest else lines: self.say(f"[{job.name}] {line.decode(errors='replace').rstrip().rpartition(chr(13))[2]}")
        return rest
