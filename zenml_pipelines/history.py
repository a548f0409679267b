"""What was run when, for how long, and how it ended.

One row a run, in SQLite beside the runs' logs. Several processes write: schedulers, and people who trigger a run by hand. None of
them may fail for want of a record, so a row that cannot be written waits in memory, and a torn database is put aside for a new one.
"""
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from uuid import uuid4

from rakuten_mm.core.config import artifacts_dir
from rakuten_mm.core.process import ProcessIdentity, identity_of, is_gone

log = logging.getLogger('rakuten_mm.history')
OUTCOMES = ('running', 'ok', 'failed', 'timed out', 'stopped', 'refused', 'abandoned')


def scheduler_dir()->Path:
    "Where the scheduler keeps its records, logs and locks."
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
    process_started:float|None = None
    host:str = field(default_factory=socket.gethostname)
    watcher:int = field(default_factory=os.getpid) # Who waits for it
    watcher_started:float = field(default_factory=lambda: identity_of().started)

    def is_left(self, gone_hosts:tuple[str, ...] = ())->bool|None: # None if nobody here can tell
        "Whether nobody waits for it any more."
        return is_gone(ProcessIdentity(self.watcher, self.watcher_started, self.host), gone_hosts)

    def is_gone(self, gone_hosts:tuple[str, ...] = ())->bool|None: # None if nobody here can tell
        "Whether its process has ended."
        return is_gone(ProcessIdentity(self.pid, self.process_started, self.host), gone_hosts)

    @property
    def exit_path(self)->Path:
        "Where the run's shell leaves the exit code, for whoever looks when nobody waited for it."
        return Path(self.log).with_suffix('.exit')

    def end(self, outcome:str, exit_code:int|None = None, note:str = '', ended:float|None = None)->'Run':
        "Note how it ended."
        self.outcome,self.exit_code,self.note,self.ended = outcome, exit_code, note, ended or time.time()
        return self


COLUMNS = [f.name for f in fields(Run)]
SCHEMA = f"""
create table if not exists runs ({', '.join('id text primary key' if c == 'id' else c for c in COLUMNS)});
create index if not exists ix_started on runs (started);
create table if not exists jobs (name text primary key, cron text not null, until real not null);
"""


class History:
    "The records of all runs."
    def __init__(self,
        path:Path|None = None # SQLite file; default: that of the scheduler
    ):
        self.path = path or scheduler_dir()/'runs.sqlite'
        self.waiting:dict[str, Run] = {}  # rows that could not be written yet, by id
        self.until:dict[str, tuple[str, float]] = {}  # what this process knows of table `jobs`, if it cannot be written

    def connect(self)->sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        c = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        c.executescript('pragma journal_mode=wal; pragma synchronous=normal;'+SCHEMA)
        return c

    def attempt(self, act:Callable, default=None):
        "The result of `act(connection)`, or `default`, with a line in the log, when the database does not play along."
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
            try: p.rename(kept if p == self.path else kept.with_name(kept.name+p.name.removeprefix(self.path.name)))
            except FileNotFoundError: pass  # another process was quicker

    def save(self, run:Run):
        "Write a row, now or later."
        self.waiting[run.id] = run
        self.flush()

    def flush(self):
        "Write what waits."
        rows = list(self.waiting.values())
        marks = ', '.join('?'*len(COLUMNS))
        if rows and self.attempt(lambda c: c.executemany(f'insert or replace into runs ({", ".join(COLUMNS)}) values ({marks})', map(astuple, rows))):
            for r in rows: self.waiting.pop(r.id, None)

    def runs(self, limit:int = 20, pipeline:str = '', outcome:str = '')->list[Run]:
        "The latest first."
        self.flush()
        where = [f'{k} = ?' for k,v in (('pipeline', pipeline), ('outcome', outcome)) if v]
        query = f'select {", ".join(COLUMNS)} from runs'+(f' where {" and ".join(where)}' if where else '')+' order by started desc limit ?'
        rows = self.attempt(lambda c: c.execute(query, [v for v in (pipeline, outcome) if v]+[limit]).fetchall(), [])
        return [Run(**dict(zip(COLUMNS, r, strict=True))) for r in rows]

    def settle(self, gone_hosts:tuple[str, ...] = (), dry:bool = False)->tuple[list[Run], list[Run]]: # What was settled, what nobody can tell
        "End the rows of runs whose process is gone and that nobody waited for: by the exit code they left, or as abandoned."
        done,unknown = [], []
        for r in self.runs(-1, outcome='running'):
            gone = r.is_left(gone_hosts) and r.is_gone(gone_hosts)
            if gone is None: unknown.append(r)
            if not gone: continue
            try: code = int(r.exit_path.read_text())
            except (OSError, ValueError): code = None
            try: last = Path(r.log).stat().st_mtime
            except OSError: last = None
            if code is None: r.end('abandoned', note='its process is gone', ended=last)
            else: r.end('failed' if code else 'ok', code, 'ended while no scheduler watched', last)
            done.append(r)
            if dry: continue
            self.save(r)
        return done, unknown

    def claimed_until(self, job:str, cron:str, now:float)->float:
        "Up to when runs of a job have been started or refused; a job that is new or has another cron expression begins now."
        row = self.attempt(lambda c: c.execute('select cron, until from jobs where name = ?', (job,)).fetchone())
        known = [u for c,u in filter(None, (row, self.until.get(job))) if c == cron]
        if known and max(known) < now+60: return min(max(known), now)
        self.claim(job, cron, now)  # also if the clock was set back
        return now

    def claim(self, job:str, cron:str, until:float):
        "Note that whatever was due up to a time is taken care of."
        self.until[job] = (cron, until)
        self.attempt(lambda c: c.execute('insert or replace into jobs values (?, ?, ?)', (job, cron, until)))
