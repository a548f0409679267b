"Drift: features that the server records, alarms on the generator's time axis, and the causes that are named."
import base64
import json
import os
import time
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from conftest import ROOT
from test_pipelines import last_run, run

from benchmarks.drift import dark, listings, serve, stability, train
from rakuten_mm.core.config import preset, single_modality
from rakuten_mm.core.environment import artifacts_dir
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.monitoring.drift import CAUSES, detect
from rakuten_mm.monitoring.observations import FEATURES, of_dataset, of_served
from rakuten_mm.registry.versions import MODEL, register_bundle
from serving.store import Store
from zenml_pipelines.scheduler import request_path

AXIS = 20_000 # Rows of the time axis: a decile is 2,000 listings
LABEL,PARTS,CONTENT = CAUSES


@pytest.fixture(scope='module')
def early(tmp_path_factory):
    "A text model of listings from the first three tenths of the axis, and its reference."
    return train(tmp_path_factory.mktemp('early'), 1_800, 6_000, 2, single_modality(preset('smoke'), 'text'))


def window(seed, rows): return list(listings(seed, np.asarray(rows), AXIS))


def test_alarm_in_time(early):
    "Deciles of two other catalogues: the label mix is named in the first that drifted moderately, by the next in both."
    model,ref = early
    first = min(k for k in range(3, 10) if stability(k) > .1)
    decile = lambda seed, k: window(seed, np.arange(k*2_000, (k+1)*2_000))
    causes_of = lambda seed, k: detect(ref, serve(model, decile(seed, k))).causes
    caught = {k: [causes_of(seed, k) for seed in (11, 12)] for k in (first, first+1)}
    assert any(caught[first]) and all(caught[first+1])
    assert all(c in ([LABEL], []) for causes in caught.values() for c in causes)


