"""Several encoders in a network, several bundles in an ensemble, and a student of either."""
import json
from dataclasses import replace

import numpy as np
import pytest
from test_encoders import image_folder, text_folder

from rakuten_mm.core.config import preset, single_modality
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.evaluation.slices import modality_states
from rakuten_mm.models.explanation import explain
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.monitoring.observations import of_dataset
from rakuten_mm.training.distillation import ask_teacher
from rakuten_mm.training.ensembles import fit_folds, join
from rakuten_mm.training.export import export, fit

SMOKE = preset('smoke')
SHORT = replace(SMOKE, fit=replace(SMOKE.fit, max_epochs=2))


@pytest.fixture(scope='module')
def joined(bundle, data_dir, tmp_path_factory):
    "The small model and one that reads texts alone, as one."
    home,data = tmp_path_factory.mktemp('joined'), Dataset.open(data_dir)
    export(fit(data, single_modality(SHORT, 'text'), home/'text', progress=False), data, home/'text')
    return join([bundle.parent, home/'text'], data, home, progress=False)


@pytest.mark.system
def test_encoders_side_by_side(data_dir, tmp_path):
    "Two text encoders and two image encoders train, export, agree with their graphs and load again."
    for name in ('words', 'pictures'): (tmp_path/name).mkdir()
    text_folder('camembert', tmp_path/'words'); image_folder('test_efficientnet', tmp_path/'pictures')
    e = replace(SHORT.encoders, text=f"use + hf:{tmp_path/'words'}",
                image=f"timm:tf_efficientnet_lite0 + timm:{tmp_path/'pictures'}")
    data = Dataset.open(data_dir)
    fitted = fit(data, replace(SHORT, encoders=e), tmp_path, progress=False)
    lite,own = (m.dim for m in fitted.net.image.each)
    assert fitted.net.text.dim == 512+32 and fitted.net.image.dim == lite+own
    model = Predictor.load(export(fitted, data, tmp_path))  # the export has compared answers from bytes on
    config = json.loads((tmp_path/'bundle'/'config.json').read_text(encoding='utf-8'))
    assert config['image_architecture'] == ['tf_efficientnet_lite0', 'test_efficientnet'] and model.net.transformers


@pytest.mark.parametrize(('field', 'names'), [('train_text', 'hf:a + hf:b'), ('train_image', 'timm:a + timm:b')])
def test_several_encoders_are_not_tuned_at_once(field, names, data_dir, tmp_path):
    part = field.removeprefix('train_')
    cfg = replace(SHORT, encoders=replace(SHORT.encoders, **{field: True, part: names}),
                  network=replace(SHORT.network, members=1))
    with pytest.raises(ValueError, match='one at a time'): fit(Dataset.open(data_dir), cfg, tmp_path, progress=False)


def test_whatever_takes_a_bundle_takes_an_ensemble(joined, data_dir, tmp_path):
    "Explaining, watching, and evaluating by state."
    data,model = Dataset.open(data_dir), Predictor.load(joined)
    rows = data.products[data.products.split == 'test'].head(12)
    images = [(data.images_dir/n).read_bytes() if n else None for n in rows.image]
    items = [model.prepare(r.designation, r.description, i) for r,i in zip(rows.itertuples(), images, strict=True)]
    stored = model.probs_of(rows, data.images_dir, tmp_path, progress=False)
    probs = model.probs(items)
    assert np.abs(probs-stored).max() < .02 and np.allclose(stored.sum(1), 1, atol=1e-5)
    assert explain(model, items[0], max_words=3, grid=2).probability == pytest.approx(probs[0].max(), abs=1e-4)
    log = of_dataset(model, rows, data.images_dir, tmp_path, progress=False)
    assert len(log) == len(rows)
    assert len(modality_states(model, rows, data.images_dir, tmp_path, progress=False)) >= 3
    assert model.config['modalities'] == ['text', 'image']


def test_trainings_that_cannot_be_joined(bundle, data_dir, tmp_path):
    "Another split."
    with pytest.raises(ValueError, match='was trained on the grouped split'):
        join([bundle.parent]*2, Dataset.open(data_dir, split='time'), tmp_path)


@pytest.mark.system
def test_validation_listings_that_were_learnt(bundle, data_dir, tmp_path):
    "Are judged out of fold, as everything is where members leave folds out."
    data,cfg = Dataset.open(data_dir), replace(SHORT, fit=replace(SHORT.fit, hold_out='auto'))
    fitted = fit(data, cfg, tmp_path/'all', progress=False)
    export(fitted, data, tmp_path/'all')
    model = Predictor.load(join([tmp_path/'all', bundle.parent], data, tmp_path, progress=False))
    val = data.products[data.products.split == 'val']
    assert len(fitted.oof) > len(val) and set(val.productid) <= set(fitted.oof.productid)
    assert model.triage.n_calibration == len(val) and fitted.triage.n_calibration == len(fitted.oof)


@pytest.mark.system
def test_folds_go_on_after_a_kill(data_dir, tmp_path, monkeypatch):
    "What was trained before stays; what comes out is an ensemble that has seen every listing, and judged it unseen."
    data,cfg = Dataset.open(data_dir), replace(SHORT, network=replace(SHORT.network, members=1))
    from rakuten_mm.training import ensembles
    trained = []
    def until(n):
        def fit_or_die(*args, **kwargs):
            if len(trained) == n: raise KeyboardInterrupt
            trained.append(args[2].name); return fit(*args, **kwargs)
        monkeypatch.setattr(ensembles, 'fit', fit_or_die)
    until(1)
    with pytest.raises(KeyboardInterrupt): fit_folds(data, cfg, tmp_path, 2, progress=False)
    until(9); model = Predictor.load(fit_folds(data, cfg, tmp_path, 2, progress=False))
    assert trained == ['fold-0', 'fold-1'] and len(model.models) == 2
    assert model.triage.n_calibration == (data.products.split != 'test').sum()


def test_teacher_that_lacks_a_category(bundle, data_dir, tmp_path):
    data = Dataset.open(data_dir)
    data.__dict__['products'] = data.products.assign(prdtypecode=data.products.prdtypecode.replace(2583, 9999))
    rows = data.products.head(3)
    with pytest.raises(ValueError, match='does not know 9999'): ask_teacher(bundle, rows, data, progress=False)
