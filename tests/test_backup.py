"Backups, tried by restoring them: what was there is there again, and what is damaged is not taken for whole."
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
from contextlib import closing
from datetime import UTC, datetime

import pytest
from conftest import ROOT
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from test_store import postgres  # noqa: F401

from serving.store import Store


def backup(what, folder, home, **env):
    "scripts/backup.py in a process; its exit code and what it says."
    command = [sys.executable, ROOT/'scripts'/'backup.py', what, str(folder), '--home', str(home)]
    r = subprocess.run(command, env=os.environ | {'API_DATABASE_URL': ''} | env, capture_output=True, text=True)
    return r.returncode, r.stdout+r.stderr


def an_answer(id:str)->dict:
    return dict(id=id, created_at=datetime.now(UTC), user='ann', model_version='rakuten-mm/3', prdtypecode=2583,
                probability=.9, lane='review', usefulness=.2, top_k=[], candidates=[2583], modalities=['text'],
                text_sha256='t'*64, image_sha256='', has_inputs=1, designation='Piscine', description='',
                facts={}, sketch=[0.]*8, probs=[.9])


def record(store, ids):
    "Answers, and a correction of the first."
    for id in ids: store.add(an_answer(id))
    store.flush()
    store.correct(ids[0], 1280, 'bea')


@pytest.fixture
def system(tmp_path):
    "A home as a system leaves it, with databases that are open and have a write-ahead log."
    home = tmp_path/'home'
    for name in ('data/catalogue/v1/images/a.jpg', 'artifacts/mlflow/artifacts/1/model/weights.bin',
                 'artifacts/served/ab/abc.jpg', 'artifacts/graphs/can-be-made-again.onnx', 'artifacts/up/up.log'):
        path = home/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(3_000))
    (home/'data'/'catalogue'/'CURRENT').write_text('v1\n')
    (home/'.env').write_text('API_PASSWORD=a-secret\n'); (home/'.env').chmod(0o600)
    runs = sqlite3.connect(home/'artifacts'/'mlflow'/'mlflow.db')
    runs.execute('pragma journal_mode=wal'); runs.execute('create table runs (name)'); runs.commit()
    runs.execute("insert into runs values ('champion')"); runs.commit()
    runs.execute("insert into runs values ('not committed')")
    with Store(f"sqlite:///{home/'artifacts'/'feedback.db'}", home/'artifacts'/'served') as store, closing(runs):
        record(store, ['p1', 'p2'])
        assert (home/'artifacts'/'mlflow'/'mlflow.db-wal').stat().st_size
        yield home


def test_what_was_saved_while_it_was_in_use_is_there_again(system, tmp_path):
    folder,home = tmp_path/'backup', tmp_path/'elsewhere'
    assert backup('save', folder, system) == (0, f'saved: {folder}\n')
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert backup('restore', folder, home) == (0, f'restored: {folder}\n')
    there = {str(p.relative_to(home)) for p in home.rglob('*') if p.is_file()}
    assert there == {'.env', 'data/catalogue/CURRENT', 'data/catalogue/v1/images/a.jpg', 'artifacts/feedback.db',
                     'artifacts/mlflow/mlflow.db', 'artifacts/mlflow/artifacts/1/model/weights.bin',
                     'artifacts/served/ab/abc.jpg'}
    same = [n for n in there if not n.endswith('.db')]
    assert all((home/n).read_bytes() == (system/n).read_bytes() for n in same)
    assert all((home/n).stat().st_mtime == pytest.approx((system/n).stat().st_mtime, abs=1) for n in same)
    assert all(stat.S_IMODE((home/n).stat().st_mode) == 0o600 for n in ('.env', 'artifacts/feedback.db'))
    with closing(sqlite3.connect(home/'artifacts'/'mlflow'/'mlflow.db')) as c:
        assert c.execute('select name from runs').fetchall() == [('champion',)]
    with Store(f"sqlite:///{home/'artifacts'/'feedback.db'}", home/'artifacts'/'served') as store:
        assert store.get('p2').designation == 'Piscine' and not store.problem
        assert [f.prdtypecode for f in store.corrections(['p1'])['p1']] == [1280]
        record(store, ['p3'])