def test_no_alarm_without_drift(early):
    "The time of training, shuffled."
    model,ref = early
    order = np.random.default_rng(0).permutation(3*AXIS//10)
    reports = [detect(ref, serve(model, window(13+i%2, order[i*1_000:(i+1)*1_000]))) for i in range(5)]
    assert [r.causes for r in reports] == [[]]*5 and {r.advice for r in reports} == {'nothing'}


@pytest.fixture(scope='module')
def now(early): return window(15, np.random.default_rng(1).permutation(3*AXIS//10)[:1_200])


def test_causes_made_to_order(early, now):
    "Label mix, lost descriptions, both, and other words."
    model,ref = early
    rng = np.random.default_rng(2)
    named = lambda items: detect(ref, serve(model, items)).causes
    lost = lambda items: [x | dict(description='' if rng.random() < .6 else x['description']) for x in items]
    other = [x for x in now if x['code']%3 or rng.random() < .3]
    assert named(other) == [LABEL]
    assert named(lost(now)) == [PARTS]
    assert named(lost(other)) == [LABEL, PARTS]
    title = lambda x: f"Neuf sous blister, envoi rapide et suivi {x['designation']}"
    worded = detect(ref, serve(model, [x | dict(designation=title(x)) if rng.random() < .5 else x for x in now]))
    assert worded.causes == [CONTENT] and worded.advice == 'retrain'
    assert {'title length', 'text vectors'} <= {s.name for s in worded.shifts if s.alarm}


def mixed(seed, n):
    "Listings from all over the time axis, as those of `data_dir` are."
    return list(listings(seed, np.random.default_rng(seed).permutation(2_000)[:n], 2_000, 128))


def test_images(bundle, data_dir):
    "Images that no longer come are a missing part, other images are content."
    model = Predictor.load(bundle)
    data = Dataset.open(data_dir)
    rows = data.products[data.products.split != 'train'].sort_values('id')  # also of `val`: the delivery is small
    ref = of_dataset(model, rows, data.images_dir, progress=False)
    ref = replace(ref, mix=np.bincount(ref.labels, minlength=len(ref.codes))/len(ref), mix_size=len(ref))
    items = mixed(21, 400)
    assert detect(ref, serve(model, items)).causes == []
    lost = [x | dict(image=None) if i%2 and x['designation'] else x for i,x in enumerate(items)]
    assert detect(ref, serve(model, lost)).causes == [PARTS]
    darker = detect(ref, serve(model, [x | dict(image=dark(x['image'])) for x in items]))
    assert CONTENT in darker.causes and 'brightness' in {s.name for s in darker.shifts if s.alarm}


def test_server_records_what_the_dataset_says(server, bundle, data_dir):
    "Of every listing, whatever its lane: the same features as those of the same listing in a dataset."
    model,data = Predictor.load(bundle), Dataset.open(data_dir)
    rows = data.products[data.products.title != ''].head(12)
    start = datetime.now(UTC)
    image = lambda r: base64.b64encode((data.images_dir/r.image).read_bytes()).decode()
    products = [dict(designation=r.designation, description=r.description, image=image(r)) for r in rows.itertuples()]
    with server.http() as c:
        answers = [c.post('/predict', json=p).json() for p in products]
    with closing(Store(server.database, data_dir)) as store:
        end = time.monotonic()+10
        while len(rows_served := store.served(start)) < len(rows) and time.monotonic() < end: time.sleep(.1)
        served = of_served(rows_served, model.codes, answers[0]['model_version'])
        assert store.get(answers[0]['prediction_id']).facts.keys() == set(FEATURES)
    want = of_dataset(model, rows, data.images_dir, progress=False)
    assert len(served) == len(want) == 12
    same = ['title_length', 'description_length', 'language', 'width', 'height']
    assert served.table[same].equals(want.table[same])
    assert np.allclose(served.table[['padding', 'brightness']], want.table[['padding', 'brightness']])
    assert np.allclose(served.probs, want.probs, atol=.01) and served.table.lane.tolist() == want.table.lane.tolist()
    for m in ('text', 'image'): assert np.allclose(served.projections[m], want.projections[m], atol=.15)


def record(store, log, version, since):
    "Store a request log as the server would have."
    part = lambda s: None if np.isnan(s).any() else [round(float(v), 2) for v in s]
    same = dict(user='anna', model_version=version, prdtypecode=10, probability=.5, usefulness=.5, top_k=[],
                candidates=None, modalities=['text'], text_sha256='', image_sha256='', has_inputs=0,
                designation=None, description=None)
    features = log.table[list(FEATURES)].astype(object).to_dict('records')
    for i,(facts,p,lane) in enumerate(zip(features, log.probs, log.table.lane, strict=True)):
        store.add(same | dict(id=str(uuid.uuid4()), created_at=since+timedelta(seconds=i), lane=lane,
                              facts={k: None if v != v else v for k,v in facts.items()},
                              probs=[round(float(v), 4) for v in p],
                              sketch={m: part(s[i]) for m,s in log.projections.items()}))
    store.flush()
    assert store.dropped == 0


@pytest.fixture
def champion(bundle):
    "The small model, champion for the time of a test."
    client = mlflow_client()
    with tracked_run(name='drift') as registering: version = register_bundle(registering, bundle)
    client.set_registered_model_alias(MODEL, 'champion', version)
    yield version
    client.delete_registered_model_alias(MODEL, 'champion')


def test_pipeline_asks_for_a_training(stack, champion, bundle, data_dir, tmp_path, monkeypatch):
    "From the server's database to a report, and a request that the scheduler takes: titles of another kind."
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('API_DATABASE_URL', f"sqlite:///{tmp_path/'feedback.db'}")
    request_path('retraining').unlink(missing_ok=True)
    model,name = Predictor.load(bundle), f'{MODEL}/{champion}'
    items = [x | dict(designation='Offre pro, livraison express : '*3+x['designation']) for x in mixed(31, 320)]
    with closing(Store(os.environ['API_DATABASE_URL'], tmp_path)) as store:
        record(store, serve(model, items), name, datetime.now(UTC)-timedelta(hours=1))
    run('drift', tmp_path, data_dir=data_dir, artifacts_dir=os.environ['RAKUTEN_MM_ARTIFACTS'],
        levels=dict(alpha=.01), retrain=True)
    made = last_run()
    report = json.loads(next((artifacts_dir()/'runs').glob('drift-*/detect/result.json')).read_text())
    assert report['n_window'] == 320 and report['model_version'] == name
    assert report['data_version'] == Dataset.open(data_dir).manifest['version']
    assert CONTENT in report['causes'] and report['advice'] == made.data.tags['drift.advice'] == 'retrain'
    assert 'title length' in report['summary']
    kept = {a.path for a in mlflow_client().list_artifacts(made.info.run_id, 'drift')}
    assert kept == {f'drift/{f}' for f in ('effects.png', 'mix.png', 'shifts.csv', 'report.txt')}
    assert made.data.metrics['drift/title_length'] > .5
    asked = json.loads(request_path('retraining').read_text())
    assert 'content moved' in asked['why']
    assert abs(datetime.fromisoformat(asked['asked_at'])-datetime.now(UTC)) < timedelta(minutes=5)
    request_path('retraining').unlink()


def test_training_is_asked_for_once(champion):
    "A champion that was not replaced is not complained of with every run."
    from zenml_pipelines.steps.detect import ask
    path = request_path('retraining')
    path.unlink(missing_ok=True)
    for days,there in ((7, True), (7, False), (0, True)):
        ask(champion, 'content moved', days)
        assert path.exists() == there
        path.unlink(missing_ok=True)
