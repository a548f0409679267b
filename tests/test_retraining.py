"The loop: a late category, corrections, a promotion that a server follows, a way back, a quick end without new data."
import csv
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from rakuten_mm.cli.main import cli
from rakuten_mm.core.config import preset
from rakuten_mm.core.files import sha256_file
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.feedback import text_hash
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.splits import FEEDBACK_ID_BASE
from rakuten_mm.registry.champion import history, move_champion
from rakuten_mm.registry.versions import alias_version, register_bundle, resolve_model
from rakuten_mm.synthetic.catalogue import synthesize
from rakuten_mm.training.export import export, fit
from serving.config import kept_images
from serving.store import Store
from serving.testing import running_server

LATE = 1560


def without(raw:Path, code:int):
    "Take a category out of a delivery."
    y = pd.read_csv(raw/'Y_train_CVw08PX.csv', index_col=0); gone = y.index[y.prdtypecode == code]
    y.drop(gone).to_csv(raw/'Y_train_CVw08PX.csv')
    with (raw/'X_train_update.csv').open(newline='', encoding='utf-8') as f: rows = list(csv.reader(f))
    kept = [r for r in rows if r[0] not in {str(g) for g in gone}]
    with (raw/'X_train_update.csv').open('w', newline='', encoding='utf-8') as f:
        csv.writer(f, lineterminator='\n').writerows(kept)


@pytest.fixture(scope='module')
def months(stack, tmp_path_factory):
    "Two deliveries; the first has nothing of a category, and a champion was trained on it."
    home = tmp_path_factory.mktemp('months')
    first = synthesize(home/'first', 500, 0, image_size=48, progress=False, total=700)
    without(first, LATE)
    data = ingest(first, home/'data', progress=False)
    bundle = export(fit(data, preset('smoke'), home/'train', progress=False), data, home/'train')
    with tracked_run(name='first month') as run: version = register_bundle(run, bundle, home/'train'/'oof.parquet')
    move_champion(version, alias_version('champion'), 'promote', 'the first month')
    second = synthesize(home/'second', 200, 0, image_size=48, progress=False, start=500, total=700)
    return home, second, version


def ask_and_correct(url:str, data:Dataset)->int:
    "Leave a listing of the dataset and a new one, both corrected. Returns the product that the dataset holds."
    known,store = data.products[data.products.split == 'train'].iloc[0], Store(url, kept_images())
    photo = (data.images_dir/known.image).read_bytes()
    new = dict(designation='Seau de plage à roulettes', description='Pour les enfants.')
    row = dict(user='anna', model_version='rakuten-mm/1', prdtypecode=10, probability=.4, lane='review', usefulness=.9,
               top_k=[], candidates=None,
               modalities=['text', 'image'], has_inputs=1, image_sha256=sha256_file(data.images_dir/known.image))
    for i,(id,listing) in enumerate((('known', dict(designation=known.designation, description=known.description)),
                                     ('new', new))):
        asked_at = datetime.now(UTC)-timedelta(days=1, seconds=-i)
        store.add(row | listing | dict(id=id, created_at=asked_at, text_sha256=text_hash(**listing)), photo)
        store.correct(id, 2583, 'berta')
    store.close()
    return int(known.productid)


def run_retraining(home:Path, raw:Path, url:str)->set[str]: # Names of the steps that ran
    "Run the pipeline in this process."
    os.environ['API_DATABASE_URL'] = url
    from zenml.client import Client

    from zenml_pipelines import retraining
    Client().activate_stack('rakuten_local')
    lenient = dict(level=.55, draws=200, margin=1, class_budget=1, state_budget=1, ece_budget=1, latency_ratio=20,
                   size_ratio=20)
    retraining(raw_dir=str(raw), data_dir=str(home/'data'), artifacts_dir=os.environ['RAKUTEN_MM_ARTIFACTS'],
               preset='smoke', gate=lenient)
    run = Client().list_pipeline_runs(sort_by='desc:created', size=1).items[0]
    assert run.status == 'completed'
    return set(run.steps)


def wait_for(ask, seconds:float = 60):
    "Ask until the answer is true."
    until = time.monotonic()+seconds
    while not (got := ask()) and time.monotonic() < until: time.sleep(.3)
    return got


@pytest.mark.system
def test_a_month_of_the_loop(months):
    home,second,before = months
    url,data = f"sqlite:///{home/'feedback.db'}", Dataset.open(home/'data')
    product = ask_and_correct(url, data)
    with running_server('models:/rakuten-mm@champion', API_POLL_S='0.5') as served, served.http() as client:
        codes = lambda: {c['prdtypecode'] for c in client.get('/categories').json()}
        version = lambda: client.get('/version').json()['model_version']
        assert version() == f'rakuten-mm/{before}'
        steps = run_retraining(home, second, url)
        assert {'fetch', 'ingest', 'collect_feedback', 'ingest_corrections', 'check_new_data', 'train', 'evaluate',
                'promote'} <= steps
        after = alias_version('champion')
        df = Dataset.open(home/'data').products.set_index('productid')
        new = df[df.index >= FEEDBACK_ID_BASE]
        assert df.prdtypecode[product] == 2583 and len(new) == 1 and (new.split == 'train').all()
        # the category that came late is learnt, promoted, reported and served
        config = (resolve_model('models:/rakuten-mm@champion')[0]/'config.json').read_text()
        assert after != before and f'"{LATE}"' in config
        assert wait_for(lambda: version() == f'rakuten-mm/{after}') and LATE in codes()
        # back in one command; the server follows, the audit says who and why
        res = CliRunner().invoke(cli, ['registry', 'rollback', '--why', 'an exercise'])
        assert res.exit_code == 0 and f'version {before} serves again' in res.output, res.output
        assert wait_for(lambda: version() == f'rakuten-mm/{before}', 20)
    last = history().iloc[-1]
    assert (last.action, last.before, last.after, last.why) == ('rollback', after, before, 'an exercise') and last.who
    report = next((Path(os.environ['RAKUTEN_MM_ARTIFACTS'])/'runs').glob('retraining-*/promote/report.md')).read_text()
    assert f'new: {LATE}' in report and '| from | to |' in report


@pytest.mark.system
def test_nothing_new_ends_quickly(months):
    home,second,_ = months
    versions = len(mlflow_client().search_model_versions("name='rakuten-mm'"))
    steps = run_retraining(home, second, f"sqlite:///{home/'feedback.db'}")
    assert 'train' not in steps and 'check_new_data' in steps
    assert len(mlflow_client().search_model_versions("name='rakuten-mm'")) == versions
