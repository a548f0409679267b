"The pipelines as their users run them: the `zenml` command, a registered stack, YAML."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PASSWORD, ROOT, USER, running_server

from rakuten_mm.dataset import Dataset
from rakuten_mm.promotion import promote
from rakuten_mm.tracking import EXPERIMENT, alias_version, mlflow_client, register_bundle, tracked_run


@pytest.fixture(scope='module')
def stack():
    "The stack, registered twice: the second time must change nothing."
    for _ in range(2): subprocess.run([sys.executable, 'scripts/setup_stack.py'], cwd=ROOT, check=True)


def zenml(pipeline:str, tmp_path, env=None, **parameters):
    "Run a pipeline from the command line."
    values = {k: str(v) if isinstance(v, os.PathLike) else v for k,v in parameters.items()}
    (tmp_path/'c.yaml').write_text(yaml.safe_dump({'parameters': values}))
    command = [str(Path(sys.executable).with_name('zenml')), 'pipeline', 'run', f'zenml_pipelines.{pipeline}',
               '-c', str(tmp_path/'c.yaml'), '-s', 'rakuten_local']
    return subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True)


def last_run():
    "The newest top-level MLflow run."
    client = mlflow_client()
    found = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id], order_by=['attributes.start_time DESC'])
    return next(r for r in found if 'mlflow.parentRunId' not in r.data.tags)


def test_ingestion_then_training(stack, raw, tmp_path):
    source = dict(remote=raw, raw_dir=tmp_path/'fetched') if shutil.which('rclone') else dict(raw_dir=raw)
    res = zenml('ingestion', tmp_path, data_dir=tmp_path/'data', **source)
    assert res.returncode == 0, res.stdout+res.stderr
    version = Dataset.open(tmp_path/'data').manifest['version']
    assert last_run().data.tags['data_version'] == version
    before = alias_version('champion')
    res = zenml('training', tmp_path, data_dir=tmp_path/'data', artifacts_dir=os.environ['RAKUTEN_MM_ARTIFACTS'], preset='smoke', seed=1)
    assert res.returncode == 0, res.stdout+res.stderr
    run,client = last_run(), mlflow_client()
    assert run.info.status == 'FINISHED' and run.data.tags['data_version'] == version and run.data.tags['git_commit']
    assert len(client.get_metric_history(run.info.run_id, 'val/f1_weighted')) > 1
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {'bundle', 'evaluation', 'notebooks'}
    decision = json.loads(next((Path(os.environ['RAKUTEN_MM_ARTIFACTS'])/'runs').glob('training-*/promote/decision.json')).read_text())
    assert decision['champion'] == before and alias_version('challenger') == decision['challenger']
    assert (alias_version('champion') == decision['challenger']) == decision['promoted']


def test_f42_unknown_parameter(stack, tmp_path):
    res = zenml('training', tmp_path, data_dir=tmp_path, prset='smoke')
    assert res.returncode == 1 and 'prset' in res.stdout+res.stderr


def test_f44_failing_notebook(stack, tmp_path):
    "Exit code 1, step FAILED, MLflow run FAILED, the notebook kept with it."
    from zenml.client import Client
    res = zenml('ingestion', tmp_path, raw_dir=tmp_path/'nothing', data_dir=tmp_path/'data')
    assert res.returncode == 1 and 'no such folder' in res.stdout+res.stderr
    run = last_run()
    assert run.info.status == 'FAILED'
    zen = Client().list_pipeline_runs(name=run.info.run_name, hydrate=True).items[0]
    assert zen.status == 'failed' and {n: s.status for n,s in zen.steps.items()} == dict(fetch='completed', ingest='failed')
    assert 'notebooks/ingest.ipynb' in {a.path for a in mlflow_client().list_artifacts(run.info.run_id, 'notebooks')}
    assert not (tmp_path/'data'/'CURRENT').exists()


def test_api_check(stack, bundle, data_dir, tmp_path):
    "It passes on a server of the champion, and fails with another password."
    with tracked_run(name='api check') as run: version = register_bundle(run, bundle)
    mlflow_client().set_registered_model_alias('rakuten-mm', 'champion', version)
    assert not promote(version, Dataset.open(data_dir), progress=False).promoted
    with running_server(f'models:/rakuten-mm/{version}') as served:
        res = zenml('api_check', tmp_path, dict(API_USERNAME=USER, API_PASSWORD=PASSWORD), url=served.url)
        assert res.returncode == 0, res.stdout+res.stderr
        assert last_run().info.status == 'FINISHED'
        res = zenml('api_check', tmp_path, dict(API_USERNAME=USER, API_PASSWORD='another'), url=served.url)
    assert res.returncode == 1 and 'credentials right: 401 instead of 200' in res.stdout+res.stderr
    assert last_run().info.status == 'FAILED'
