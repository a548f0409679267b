"Every library notebook runs top to bottom in a fresh namespace: its examples are the library's unit tests."
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config()
nbs = [*sorted(nbglob(cfg.nbs_path/'lib', as_path=True)), cfg.nbs_path/'index.ipynb']


@pytest.mark.parametrize('nb', nbs, ids=lambda p: p.stem)
def test_notebook(nb):
    ok,_ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    assert ok
