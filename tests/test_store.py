"The database of answers and corrections, in SQLite and in a real PostgreSQL."
import multiprocessing as mp
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import psutil
import pytest
from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from serving.store import (
    DRIFT_COLUMNS,
    NO_CATEGORY,
    Base,
    Feedback,
    Store,
    UnreachableDatabase,
    UnusableDatabase,
    migrate,
    verdict,
)
from serving.testing import free_port

INSTALLED = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'))
INITDB = INSTALLED[-1] if INSTALLED else shutil.which('initdb')


@pytest.fixture(scope='session')
def postgres():
    "The URL of an empty PostgreSQL of this session's own."
    if not INITDB: pytest.skip('PostgreSQL is not installed (Debian: postgresql)')
    home,port,bin = Path(tempfile.mkdtemp(prefix='postgres-')), free_port(), Path(INITDB).parent
    as_whom = ['runuser', '-u', 'postgres', '--'] if os.getuid() == 0 else []  # it refuses to run as root
    if as_whom: shutil.chown(home, 'postgres')
    run = lambda *a,**kw: subprocess.run([*as_whom, *map(str, a)], check=True, capture_output=True, cwd='/', **kw)
    run(bin/'initdb', '-D', home/'data', '-U', 'rakuten', '-A', 'trust', '--no-sync')
    options = f"-p {port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
    run(bin/'pg_ctl', '-D', home/'data', '-l', home/'log', '-w', '-o', options, 'start')
    try: yield f'postgresql+psycopg://rakuten@127.0.0.1:{port}/postgres'
    finally: run(bin/'pg_ctl', '-D', home/'data', '-m', 'immediate', 'stop'); shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request, tmp_path):
    "An empty database."
    if request.param == 'sqlite': return f'sqlite:///{tmp_path/"feedback.db"}'
    server,name = request.getfixturevalue('postgres'), f't{uuid.uuid4().hex}'
    with create_engine(server, isolation_level='AUTOCOMMIT').connect() as c: c.execute(text(f'CREATE DATABASE {name}'))
    return server.removesuffix('postgres')+name


@pytest.fixture
def store(url, tmp_path):
    s = Store(url, tmp_path/'images')
    yield s
    s.close()


def answer(lane='review', usefulness=.5, **kw)->dict:
    "A row of `predictions`."
    book = dict(prdtypecode=10, label='Livres', probability=.5)
    return dict(id=str(uuid.uuid4()), created_at=datetime.now(UTC), user='anna', model_version='rakuten-mm/1',
                prdtypecode=10, probability=.5, lane=lane, usefulness=usefulness, top_k=[book], candidates=[10, 2403],
                modalities=['text'], text_sha256='0'*64, image_sha256='', designation='Livre', description='',
                has_inputs=1, facts=None, probs=None, sketch=None) | kw


