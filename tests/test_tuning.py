"A search for better heads is honest, goes on after a kill, and can be looked up in MLflow."
import os
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
from click.testing import CliRunner

from rakuten_mm.core.config import FitConfig, preset, read_config
from rakuten_mm.core.tracking import EXPERIMENT, mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.training.tuning import search

CFG = preset('smoke')


@pytest.fixture(scope='module')
def data(data_dir): return Dataset.open(data_dir)


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "An undisturbed search of three trials."
    return search(data, CFG, tmp_path_factory.mktemp('whole'), 3, progress=False)


def same(a, b):
    columns = [c for c in a.trials if c not in ('number', 'seconds', 'run_id')]
    pd.testing.assert_frame_equal(a.trials[columns], b.trials[columns])


def children(run):
    client = mlflow_client()
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    return client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run}'")


def test_goes_on_to_the_asked_number_as_nested_runs(data, whole, tmp_path):
    with tracked_run(name='tune') as run:
        first = search(data, CFG, tmp_path, 2, run_id=run, progress=False)
        assert len(first.trials) == 2 and len(children(run)) == 2
        more = search(data, CFG, tmp_path, 3, run_id=run, progress=False)
    same(more, whole)
    runs = children(run)
    assert [r.info.status for r in runs] == ['FINISHED']*3
    assert sorted(r.data.metrics['oof/f1_weighted'] for r in runs) == sorted(more.trials.score)
    assert {float(r.data.params['fit.lr']) for r in runs} == set(more.trials['fit.lr'])
    assert len(search(data, CFG, tmp_path, 3, progress=False).trials) == 3


@pytest.mark.system
def test_a_killed_search_ends_in_the_same_trials(data, data_dir, whole, tmp_path):
    "kill -9 in the second trial: its number is given up, its values are tried again."
    code = f'''
from rakuten_mm.core.config import preset
from rakuten_mm.core.environment import load_environment
load_environment('no.env')
from rakuten_mm.training import tuning
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.core.tracking import tracked_run
ran, n = tuning.run_trial, [0]
def hang(*args):
    n[0] += 1
    if n[0] == 2: print('second', flush=True); import time; time.sleep(600)
    return ran(*args)
tuning.run_trial = hang
with tracked_run(name='tune') as run:
    print(run, flush=True)
    tuning.search(Dataset.open({str(data_dir)!r}), preset('smoke'), {str(tmp_path)!r}, 3, run_id=run, progress=False)
'''
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=os.environ)
    run = process.stdout.readline().strip()
    assert process.stdout.readline().strip() == 'second'
    with pytest.raises(ValueError, match='another search is working'): search(data, CFG, tmp_path, 3, progress=False)
    process.kill(); process.wait()
    after = search(data, CFG, tmp_path, 3, progress=False)
    same(after, whole)
    assert after.trials.number.tolist() == [0, 2, 3]
    assert sorted(r.info.status for r in children(run)) == ['FINISHED', 'KILLED']


def test_only_training_listings_decide(data, data_dir, whole, tmp_path):
    "The labels of validation and test listings may be anything."
    other = Dataset.open(data_dir)
    df = other.products.copy()
    held = df.split != 'train'
    df.loc[held, 'prdtypecode'] = df.loc[held, 'prdtypecode'].sample(frac=1, random_state=0).to_numpy()
    other.__dict__['products'] = df
    same(search(other, CFG, tmp_path, 2, progress=False), replace(whole, trials=whole.trials[:2]))


def test_best_is_a_whole_configuration(whole, data, tmp_path):
    t = whole.trials.sort_values('score').iloc[-1]
    assert whole.score == t.score == t.f1_weighted
    assert whole.cfg.fit.lr == t['fit.lr'] and whole.cfg.fit.min_steps == 0
    assert whole.cfg.encoders == CFG.encoders and whole.cfg.network.members == CFG.network.members


def test_time_limit_lets_one_trial_through(data, tmp_path):
    start = time.perf_counter()
    assert len(search(data, CFG, tmp_path, 50, timeout_s=.01, metric='f1_macro', progress=False).trials) == 1
    assert time.perf_counter()-start < 120


def test_what_cannot_be_tuned(data, tmp_path):
    one = replace(CFG, network=replace(CFG.network, members=1))
    with pytest.raises(ValueError, match=r'network\.members to 2'): search(data, one, tmp_path, 1, progress=False)
    moving = replace(CFG, encoders=replace(CFG.encoders, train_image=True))
    with pytest.raises(ValueError, match='frozen encoders'): search(data, moving, tmp_path, 1, progress=False)
    with pytest.raises(ValueError, match='no objective'):
        search(data, CFG, tmp_path, 1, metric='accuracy', progress=False)


def test_command_line(data_dir, tmp_path):
    from rakuten_mm.cli.main import cli
    run = lambda *args: CliRunner().invoke(cli, [str(a) for a in args])
    r = run('tune', data_dir, '--out', tmp_path/'tune', '--preset', 'smoke', '--trials', 1, '--no-track')
    assert r.exit_code == 0 and '1 trials' in r.output, r.output
    assert read_config(tmp_path/'tune'/'best.json').fit != FitConfig()
    r = run('train', data_dir, '--out', tmp_path/'train', '--config', tmp_path/'tune'/'best.json', '--no-track')
    assert r.exit_code == 0 and (tmp_path/'train'/'bundle').is_dir(), r.output
    (tmp_path/'bad.json').write_text('{"fit": {"lr": 0.1, "momentum": 0.9}}')
    r = run('train', data_dir, '--config', tmp_path/'bad.json')
    assert r.exit_code == 1 and 'FitConfig has no field momentum' in r.output
