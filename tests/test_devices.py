"Training on several devices: once, refused before any work where it cannot be, and going on after a kill."
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from rakuten_mm.core.config import preset, write_config
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.training import fit as fitting
from rakuten_mm.training.fit import fit

SMOKE = preset('smoke')
TWO = replace(SMOKE, fit=replace(SMOKE.fit, devices=2, accelerator='cpu', precision='32-true', n_threads=1))


def changed(**fit): return replace(TWO, fit=replace(TWO.fit, **fit))


@pytest.fixture(scope='module')
def data(data_dir): return Dataset.open(data_dir)


@pytest.fixture(scope='module')
def alone(data, tmp_path_factory):
    "The same training by one process."
    return fit(data, changed(devices=1), tmp_path_factory.mktemp('alone'), progress=False)


def train(data_dir, home, cfg, *options, start=('-m', 'rakuten_mm'), **env):
    "`rakuten-mm train`, in a folder of its own."
    write_config(cfg, home/'config.json')
    cmd = [sys.executable, *start, 'train', data_dir, '--config', home/'config.json', '--out', home/'out', *options]
    env = os.environ | dict(RAKUTEN_MM_ARTIFACTS=str(home/'artifacts')) | env
    return subprocess.run([*map(str, cmd)], env=env, capture_output=True, text=True, timeout=300)


def learnt_alike(home, alone):
    "The bundle of a command and the network of `alone` are as good; their dropout differs."
    history = pd.read_csv(home/'out'/'history'/'metrics.csv')
    loss = lambda h: h['val/loss'].iloc[-1]
    assert len(history) == len(alone.history) and abs(loss(history)-loss(alone.history)) < .15
    info = Predictor.load(home/'out'/'bundle').config['info']
    assert abs(info['val']['f1_weighted']-alone.val['f1_weighted']) < .06


@pytest.mark.system
def test_command_forks(data_dir, tmp_path, alone):
    "Two devices, one command: it reads, writes and prints once."
    done = train(data_dir, tmp_path, TWO, '--no-track')
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('bundle in') == 1 and not (tmp_path/'out'/'checkpoints').exists()
    learnt_alike(tmp_path, alone)


@pytest.mark.system
def test_torchrun(data_dir, tmp_path, alone):
    "Two processes of torchrun are one training: one MLflow run, one version."
    from mlflow import MlflowClient
    start = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'rakuten_mm'
    store = f"sqlite:///{tmp_path/'mlflow.db'}"
    done = train(data_dir, tmp_path, changed(devices=-1), start=start, MLFLOW_TRACKING_URI=store)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('bundle in') == done.stdout.count('promoted') == 1
    client = MlflowClient(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len([r for r in runs if r.data.tags['mlflow.runName'].startswith('train')]) == 1
    assert len(client.get_metric_history(runs[-1].info.run_id, 'val/loss')) == SMOKE.fit.max_epochs
    assert len(client.search_model_versions()) == 1
    learnt_alike(tmp_path, alone)


KILL = '''
import json, os, signal, sys
from pathlib import Path
from rakuten_mm.core.config import read_config
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.training import fit as fitting
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
victim,shared,out = sys.argv[3:]
begin = os.getpid()
def die(self, *a):
    if self.current_epoch == 3 and str(self.global_rank) == victim: os.kill(os.getpid(), signal.SIGKILL)
    if self.current_epoch == 3 and victim == 'parent': os.kill(begin, signal.SIGKILL)
fitting.ProductClassifier.on_train_batch_end = die
fitting.fit(Dataset.open(sys.argv[1]), read_config(sys.argv[2]), out, progress=False, shared=shared)
'''


@pytest.mark.parametrize('victim', [*(pytest.param(v, marks=pytest.mark.system) for v in '01'), 'parent'])
def test_killed_it_goes_on_with_another_number(data, data_dir, tmp_path, alone, victim, monkeypatch):
    "Whoever is killed: two devices began, one ends it, and no more than the epoch is lost."
    write_config(TWO, tmp_path/'config.json')
    args = data_dir, tmp_path/'config.json', victim, tmp_path/'shared', tmp_path/'a'
    done = subprocess.run([sys.executable, '-c', KILL, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if victim == 'parent' else 1)
    if victim != 'parent': assert 'SIGKILL' in done.stderr
    seen,start = [], fitting.ProductClassifier.on_train_epoch_start
    noted = lambda self: (seen.append(self.current_epoch), start(self))
    monkeypatch.setattr(fitting.ProductClassifier, 'on_train_epoch_start', noted)
    again = fit(data, changed(devices=1), tmp_path/'b', progress=False, shared=tmp_path/'shared')
    assert seen == [3, 4, 5] and again.history.epoch.tolist() == [*range(6)]
    assert abs(again.val['f1_weighted']-alone.val['f1_weighted']) < .06


@pytest.mark.parametrize(('fit_with', 'why'), [
    (dict(devices=3), 'shared out evenly'), (dict(devices=0), '-1 for all'), (dict(num_nodes=2), 'torchrun --nnodes 2'),
    (dict(strategy='ddp'), 'whole command'), (dict(accelerator='cuda'), 'finds none'),
    (dict(accelerator='tpu'), 'choose one of auto'),
    (dict(hold_out='never'), 'choose auto or always')])
def test_refused_before_any_work(data, tmp_path, fit_with, why, monkeypatch):
    "What cannot be is said at once: embedding a catalogue takes an hour."
    def work(*a, **k): raise AssertionError('this is work')
    monkeypatch.setattr(fitting, 'build_network', work)
    if fit_with.get('accelerator') == 'cuda' and torch.cuda.is_available(): pytest.skip('there is a card')
    with pytest.raises(ValueError, match=why): fit(data, changed(**fit_with), tmp_path, progress=False)
    assert not [*tmp_path.iterdir()]


def test_a_card_in_use_is_not_forked(monkeypatch):
    "CUDA does not survive a fork; whoever has used it in a notebook is told to restart the kernel."
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    with pytest.raises(ValueError, match='restart the kernel'): fitting.choose_devices(TWO)
    assert fitting.choose_devices(changed(devices=1)).world == 1


def test_result_names_its_configuration(data_dir, tmp_path):
    "The run notebook takes a file instead of a preset."
    from zenml_pipelines.run_notebook import NotebookError, run_notebook
    (tmp_path/'wrong.json').write_text(json.dumps(dict(fit=dict(lerning_rate=1))))
    with pytest.raises(NotebookError, match='lerning_rate'):
        run_notebook('train', tmp_path/'train', data_dir=data_dir, config=str(tmp_path/'wrong.json'))