def test_migrations_make_what_the_code_expects(url):
    "Also on a database that is up to date, and by two servers that start at once."
    threads = [Thread(target=migrate, args=(url,)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    found = inspect(create_engine(url))
    for name,table in Base.metadata.tables.items():
        columns = {c['name']: c['nullable'] for c in found.get_columns(name)}
        assert columns == {c.name: c.nullable for c in table.columns}, name
        assert {i['name'] for i in found.get_indexes(name)} == {i.name for i in table.indexes}, name


def test_answers_are_written_and_found(store):
    rows = [answer(usefulness=u) for u in (.2, .9, .5)]+[answer('auto'), answer(has_inputs=0)]
    for r in rows: store.add(r)
    queue,waiting = store.queue()
    assert [q.usefulness for q in queue] == [.9, .5, .2] and waiting == {10: 3}
    got = store.get(rows[0]['id'])
    assert got.created_at == rows[0]['created_at'] and got.top_k == rows[0]['top_k']
    assert got.candidates == [10, 2403] and got.designation == 'Livre'
    assert store.get(str(uuid.uuid4())) is None and store.dropped == 0


def test_corrections_are_arbitrated(store):
    "The last word of each reviewer counts; without a winner the listing waits for those who have not spoken."
    row = answer(); store.add(row)
    say = lambda code,who: verdict(store.correct(row['id'], code, who)[1])
    waits = lambda who='': [q.id for q in store.queue(reviewer=who)[0]] == [row['id']]
    assert waits() and say(10, 'anna') == 10 and not waits()
    assert say(2403, 'bob') is None and waits('eve') and not waits('anna')
    assert say(10, 'bob') == 10 and not waits('eve')  # bob thought again
    assert say(2403, 'bob') is None and say(2403, 'eve') == 2403 and not waits('zoe')
    assert [c.prdtypecode for c in store.corrections([row['id']])[row['id']]] == [10, 2403, 10, 2403, 2403]
    with pytest.raises(KeyError): store.correct(str(uuid.uuid4()), 10, 'anna')


def test_unusable_listings_are_kept_and_no_labels(store):
    "They leave the queue, are counted, and are no training data; reviewers may disagree about them too."
    rows = [answer(), answer(), answer(prdtypecode=2403)]
    for r in rows: store.add(r)
    assert [r.id for r in store.queue(prdtypecode=2403)[0]] == [rows[2]['id']]
    assert store.queue(prdtypecode=2403)[1] == {10: 2, 2403: 1}
    assert verdict(store.correct(rows[0]['id'], None, 'anna', 'several')[1]) == NO_CATEGORY
    store.correct(rows[1]['id'], 10, 'anna')
    assert store.queue()[1] == {2403: 1}
    assert [(u['prediction_id'], u['reason']) for u in store.unusable()] == [(rows[0]['id'], 'several')]
    assert [c.prdtypecode for c in store.verdicts()] == [10]
    assert verdict(store.correct(rows[0]['id'], 10, 'bob')[1]) is None and store.queue(reviewer='eve')[1][10] == 1
    assert verdict(store.correct(rows[0]['id'], None, 'eve', 'no_category')[1]) == NO_CATEGORY  # whatever the reason
    assert store.unusable()[0]['reason'] == 'no_category' and len(store.verdicts()) == 1
    for both in ((10, 'anna', 'several'), (None, 'anna', None)):
        with pytest.raises(ValueError, match='a category, or a reason'): store.correct(rows[0]['id'], *both)


def test_a_database_without_reasons_is_brought_up_to_date(url):
    "With its corrections, which can be added only, and still are."
    with Store(url, Path()) as store:
        row = answer(); store.add(row); store.correct(row['id'], 10, 'anna')
    engine = create_engine(url)
    with engine.begin() as c:
        c.execute(text("UPDATE alembic_version SET version_num = '0003'"))
        if engine.dialect.name == 'postgresql':
            c.execute(text('ALTER TABLE feedback DROP COLUMN unusable'))
            c.execute(text('ALTER TABLE feedback ALTER COLUMN prdtypecode SET NOT NULL'))
        else:  # as 0001 made it
            columns = 'id, prediction_id, prdtypecode, reviewer, created_at'
            c.execute(text(f'CREATE TABLE old AS SELECT {columns} FROM feedback'))
            c.execute(text('DROP TABLE feedback'))
            c.execute(text('CREATE TABLE feedback (id INTEGER NOT NULL PRIMARY KEY, prediction_id VARCHAR(36) NOT NULL '
                           'REFERENCES predictions(id), prdtypecode INTEGER NOT NULL, reviewer VARCHAR(64) NOT NULL, '
                           'created_at DATETIME NOT NULL)'))
            c.execute(text('CREATE INDEX ix_feedback_prediction_id ON feedback (prediction_id)'))
            c.execute(text('INSERT INTO feedback SELECT * FROM old')); c.execute(text('DROP TABLE old'))
            for what in ('UPDATE', 'DELETE'):
                c.execute(text(f'CREATE TRIGGER feedback_no_{what} BEFORE {what} ON feedback '
                               "BEGIN SELECT RAISE(ABORT, 'corrections are only added'); END"))
    engine.dispose()
    with Store(url, Path()) as store:
        store.correct(row['id'], None, 'bob', 'unreadable')
        assert [(f.id, f.prdtypecode, f.unusable) for f in store.corrections([row['id']])[row['id']]] == [
            (1, 10, None), (2, None, 'unreadable')]
        with pytest.raises(DBAPIError, match='only added'), store.engine.begin() as c:
            c.execute(text('DELETE FROM feedback'))
        found = inspect(store.engine)
        assert {i['name'] for i in found.get_indexes('feedback')} == {'ix_feedback_prediction_id'}
        assert found.get_foreign_keys('feedback')[0]['referred_table'] == 'predictions'


def test_corrections_cannot_be_changed(store):
    row = answer(); store.add(row); store.correct(row['id'], 10, 'anna')
    for sql in ('UPDATE feedback SET prdtypecode = 40', 'DELETE FROM feedback'):
        with pytest.raises(DBAPIError, match='only added'), store.engine.begin() as c: c.execute(text(sql))
    assert verdict(store.corrections([row['id']])[row['id']]) == 10


def test_reviewers_at_once(store):
    "Nothing that was confirmed is lost."
    rows = [answer() for _ in range(8)]
    for r in rows: store.add(r)
    def work(who):
        for r in rows: store.correct(r['id'], 10, who)
    threads = [Thread(target=work, args=(f'r{i}',)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(len(c) == 6 for c in store.corrections([r['id'] for r in rows]).values())


def test_images_are_kept_once(store):
    for _ in range(2): store.add(answer(image_sha256='ab'*32), b'image')
    store.queue()
    assert store.image_path('ab'*32).read_bytes() == b'image'


def test_older_answers_have_no_figures(url):
    "A database of the first version is brought up to date with its rows."
    migrate(url)
    engine = create_engine(url)
    with engine.begin() as c:
        for name in ('facts', 'probs', 'sketch'): c.execute(text(f'ALTER TABLE predictions DROP COLUMN {name}'))
        c.execute(text("UPDATE alembic_version SET version_num = '0001'"))
        c.execute(text("""
            INSERT INTO predictions (id, created_at, "user", model_version, prdtypecode, probability, lane, usefulness,
                                     top_k, modalities, text_sha256, image_sha256, has_inputs)
            VALUES ('old', '2026-01-01 12:00:00.000000', 'anna', 'rakuten-mm/1', 10, .5, 'auto', .5,
                    '[]', '[]', '', '', 0)"""))
    engine.dispose()
    with Store(url, Path()) as store:
        assert store.get('old').facts is None and store.served(datetime(2026, 1, 1, tzinfo=UTC)) == []
        store.add(answer(facts=dict(language='fr')))
        assert [r['facts'] for r in store.served(datetime(2026, 1, 1, tzinfo=UTC))] == [dict(language='fr')]


def test_what_drift_needs_of_a_time(store):
    "Figures, in the order of time, and no input."
    start = datetime.now(UTC)
    figures = lambda i: dict(facts=dict(title_length=i), probs=[.25, .75], sketch=dict(text=[i, .5], image=None))
    for i in (2, 0, 1, 3): store.add(answer(created_at=start+timedelta(hours=i), **figures(i)))
    store.add(answer(created_at=start+timedelta(hours=1.5)))
    rows = store.served(start+timedelta(hours=1), start+timedelta(hours=3))
    assert [r['facts']['title_length'] for r in rows] == [1, 2]  # one without figures is between them
    assert {k: rows[0][k] for k in ('facts', 'probs', 'sketch')} == figures(1) and rows[0].keys() == set(DRIFT_COLUMNS)
    assert rows[0]['created_at'] == start+timedelta(hours=1)
    assert not {'designation', 'description', 'top_k'} & rows[0].keys()
    other = 'rakuten-mm/2'
    for i in range(200):
        store.add(answer(created_at=start+timedelta(minutes=i/10), model_version=other, **figures(i)))
    whole,some = (store.served(start, version=other, until=start+timedelta(hours=1), most=n) for n in (1_000, 50))
    lengths = [r['facts']['title_length'] for r in some]
    assert len(whole) == 200 and 20 < len(some) < 90 and lengths == sorted(lengths)


def test_recent_answers_of_a_model(store):
    "Those of the last days that have figures."
    for hours,version,facts in ((1, 'a', {}), (47, 'a', {}), (49, 'a', {}), (1, 'b', {}), (1, 'a', None)):
        created = datetime.now(UTC)-timedelta(hours=hours)
        store.add(answer(created_at=created, model_version=version, facts=facts, probs=[], sketch={}))
    store.flush()
    assert len(store.recent(2, 'a')) == store.count_recent(2, 'a') == 2 and store.count_recent(3, 'a') == 3


def test_a_database_that_goes_away_costs_records_only(postgres, tmp_path):
    name = f't{uuid.uuid4().hex}'
    admin = create_engine(postgres, isolation_level='AUTOCOMMIT')
    with admin.connect() as c: c.execute(text(f'CREATE DATABASE {name}'))
    store = Store(postgres.removesuffix('postgres')+name, tmp_path)
    store.add(answer()); store.queue()
    with admin.connect() as c: c.execute(text(f'DROP DATABASE {name} WITH (FORCE)'))
    start = time.monotonic()
    for _ in range(10): store.add(answer())
    assert time.monotonic()-start < .5
    store.flush()
    assert store.dropped == 10
    store.close()


def test_verdict():
    said = lambda *pairs: [Feedback(reviewer=r, prdtypecode=c) for r,c in pairs]
    assert verdict([]) is None and verdict(said(('a', 1))) == 1 and verdict(said(('a', 1), ('b', 2))) is None
    assert verdict(said(('a', 1), ('b', 2), ('a', 2))) == 2 and verdict(said(('a', 1), ('b', 1), ('c', 2))) == 1


def die_at(url:str, statement:int):
    "Migrate, and be killed before a statement of it."
    seen = iter(range(statement))
    @event.listens_for(Engine, 'before_cursor_execute')
    def count(*_):
        if next(seen, None) is None: os.kill(os.getpid(), signal.SIGKILL)
    migrate(url)


def test_f58_first_start_killed_at_any_statement(tmp_path):
    "The next start finds nothing or everything, and goes on."
    ctx,killed = mp.get_context('fork'), 0
    for n in range(1, 100):
        url = f'sqlite:///{tmp_path}/{n}/feedback.db'
        p = ctx.Process(target=die_at, args=(url, n)); p.start(); p.join()
        with Store(url, tmp_path) as store: store.put_user('anna', 'x', 'predict'); assert [*store.users()] == ['anna']
        if p.exitcode == 0: break
        killed += 1
    assert p.exitcode == 0 and killed > 10


@pytest.mark.parametrize('cut', [1, 2, 4, 7])
def test_f58_first_start_that_an_older_version_left_half_done(tmp_path, cut):
    url = f'sqlite:///{tmp_path}/feedback.db'
    migrate(url)
    whole = sqlite3.connect(tmp_path/'feedback.db')
    schema = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    made = [row[0] for row in whole.execute(schema)]
    (tmp_path/'feedback.db').unlink()
    half = sqlite3.connect(tmp_path/'feedback.db')
    for sql in sorted(made, key=lambda s: not s.startswith('CREATE TABLE'))[:cut]: half.execute(sql)
    half.commit(); half.close()
    with Store(url, tmp_path) as store: store.add(answer()); assert sum(store.queue()[1].values()) == 1


def bad_database(folder:Path, how:str)->str:
    file = folder/'feedback.db'
    migrate(f'sqlite:///{file}')
    c = sqlite3.connect(file)
    match how:
        case 'corrupt': file.write_bytes(b'no database at all'*1000)
        case 'newer': c.execute("UPDATE alembic_version SET version_num = '9999'"); c.commit()
        case 'half':
            c.execute("INSERT INTO users VALUES ('anna', 'x', 'predict', '2026-01-01')")
            c.execute('DELETE FROM alembic_version'); c.commit()
    c.close()
    return f'sqlite:///{file}'


BAD = [('corrupt', 'cannot be used'), ('newer', 'a newer version'), ('half', 'half a schema')]

@pytest.mark.parametrize(('how', 'says'), BAD)
def test_f78_databases_that_cannot_be_used(tmp_path, how, says):
    "One line that says what to do, and nothing is changed."
    url = bad_database(tmp_path, how)
    before = (tmp_path/'feedback.db').read_bytes()
    with pytest.raises(UnusableDatabase, match=says) as e: Store(url, tmp_path, patient=True)
    assert len(str(e.value).splitlines()) == 1 and (tmp_path/'feedback.db').read_bytes() == before


def test_f78_database_that_is_not_there(postgres, tmp_path):
    with pytest.raises(UnusableDatabase, match=r'cannot be used.*does not exist'):
        Store(postgres.removesuffix('postgres')+'nowhere', tmp_path, patient=True)
    nobody = f'postgresql+psycopg://rakuten@127.0.0.1:{free_port()}/postgres'
    with pytest.raises(UnreachableDatabase, match='does not answer'): Store(nobody, tmp_path)
    with Store(nobody, tmp_path, patient=True) as store:
        assert store.problem
        with pytest.raises(OperationalError): store.users()


def test_f78_database_deleted_while_running(tmp_path):
    "It is noticed, counted, and never written to an unlinked file; one that comes back is used again."
    file = tmp_path/'feedback.db'
    with Store(f'sqlite:///{file}', tmp_path) as store:
        store.add(answer()); store.flush()
        kept = file.rename(tmp_path/'elsewhere.db')
        for extra in ('-wal', '-shm'): (tmp_path/f'feedback.db{extra}').unlink(missing_ok=True)
        store.add(answer()); store.flush()
        assert store.dropped == 1 and 'was removed' in store.problem and not file.exists()
        with pytest.raises(OperationalError): store.queue()
        kept.rename(file)
        store.add(answer()); store.flush()
        assert store.dropped == 1 and not store.problem and sum(store.queue()[1].values()) >= 1


def test_f72_one_bad_record_costs_itself_only(store):
    "Whatever a database refuses: its neighbours in the same batch are recorded."
    good,bad = [answer() for _ in range(3)], answer(id='x'*36, lane=None)
    for row in (good[0], bad, *good[1:]): store.add(row)
    store.flush()
    assert store.dropped == 1 and all(store.get(r['id']) for r in good) and store.get(bad['id']) is None


def test_f80_codes_above_32_bits(store):
    "Answers and corrections with the codes that ingestion accepts, beside others in one batch."
    codes = [10, 2**31-1, 2**31, 2**53-1]
    rows = [answer(prdtypecode=c, candidates=codes) for c in codes]
    for row in rows: store.add(row)
    assert [store.get(r['id']).prdtypecode for r in rows] == codes and store.dropped == 0
    assert store.get(rows[0]['id']).candidates == codes
    for row in rows: store.correct(row['id'], 2**53-1, 'anna')
    assert {verdict(store.corrections([r['id']])[r['id']]) for r in rows} == {2**53-1}
    assert {(c.answered, c.prdtypecode) for c in store.verdicts()} == {(c, 2**53-1) for c in codes}


def test_f80_a_database_of_32_bits_is_brought_up_to_date(url):
    "With its rows; corrections can be added only, and still are."
    with Store(url, Path()) as store:
        row = answer(); store.add(row); store.correct(row['id'], 10, 'anna')
    engine = create_engine(url)
    if engine.dialect.name == 'postgresql':
        with engine.begin() as c:
            for table in ('predictions', 'feedback'):
                c.execute(text(f'ALTER TABLE {table} ALTER COLUMN prdtypecode TYPE INTEGER'))
            c.execute(text("UPDATE alembic_version SET version_num = '0002'"))
    engine.dispose()
    with Store(url, Path()) as store:
        store.correct(row['id'], 2**40, 'anna')
        assert [f.prdtypecode for f in store.corrections([row['id']])[row['id']]] == [10, 2**40]
        with pytest.raises(DBAPIError), store.engine.begin() as c: c.execute(text('DELETE FROM feedback'))


def test_f80_a_zero_byte_costs_its_own_record_only(store):
    "Case B05: the neighbours in one batch are found."
    rows = [answer(), answer(designation='a\0b', text_sha256='\0'), answer()]
    for row in rows: store.add(row)
    assert store.get(rows[0]['id']) and store.get(rows[2]['id'])


def test_f73_erasure(store):
    "Old answers, or all of one listing, go with texts and images; corrections stay without the listing."
    old = datetime.now(UTC)-timedelta(days=100)
    seen,other = dict(designation='Piscine', text_sha256='a'*64, image_sha256='ab'*32), dict(image_sha256='cd'*32)
    rows = [answer(created_at=old, **seen) for _ in range(2)]+[answer(created_at=old, **other), answer(**seen)]
    for r in rows: store.add(r, b'image')
    store.correct(rows[0]['id'], 10, 'rita')
    expected = dict(answers=2, corrected=1, images=1)
    before = datetime.now(UTC)-timedelta(days=30)
    assert store.erase(before, dry_run=True) == expected
    assert store.get(rows[1]['id']) and store.image_path('cd'*32).exists()
    assert store.erase(before) == expected and store.erase(before) == dict(answers=0, corrected=0, images=0)
    assert store.get(rows[1]['id']) is store.get(rows[2]['id']) is None and not store.image_path('cd'*32).exists()
    left = store.get(rows[0]['id'])
    assert left.designation is left.facts is None and left.user == '' and store.image_path('ab'*32).exists()
    assert [(c.prdtypecode, c.designation, c.image) for c in store.verdicts()] == [(10, None, None)]
    assert store.erase(prediction_id=rows[3]['id']) == dict(answers=1, corrected=0, images=1)
    assert not store.image_path('ab'*32).exists()
    with pytest.raises(KeyError): store.erase(prediction_id='unknown')


def test_f74_database_is_private(tmp_path):
    with Store(f'sqlite:///{tmp_path}/new/feedback.db', tmp_path) as store:
        store.put_user('anna', 'x', 'predict')
        assert stat.S_IMODE((tmp_path/'new').stat().st_mode) == 0o700
        assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path/'new').iterdir()} == {0o600}


def postgres_process(url:str)->psutil.Process:
    "The process that all others of the PostgreSQL at `url` come from."
    port = url.split(':')[-1].split('/')[0]
    asked = lambda p: p.name() == 'postgres' and f'-p {port}' in ' '.join(p.cmdline())
    return next(p for p in psutil.process_iter() if asked(p))


def test_f54_frozen_database(postgres, tmp_path):
    "Statements end at their deadline, and all is well again when the database answers."
    main = postgres_process(postgres)
    with Store(postgres, tmp_path, deadline_s=2) as store:
        store.put_user('anna', 'x', 'predict')
        frozen = [main, *main.children()]
        for p in frozen: p.suspend()
        try:
            start = time.monotonic()
            with pytest.raises(OperationalError): store.users()
            assert time.monotonic()-start < 8 and store.problem
            store.add(answer())
        finally:
            for p in frozen: p.resume()
        assert [*store.users()] == ['anna'] and not store.problem
