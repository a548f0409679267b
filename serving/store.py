"""The database of answers and of corrections by reviewers.

Rows are only ever added. Corrections of one prediction may disagree: the last word of each reviewer counts once, the
category with the most votes is the verdict, and without a single winner there is none and the listing goes back into
the queue.
"""
import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alembic import command
from alembic.config import Config
from sqlalchemy import (
    JSON,
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
    select,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from rakuten_mm.core.files import write_atomic
from serving.config import ServeConfig, kept_images

if TYPE_CHECKING:
    from rakuten_mm.data.feedback import Correction  # with pandas, which the server does without

log = logging.getLogger('rakuten_mm.store')
DRIFT_COLUMNS = ('created_at', 'model_version', 'lane', 'facts', 'probs', 'sketch')


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
    prdtypecode:Mapped[int] = mapped_column(Integer)
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
    "A correction of an answer by a reviewer, or its confirmation."
    __tablename__ = 'feedback'
    id:Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    prediction_id:Mapped[str] = mapped_column(ForeignKey('predictions.id'), index=True)
    prdtypecode:Mapped[int] = mapped_column(Integer)
    reviewer:Mapped[str] = mapped_column(String(64))
    created_at:Mapped[datetime] = mapped_column(default=now)


def open_database(
    url:str, # Of SQLAlchemy: sqlite:///file or postgresql+psycopg://user:password@host/name
)->Engine:
    "A connection pool whose database has the newest schema."
    lite = url.startswith('sqlite')
    engine = create_engine(url, pool_pre_ping=True, connect_args={'timeout': 10} if lite else {})
    if lite:
        @event.listens_for(engine, 'connect')
        def careful(connection, _):
            for pragma in ('journal_mode=WAL', 'synchronous=NORMAL', 'foreign_keys=ON'):
                connection.execute(f'PRAGMA {pragma}')
    with engine.begin() as connection:
        # two servers may start at once
        if not lite: connection.exec_driver_sql('SELECT pg_advisory_xact_lock(5125010)')
        cfg = Config()
        cfg.set_main_option('script_location', str(Path(__file__).parent/'migrations'))
        cfg.attributes['connection'] = connection
        command.upgrade(cfg, 'head')
    return engine


def votes(
    corrections:Iterable[Feedback], # Of one prediction, oldest first
)->Counter: # Reviewers by category
    "Count the last word of each reviewer."
    return Counter({c.reviewer: c.prdtypecode for c in corrections}.values())


def verdict(corrections:Iterable[Feedback])->int|None:
    "The category with the most votes; None if there is no single one."
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
    "Writes answers in a thread, a few at a time; a database that fails costs their record, not the answer."
    def __init__(self,
        url:str,
        images_dir:str|Path, # For images that are kept
        max_waiting:int = 2_000, # Answers that wait to be written; more are dropped and counted
    ):
        self.engine,self.images_dir = open_database(url), Path(images_dir)
        self.waiting:queue.Queue[tuple[dict, bytes|None]|None] = queue.Queue(max_waiting)
        self.dropped,self.closed = 0, False
        self.writer = threading.Thread(target=self._write, name='store', daemon=True)
        self.writer.start()

    @classmethod
    def from_environment(cls)->'Store':
        "The server's database."
        return cls(ServeConfig().url, kept_images())

    def __enter__(self)->'Store': return self
    def __exit__(self, *_): self.close()

    def add(self,
        row:dict, # Columns of `Prediction`
        image:bytes|None = None, # Image to keep
    ):
        "Record an answer soon."
        try: self.waiting.put_nowait((row, image))
        except queue.Full: self.dropped += 1

    def _write(self):
        while True:
            batch = [self.waiting.get()]
            while len(batch) < 200:
                try: batch.append(self.waiting.get_nowait())
                except queue.Empty: break
            rows = [b for b in batch if b is not None]
            try:
                for row,image in rows:
                    if image is not None: self._keep(row['image_sha256'], image)
                if rows:
                    with self.engine.begin() as c: c.execute(insert(Prediction), [r for r,_ in rows])
            except (SQLAlchemyError, OSError) as e:
                self.dropped += len(rows)
                log.error('%s answers could not be recorded: %s', len(rows), str(e).splitlines()[0])
            finally:
                for _ in batch: self.waiting.task_done()
            if None in batch: return

    def _keep(self, sha256:str, image:bytes):
        path = self.image_path(sha256)
        if not path.exists(): write_atomic(path, image)

    def image_path(self, sha256:str)->Path: return self.images_dir/sha256[:2]/sha256

    def close(self):
        "Write those that wait, and stop."
        if self.closed: return
        self.closed = True; self.waiting.put(None); self.writer.join(10); self.engine.dispose()

    def get(self, prediction_id:str)->Prediction|None:
        "An answer that was given; one that still waits to be written is written first."
        self.waiting.join()
        with Session(self.engine) as s: return s.get(Prediction, prediction_id)

    def served(self,
        since:datetime,
        until:datetime|None = None, # Not included; now if left out
        version:str = '', # Answers of this model only
        most:int = 50_000, # About so many; of more, a sample
    )->list[dict]: # `DRIFT_COLUMNS` of each answer, oldest first
        "Figures of a period for drift detection: nothing that a listing could be read from."
        self.waiting.join()
        wanted,columns = with_figures(since, until, version), [getattr(Prediction, c) for c in DRIFT_COLUMNS]
        with self.engine.connect() as c:
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
        with Session(self.engine) as s: return count(s, wanted)

    def correct(self,
        prediction_id:str, prdtypecode:int, reviewer:str
    )->tuple[Feedback, list[Feedback]]: # The new one, and all of this prediction
        "Record a correction; raises `KeyError` for an unknown prediction."
        if self.get(prediction_id) is None: raise KeyError(prediction_id)
        with Session(self.engine, expire_on_commit=False) as s:
            new = Feedback(prediction_id=prediction_id, prdtypecode=prdtypecode, reviewer=reviewer)
            s.add(new); s.commit()
        return new, self.corrections([prediction_id])[prediction_id]

    def corrections(self, ids:list[str])->dict[str, list[Feedback]]:
        "Corrections of some predictions, oldest first."
        out:dict[str, list[Feedback]] = {i: [] for i in ids}
        wanted = select(Feedback).where(Feedback.prediction_id.in_(ids)).order_by(Feedback.id)
        with Session(self.engine) as s:
            for f in s.scalars(wanted): out[f.prediction_id].append(f)
        return out

    def verdicts(self)->list['Correction']: # Oldest answer first
        "All answers on which reviewers agree, for the training data."
        from rakuten_mm.data.feedback import Correction
        self.waiting.join()
        said:dict[str, list[Feedback]] = {}
        corrected = Prediction.id.in_(select(Feedback.prediction_id))
        with Session(self.engine) as s:
            for f in s.scalars(select(Feedback).order_by(Feedback.id)): said.setdefault(f.prediction_id, []).append(f)
            rows = s.scalars(select(Prediction).where(corrected).order_by(Prediction.created_at, Prediction.id)).all()
        def correction(r:Prediction, code:int):
            title,text = (r.designation, r.description or '') if r.has_inputs else (None, None)
            image = self.image_path(r.image_sha256) if r.has_inputs and r.image_sha256 else None
            last = said[r.id][-1].created_at
            hashes = r.text_sha256, r.image_sha256
            return Correction(*hashes, r.created_at, last, r.prdtypecode, code, title, text, image)
        return [correction(r, code) for r in rows if (code := verdict(said[r.id])) is not None]

    def queue(self,
        limit:int = 20,
        reviewer:str = '', # Not those that this one has judged already
    )->tuple[list[Prediction], int]: # The most useful first, and how many there are
        "Listings in the review lane that nobody corrected, and those that reviewers disagree on."
        self.waiting.join()
        said = Feedback.prediction_id == Prediction.id
        judged,mine = exists().where(said), exists().where(said, Feedback.reviewer == reviewer)
        has_inputs,useful = Prediction.has_inputs == 1, Prediction.usefulness.desc()
        several = func.count(func.distinct(Feedback.prdtypecode)) > 1
        with Session(self.engine) as s:
            found = s.scalars(select(Feedback.prediction_id).join(Prediction, said).where(has_inputs)
                              .group_by(Feedback.prediction_id).having(several)).all()
            disputed = [i for i,c in self.corrections([*found]).items() if verdict(c) is None]
            wanted = ((Prediction.lane == 'review') & has_inputs & ~judged) | (Prediction.id.in_(disputed) & ~mine)
            rows = select(Prediction).where(wanted).order_by(useful, Prediction.created_at, Prediction.id).limit(limit)
            return list(s.scalars(rows)), count(s, wanted)

    def users(self)->dict[str, User]:
        "All users of the database, by name."
        with Session(self.engine) as s: return {u.name: u for u in s.scalars(select(User))}

    def put_user(self, name:str, password_hash:str, role:str):
        "Add a user, or change one."
        user = User(name=name, password_hash=password_hash, role=role, created_at=now())
        with Session(self.engine) as s: s.merge(user); s.commit()

    def drop_user(self, name:str)->bool: # False if there was none
        "Remove a user."
        with self.engine.begin() as c: return c.execute(delete(User).where(User.name == name)).rowcount > 0
