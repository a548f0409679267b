"Faults 49 and 50: what the gate refuses, and that two promotions cannot both win."
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from rakuten_mm.cli.main import cli
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.bundle import load_bundle, save_bundle
from rakuten_mm.models.manifest import write_manifest
from rakuten_mm.registry import comparison, promotion
from rakuten_mm.registry.champion import ChampionMoved, history, move_champion
from rakuten_mm.registry.comparison import compare
from rakuten_mm.registry.gate import GateConfig
from rakuten_mm.registry.promotion import promote
from rakuten_mm.registry.versions import alias_version, register_bundle

QUICK = GateConfig(draws=300)


@pytest.fixture(scope='module')
def data(data_dir): return Dataset.open(data_dir)


def registered(bundle, name='challenger')->int:
    with tracked_run(name=name) as run: return register_bundle(run, bundle)


def changed(bundle, dest:Path, config=lambda c: c, net=lambda n: n, golden=False)->Path:
    "A bundle with other weights or another configuration; its golden products are asked anew, or left out."
    n,c = load_bundle(bundle)
    n = net(n) or n; c = config(c)
    triage = json.loads((bundle/'triage.json').read_text())
    graphs = {p.stem: p.read_bytes() for p in bundle.glob('*.onnx')}
    save_bundle(dest, n, c['codes'], {int(k): v for k,v in c['names'].items()}, c['info'], triage, graphs)
    if golden: shutil.copytree(bundle/'golden', dest/'golden'); write_manifest(dest)
    return dest


def renamed(c): return c | {'names': c['names'] | {str(c['codes'][0]): 'Something else'}}
def relabelled(c): return c | {'codes': c['codes'][::-1]}
def sharpened(n): n.stack.weights *= 4
def flattened(n): n.stack.weights[:, 1:] = 0  # only the linear expert is asked, which sees no image


@pytest.mark.parametrize(('how', 'check'), [
    ({'config': renamed}, 'labels'), ({'config': relabelled}, 'score'), ({'net': flattened}, 'robustness'),
    ({'net': sharpened, 'golden': True}, 'golden')])
def test_f50_refused_for_its_reason(bundle, data, tmp_path, how, check):
    verdict = compare(changed(bundle, tmp_path/'b', **how), bundle, data, QUICK, progress=False).verdict
    assert not verdict.ok
    assert check in {c.name for c in verdict.checks if not c.ok}, verdict.table().to_string()
    assert f'{check}: ' in verdict.reason


def test_f50_slower_than_allowed(bundle, data, monkeypatch):
    "The stopwatch is real; the model is slow enough for any machine."
    real = comparison.answer_seconds
    def with_delay(models, *args):
        answer = models[0].predict
        models[0].predict = lambda items: time.sleep(.5) or answer(items)
        return real(models, *args)
    monkeypatch.setattr(comparison, 'answer_seconds', with_delay); monkeypatch.setattr(comparison, 'N_TIMED', 1)
    verdict = compare(bundle, bundle, data, QUICK, progress=False).verdict
    latency = next(c for c in verdict.checks if c.name == 'latency')
    assert not latency.ok
    assert latency.figures['latency_ratio'] > 1.3


def test_f50_exit_code_and_report(bundle, data_dir, tmp_path):
    "Not promoted is 3 and leaves the champion; the report says why, the version keeps it as tags."
    first = registered(bundle)
    if alias_version('champion') != first: move_champion(first, alias_version('champion'), 'promote', 'for this test')
    twin = registered(bundle)
    options = ['--gate', '{"draws": 300}', '--out', str(tmp_path/'out')]
    res = CliRunner().invoke(cli, ['registry', 'promote', str(twin), str(data_dir), *options])
    assert res.exit_code == 3, res.output
    assert 'not promoted' in res.output
    assert alias_version('champion') == first
    report = (tmp_path/'out'/'report.md').read_text()
    assert f'Version {twin} is not promoted' in report
    assert '**failed**' in report
    assert '0 listings would be filed elsewhere' in report
    assert json.loads((tmp_path/'out'/'decision.json').read_text())['checks']['score'] is False
    tags = mlflow_client().get_model_version('rakuten-mm', str(twin)).tags
    assert tags['promotion.promoted'] == 'false'
    assert 'not better' in tags['promotion.reason']
    wrong = CliRunner().invoke(cli, ['registry', 'promote', '999', str(data_dir)])
    assert wrong.exit_code == 1
    assert 'no version 999' in wrong.output


def test_f49_champion_moves_during_the_comparison(bundle, data, monkeypatch, tmp_path):
    "The comparison is made again, with the champion of now; if that moves every time, it is an error."
    a,b,c = (registered(bundle) for _ in range(3))
    if alias_version('champion') != a: move_champion(a, alias_version('champion'), 'promote', 'for this test')
    real,seen = promotion.compare, []
    def slow_compare(*args, **kw):
        found = real(*args, **kw); seen.append(args[4])
        if len(seen) == 1: move_champion(b, a, 'promote', 'a promotion that was quicker')
        found.verdict.ok = True
        return found
    monkeypatch.setattr(promotion, 'compare', slow_compare)
    decision,_ = promote(c, data, QUICK, tmp_path, progress=False)
    assert decision.promoted
    assert decision.champion == b
    assert [s[1] for s in seen] == [f'version {a}', f'version {b}']
    assert (alias_version('champion'), alias_version('previous')) == (c, b)
    others = iter([a, b, a, b])
    def restless(*args, **kw):
        found = real(*args, **kw); found.verdict.ok = True
        move_champion(next(others), alias_version('champion'), 'promote', 'restless')
        return found
    monkeypatch.setattr(promotion, 'compare', restless)
    with pytest.raises(ChampionMoved): promote(registered(bundle), data, QUICK, tmp_path, progress=False)
    assert alias_version('champion') == a
    assert history().action.eq('promote').sum() >= 5


def test_f49_trainings_at_once_have_runs_of_their_own(bundle):
    with ThreadPoolExecutor(4) as pool: versions = list(pool.map(registered, [bundle]*4))
    runs = {mlflow_client().get_model_version('rakuten-mm', str(v)).run_id for v in versions}
    assert len(set(versions)) == len(runs) == 4
    assert all(mlflow_client().get_run(r).info.status == 'FINISHED' for r in runs)
