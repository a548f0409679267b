"Environment and artefacts that the tests share."
import os
import shutil
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from rakuten_mm.core.config import preset
from rakuten_mm.core.environment import load_environment
from serving.testing import running_server

ROOT = Path(__file__).parents[1]


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
    parser.addoption('--system', action='store_true',
                     help='Also run what starts the whole system or real pipeline runs, minutes each.')


LONG = 'test_server_life', 'test_pipelines', 'test_retraining' # Files that would keep one process busy after the others


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)  # long ones first; each file in its own order
    if config.getoption('--system'): return
    skip = pytest.mark.skip(reason='takes minutes; scripts/test.sh --system runs it')
    for item in items:
        if item.get_closest_marker('system'): item.add_marker(skip)


@pytest.fixture(scope='session', autouse=True)
def environment(tmp_path_factory):
    "Artifacts, ZenML's store and credentials of this session's own; the developer's `.env` is not read."
    scratch = tmp_path_factory.mktemp('session')
    graphs = shared_dir(tmp_path_factory)/'graphs'  # an encoder's takes a quarter of a minute to make
    os.environ |= dict(RAKUTEN_MM_ARTIFACTS=str(scratch/'artifacts'), ZENML_CONFIG_PATH=str(scratch/'zenml'),
                       RAKUTEN_MM_GRAPHS=str(graphs))
    for k in ('MLFLOW_TRACKING_URI', 'API_USERNAME', 'API_PASSWORD', 'RAKUTEN_MM_USE_HUB', 'RAKUTEN_MM_REMOTE',
              'RAKUTEN_MM_RAW'): os.environ.pop(k, None)
    load_environment(scratch/'no.env')


@contextmanager
def kept_environment():
    "Variables that are set inside end with it: MLflow, for one, puts the address of its registry there."
    before = dict(os.environ)
    try: yield
    finally: os.environ.clear(); os.environ.update(before)


@pytest.fixture(scope='module', autouse=True)
def environment_of_the_module(environment):
    "What a module's fixtures set ends with the module."
    with kept_environment(): yield


@pytest.fixture(autouse=True)
def restored_environment():
    "Notebooks and steps set variables and change folders; the next test must not notice."
    cwd = Path.cwd()
    with kept_environment(): yield
    os.chdir(cwd)


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
    def make(out):
        data = Dataset.open(data_dir)
        return export(fit(data, preset('smoke'), out, progress=False), data, out)
    return made_once(tmp_path_factory, 'training', make)


@pytest.fixture(scope='session')
def stack(environment):
    "ZenML's stack."
    import setup_stack
    with kept_environment(), chdir(ROOT): setup_stack.main()


@pytest.fixture(scope='session')
def server(bundle):
    "A server of `bundle`."
    with running_server(bundle) as served: yield served


@pytest.fixture(scope='session')
def page_server(bundle):
    "Another, for the page: what it answers waits for review."
    with running_server(bundle, API_KEEP_INPUTS='all') as served: yield served
