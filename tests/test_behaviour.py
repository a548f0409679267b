"Behaviour that a user may rely on, whatever the catalogue."
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rakuten_mm.core.config import preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.schema import image_name
from rakuten_mm.evaluation.scores import evaluate
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.training.export import export, fit, fit_references


@pytest.fixture(scope='module')
def other_catalogue(tmp_path_factory):
    "Forty codes of its own, PNG images of odd sizes under .jpg names, no descriptions, a class of two."
    root = tmp_path_factory.mktemp('other')
    images = root/'images'/'image_train'
    images.mkdir(parents=True)
    rng,rows = np.random.default_rng(0), []
    for i in range(322):
        code = 7 if i >= 320 else 100+i%40
        rows.append((i, f'objet {code} numéro {i}', '', 10**9+i, 10**6+i, code))
        size = tuple(rng.integers(20, 90, 2))
        image = Image.new('RGB', size, (code*37%256, code*91%256, code*13%256))
        image.save(images/image_name(10**6+i, 10**9+i), 'PNG')
    df = pd.DataFrame(rows, columns=['', 'designation', 'description', 'productid', 'imageid', 'prdtypecode'])
    df.drop(columns='prdtypecode').to_csv(root/'X_train_update.csv', index=False)
    df[['', 'prdtypecode']].sample(frac=1, random_state=0).to_csv(root/'Y_train_CVw08PX.csv', index=False)
    return root


def test_codes_come_from_the_data(other_catalogue, tmp_path):
    data = ingest(other_catalogue, tmp_path/'data', progress=False)
    assert len(data.manifest['classes']) == 41 and data.manifest['names']['100'] == '100'
    assert (data.products.loc[data.products.prdtypecode == 7, 'split'] == 'train').all()
    bundle = export(fit(data, preset('smoke'), tmp_path/'run', progress=False), data, tmp_path/'run')
    assert Predictor.load(bundle).codes == sorted({7, *range(100, 140)})
    assert evaluate(bundle, data, progress=False).f1_weighted.iloc[0] > .5


def test_fusing_helps(tmp_path):
    "On the synthetic catalogue neither part decides alone."
    from rakuten_mm.synthetic.catalogue import demo
    data = demo(tmp_path, 1000)
    cfg = preset('smoke')
    bundle = export(fit(data, cfg, tmp_path/'run', progress=False), data, tmp_path/'run')
    references = fit_references(data, cfg, tmp_path/'refs', progress=False)
    table = evaluate(bundle, data, references, progress=False).f1_weighted
    assert table['text + image'] > table[['text-only model', 'image-only model']].max()+.01


def test_train_and_serve_see_the_same(data_dir, bundle):
    "The predictor, given what the seller sent, says what evaluation said of the cleaned row and its stored vector."
    data,model = Dataset.open(data_dir), Predictor.load(bundle)
    rows = data.products[data.products.split == 'test'].head(12)
    stored = model.probs_of(rows, data.images_dir, os.environ['RAKUTEN_MM_ARTIFACTS']+'/embeddings', progress=False)
    sent = model.probs([model.prepare(r.designation, r.description, (data.images_dir/r.image).read_bytes())
                        for r in rows.itertuples()])
    assert np.abs(stored-sent).max() < .02 and (stored.argmax(1) == sent.argmax(1)).all()


def test_ids_are_not_features(data_dir, bundle):
    "Other ids, same answer."
    data,model = Dataset.open(data_dir), Predictor.load(bundle)
    rows = data.products.head(8)
    store = os.environ['RAKUTEN_MM_ARTIFACTS']+'/embeddings'
    ask = lambda df: model.probs_of(df, data.images_dir, store, progress=False)
    assert (ask(rows) == ask(rows.assign(id=0, productid=1, imageid=2))).all()


def test_help_does_not_wait_for_torch():
    code = ("import sys\nfrom rakuten_mm.cli.main import cli\ncli(['--help'], standalone_mode=False)\n"
            "print([m for m in ('torch', 'pandas', 'mlflow') if m in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith('[]')


def test_predict_answers_every_row(raw, bundle, tmp_path):
    out = tmp_path/'preds.csv'
    subprocess.run([sys.executable, '-m', 'rakuten_mm', 'predict', '--bundle', bundle, '--out', out,
                    '--products', raw/'X_test_update.csv', '--images', raw/'images'/'image_test'], check=True)
    x,preds = pd.read_csv(raw/'X_test_update.csv'), pd.read_csv(out)
    assert list(preds) == ['id', 'prdtypecode', 'label', 'probability', 'top_2', 'top_3', 'lane']
    assert preds.id.tolist() == x.iloc[:, 0].tolist()
    assert preds.notna().all(axis=None) and preds.prdtypecode.dtype == int


@pytest.mark.skipif(subprocess.run(['unshare', '-rn', 'true'], capture_output=True).returncode != 0,
                    reason='no network namespaces here (unshare -rn)')
def test_f51_no_network(data_dir, tmp_path):
    "Training, registering and promoting in a namespace without any network."
    env = os.environ | dict(RAKUTEN_MM_ARTIFACTS=str(tmp_path/'artifacts'))
    train = [sys.executable, '-m', 'rakuten_mm', 'train', data_dir, '--preset', 'smoke', '--out', tmp_path/'out']
    res = subprocess.run(['unshare', '-rn', *train], env=env, capture_output=True, text=True)
    assert res.returncode == 0 and 'promoted: there was no champion' in res.stdout, res.stdout+res.stderr
