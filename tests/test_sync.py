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
    anywhere = shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', '__pycache__', '.zen', '.ipynb_checkpoints')
    skip = lambda folder, names: anywhere(folder, names) | ({'artifacts', 'data'} if folder == str(ROOT) else set())
    shutil.copytree(ROOT, repo, ignore=skip)
    for cmd in ('nbdev_export', 'nbdev_clean'): subprocess.run([cmd], cwd=repo, check=True)
    return repo


def test_export_and_clean_change_nothing(copy):
    changed = [p.relative_to(copy) for p in copy.rglob('*') if p.suffix in ('.py', '.ipynb') and p.read_bytes() != (ROOT/p.relative_to(copy)).read_bytes()]
    assert not changed


def test_documentation_and_readme(copy):
    """Every notebook has its page, and README.md is what nbs/index.ipynb says.

    Cells are not executed, which takes most of two minutes: the tests of the notebooks do, and `test_imports_stand_alone` says what differs.
    """
    settings = (copy/'settings.ini').read_text()
    (copy/'settings.ini').write_text(settings.replace('tst_flags =', 'skip_procs = exec_show_docs\ntst_flags =', 1))
    try: subprocess.run([sys.executable, 'scripts/build_docs.py'], cwd=copy, check=True, capture_output=True)
    finally: (copy/'settings.ini').write_text(settings)
    assert (copy/'README.md').read_text() == (ROOT/'README.md').read_text(), 'run python scripts/build_docs.py --readme'
    pages = {p.relative_to(copy/'_docs').as_posix() for p in (copy/'_docs').rglob('*.html')}
    name = lambda p: (p.stem.split('_', 1)[-1] if p.stem[:1].isdigit() else p.stem)+'.html'
    want = {p.relative_to(ROOT/'nbs').with_name(name(p)).as_posix() for p in NOTEBOOKS}
    assert pages == want


def test_documented_symbols(tmp_path):
    "A page shows the signatures of what its notebook exports."
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import exec_nb
    exec_nb(ROOT/'nbs'/'lib'/'data'/'00_taxonomy.ipynb', tmp_path/'page.ipynb', FilterDefaults)
    cell = next(c for c in nbformat.read(tmp_path/'page.ipynb', as_version=4).cells if 'show_doc(Category)' in c.source)
    assert 'code:int, fr:str, en:str' in cell.outputs[0].data['text/markdown']


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if 'lib' in p.parts], ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "nbdev runs every cell with an import when it makes a page, and not the cells before it: such a cell must not need them."
    for cell in (c for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code'):
        directives = [l.split('|')[1].strip() for l in cell.source.splitlines() if l.startswith('#|')]
        if {'export', 'exports', 'exporti'} & {d.split()[0] for d in directives} or 'eval: false' in directives: continue
        body = ast.parse('\n'.join(l for l in cell.source.splitlines() if not l.startswith(('%', '!')))).body
        if any(isinstance(n, ast.Import|ast.ImportFrom) for statement in body for n in ast.walk(statement)):
            assert not [n.lineno for n in body if not isinstance(n, ast.Import|ast.ImportFrom)], f'an import stands among other code:\n{cell.source}'


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
