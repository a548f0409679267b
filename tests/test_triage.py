"Guarantees of the triage on worlds whose truth is known, and what happens at the edges."
import json

import numpy as np
import pytest
from scipy import special

from rakuten_mm.data.dataset import Dataset
from rakuten_mm.stats.bootstrap import bootstrap_scores
from rakuten_mm.stats.calibration import check_probs, ece
from rakuten_mm.stats.risk_control import prove_threshold
from rakuten_mm.stats.triage import (
    Triage,
    class_lanes,
    fit_triage,
    resample_guarantee,
    temperature_threshold,
    triage_report,
)
from zenml_pipelines.run_notebook import run_notebook


def world(n, k=27, bold=1., bold_share=1., skew=8., seed=0):
    "(n, k) probabilities of a model that is `bold` (a power of the truth) on a share of listings; (n,) true classes."
    rng = np.random.default_rng(seed)
    prior = np.linspace(1, skew, k)/np.linspace(1, skew, k).sum()
    z = rng.normal(size=(n, k))+np.log(prior)
    z[np.arange(n), rng.choice(k, n, p=prior)] += (rng.random(n) < .8)*rng.gamma(4, 2.5, n)
    targets = (special.softmax(z, 1).cumsum(1) > rng.random((n, 1))).argmax(1)
    return special.softmax(np.where(rng.random(n) < bold_share, bold, 1.)[:, None]*z, 1), targets


WORLDS = {'calibrated': {}, 'overconfident': {'bold': 3.}, 'timid': {'bold': .5},
          'bold fifth': {'bold': 3., 'bold_share': .2}, 'imbalanced': {'skew': 200.}, 'two classes': {'k': 2}}


@pytest.mark.parametrize('per_class', [False, True], ids=['pooled', 'per class'])
@pytest.mark.parametrize('name', WORLDS)
def test_guarantee_holds(name, per_class):
    "Fitted on 100 samples, judged on the whole world: broken in at most delta of them, with room for chance."
    probs,targets = world(20_000, **WORLDS[name])
    right,preds,rng,broken = probs.argmax(1) == targets, probs.argmax(1), np.random.default_rng(1), 0
    for _ in range(100):
        i = rng.choice(len(targets), 3000, replace=False)
        t = fit_triage(probs[i], targets[i], target=.97, per_class=per_class)
        auto = t.auto(probs)
        parts = [auto & (preds == c) for c in t.own]+[auto & ~np.isin(preds, t.own), auto]
        broken += any(right[m].mean() < .97 for m in parts if m.any())
    assert broken <= 7


def test_guarantee_on_halves_beside_the_naive_threshold():
    draws = resample_guarantee(*world(12_000, bold=3., bold_share=.2, seed=1), n=100)
    assert draws['held'] >= .95
    assert draws['naive_held'] < .5
    assert draws['coverage'] > .05


def test_near_duplicates_prove_nothing():
    "Fifty right listings, each twenty times, are fifty."
    top,right,groups = np.repeat(np.linspace(.9, 1, 50), 20), np.ones(1000, bool), np.repeat(np.arange(50), 20)
    assert prove_threshold(top, right)[0] is not None
    assert prove_threshold(top, right, groups=groups)[0] is None


def test_groups_are_never_halved():
    "With copies in both halves the guarantee would be about memory."
    p,t = world(1500)
    g = np.repeat(np.arange(500), 3)
    draw = lambda *groups: resample_guarantee(p, t, *groups, n=5, target=.9)
    assert draw(g) == draw(g) != draw()
    with pytest.raises(ValueError, match='two groups'): resample_guarantee(p, t, np.zeros(1500), n=1)


@pytest.mark.parametrize('n', [1, 2, 30, 250])
def test_too_little_data(n):
    p,t = world(n)
    triage = fit_triage(p, t)
    assert set(triage.thresholds) == {None}
    assert triage.coverage == 0
    assert 'more calibration listings' in triage.reasons[0]
    assert 'auto' not in triage.lanes(p)
    assert (n > 19 or 'reject' not in triage.lanes(p))
    assert len(triage.sets(p)) == n
    assert triage_report(triage, p, t).n['all'] == n


def test_hopeless_model():
    "More data is not the answer, and is not given as one."
    p = np.random.default_rng(0).dirichlet(np.ones(5), 2000)
    triage = fit_triage(p, np.random.default_rng(1).integers(0, 5, 2000))
    assert set(triage.thresholds) == {None}
    assert 'better model' in triage.reasons[0]


@pytest.mark.parametrize('kwargs', [{}, {'per_class': True, 'target': .95}, {'capacity': (300, 1000)}],
                         ids=['guarantee', 'per class', 'capacity'])
def test_json(kwargs):
    p,t = world(6000, bold=2.)
    triage = fit_triage(p.astype('float32'), t, max_set=5, **kwargs)
    back = Triage.from_dict(json.loads(json.dumps(triage.to_dict(), allow_nan=False)))
    assert back == triage
    assert (back.lanes(p.astype('float32')) == triage.lanes(p.astype('float32'))).all()
    assert all((a == b).all() for a,b in zip(back.sets(p), triage.sets(p), strict=True))
    assert {'auto', 'review', 'reject'} == set(triage.lanes(p))
    assert all(s[0] == r.argmax() for s,r in zip(triage.sets(p), p, strict=True))


