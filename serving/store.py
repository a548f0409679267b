"""The database of answers and of corrections by reviewers.

Rows are only ever added. Corrections of one prediction may disagree: the last word of each reviewer counts once, the
category with the most votes is the verdict, and without a single winner there is none and the listing goes back into
the queue. A listing that most call unusable has no category, and is no training data.
"""
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool
from sqlalchemy.types import TypeDecorator

from rakuten_mm.core.files import write_atomic
from serving import metrics
from serving.config import ServeConfig, kept_images

if TYPE_CHECKING:
    from rakuten_mm.data.feedback import Correction  # with pandas, which the server does without

log = logging.getLogger('rakuten_mm.store')
NO_CATEGORY = -1 # The verdict that a listing is unusable; codes are not negative
DRIFT_COLUMNS = ('created_at', 'model_version', 'lane', 'facts', 'probs', 'sketch')
PASSING = ('starting up', 'shutting down', 'too many', 'remaining connection slots') # A database that refuses for now


class UnusableDatabase(OSError):
    "The database cannot be used until somebody mends it."


class UnreachableDatabase(UnusableDatabase):
    "The database does not answer; it may later."


def now()->datetime: return datetime.now(UTC)


class Moment(TypeDecorator):
    "A time in UTC; SQLite forgets the zone."
    impl,cache_ok = DateTime(timezone=True), True

    def process_result_value(self, value, dialect): return value and value.replace(tzinfo=value.tzinfo or UTC)


class Base(DeclarativeBase):
    type_annotation_map:ClassVar = {dict: JSON, list: JSON, datetime: Moment}


class User(Base):
    "A user of the database."
    __tablename__ = 'users'
    name:Mapped[str] = mapped_column(String(64), primary_key=True)
    password_hash:Mapped[str] = mapped_column(String(255))
    role:Mapped[str] = mapped_column(String(16))
    created_at:Mapped[datetime] = mapped_column(default=now)


class Prediction(Base):
    "An answer that was given."
    __tablename__ = 'predictions'
    id:Mapped[str] = mapped_column(String(36), primary_key=True)
    created_at:Mapped[datetime] = mapped_column(default=now)
    user:Mapped[str] = mapped_column(String(64))
    model_version:Mapped[str] = mapped_column(String(128))
    prdtypecode:Mapped[int] = mapped_column(BigInteger)
    probability:Mapped[float] = mapped_column(Float)
    lane:Mapped[str] = mapped_column(String(16))
    usefulness:Mapped[float] = mapped_column(Float)
    top_k:Mapped[list]
    candidates:Mapped[list|None]
    modalities:Mapped[list]
    text_sha256:Mapped[str] = mapped_column(String(64))
    image_sha256:Mapped[str] = mapped_column(String(64))
    designation:Mapped[str|None] = mapped_column(Text)
    description:Mapped[str|None] = mapped_column(Text)
    has_inputs:Mapped[int] = mapped_column(Integer, default=0)
    # These three are there for every listing, and for drift.
    facts:Mapped[dict|None] = mapped_column(JSON(none_as_null=True))
    probs:Mapped[list|None] = mapped_column(JSON(none_as_null=True))  # of all categories, by code
    sketch:Mapped[dict|None] = mapped_column(JSON(none_as_null=True))
    __table_args__ = (Index('ix_predictions_queue', 'lane', 'has_inputs', 'usefulness'),
                      Index('ix_predictions_created_at', 'created_at'))


class Feedback(Base):
    "A correction of an answer by a reviewer, its confirmation, or the reason why there is no right one."
    __tablename__ = 'feedback'
    id:Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    prediction_id:Mapped[str] = mapped_column(ForeignKey('predictions.id'), index=True)
    prdtypecode:Mapped[int|None] = mapped_column(BigInteger)  # None if it is unusable
    unusable:Mapped[str|None] = mapped_column(String(32))
    reviewer:Mapped[str] = mapped_column(String(64))
    created_at:Mapped[datetime] = mapped_column(default=now)


