"A registered bundle is a model to MLflow as well."
import base64
import shutil
import subprocess
import sys
import time

import httpx
import mlflow
import pandas as pd
import pytest
from conftest import ROOT

from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.bundle import EXAMPLE
from rakuten_mm.registry.versions import MODEL, register_bundle, resolve_model
from serving.testing import free_port

ALIAS = 'asked-through-mlflow'


@pytest.fixture(scope='module')
def registered(bundle):
    "The address of a registered bundle."
    with tracked_run(name='test') as run: version = register_bundle(run, bundle)
    mlflow_client().set_registered_model_alias(MODEL, ALIAS, str(version))
    return f'models:/{MODEL}@{ALIAS}'


@pytest.fixture(scope='module')
def listings(data_dir):
    "Some listings as MLflow takes them, with pictures and without."
    data = Dataset.open(data_dir)
    rows = data.products[data.products.split == 'test'].head(40)
    image = [base64.b64encode((data.images_dir/n).read_bytes()).decode() if n else None for n in rows.image]
    return pd.DataFrame(dict(designation=rows.designation, description=rows.description, image=image))


def test_answers_are_those_of_the_server(registered, listings, server):
    answers = mlflow.pyfunc.load_model(registered).predict(listings)
    assert answers.error.isna().all()
    for asked,said in zip(listings.to_dict('records'), answers.to_dict('records'), strict=True):
        r = server.ask(**{k: v for k,v in asked.items() if isinstance(v, str)}).json()
        assert (r['prdtypecode'], r['label'], r['lane']) == (said['prdtypecode'], said['label'], said['lane'])
        assert r['probability'] == pytest.approx(said['probability'], abs=1e-5)


def test_what_mlflow_fetched_is_still_the_bundle(registered):
    "Our own way to it finds nothing added."
    bundle,version = resolve_model(registered)
    model = mlflow.pyfunc.load_model(registered)
    assert model.metadata.get_input_schema().input_names() == ['designation', 'description', 'image']
    assert not list(bundle.rglob('*.pkl')) and version.startswith(MODEL)


def test_damage_is_found(registered, bundle, tmp_path):
    bad = shutil.copytree(bundle, tmp_path/'bad')
    f = bad/'weights.safetensors'; f.write_bytes(f.read_bytes()[:-1]+b'\x7f')
    with pytest.raises(ValueError, match='does not match its checksum'): mlflow.pyfunc.load_model(str(bad))


def test_other_columns_are_refused(registered):
    with pytest.raises(mlflow.MlflowException, match='designation'):
        mlflow.pyfunc.load_model(registered).predict(pd.DataFrame(dict(title=['Piscine'])))


@pytest.mark.system
def test_mlflow_serves_it(bundle, tmp_path):
    port = free_port()
    command = [sys.executable, '-m', 'mlflow', 'models', 'serve', '-m', str(bundle), '-p', str(port),
               '--env-manager', 'local']
    with (tmp_path/'log').open('w') as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        def up():
            try: return httpx.get(f'http://127.0.0.1:{port}/ping', timeout=2).status_code == 200
            except httpx.TransportError: return False
        end = time.monotonic()+120
        while not up() and time.monotonic() < end: time.sleep(.5)
        r = httpx.post(f'http://127.0.0.1:{port}/invocations', json=dict(dataframe_split=EXAMPLE), timeout=60)
        assert r.status_code == 200, (tmp_path/'log').read_text()
        assert {a['prdtypecode'] for a in r.json()['predictions']}
    finally: process.terminate(); process.wait(20)
