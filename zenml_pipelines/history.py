"""Records of runs: when they ran, for how long, and how they ended.

One row a run, in SQLite beside the runs' logs. Several processes write: schedulers, and people who trigger a run by
hand. None of them may fail for want of a record, so a row that cannot be written waits in memory, and a torn database
is put aside for a new one.
"""
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from rakuten_mm.core.environment import artifacts_dir
from rakuten_mm.core.process import ProcessIdentity, identity_of, is_gone

log = logging.getLogger('rakuten_mm.history')
OUTCOMES = ('running', 'ok', 'failed', 'timed out', 'stopped', 'refused', 'abandoned')
INTERRUPTED = ('stopped', 'abandoned') # Ended with its scheduler, which was asked to end or was killed
BY_HAND = 'by hand' # Why a run was started that no scheduler starts again
RUN_ID = 'RAKUTEN_MM_RUN' # Variable by which the processes of a run are known, whoever their parent is by now


def scheduler_dir()->Path:
    "Folder of the scheduler's records, logs and locks."
    return artifacts_dir()/'scheduler'


@dataclass
class Run:
    "A run of a pipeline; times are seconds since 1970."
    job:str # Its name in the schedule
    pipeline:str
    why:str # What started it
    scheduled:float|None = None # When its cron expression was due
    id:str = field(default_factory=lambda: uuid4().hex)
    started:float = field(default_factory=time.time)
    ended:float|None = None
    outcome:str = 'running' # One of `OUTCOMES`
    exit_code:int|None = None # 128 and more: ended by that signal
    note:str = ''
    log:str = '' # Path of what it printed
    pid:int|None = None
    process_started:str|None = None # By a clock that nobody sets
    host:str = field(default_factory=socket.gethostname)
    watcher:int = field(default_factory=os.getpid) # Its scheduler, or who triggered it
    watcher_started:str = field(default_factory=lambda: identity_of().started)

    def is_orphaned(self, gone_hosts:tuple[str, ...] = ())->bool|None: # None if nobody here can tell
        "True if its scheduler is gone, and it with it."
        return is_gone(ProcessIdentity(self.watcher, self.watcher_started, self.host), gone_hosts)

    @property
    def seconds(self)->float:
        "Its duration so far."
        return max((self.ended or time.time())-self.started, 0.)  # the clock may have been set back

    def end(self, outcome:str, exit_code:int|None = None, note:str = '', ended:float|None = None)->'Run':
        "Note how it ended."
        self.outcome,self.exit_code,self.note,self.ended = outcome, exit_code, note, ended or time.time()
        return self

    def kill(self):
        "Kill what it has left running."
        for p in psutil.process_iter(['environ']):
            if (p.info['environ'] or {}).get(RUN_ID) == self.id:
                with suppress(psutil.NoSuchProcess): p.kill()


COLUMNS = [f.name for f in fields(Run)]
SCHEMA = f"""
create table if not exists runs ({', '.join('id text primary key' if c == 'id' else c for c in COLUMNS)});
create table if not exists jobs (name text primary key, cron text not null, until real not null);
"""