def test_it_neither_overwrites_nor_takes_half_for_whole(system, tmp_path):
    folder = tmp_path/'backup'
    assert backup('save', folder, system)[0] == 0
    assert backup('save', folder, system) == (1, f"[Errno 17] File exists: '{folder}'\n")
    code,said = backup('restore', folder, system)
    assert code == 1 and 'not empty' in said and (system/'data'/'catalogue'/'CURRENT').read_text() == 'v1\n'
    tar,whole = folder/'files.tar', (folder/'files.tar').read_bytes()
    at = whole.index((system/'artifacts'/'served'/'ab'/'abc.jpg').read_bytes())
    tar.write_bytes(whole[:at]+b'?'+whole[at+1:])
    code,said = backup('restore', folder, tmp_path/'changed')
    assert code == 1 and 'not whole, or was changed' in said
    tar.write_bytes(whole[:len(whole)//2])
    assert backup('restore', folder, tmp_path/'half') == (1, 'unexpected end of data\n')
    with tarfile.open(tar, 'w') as t: t.add(system/'.env', 'data/../../outside')
    code,said = backup('restore', folder, tmp_path/'crafted')
    assert code == 1 and 'is in no backup' in said and not (tmp_path/'outside').exists()


def test_a_damaged_database_is_not_saved_as_if_it_was_well(system, tmp_path):
    db = system/'artifacts'/'mlflow'/'basic_auth.db'
    with closing(sqlite3.connect(db)) as c:
        c.execute('create table users (name)'); c.executemany('insert into users values (?)', [('u'*500,)]*100)
        c.commit()
    with db.open('r+b') as f: f.seek(4096*3); f.write(b'\xff'*4096)
    code,said = backup('save', tmp_path/'backup', system)
    assert code == 1 and 'basic_auth.db' in said


@pytest.mark.skipif(not shutil.which('pg_dump'), reason='pg_dump is not installed (Debian: postgresql-client)')
def test_answers_in_postgresql(postgres, system, tmp_path):  # noqa: F811
    "Into another database: rows, sequence and the trigger that forbids changes come along; no password is shown."
    first,second = postgres.replace('/postgres', '/first'), postgres.replace('/postgres', '/second')
    with create_engine(postgres, isolation_level='AUTOCOMMIT').connect() as c:
        for name in ('first', 'second'): c.execute(text(f'create database {name}'))
    with Store(first, tmp_path/'served') as store: record(store, ['p1', 'p2'])
    folder = tmp_path/'backup'
    assert backup('save', folder, system, API_DATABASE_URL=first)[0] == 0
    assert stat.S_IMODE((folder/'answers.dump').stat().st_mode) == 0o600
    assert backup('restore', folder, tmp_path/'elsewhere', API_DATABASE_URL=second)[0] == 0
    with Store(second, tmp_path/'served') as store:
        assert store.get('p2').designation == 'Piscine'
        record(store, ['p3'])
        assert sum(len(f) for f in store.corrections(['p1', 'p3']).values()) == 2
    with create_engine(second).connect() as c, pytest.raises(DBAPIError, match='only added'):
        c.execute(text('delete from feedback'))
    code,said = backup('restore', folder, tmp_path/'third')
    assert code == 1 and 'name an empty one in API_DATABASE_URL' in said
    gone = postgres.replace('rakuten@', 'rakuten:secret-word@').replace('/postgres', '/gone')
    code,said = backup('save', tmp_path/'other', system, API_DATABASE_URL=gone)
    assert code == 1 and 'pg_dump ended with 1' in said and 'secret-word' not in said
