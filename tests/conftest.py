"Environment and artefacts that the tests share."
import base64
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from rakuten_mm.core.config import load_environment, preset

ROOT = Path(__file__).parents[1]
USER,PASSWORD = 'anna', 'pässword: ü'


def shared_dir(tmp_path_factory)->Path:
    "A folder that all processes of a test run have in common."
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base)/'shared'
    shared.mkdir(exist_ok=True)
    return shared


def made_once(tmp_path_factory, name:str, make)->Path:
    "What `make` writes into a folder, done by the first process that needs it while the others wait."
    folder = shared_dir(tmp_path_factory)/name
    with FileLock(f'{folder}.lock'):
        done = folder/'.done'
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True); folder.mkdir()  # of one that failed
            done.write_text(str(make(folder)))
    return Path(done.read_text())


def pytest_addoption(parser):
    parser.addoption('--system', action='store_true', help='Also run what starts the whole system or real pipeline runs, minutes each.')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--system'): return
    for item in items:
        if item.get_closest_marker('system'): item.add_marker(pytest.mark.skip(reason='takes minutes; scripts/test.sh --system runs it'))


@pytest.fixture(scope='session', autouse=True)
def environment(tmp_path_factory):
    "Artifacts, ZenML's store and credentials of this session's own; the developer's `.env` is not read."
    scratch = tmp_path_factory.mktemp('session')
    graphs = shared_dir(tmp_path_factory)/'graphs'  # an encoder's takes a quarter of a minute to make
    os.environ |= dict(RAKUTEN_MM_ARTIFACTS=str(scratch/'artifacts'), ZENML_CONFIG_PATH=str(scratch/'zenml'), RAKUTEN_MM_GRAPHS=str(graphs))
    for k in ('MLFLOW_TRACKING_URI', 'API_USERNAME', 'API_PASSWORD', 'RAKUTEN_MM_USE_HUB', 'RAKUTEN_MM_REMOTE', 'RAKUTEN_MM_RAW'): os.environ.pop(k, None)
    load_environment(scratch/'no.env')


@pytest.fixture(autouse=True)
def restored_environment():
    "Notebooks and steps set variables and change folders; the next test must not notice."
    before,cwd = dict(os.environ), os.getcwd()
    yield
    os.environ.clear(); os.environ.update(before); os.chdir(cwd)


@pytest.fixture(scope='session')
def raw(environment, tmp_path_factory):
    "A synthetic delivery; read only, as all that is made once."
    from rakuten_mm.synthetic.catalogue import synthesize
    return made_once(tmp_path_factory, 'delivery', lambda d: synthesize(d/'raw', 500, 40, progress=False))


@pytest.fixture(scope='session')
def data_dir(raw, tmp_path_factory):
    "The delivery, ingested."
    from rakuten_mm.data.ingestion import ingest
    def make(folder): ingest(raw, folder/'data', progress=False); return folder/'data'
    return made_once(tmp_path_factory, 'dataset', make)


@pytest.fixture(scope='session')
def bundle(data_dir, tmp_path_factory):
    "A small fused model."
    from rakuten_mm.data.dataset import Dataset
    from rakuten_mm.training.export import export, fit
    def make(out): data = Dataset.open(data_dir); return export(fit(data, preset('smoke'), out, progress=False), data, out)
    return made_once(tmp_path_factory, 'training', make)


@pytest.fixture(scope='session')
def stack(environment):
    "ZenML's stack."
    subprocess.run([sys.executable, 'scripts/setup_stack.py'], cwd=ROOT, check=True)


class Served:
    "A server process and how to reach it."
    def __init__(self, url:str, process:subprocess.Popen, log:Path, database:str):
        self.url,self.process,self.log,self.database,self.user,self.password = url,process,log,database,USER,PASSWORD

    def family(self)->list:
        "The process and all below it."
        import psutil
        p = psutil.Process(self.process.pid)
        return [p, *p.children(recursive=True)]

    def worker(self):
        "The process that runs the model."
        return next(p for p in self.family() if 'spawn_main' in ' '.join(p.cmdline()))

    def http(self, **kw):
        "A client with the right credentials."
        import httpx
        return httpx.Client(base_url=self.url, headers=dict(authorization=basic(USER, PASSWORD)), timeout=60, **kw)

    def metric(self, name:str)->float:
        "The sum of a figure of /metrics."
        lines = [l for l in self.http().get('/metrics').text.splitlines() if l.split('{')[0].split(' ')[0] == name]
        return sum(float(l.rsplit(' ', 1)[1]) for l in lines)


def basic(user:str, password:str)->str:
    "A value of the `Authorization` header."
    return 'Basic '+base64.b64encode(f'{user}:{password}'.encode()).decode()


@contextmanager
def running_server(model, command=(sys.executable, '-m', 'rakuten_mm', 'serve', '--model', '{model}', '--port', '{port}'), end=True, **env):
    "A real server process for a bundle or a registered version, with a database of its own."
    from serve_once import free_port, wait_ready
    port,home = free_port(8080), Path(tempfile.mkdtemp(prefix='served-'))
    env = dict(API_USERNAME=USER, API_PASSWORD=PASSWORD, API_DATABASE_URL=f"sqlite:///{home/'feedback.db'}", API_RATE='1000000/minute',
               API_FAILED_LOGINS='1000000/minute') | env
    with open(home/'log', 'w') as log:
        process = subprocess.Popen([c.format(model=model, port=port) for c in command], env=os.environ | env, stdout=log, stderr=subprocess.STDOUT)
    served = Served(f'http://127.0.0.1:{port}', process, home/'log', env['API_DATABASE_URL'])
    try:
        wait_ready(served.url, process)
        yield served
    finally:
        process.terminate()
        code = process.wait(40)
    assert code == 0 or not end, served.log.read_text()[-3000:]


@pytest.fixture(scope='session')
def server(bundle):
    "A server of `bundle`."
    with running_server(bundle) as served: yield served


@pytest.fixture(scope='session')
def page_server(bundle):
    "Another, for the page: what it answers waits for review."
    with running_server(bundle, API_KEEP_INPUTS='all') as served: yield served
