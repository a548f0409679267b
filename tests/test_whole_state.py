"Faults 57, 58, 75 and 78: the registry is whole, whatever was killed, damaged, moved or lost."
import functools
import itertools
import json
import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from types import SimpleNamespace

import pytest
import sqlalchemy
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.store.db import utils as store

from rakuten_mm.cli.main import cli
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.models.manifest import BundleError, write_manifest
from rakuten_mm.registry import promotion
from rakuten_mm.registry.champion import history, move_champion, overview, rollback, rolled_back
from rakuten_mm.registry.promotion import Decision
from rakuten_mm.registry.versions import alias_version, register_bundle, resolve_model, resolve_training


def work_in(folder):
    "Let the registry in a folder be the one from now on."
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(folder)
    os.environ.pop('MLFLOW_TRACKING_URI', None)  # MLflow sets it


@pytest.fixture(scope='module')
def made(environment_of_the_module, tmp_path_factory):
    "An artifacts folder with three versions: 2 is champion, 1 was it before."
    home = tmp_path_factory.mktemp('made')
    work_in(home/'artifacts')
    (home/'bundle').mkdir()
    (home/'bundle'/'config.json').write_text('{"info": {"data_version": "d"}}')
    (home/'bundle'/'weights').write_bytes(bytes(200_000))
    write_manifest(home/'bundle')
    (home/'oof.parquet').write_bytes(b'folds')
    for _ in range(3):
        with tracked_run(name='made') as run: register_bundle(run, home/'bundle', home/'oof.parquet')
    move_champion(1, None, 'promote', 'the first')
    move_champion(2, 1, 'promote', 'better')
    return home/'artifacts'


@pytest.fixture
def artifacts(made, tmp_path):
    "A copy of it, to work in."
    shutil.copytree(made, tmp_path/'artifacts')
    work_in(tmp_path/'artifacts')
    return tmp_path/'artifacts'


@pytest.fixture
def judged_better(monkeypatch):
    "A gate that lets every version pass."
    def decision(comparison, version, champion, data_version):
        return Decision(True, 'it is better', version, champion, .9, .8, data_version, {}, {})
    monkeypatch.setattr(promotion, 'decision_tags', lambda d: {'promotion.promoted': 'true', 'promotion.reason': '"x"'})
    monkeypatch.setattr(promotion, 'compare', lambda *args: None)
    monkeypatch.setattr(promotion, 'decision_of', decision)
    monkeypatch.setattr(promotion, 'keep_decision', lambda *args, **kw: None)


DATA = SimpleNamespace(manifest={'version': 'd'})


def call(*args): return CliRunner().invoke(cli, ['registry', *map(str, args)])


def in_child(work)->int: # Its signal, or 0
    "Do something in a fork, which knows MLflow already."
    if not (pid := os.fork()):
        try: work(); os._exit(0)
        except BaseException as e: os.write(2, f'{type(e).__name__}: {e}\n'.encode())
        finally: os._exit(1)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def kill_at_write(n:int):
    "Let MLflow's `n`-th write from now on be preceded by a SIGKILL."
    left = iter(range(n))
    def killing(real):
        def write(self, *args, **kw):
            if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args, **kw)
        return write
    for name in dir(MlflowClient):
        if name.startswith(('set_', 'delete_')): setattr(MlflowClient, name, killing(getattr(MlflowClient, name)))


@pytest.fixture
def quick(monkeypatch):
    "Every copy is a database that MLflow has not seen; which revision is the latest it need not find out each time."
    latest = functools.cache(store._get_latest_schema_revision)
    monkeypatch.setattr(store, '_get_latest_schema_revision', latest)


def tags(version): return mlflow_client().get_model_version('rakuten-mm', str(version)).tags


def is_whole(champion, previous, action)->bool:
    "The aliases, the audit and the tags tell the same story."
    last,seen = history().iloc[-1], overview().set_index('version')
    return ((alias_version('champion'), alias_version('previous')) == (champion, previous)
            and (last.before, last.after, last.action) == (previous, champion, action)
            and [v for v in seen.index if 'champion' in seen.aliases[v].split()] == [champion]
            and not history().duplicated(['before', 'after', 'why']).any())