class History:
    "The records of all runs."
    def __init__(self,
        path:Path|None = None # SQLite file; default: that of the scheduler
    ):
        self.path = path or scheduler_dir()/'runs.sqlite'
        self.waiting:dict[str, Run] = {}  # rows that could not be written yet, by id
        self.until:dict[str, tuple[str, float]] = {}  # this process's own table `jobs`, if it cannot be written

    def connect(self)->sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        c = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        c.executescript('pragma journal_mode=wal; pragma synchronous=normal;'+SCHEMA)
        return c

    def attempt(self, act:Callable, default:Any=None):
        "The result of `act(connection)`, or `default`, with a line in the log, if the database does not play along."
        why:Exception|None = None
        for again in (True, False):
            try:
                with closing(self.connect()) as c: return act(c)
            except (sqlite3.OperationalError, OSError) as e: why = e; break  # locked, disk full: it may pass
            except sqlite3.DatabaseError as e:
                why = e
                if again: self.put_aside()
        log.error('run history %s: %s', self.path, why)
        return default

    def put_aside(self):
        "Rename a database that is torn; the next connection makes a new one."
        kept = self.path.with_name(f'{self.path.name}.torn-{time.strftime("%Y%m%dT%H%M%S")}')
        log.error('%s is damaged; it is kept as %s and a new one begun', self.path, kept.name)
        for p in (self.path, *self.path.parent.glob(f'{self.path.name}-*')):
            with suppress(FileNotFoundError):  # another process was quicker
                p.rename(kept.with_name(kept.name+p.name.removeprefix(self.path.name)))

    def save(self, run:Run):
        "Write a row, now or later."
        self.waiting[run.id] = run
        self.flush()

    def flush(self):
        "Write what waits."
        rows,marks = list(self.waiting.values()), ', '.join('?'*len(COLUMNS))
        query = (f'insert into runs ({", ".join(COLUMNS)}) values ({marks}) on conflict (id) do update set '
                 +', '.join(f'{c} = excluded.{c}' for c in COLUMNS))
        if rows and self.attempt(lambda c: c.executemany(query, map(astuple, rows))):
            for r in rows: self.waiting.pop(r.id, None)

    def runs(self,
        limit:int = 20, # -1: all
        also:str = 'true', # Condition, as SQL
        **equal:str, # Values of columns; one that is empty does not count
    )->list[Run]:
        "The latest first, in the order in which they were noted: clocks are set back."
        self.flush()
        equal = {k: v for k,v in equal.items() if v}
        where = ' and '.join([also, *(f'{k} = ?' for k in equal)])
        query = f'select {", ".join(COLUMNS)} from runs where {where} order by rowid desc limit ?'
        rows = self.attempt(lambda c: c.execute(query, [*equal.values(), limit]).fetchall(), [])
        return [Run(**dict(zip(COLUMNS, r, strict=True))) for r in rows]

    def interrupted(self, job:str)->list[Run]: # The latest first
        "Runs that ended with their scheduler since one of the job's ended by itself; those by hand do not count."
        counts = f"outcome != 'refused' and not (outcome in {INTERRUPTED} and why = '{BY_HAND}')"
        return list(takewhile(lambda r: r.outcome in INTERRUPTED, self.runs(20, counts, job=job)))

    def end_orphans(self,
        gone_hosts:tuple[str, ...] = (), # Machines that are known not to come back
        dry:bool = False, # Only look
    )->tuple[list[Run], list[Run]]: # Those that have ended, and those that nobody here can tell
        "End runs whose scheduler is gone: their rows, and whatever they have left running."
        orphans,unknown = [], []
        for r in self.runs(-1, outcome='running'):
            gone = r.is_orphaned(gone_hosts)
            if gone is None: unknown.append(r)
            if not gone: continue
            try: last = Path(r.log).stat().st_mtime
            except OSError: last = None
            orphans.append(r.end('abandoned', note='its process is gone', ended=last))
            if not dry: r.kill(); self.save(r)
        return orphans, unknown

    def claimed_until(self,
        job:str,
        cron:str,
        now:float,
        patience:float, # A time that is further ahead of now was of a clock that went wrong
    )->float:
        "Time up to which runs of a job were started or refused; a job that is new or has another cron begins now."
        row = self.attempt(lambda c: c.execute('select cron, until from jobs where name = ?', (job,)).fetchone())
        known = [u for c,u in filter(None, (row, self.until.get(job))) if c == cron]
        if known and max(known) <= now+patience: return max(known)
        self.claim(job, cron, now)
        return now

    def claim(self, job:str, cron:str, until:float):
        "Note that whatever was due up to a time is taken care of."
        self.until[job] = (cron, until)
        self.attempt(lambda c: c.execute('insert or replace into jobs values (?, ?, ?)', (job, cron, until)))
