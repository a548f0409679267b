"Library and research notebooks run top to bottom in a fresh namespace: the examples are the library's unit tests."
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config()
nbs = [p for kind in ('lib', 'research') for p in sorted(nbglob(cfg.nbs_path/kind, as_path=True))]
nbs += [cfg.nbs_path/'index.ipynb']


def marked(nb):
    "What a research notebook trains takes minutes in all."
    return pytest.param(nb, id=nb.stem, marks=[pytest.mark.system]*(nb.parent.name == 'research'))


@pytest.mark.parametrize('nb', map(marked, nbs))
def test_notebook(nb):
    ok,_ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    assert ok


def test_outputs_name_no_machine():
    "Stored outputs hold neither paths of this checkout nor warnings of installed packages."
    machine = f'{cfg.config_path}/', 'site-packages/'
    texts = {p.name: p.read_text(encoding='utf-8') for p in nbglob(cfg.nbs_path, as_path=True)}
    found = [name for name,text in texts.items() if any(x in text for x in machine)]
    assert not found, f'{", ".join(found)}: run with no warnings, or clear these outputs'