def sqlite_file(engine:Engine)->Path|None:
    "The file of a SQLite database; None for another one, and for one in memory."
    name = engine.url.database
    return Path(name) if engine.dialect.name == 'sqlite' and name and name != ':memory:' else None


def within_deadline(deadline_s:float, cargs:tuple, cparams:dict)->Any:
    "A connection to PostgreSQL on which no statement waits longer, whatever has become of the server."
    import psycopg

    class Connection(psycopg.Connection):
        def wait(self, gen, interval=.1, timeout=None):
            try: return super().wait(gen, interval, timeout or deadline_s)
            except psycopg.OperationalError:
                # the statement is still at work: nothing can be said on this connection any more
                if self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE: self.pgconn.finish()
                raise
    return Connection.connect(*cargs, **dict(connect_timeout=int(deadline_s)) | cparams)


def make_engine(
    url:str, # Of SQLAlchemy: sqlite:///file or postgresql+psycopg://user:password@host/name
    deadline_s:float, # For a statement, and for a connection
    **kw:Any, # For `create_engine`
)->Engine:
    "A connection pool whose statements have a deadline; nothing is connected yet."
    lite = make_url(url).get_backend_name() == 'sqlite'
    engine = create_engine(url, connect_args={'timeout': deadline_s} if lite else {}, **kw)
    if lite:
        @event.listens_for(engine, 'connect')
        def careful(connection, _):
            for pragma in ('journal_mode=WAL', 'synchronous=NORMAL', 'foreign_keys=ON', 'secure_delete=ON'):
                connection.execute(f'PRAGMA {pragma}')
    else:
        @event.listens_for(engine, 'do_connect')
        def connect(dialect, record, cargs, cparams): return within_deadline(deadline_s, cargs, cparams)
    return engine


def drop_half_made(connection:Connection):
    "Remove the empty tables of a first start that was killed, as versions up to 0.2.0 left them."
    tables = {*inspect(connection).get_table_names()}
    recorded = 'alembic_version' in tables and connection.exec_driver_sql('SELECT * FROM alembic_version').first()
    ours = [t for t in reversed(Base.metadata.sorted_tables) if t.name in tables]
    filled = lambda t: connection.execute(select(t.primary_key.columns.values()[0]).limit(1)).first()
    if recorded or any(map(filled, ours)): return
    for t in ours: connection.exec_driver_sql(f'DROP TABLE {t.name}')


def migrate(url:str, deadline_s:float=60.):
    "Bring the schema of a database up to date, all of it or nothing; raises `UnusableDatabase`."
    engine = make_engine(url, deadline_s, poolclass=NullPool)
    lite,file = engine.dialect.name == 'sqlite', sqlite_file(engine)
    if lite:
        # pysqlite begins no transaction before a CREATE TABLE, so a kill would leave half a schema
        @event.listens_for(engine, 'connect')
        def leave_transactions_to_us(connection, _): connection.isolation_level = None
        @event.listens_for(engine, 'begin')
        def begin(connection): connection.exec_driver_sql('BEGIN IMMEDIATE')
    if file:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # it holds texts and hashes of passwords
    try:
        # two servers may start at once, and changing to WAL does not wait for its turn
        alone = FileLock(f'{file}.lock', timeout=30, mode=0o600) if file else nullcontext()
        with alone, engine.begin() as connection:
            if lite: drop_half_made(connection)
            else: connection.exec_driver_sql('SELECT pg_advisory_xact_lock(5125010)')
            cfg = Config()
            cfg.set_main_option('script_location', str(Path(__file__).parent/'migrations'))
            cfg.attributes['connection'] = connection
            command.upgrade(cfg, 'head')
    except (SQLAlchemyError, CommandError, OSError) as e: raise unusable(engine, e) from None
    finally: engine.dispose()


def cause_of(e:Exception)->str:
    "What the database, or the system, said, in one line."
    return ' '.join(str(e.orig if isinstance(e, DBAPIError) and e.orig else e).split())