def killed_at_every_write(made, folder, work, check):
    "Kill `work` before each of its writes in turn, each time in a new copy, and look at what it left."
    for n in itertools.count():
        shutil.copytree(made, folder/str(n)); work_in(folder/str(n))
        killed = in_child(lambda n=n: (kill_at_write(n), work()))
        check(n)
        if not killed: return n
    return 0


def test_f58_promotion_killed_at_every_write(made, tmp_path, judged_better, quick):
    "It was made or was not, it can be taken back, and what was taken back is not promoted again."
    def check(n):
        listed = call('list')
        assert listed.exit_code == 0, listed.output
        assert is_whole(*((3, 2) if n else (2, 1)), 'promote'), n
        if not n: return
        assert json.loads(tags(3)['promotion.promoted']) is True
        assert 'promoted' in listed.output.splitlines()[1]
        assert call('rollback', '--why', 'after all').exit_code == 0
        assert is_whole(2, 3, 'rollback'), n
        assert rolled_back(3) == 'after all'
    assert killed_at_every_write(made, tmp_path, lambda: promotion.promote(3, DATA), check) == 7


def test_f58_rollback_killed_at_every_write(made, tmp_path, judged_better, quick):
    def check(n):
        if n: assert rolled_back(2) == 'wrong'  # asked first, in a process that knows nothing
        assert is_whole(*((1, 2, 'rollback') if n else (2, 1, 'promote'))), n
        if n: assert not promotion.promote(2, DATA)[0].promoted
        assert alias_version('champion') == (1 if n else 2)
    assert killed_at_every_write(made, tmp_path, lambda: rollback('wrong'), check) == 7


def test_f58_a_move_to_a_version_that_was_deleted_is_dropped(artifacts):
    in_child(lambda: (kill_at_write(1), move_champion(3, 2, 'promote', 'better')))
    mlflow = MlflowClient(f"sqlite:///{artifacts/'mlflow.db'}")
    mlflow.delete_model_version('rakuten-mm', '3')
    assert call('list').exit_code == 0
    assert alias_version('champion') == 2


def test_f58_killed_while_the_registry_is_made(tmp_path):
    "At some of the statements that make its tables, and before the file gets its name; the next start makes it."
    def make(n):
        left = iter(range(n))
        def execute(*args):
            if next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
        sqlalchemy.event.listen(sqlalchemy.engine.Engine, 'before_cursor_execute', execute)
        mlflow_client()
    work_in(tmp_path)
    assert [in_child(lambda n=n: make(n)) for n in (3, 90, 400)] == [signal.SIGKILL]*3
    assert not (tmp_path/'mlflow.db').exists()
    assert alias_version('champion') is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mlflow.db', 'mlflow.db.lock']


def size(folder): return sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())


def source(version): return Path(mlflow_client().get_model_version('rakuten-mm', str(version)).source[7:])


@pytest.mark.parametrize('alias', ['models:/rakuten-mm@champion', 'models:/rakuten-mm/2'])
def test_f57_attempts_at_a_damaged_champion_leave_nothing(artifacts, alias):
    (source(2)/'weights').write_bytes(bytes(199_999))
    sizes = []
    for _ in range(3):
        with pytest.raises(BundleError, match='artifacts/bundle: weights does not match'): resolve_model(alias)
        with pytest.raises(BundleError): resolve_training(2)
        sizes.append(size(artifacts))
    assert len(set(sizes)) == 1
    assert not list((artifacts/'models').iterdir())


def test_f57_attempts_at_damaged_folds_leave_nothing(artifacts):
    folds = source(2).parent/'training'/'oof.parquet'
    folds.write_bytes(b'other')
    for _ in range(3):
        with pytest.raises(BundleError, match='is not what was registered'): resolve_training(2)
    folds.unlink()
    with pytest.raises(FileNotFoundError, match='is gone'): resolve_training(2)
    bundle,_ = resolve_model('models:/rakuten-mm/2')
    assert [p.name for p in (artifacts/'models').rglob('*') if p.is_dir()] == [bundle.parent.name, 'v2']


