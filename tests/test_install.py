"The wheel, installed into empty environments away from the checkout: it is the library, and what needs more says so."
import importlib.metadata as md
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SITE = Path(sysconfig.get_path('purelib')) # What these tests run with
HEAVY = {'torch', 'mlflow', 'zenml', 'pytorch-lightning', 'transformers', 'litserve', 'pandas', 'numpy'}


def requirements(name:str, extras:set[str], wheel:Path)->list[Requirement]:
    "What a distribution asks for, by itself and with extras; of ours, what the wheel says."
    path = [str(wheel)] if name == 'rakuten-mm' else sys.path
    lines = next(iter(md.distributions(name=name, path=path))).requires or []
    wanted = lambda r: r.marker is None or any(r.marker.evaluate({'extra': e}) for e in {'', *extras})
    return [r for r in map(Requirement, lines) if wanted(r)]


def needed(extra:str, wheel:Path)->set[str]:
    "Names of all that `pip install rakuten-mm[extra]` brings, found among what is installed here."
    seen,todo = set(), [('rakuten-mm', frozenset({extra}))]
    while todo:
        if (this := todo.pop()) in seen: continue
        seen.add(this)
        todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(*this, wheel)]
    return {name for name,_ in seen}-{'rakuten-mm'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy, because setuptools leaves a build folder behind that later wheels would be filled from."
    source,out = tmp_path_factory.mktemp('source')/'rakuten-mm', tmp_path_factory.mktemp('wheel')
    source.mkdir()
    for name in ('rakuten_mm', 'serving', 'zenml_pipelines'):
        shutil.copytree(ROOT/name, source/name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, source)
    pip('wheel', source, '--no-build-isolation', '--wheel-dir', out)
    return next(out.glob('*.whl'))


def pip(*args):
    subprocess.run([sys.executable, '-m', 'pip', *map(str, args), '--quiet', '--no-deps', '--no-index'], check=True)


def environment(wheel:Path, folder:Path)->Path:
    "A new environment with the wheel in it and nothing else; returns its folder for packages."
    venv.create(folder)
    pip('--python', folder/'bin'/'python', 'install', wheel)
    return next(folder.glob('lib/python*/site-packages'))


@pytest.fixture(scope='module')
def client_only(wheel, tmp_path_factory):
    "`pip install rakuten-mm[client]`: packages are linked from those of this environment, so nothing is downloaded."
    folder = tmp_path_factory.mktemp('client')
    site = environment(wheel, folder)
    for name in needed('client', wheel):
        for top in {f.parts[0] for f in md.files(name) if '..' not in f.parts}:
            if not (site/top).exists(): (site/top).symlink_to(SITE/top)
    return folder


@pytest.fixture(scope='module')
def everything(wheel, tmp_path_factory):
    "`pip install rakuten-mm[dev]` away from the checkout: it sees the packages here, but not the path to the checkout."
    folder = tmp_path_factory.mktemp('everything')
    (environment(wheel, folder)/'all.pth').write_text(f'{SITE}\n')
    return folder


def run(folder:Path, *args, cwd:Path, **env)->subprocess.CompletedProcess:
    "What a command of an environment says, in an empty folder."
    keep = {k: v for k,v in os.environ.items() if not k.startswith('PYTHON')}
    command = [folder/'bin'/args[0], *args[1:]]
    return subprocess.run([*map(str, command)], cwd=cwd, env=keep | env, capture_output=True, text=True, timeout=120)


def test_the_wheel_is_the_library(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0] for n in names if '.dist-info/' not in n} == {'rakuten_mm'}
    files = {p for p in (ROOT/'rakuten_mm').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert ROOT/'rakuten_mm'/'py.typed' in files
    assert {p.relative_to(ROOT).as_posix() for p in files} <= {*names}


def test_extras_are_what_they_say(wheel):
    "The client brings nothing heavy, and `dev` is all extras together."
    assert not needed('client', wheel) & HEAVY
    assert {'torch', 'mlflow', 'litserve'} <= needed('serve', wheel)
    assert not {'zenml', 'pytorch-lightning'} & needed('serve', wheel)
    text = lambda *extras: {str(r).split(';')[0] for r in requirements('rakuten-mm', {*extras}, wheel)}
    assert text('client', 'serve', 'train', 'pipelines') < text('dev')


def test_client_stands_alone(client_only, tmp_path):
    code = ('import sys, rakuten_mm; from rakuten_mm.client import AsyncClient, Client; Client("http://127.0.0.1:1");'
            'print(rakuten_mm.__version__, *{"torch", "mlflow", "zenml", "numpy"}.intersection(sys.modules))')
    said = run(client_only, 'python', '-c', code, cwd=tmp_path)
    assert said.stdout.split() == [md.version('rakuten-mm')], said.stderr


@pytest.mark.parametrize('args', [['--help'], ['--version'], ['predict', '--help'], ['train', '--help']], ids=' '.join)
def test_help_needs_no_extra(client_only, tmp_path, args):
    said = run(client_only, 'rakuten-mm', *args, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert 'rakuten-mm' in said.stdout


def test_a_missing_extra_is_named(client_only, tmp_path):
    said = run(client_only, 'rakuten-mm', 'synthesize', 'raw', cwd=tmp_path)
    assert said.returncode == 1
    assert 'rakuten-mm[train]' in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_predict_away_from_the_checkout(everything, bundle, raw, tmp_path):
    listings = '--products', raw/'X_test_update.csv', '--images', raw/'images'/'image_test'
    said = run(everything, 'rakuten-mm', 'predict', '--bundle', bundle, *listings, '--out', 'codes.csv', cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert len((tmp_path/'codes.csv').read_text().splitlines()) == 41


@pytest.mark.parametrize('args', [['serve'], ['users', 'list'], ['scheduler', 'run'], ['runs']], ids=' '.join)
def test_what_needs_the_checkout_says_so(everything, tmp_path, args):
    said = run(everything, 'rakuten-mm', *args, cwd=tmp_path)
    assert said.returncode != 0
    assert 'needs a checkout' in said.stderr
    assert len(said.stderr.splitlines()) == 1