def unusable(engine:Engine, e:Exception)->UnusableDatabase:
    "What is wrong with a database, in one line."
    name,cause = engine.url.render_as_string(hide_password=True), cause_of(e)
    if isinstance(e, CommandError) and 'locate revision' in cause:
        return UnusableDatabase(f'{name} was written by a newer version; install that version, or restore a backup')
    if 'already exists' in cause or 'duplicate column' in cause:
        return UnusableDatabase(f'{name} has half a schema ({cause}); restore a backup, or move it away')
    later = engine.dialect.name != 'sqlite' and isinstance(e, OperationalError)
    if later and ('FATAL' not in cause or any(p in cause for p in PASSING)):
        return UnreachableDatabase(f'{name} does not answer: {cause}')
    return UnusableDatabase(f'{name} cannot be used: {cause}')


def votes(
    corrections:Iterable[Feedback], # Of one prediction, oldest first
)->Counter: # Reviewers by category, or by `NO_CATEGORY`
    "Count the last word of each reviewer."
    return Counter({c.reviewer: NO_CATEGORY if c.unusable else c.prdtypecode for c in corrections}.values())


def verdict(corrections:Iterable[Feedback])->int|None:
    "The category with the most votes, or `NO_CATEGORY`; None if there is no single one."
    first = votes(corrections).most_common(2)
    return first[0][0] if first and (len(first) == 1 or first[0][1] > first[1][1]) else None


def with_figures(since:datetime, until:datetime|None, version:str)->ColumnElement[bool]:
    "The condition for answers of a period, by a model or by all, that have figures."
    since,until = since.astimezone(UTC), (until or now()).astimezone(UTC)  # SQLite compares the digits of the clocks
    found = (Prediction.created_at >= since) & (Prediction.created_at < until) & Prediction.facts.is_not(None)
    return found & (Prediction.model_version == version) if version else found


def count(connection:Connection|Session, wanted:ColumnElement[bool])->int:
    "Count the answers that are `wanted`."
    return connection.scalar(select(func.count()).select_from(Prediction).where(wanted)) or 0


