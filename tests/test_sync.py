"The library equals what the notebooks export, the notebooks are clean, and the README is what the index says."
import ast
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The working tree, exported and cleaned."
    repo = tmp_path_factory.mktemp('copy')/'repo'
    skip = shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', '__pycache__', 'artifacts', 'data', '.zen', '.ipynb_checkpoints')
    shutil.copytree(ROOT, repo, ignore=skip)
    for cmd in ('nbdev_export', 'nbdev_clean'): subprocess.run([cmd], cwd=repo, check=True)
    return repo


def test_export_and_clean_change_nothing(copy):
    changed = [p.relative_to(copy) for p in copy.rglob('*') if p.suffix in ('.py', '.ipynb') and p.read_bytes() != (ROOT/p.relative_to(copy)).read_bytes()]
    assert not changed


def test_documentation_and_readme(copy):
    "Every notebook has its page, and README.md is what nbs/index.ipynb says."
    subprocess.run([sys.executable, 'scripts/build_docs.py'], cwd=copy, check=True, capture_output=True)
    assert (copy/'README.md').read_text() == (ROOT/'README.md').read_text(), 'run python scripts/build_docs.py --readme'
    pages = {p.relative_to(copy/'_docs').as_posix() for p in (copy/'_docs').rglob('*.html')}
    name = lambda p: (p.stem.split('_', 1)[-1] if p.stem[:1].isdigit() else p.stem)+'.html'
    want = {p.relative_to(ROOT/'nbs').with_name(name(p)).as_posix() for p in NOTEBOOKS}
    assert pages == want


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_a_kernel(path):
    "papermill needs the kernel's name and language."
    assert nbformat.read(path, as_version=4).metadata.kernelspec.items() >= {'name': 'python3', 'language': 'python'}.items()


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if 'runs' in p.parts], ids=lambda p: p.stem)
def test_f43_parameters_tag(path):
    "nbdev_clean removes the tag unless settings.ini keeps it; without it papermill's values are overwritten by the defaults."
    tagged = [c for c in nbformat.read(path, as_version=4).cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1
    assert {'run_id', 'out_dir'} <= {n.target.id for n in ast.parse(tagged[0].source).body if isinstance(n, ast.AnnAssign)}
