"The database of answers and corrections, in SQLite and in a real PostgreSQL."
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from serving.store import DRIFT_COLUMNS, Base, Feedback, Store, open_database, verdict
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
    threads = [Thread(target=open_database, args=(url,)) for _ in range(1 if url.startswith('sqlite') else 3)]
    for t in threads: t.start()
    for t in threads: t.join()
    found = inspect(open_database(url))
    for name,table in Base.metadata.tables.items():
        columns = {c['name']: c['nullable'] for c in found.get_columns(name)}
        assert columns == {c.name: c.nullable for c in table.columns}, name
        assert {i['name'] for i in found.get_indexes(name)} == {i.name for i in table.indexes}, name


def test_answers_are_written_and_found(store):
    rows = [answer(usefulness=u) for u in (.2, .9, .5)]+[answer('auto'), answer(has_inputs=0)]
    for r in rows: store.add(r)
    queue,waiting = store.queue()
    assert [q.usefulness for q in queue] == [.9, .5, .2] and waiting == 3
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
    open_database(url).dispose()
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
    store.waiting.join()
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
    store.waiting.join()
    assert store.dropped == 10
    store.close()


def test_verdict():
    said = lambda *pairs: [Feedback(reviewer=r, prdtypecode=c) for r,c in pairs]
    assert verdict([]) is None and verdict(said(('a', 1))) == 1 and verdict(said(('a', 1), ('b', 2))) is None
    assert verdict(said(('a', 1), ('b', 2), ('a', 2))) == 2 and verdict(said(('a', 1), ('b', 1), ('c', 2))) == 1
