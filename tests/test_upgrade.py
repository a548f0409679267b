"From 0.1.0 to this version: what its code left is moved, served, corrected and added to."
import os
import re
import subprocess
import sys
import tarfile
from io import BytesIO

import pytest
from conftest import ROOT
from test_backup import backup

from serving.testing import running_server

LAST = '6183bfd' # The last commit of 0.1.0
USE = """if 1:
    import sys, httpx
    url,user,password,title = sys.argv[1:]
    with httpx.Client(base_url=url, auth=(user, password), timeout=60) as c:
        a = c.post('/predict', json=dict(designation=title)).raise_for_status().json()
        c.post('/feedback', json=dict(prediction_id=a['prediction_id'], prdtypecode=2583)).raise_for_status()"""


@pytest.fixture(scope='module')
def old(tmp_path_factory):
    "The checkout of then; its code runs with the packages of now."
    r = subprocess.run(['git', 'archive', LAST], cwd=ROOT, capture_output=True)
    if r.returncode: pytest.skip('the history of the repository is not here')
    folder = tmp_path_factory.mktemp('old')
    with tarfile.open(fileobj=BytesIO(r.stdout)) as t: t.extractall(folder, filter='data')
    return folder


def rakuten_mm(code, home, *args):
    "Run the command line of a checkout for a home; what it prints."
    env = os.environ | dict(PYTHONPATH=str(code), RAKUTEN_MM_ARTIFACTS=str(home/'artifacts'), HF_HUB_OFFLINE='1')
    r = subprocess.run([sys.executable, '-m', 'rakuten_mm', *map(str, args)], cwd=home, env=env, capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stdout+r.stderr
    return r.stdout


def serve(code, home):
    "A server of a checkout that keeps what it is asked in the database of a home."
    return running_server(home=home, PYTHONPATH=str(code), RAKUTEN_MM_ARTIFACTS=str(home/'artifacts'),
                          API_DATABASE_URL='', API_KEEP_INPUTS='all')


@pytest.mark.system
def test_from_0_1_0(old, tmp_path):
    home,new,data = tmp_path/'home', tmp_path/'new', 'data/catalogue'
    home.mkdir()
    for args in (['synthesize', 'raw', '--rows', 200, '--test-rows', 0, '--image-size', 24], ['ingest', 'raw', data],
                 ['train', data, '--preset', 'smoke', '--out', 'trained']): rakuten_mm(old, home, *args)
    with serve(old, home) as s:
        subprocess.run([sys.executable, '-c', USE, s.url, s.user, s.password, 'Piscine ronde'], check=True)
    assert 'champion' in rakuten_mm(old, home, 'registry', 'list')
    assert '0.1.0' in rakuten_mm(old, home, '--version')
    assert backup('save', tmp_path/'backup', home)[0] == 0 and backup('restore', tmp_path/'backup', new)[0] == 0
    home.rename(tmp_path/'away')

    assert 'champion' in rakuten_mm(ROOT, new, 'registry', 'list')
    assert 'all files are what they were' in rakuten_mm(ROOT, new, 'data', 'verify', data)
    with serve(ROOT, new) as s:
        subprocess.run([sys.executable, '-c', USE, s.url, s.user, s.password, 'Livre'], check=True)
        assert s.ready()['status'] == 'ready'
    from serving.store import Store
    with Store(f"sqlite:///{new/'artifacts'/'feedback.db'}", new/'artifacts'/'served') as store:
        assert [(c.designation, c.prdtypecode) for c in store.verdicts()] == [('Piscine ronde', 2583), ('Livre', 2583)]
    rakuten_mm(ROOT, new, 'synthesize', 'raw2', '--rows', 60, '--test-rows', 0, '--image-size', 24, '--seed', 7)
    rakuten_mm(ROOT, new, 'ingest', 'raw2', data)
    assert len(set(re.findall(r'\b[0-9a-f]{16}\b', rakuten_mm(ROOT, new, 'data', 'list', data)))) == 2