@pytest.mark.parametrize('change', [
    {'thresholds': []}, {'thresholds': [float('nan')]*3}, {'thresholds': '0.9'}, {'set_floor': 2.}, {'max_set': 0},
    {'max_set': True}, {'own': [3]}, {'capacity': [1]}, {'delta': None}, {'more': 1}], ids=str)
def test_json_is_refused(change):
    d = fit_triage(*world(500, k=3)).to_dict()
    with pytest.raises(ValueError, match='triage: '): Triage.from_dict(d | change)
    del d['alpha']
    with pytest.raises(ValueError, match=r"missing keys .'alpha'"): Triage.from_dict(d)


def test_unknown_codes_are_errors():
    p,t = world(6000)
    sure = fit_triage(p, t)
    unknown = np.where(np.random.default_rng(0).random(6000) < .2, -1, t)
    triage = fit_triage(p, unknown)
    assert sure.coverage > .2
    assert triage.coverage == 0
    assert triage.set_floor is None
    assert 'reject' not in triage.lanes(p)
    report = triage_report(sure, p, unknown)
    assert report.accuracy.auto < .9
    assert report.set_coverage['all'] < .85
    assert report.top3_accuracy['all'] < .85
    assert ece(p, unknown) > ece(p, t)
    assert bootstrap_scores(p, unknown, n=20).high.accuracy < .8
    assert not temperature_threshold(p, np.full(6000, -1))(p).any()


def test_single_class():
    p,t = np.ones((500, 1)), np.zeros(500, int)
    triage = fit_triage(p, t)
    assert (triage.lanes(p) == 'auto').all()
    assert triage.sets(p)[0].tolist() == [0]
    assert triage.coverage == 1
    assert ece(p, t) == 0
    assert bootstrap_scores(p, t, n=10).low.accuracy == 1
    assert class_lanes(triage, p, t, [10]).auto.tolist() == [500]
    assert resample_guarantee(p, t, n=3)['held'] == 1


def test_saturated_probabilities():
    "Half of all probabilities are exactly 1: they go one way together, and errors among them count."
    rng = np.random.default_rng(0)
    p = np.where((rng.random(4000) < .5)[:, None], [1., 0.], [.6, .4])
    clean,dirty = (rng.random(4000) < [[.001], [.03]]).astype(int)
    assert fit_triage(p, np.where(p[:, 0] == 1, clean, 1)).coverage == pytest.approx((p[:, 0] == 1).mean())
    assert fit_triage(p, np.where(p[:, 0] == 1, dirty, 1)).coverage == 0


def test_capacity_is_kept():
    p,t = world(20_000, bold=2.)
    for reviews in (0, 1, 150, 1000):
        triage = fit_triage(p[:5000], t[:5000], capacity=(reviews, 1000))
        assert (triage.lanes(p[:5000]) == 'review').mean() <= reviews/1000
        right = p[5000:].argmax(1) == t[5000:]
        assert triage.accuracy_low <= right[triage.auto(p[5000:])].mean() if reviews < 1000 else triage.coverage == 0
    with pytest.raises(ValueError, match='capacity must be'): fit_triage(p, t, capacity=(-1, 10))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -.1, 1.5], ids=str)
def test_what_is_not_a_probability_is_refused(bad):
    p,t = world(300, k=3)
    triage,q = fit_triage(p, t), p.copy()
    q[7, 1] = bad
    for call in (lambda: fit_triage(q, t), lambda: triage.lanes(q), lambda: triage.sets(q), lambda: ece(q, t),
                 lambda: triage_report(triage, q, t), lambda: bootstrap_scores(q, t, n=2),
                 lambda: resample_guarantee(q, t, n=2)):
        with pytest.raises(ValueError, match=r'not probabilities.*first row 7'): call()


def test_arrays_that_do_not_fit_are_refused():
    p,t = world(300, k=3)
    for args in [(p, t[:-1]), (p, t+1), (p[:0], t[:0]), (p, t.astype(float)), (p[0], t)]:
        with pytest.raises(ValueError, match=r'probs|targets|no listings'): check_probs(*args)
    with pytest.raises(ValueError, match='groups'): fit_triage(p, t, np.zeros(5))
    with pytest.raises(ValueError, match='target, delta and alpha'): fit_triage(p, t, target=1.)


def test_run(data_dir, bundle, tmp_path):
    "The run notebook at the size of the test data, where nothing can be proved at 99 %, and at what can."
    version = Dataset.open(data_dir).manifest['version']
    trained = {'bundle': str(bundle), 'data_version': version, 'split': 'grouped'}
    (tmp_path/'result.json').write_text(json.dumps(trained))
    res = run_notebook('triage', tmp_path/'out', data_dir=data_dir, train_dir=tmp_path,
                       reviews_a_day=20, listings_a_day=100)
    triage = Triage.from_dict(res['triage'])
    assert Triage.from_dict(json.loads((tmp_path/'out'/'triage.json').read_text())) == triage
    assert triage.coverage == 0
    assert 'more' in triage.reasons[0]
    assert res['test']['auto_accuracy'] is None
    assert res['promise']['held'] == 1
    assert Triage.from_dict(res['capacity']).coverage >= .8