class Store:
    """Writes answers in a thread, a few at a time; a database that fails costs their record, not the answer.

    Methods that read raise SQLAlchemy's `OperationalError` while the database cannot be reached.
    """
    def __init__(self,
        url:str,
        images_dir:str|Path, # For images that are kept
        max_waiting:int = 2_000, # Answers that wait to be written; more are dropped and counted
        deadline_s:float = 60., # For a statement, and for a connection
        patient:bool = False, # Go on if the database does not answer yet, and open it when it does
    ):
        self.url,self.images_dir,self.deadline_s = url,Path(images_dir),deadline_s
        self.engine = make_engine(url, deadline_s, pool_pre_ping=True)
        self.waiting:queue.Queue[tuple[dict, bytes|None]|None] = queue.Queue(max_waiting)
        self.dropped,self.closed,self.accepted,self.settled = 0, False, 0, 0
        self.problem = '' # Why the database cannot be used now
        self.inode,self.opening,self.written = 0, threading.Lock(), threading.Condition()
        self.pool = ThreadPoolExecutor(4, 'database') # For those that must not wait for a database themselves
        try: self.open()
        except UnreachableDatabase:
            if not patient: raise
        self.writer = threading.Thread(target=self._write, name='store', daemon=True)
        self.writer.start()

    @classmethod
    def from_environment(cls)->'Store':
        "The server's database."
        return cls(ServeConfig().url, kept_images())

    def __enter__(self)->'Store': return self
    def __exit__(self, *_): self.close()

    def open(self):
        "Bring the schema up to date, unless that was done; raises `UnusableDatabase`, also if the file has gone since."
        file = sqlite_file(self.engine)
        now = file.stat().st_ino if file and file.exists() else 0
        if self.inode and (not file or now == self.inode): return
        with self.opening, self.noticed():
            if self.inode and not now:
                raise UnusableDatabase(f'{file} was removed; restore it, or start the server again for a new one')
            self.engine.dispose()  # what it holds open is the file of before
            migrate(self.url, self.deadline_s)
            self.inode = file.stat().st_ino if file else 1

    @contextmanager
    def noticed(self)->Iterator[None]:
        "Remember whether the database can be used, with one line in the log when that changes."
        try: yield
        except (OperationalError, OSError) as e:
            why = cause_of(e)
            if not self.problem: log.error('the database cannot be used: %s', why)
            self.problem = why; metrics.DATABASE_DOWN.set(1)
            raise
        if self.problem: log.info('the database can be used again')
        self.problem = ''; metrics.DATABASE_DOWN.set(0)

    @contextmanager
    def begin(self)->Iterator[Connection]:
        "A transaction."
        try: self.open()
        except UnusableDatabase as e: raise OperationalError(str(e), None, e) from None
        with self.noticed(), self.engine.begin() as c: yield c

    @contextmanager
    def session(self)->Iterator[Session]:
        "A session in a transaction."
        with self.begin() as c, Session(c, expire_on_commit=False) as s: yield s; s.flush()

    def add(self,
        row:dict, # Columns of `Prediction`
        image:bytes|None = None, # Image to keep
    ):
        "Record an answer soon."
        try: self.waiting.put_nowait((row, image)); self.accepted += 1
        except queue.Full: self.dropped += 1

    def _write(self):
        while True:
            batch = [self.waiting.get()]
            while len(batch) < 200:
                try: batch.append(self.waiting.get_nowait())
                except queue.Empty: break
            rows = [b for b in batch if b is not None]
            try: self._record(rows)
            except Exception as e: self._drop(len(rows), e)
            with self.written: self.settled += len(rows); self.written.notify_all()
            if None in batch: return

    def _drop(self, n:int, e:Exception):
        self.dropped += n
        log.error('%s answers could not be recorded: %s', n, cause_of(e))

    def _record(self, batch:list[tuple[dict, bytes|None]]):
        "Write answers at once, or one by one if the database refuses them together."
        if not batch or (self.closed and self.problem): self.dropped += len(batch); return
        rows = []
        for row,image in batch:
            try:
                if image is not None: self._keep(row['image_sha256'], image)
                rows.append(row)
            except OSError as e: self._drop(1, e)
        if not rows: return
        try:
            with self.begin() as c: c.execute(insert(Prediction), rows)
        except SQLAlchemyError as e:
            if len(rows) == 1 or isinstance(e, OperationalError): raise
            for row in rows:
                try:
                    with self.begin() as c: c.execute(insert(Prediction), [row])
                except SQLAlchemyError as one: self._drop(1, one)

    def flush(self):
        "Wait until the answers given so far are written; raises `OperationalError` after the deadline."
        with self.written:
            until = self.accepted
            if not self.written.wait_for(lambda: self.settled >= until, self.deadline_s):
                raise OperationalError('answers still wait to be written', None, TimeoutError('the database is slow'))

    def _keep(self, sha256:str, image:bytes):
        path = self.image_path(sha256)
        if not path.exists(): write_atomic(path, image, private=True)

    def image_path(self, sha256:str)->Path: return self.images_dir/sha256[:2]/sha256

    def close(self):
        "Write those that wait, and stop."
        if self.closed: return
        self.closed = True
        try: self.waiting.put(None, timeout=5)
        except queue.Full: log.error('%s answers are not recorded', self.waiting.qsize())
        self.writer.join(10)
        self.pool.shutdown(wait=False, cancel_futures=True); self.engine.dispose()

    def get(self, prediction_id:str)->Prediction|None:
        "An answer that was given; one that still waits to be written is written first."
        self.flush()
        with self.session() as s: return s.get(Prediction, prediction_id)

    def served(self,
        since:datetime,
        until:datetime|None = None, # Not included; now if left out
        version:str = '', # Answers of this model only
        most:int = 50_000, # About so many; of more, a sample
    )->list[dict]: # `DRIFT_COLUMNS` of each answer, oldest first
        "Figures of a period for drift detection: nothing that a listing could be read from."
        self.flush()
        wanted,columns = with_figures(since, until, version), [getattr(Prediction, c) for c in DRIFT_COLUMNS]
        with self.begin() as c:
            n = count(c, wanted)
            if n > most: wanted &= Prediction.id < f'{int(most/n*16**8):08x}'  # ids are random
            rows = c.execute(select(*columns).where(wanted).order_by(Prediction.created_at, Prediction.id))
            return [dict(r) for r in rows.mappings()]

    def recent(self, days:float, version:str)->list[dict]: # As `served`
        "Figures of the answers that a model gave in the last `days`."
        return self.served(now()-timedelta(days=days), None, version)

    def count_recent(self, days:float, version:str)->int:
        "Count the answers with figures that a model gave in the last `days`."
        wanted = with_figures(now()-timedelta(days=days), None, version)
        with self.session() as s: return count(s, wanted)

    def correct(self,
        prediction_id:str,
        prdtypecode:int|None, # None if it is unusable
        reviewer:str,
        unusable:str|None = None, # One of `rakuten_mm.api.UNUSABLE`
    )->tuple[Feedback, list[Feedback]]: # The new one, and all of this prediction
        "Record a correction; raises `KeyError` for an unknown prediction."
        if (prdtypecode is None) != bool(unusable): raise ValueError('give a category, or a reason for none')
        if self.get(prediction_id) is None: raise KeyError(prediction_id)
        with self.session() as s:
            new = Feedback(prediction_id=prediction_id, prdtypecode=prdtypecode, unusable=unusable, reviewer=reviewer)
            s.add(new); s.flush()
        return new, self.corrections([prediction_id])[prediction_id]

    def corrections(self, ids:list[str])->dict[str, list[Feedback]]:
        "Corrections of some predictions, oldest first."
        out:dict[str, list[Feedback]] = {i: [] for i in ids}
        wanted = select(Feedback).where(Feedback.prediction_id.in_(ids)).order_by(Feedback.id)
        with self.session() as s:
            for f in s.scalars(wanted): out[f.prediction_id].append(f)
        return out

    def verdicts(self)->list['Correction']: # Oldest answer first
        "All answers on whose category reviewers agree, for the training data."
        from rakuten_mm.data.feedback import Correction
        rows,said = self.reviewed()
        def correction(r:Prediction, code:int):
            title,text = (r.designation, r.description or '') if r.has_inputs else (None, None)
            image = self.image_path(r.image_sha256) if r.has_inputs and r.image_sha256 else None
            last = said[r.id][-1].created_at
            hashes = r.text_sha256, r.image_sha256
            return Correction(*hashes, r.created_at, last, r.prdtypecode, code, title, text, image)
        told = ((r, verdict(said[r.id])) for r in rows)
        return [correction(r, code) for r,code in told if code not in (None, NO_CATEGORY)]

    def unusable(self)->list[dict[str, Any]]: # prediction_id, created_at, reason, reviewer, designation
        "Listings that most reviewers call unusable, oldest first, with the last reason that was given."
        rows,said = self.reviewed()
        found = [(r, [f for f in said[r.id] if f.unusable][-1]) for r in rows if verdict(said[r.id]) == NO_CATEGORY]
        return [dict(prediction_id=r.id, created_at=r.created_at, reason=f.unusable, reviewer=f.reviewer,
                     designation=r.designation) for r,f in found]

    def reviewed(self)->tuple[list[Prediction], dict[str, list[Feedback]]]:
        "Answers that were corrected, oldest first, and what was said about each."
        self.flush()
        said:dict[str, list[Feedback]] = {}
        corrected = Prediction.id.in_(select(Feedback.prediction_id))
        with self.session() as s:
            for f in s.scalars(select(Feedback).order_by(Feedback.id)): said.setdefault(f.prediction_id, []).append(f)
            rows = s.scalars(select(Prediction).where(corrected).order_by(Prediction.created_at, Prediction.id)).all()
        return [*rows], said

    def queue(self,
        limit:int = 20,
        reviewer:str = '', # Not those that this one has judged already
        prdtypecode:int|None = None, # Only those that were put here
    )->tuple[list[Prediction], dict[int, int]]: # The most useful first; how many wait, by the category of the answer
        "Listings in the review lane that nobody corrected, and those that reviewers disagree on."
        self.flush()
        said = Feedback.prediction_id == Prediction.id
        judged,mine = exists().where(said), exists().where(said, Feedback.reviewer == reviewer)
        has_inputs,useful = Prediction.has_inputs == 1, Prediction.usefulness.desc()
        several = func.count(func.distinct(func.coalesce(Feedback.prdtypecode, NO_CATEGORY))) > 1
        with self.session() as s:
            found = s.scalars(select(Feedback.prediction_id).join(Prediction, said).where(has_inputs)
                              .group_by(Feedback.prediction_id).having(several)).all()
            disputed = [i for i,c in self.corrections([*found]).items() if verdict(c) is None]
            wanted = ((Prediction.lane == 'review') & has_inputs & ~judged) | (Prediction.id.in_(disputed) & ~mine)
            code = Prediction.prdtypecode
            each = select(code, func.count()).where(wanted).group_by(code).order_by(func.count().desc(), code)
            waiting:dict[int, int] = dict(s.execute(each).tuples().all())
            if prdtypecode is not None: wanted &= code == prdtypecode
            rows = select(Prediction).where(wanted).order_by(useful, Prediction.created_at, Prediction.id).limit(limit)
            return list(s.scalars(rows)), waiting

    def erase(self,
        before:datetime|None = None, # Answers given before this
        prediction_id:str = '', # This answer, and every other one to the same listing
        dry_run:bool = False,
    )->dict[str, int]: # How many `answers`, `corrected` ones and `images`
        """Remove answers with their texts and images; of those that were corrected the label stays, without listing.

        Raises `KeyError` for an unknown answer.
        """
        self.flush()
        corrected = exists().where(Feedback.prediction_id == Prediction.id)
        with self.begin() as c:
            if prediction_id:
                hashes = select(Prediction.text_sha256, Prediction.image_sha256)
                one = c.execute(hashes.where(Prediction.id == prediction_id)).first()
                if one is None: raise KeyError(prediction_id)
                wanted = (Prediction.text_sha256 == one[0]) & (Prediction.image_sha256 == one[1])
            else: wanted = Prediction.created_at < (before or now()).astimezone(UTC)
            told = wanted & corrected & (Prediction.user != '')
            images = {*c.scalars(select(Prediction.image_sha256).where(wanted, Prediction.has_inputs == 1))}-{''}
            out = dict(answers=count(c, wanted & ~corrected), corrected=count(c, told), images=0)
            if not dry_run:
                nothing = dict.fromkeys(('designation', 'description', 'facts', 'probs', 'sketch'))
                c.execute(update(Prediction).where(told).values(has_inputs=0, user='', **nothing))
                c.execute(delete(Prediction).where(wanted & ~corrected))
            kept = {*c.scalars(select(Prediction.image_sha256).where(
                Prediction.image_sha256.in_(images), Prediction.has_inputs == 1, ~wanted))} if images else set()
        for sha256 in images-kept:
            file = self.image_path(sha256)
            out['images'] += file.exists()
            if not dry_run: file.unlink(missing_ok=True)
        return out

    def users(self)->dict[str, User]:
        "All users of the database, by name."
        with self.session() as s: return {u.name: u for u in s.scalars(select(User))}

    def put_user(self, name:str, password_hash:str, role:str):
        "Add a user, or change one."
        user = User(name=name, password_hash=password_hash, role=role, created_at=now())
        with self.session() as s: s.merge(user)

    def drop_user(self, name:str)->bool: # False if there was none
        "Remove a user."
        with self.begin() as c: return c.execute(delete(User).where(User.name == name)).rowcount > 0
