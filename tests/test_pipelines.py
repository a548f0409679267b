"The pipelines as users run them: a registered stack, YAML; one by the `zenml` command, the others in this process."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from rakuten_mm.core.tracking import EXPERIMENT, INGESTION, mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.registry.versions import alias_version, register_bundle
from serving.testing import PASSWORD, USER, running_server


@pytest.fixture(autouse=True)
def again(stack, monkeypatch):
    "Registering a stack that is there changes nothing."
    import setup_stack
    monkeypatch.chdir(ROOT)
    setup_stack.main()


def config(folder:Path, parameters:dict)->str:
    "A configuration file."
    values = {k: str(v) if isinstance(v, os.PathLike) else v for k,v in parameters.items()}
    (folder/'c.yaml').write_text(yaml.safe_dump({'parameters': values}))
    return str(folder/'c.yaml')


def zenml(pipeline:str, tmp_path, **parameters):
    "Run a pipeline from the command line."
    command = [str(Path(sys.executable).with_name('zenml')), 'pipeline', 'run', f'zenml_pipelines.{pipeline}',
               '-c', config(tmp_path, parameters), '-s', 'rakuten_local']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run(pipeline:str, tmp_path, **parameters):
    "Run it in this process: what the command does, without a quarter of a minute of imports."
    from zenml.client import Client

    import zenml_pipelines
    Client().activate_stack('rakuten_local')
    getattr(zenml_pipelines, pipeline).with_options(config_path=config(tmp_path, parameters))()


def last_run(experiment:str = EXPERIMENT):
    "The newest top-level MLflow run."
    client = mlflow_client()
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id],
                               order_by=['attributes.start_time DESC'])
    return next(r for r in found if 'mlflow.parentRunId' not in r.data.tags)


def reports(pipeline:str)->dict[str, dict]:
    "Pages that the steps of its last run keep as artifacts, by step and name; each is a whole page, with its metadata."
    from zenml.client import Client
    steps = Client().list_pipeline_runs(pipeline=pipeline, sort_by='desc:created', hydrate=True).items[0].steps
    found = {s: {name: a[0] for name,a in step.outputs.items() if 'HTMLString' in a[0].data_type.attribute}
             for s,step in steps.items()}
    for s,named in found.items():
        for a in named.values():
            assert a.load().startswith('<!DOCTYPE html>') and 'border-left:6px solid' in a.load()
            assert steps[s].run_metadata['page'].endswith('.html')
    return found


def test_ingestion_then_training(stack, raw, tmp_path):
    source = dict(remote=raw, raw_dir=tmp_path/'fetched') if shutil.which('rclone') else dict(raw_dir=raw)
    run('ingestion', tmp_path, data_dir=tmp_path/'data', **source)
    version = Dataset.open(tmp_path/'data').manifest['version']
    assert last_run(INGESTION).data.tags['data_version'] == version
    before = alias_version('champion')
    home = Path(os.environ['RAKUTEN_MM_ARTIFACTS'])
    run('training', tmp_path, data_dir=tmp_path/'data', artifacts_dir=home, preset='smoke', seed=1)
    train,client = last_run(), mlflow_client()
    assert train.info.status == 'FINISHED' and train.data.tags['data_version'] == version
    assert train.data.tags['git_commit']
    assert len(client.get_metric_history(train.info.run_id, 'val/f1_weighted')) > 1
    assert {a.path for a in client.list_artifacts(train.info.run_id)} == {'bundle', 'evaluation', 'notebooks',
                                                                          'promotion', 'training'}
    assert {s: r.keys() for s,r in reports('training').items()} == dict(
        train={'training_report'}, evaluate={'model_card'}, promote={'decision'})
    decision = json.loads(next((home/'runs').glob('training-*/promote/decision.json')).read_text())
    assert decision['champion'] == before and alias_version('challenger') == decision['challenger']
    assert (alias_version('champion') == decision['challenger']) == decision['promoted']


