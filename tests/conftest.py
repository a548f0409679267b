"Environment and artefacts that the tests share."
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from rakuten_mm.config import load_environment, preset

ROOT = Path(__file__).parents[1]
USER,PASSWORD = 'anna', 'pässword: ü'


@pytest.fixture(scope='session', autouse=True)
def environment(tmp_path_factory):
    "Artifacts, ZenML's store and credentials of this session's own; the developer's `.env` is not read."
    scratch = tmp_path_factory.mktemp('session')
    os.environ |= dict(RAKUTEN_MM_ARTIFACTS=str(scratch/'artifacts'), ZENML_CONFIG_PATH=str(scratch/'zenml'), RAKUTEN_MM_GRAPHS=str(scratch/'graphs'))
    for k in ('MLFLOW_TRACKING_URI', 'API_USERNAME', 'API_PASSWORD', 'RAKUTEN_MM_USE_HUB'): os.environ.pop(k, None)
    load_environment(scratch/'no.env')


@pytest.fixture(autouse=True)
def restored_environment():
    "Notebooks and steps set variables and change folders; the next test must not notice."
    before,cwd = dict(os.environ), os.getcwd()
    yield
    os.environ.clear(); os.environ.update(before); os.chdir(cwd)


@pytest.fixture(scope='session')
def raw(environment, tmp_path_factory):
    "A synthetic delivery."
    from rakuten_mm.synthetic import synthesize
    return synthesize(tmp_path_factory.mktemp('delivery')/'raw', 500, 40, progress=False)


@pytest.fixture(scope='session')
def data_dir(raw, tmp_path_factory):
    "The delivery, ingested."
    from rakuten_mm.ingestion import ingest
    folder = tmp_path_factory.mktemp('dataset')
    ingest(raw, folder, progress=False)
    return folder


@pytest.fixture(scope='session')
def bundle(data_dir, tmp_path_factory):
    "A small fused model."
    from rakuten_mm.dataset import Dataset
    from rakuten_mm.training import export, fit
    out,data = tmp_path_factory.mktemp('bundle'), Dataset.open(data_dir)
    return export(fit(data, preset('smoke'), out, progress=False), data, out)


@contextmanager
def running_server(model):
    "Address of a real server process for a bundle or a registered version."
    from serve_once import free_port, wait_ready
    port = free_port(8080)
    env = os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD)
    process = subprocess.Popen([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(model), '--port', str(port)], env=env)
    url = f'http://127.0.0.1:{port}'
    try:
        wait_ready(url, process)
        yield url
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope='session')
def server(bundle):
    "Address of a server of `bundle`."
    with running_server(bundle) as url: yield url