def test_f57_what_a_killed_attempt_left_is_removed_by_the_next(artifacts, monkeypatch):
    def killed():
        monkeypatch.setattr('rakuten_mm.registry.versions.verify_manifest', lambda got: os.kill(os.getpid(), 9))
        resolve_model('models:/rakuten-mm/2')
    for _ in range(3): assert in_child(killed) == signal.SIGKILL
    assert len(left := list((artifacts/'models').iterdir())) == 1
    assert size(left[0]) > 200_000
    old = artifacts/'models'/'abc'/'.v2-left'; old.mkdir(parents=True)  # as they were called before
    resolve_model('models:/rakuten-mm/2')
    assert not list((artifacts/'models').rglob('.*'))


@pytest.mark.parametrize('how', ['copied', 'moved'])
def test_f75_artifacts_folder_elsewhere(made, tmp_path, how, judged_better):
    "Everything is found in the new place and written there, in one whose name has to be quoted."
    old,new = tmp_path/'old', tmp_path/'à b%20'/'artifacts'
    shutil.copytree(made, old); work_in(old); resolve_model('models:/rakuten-mm@champion')
    new.parent.mkdir()
    shutil.copytree(old, new) if how == 'copied' else old.rename(new)
    before = {p: p.stat().st_mtime_ns for p in old.rglob('*')}
    work_in(new)
    assert call('list').exit_code == 0
    for v in (1, 2, 3):
        assert resolve_model(f'models:/rakuten-mm/{v}')[0].is_relative_to(new)
        assert (resolve_training(v)/'oof.parquet').read_bytes() == b'folds'
    promotion.promote(3, DATA)
    assert call('rollback', '--why', 'x').exit_code == 0
    with tracked_run(name='new') as run: register_bundle(run, resolve_model('models:/rakuten-mm/1')[0])
    run = mlflow_client().get_model_version('rakuten-mm', '1').run_id
    (tmp_path/'note').write_text('x'); mlflow_client().log_artifact(run, str(tmp_path/'note'))
    assert len(list(new.rglob('note'))) == 1
    assert {p: p.stat().st_mtime_ns for p in old.rglob('*')} == before
    with closing(connect(new/'mlflow.db')) as c: assert str(old) not in '\n'.join(c.iterdump())


@pytest.mark.parametrize('command', [['list'], ['history'], ['rollback', '--why', 'x'], ['promote', '3', '.'],
                                     ['rollback', '--why', 'x', '--to', '1']], ids=' '.join)
@pytest.mark.parametrize('harm', ['down', 'torn', 'newer', 'gone', 'cut'])
def test_f75_f78_registry_that_cannot_be_asked(artifacts, command, harm, data_dir):
    "One line and exit code 1, from every command that reads it."
    db = artifacts/'mlflow.db'
    if harm == 'down': os.environ |= dict(MLFLOW_TRACKING_URI='http://127.0.0.1:9', MLFLOW_HTTP_REQUEST_MAX_RETRIES='0')
    elif harm == 'torn': db.write_bytes(b'SQLite format 3\0'+os.urandom(9_000))
    elif harm == 'gone': db.unlink()
    elif harm == 'cut': db.write_bytes(db.read_bytes()[:20_000])
    else:
        with closing(connect(db)) as c, c: c.execute("update alembic_version set version_num = 'ffffffffffff'")
    res = call(*[str(data_dir) if a == '.' else a for a in command])
    assert res.exit_code == 1 and isinstance(res.exception, SystemExit), res.exception
    assert len(res.output.strip().splitlines()) == 1, res.output


def test_f75_files_of_a_version_are_gone(artifacts, data_dir):
    shutil.rmtree(artifacts/'mlruns')
    res = call('promote', 3, data_dir)
    assert res.exit_code == 1 and 'is gone; restore it from a backup' in res.output
    assert len(res.output.strip().splitlines()) == 1
    assert call('list').exit_code == 0


def test_f78_database_deleted_while_it_is_used(artifacts):
    assert alias_version('champion') == 2
    (artifacts/'mlflow.db').unlink()
    with pytest.raises(OSError, match='restore it from a backup'): alias_version('champion')