def test_f42_unknown_parameter(stack, tmp_path):
    with pytest.raises(ValueError, match='entrypoint arguments') as e:
        run('training', tmp_path, data_dir=tmp_path, prset='smoke')
    assert 'prset' in str(e.value.__cause__)


def test_f44_failing_notebook(stack, tmp_path):
    "Exit code 1, step FAILED, MLflow run FAILED, the notebook kept with it."
    from zenml.client import Client
    res = zenml('ingestion', tmp_path, raw_dir=tmp_path/'nothing', data_dir=tmp_path/'data')
    *_,last = res.stderr.strip().splitlines()
    why,page = re.fullmatch(r'NotebookError: (.+) \(its page: (.+)\)', last).groups()
    assert res.returncode == 1 and 'no such folder' in why
    assert 'Did not finish' in Path(page).read_text()
    assert 'You can visualize your pipeline runs' not in res.stdout+res.stderr, 'there is no dashboard here'
    failed = last_run(INGESTION)
    assert failed.info.status == 'FAILED'
    zen = Client().list_pipeline_runs(name=failed.info.run_name, hydrate=True).items[0]
    assert zen.status == 'failed'
    assert {n: s.status for n,s in zen.steps.items()} == dict(fetch='completed', ingest='failed')
    assert 'notebooks/ingest.ipynb' in {a.path for a in mlflow_client().list_artifacts(failed.info.run_id, 'notebooks')}
    assert not (tmp_path/'data'/'CURRENT').exists()


@pytest.mark.system
def test_api_check(stack, bundle, tmp_path, monkeypatch):
    "It passes on a server of the champion, and fails with another password; either way its report is kept."
    with tracked_run(name='api check') as registering: version = register_bundle(registering, bundle)
    mlflow_client().set_registered_model_alias('rakuten-mm', 'champion', version)
    monkeypatch.setenv('API_USERNAME', USER)
    with running_server(f'models:/rakuten-mm/{version}') as served:
        monkeypatch.setenv('API_PASSWORD', PASSWORD)
        run('api_check', tmp_path, url=served.url, max_p95_ms=0.)
        good = last_run()
        monkeypatch.setenv('API_PASSWORD', 'another')
        with pytest.raises(RuntimeError): run('api_check', tmp_path, url=served.url, wait_s=0.)
        bad = last_run()
    said = max((Path(os.environ['RAKUTEN_MM_ARTIFACTS'])/'runs').glob('api_check-*/check_api/checks.csv'),
               key=lambda p: p.stat().st_mtime).read_text()
    assert 'credentials,right,401 instead of 200' in said
    kept = lambda run: {a.path for folder in ('api_check', 'notebooks')
                        for a in mlflow_client().list_artifacts(run.info.run_id, folder)}
    for run_,status in ((good, 'FINISHED'), (bad, 'FAILED')):
        assert run_.info.status == status
        assert {'api_check/checks.csv', 'api_check/golden.csv', 'notebooks/api_check.html'} <= kept(run_)
        assert PASSWORD not in str(run_.data.params) and (run_.data.metrics['api/failed'] > 0) == (status == 'FAILED')
    assert good.data.metrics['api/golden'] > 5 and good.data.metrics['api/p95_ms'] > 0


def test_drift_with_too_little_traffic(stack, bundle, data_dir, tmp_path, monkeypatch):
    "It ends well, and says so."
    with tracked_run(name='drift') as registering: version = register_bundle(registering, bundle)
    mlflow_client().set_registered_model_alias('rakuten-mm', 'champion', version)
    values = yaml.safe_load((ROOT/'zenml_pipelines/configs/drift.yaml').read_text())['parameters']
    values |= dict(data_dir=data_dir, artifacts_dir=os.environ['RAKUTEN_MM_ARTIFACTS'])
    monkeypatch.setenv('API_DATABASE_URL', f"sqlite:///{tmp_path/'feedback.db'}")
    run('drift', tmp_path, **values)
    tags = last_run().data.tags
    assert tags['drift.advice'] == 'wait'
    assert f'0 answers by version {version} in 7 days, 300 are needed' in tags['drift.summary']
