"The model card, on models and rows that are not the usual ones."
import os

import numpy as np
import pytest

from rakuten_mm.core.config import preset, single_modality
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.evaluation.model_card import class_sizes, model_facts, use_and_limits
from rakuten_mm.evaluation.scores import targets_of
from rakuten_mm.evaluation.shortcuts import shortcut_costs
from rakuten_mm.evaluation.slices import class_balance_figure, modality_states, slices
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.stats.metrics import class_report
from rakuten_mm.training.export import export, fit

CHANGES = ['f1_weighted_change', 'f1_macro_change', 'accuracy_change']


@pytest.fixture(scope='module')
def data(data_dir):
    return Dataset.open(data_dir)


@pytest.fixture(scope='module')
def test_rows(data):
    return data.products[data.products.split == 'test']


@pytest.fixture(scope='module')
def store(environment):
    return os.environ['RAKUTEN_MM_ARTIFACTS']+'/embeddings'


@pytest.fixture(scope='module')
def model(bundle):
    return Predictor.load(bundle)


@pytest.fixture(scope='module')
def costs(model, data, test_rows, store):
    return shortcut_costs(model, test_rows, data.images_dir, store, progress=False)


def test_ids_change_nothing(costs):
    assert (costs.loc['ids shuffled', [*CHANGES, 'touched', 'answers_changed']] == 0).all()


def test_a_wrong_image_costs(costs):
    assert (costs.loc['wrong image', CHANGES] < 0).all()
    assert costs.loc['wrong image', 'touched'] == 1 and costs.loc['wrong image', 'answers_changed'] > 0


def test_changes_are_measured_against_the_untouched(costs):
    assert costs.index.tolist() == ['untouched', 'no description', 'no image', 'no text', 'wrong image', 'raw text',
                                    'raw text, HTML stripped', 'ids shuffled', 'blank image', 'padding cropped']
    assert np.allclose(costs.f1_macro-costs.f1_macro_change, costs.loc['untouched', 'f1_macro'])
    assert (costs[costs.touched == 0].answers_changed == 0).all()
    assert (costs.answers_changed <= np.maximum(costs.touched, 1e-9)).all()


def test_a_sample_is_the_same_sample(model, data, test_rows, store):
    again = lambda: shortcut_costs(model, test_rows, data.images_dir, store, seed=1, max_rows=20, progress=False)
    a,b = again(), again()
    assert (a.n == 20).all() and a.equals(b)


@pytest.mark.parametrize('min_size', [1, 10, 30, 10**6])
def test_slices_add_up(model, data, test_rows, store, min_size):
    probs = model.probs_of(test_rows, data.images_dir, store, progress=False)
    table = slices(probs, targets_of(test_rows, model.codes), test_rows, model.codes, min_size)
    assert (table.groupby('kind').n.sum() == len(test_rows)).all() and table.kind.nunique() == 5
    assert (table.n[~table['slice'].str.startswith('other')] >= min_size).all()
    assert table.notna().all(axis=None)


def test_text_only_model(data, test_rows, store, tmp_path):
    "It is not asked what it cannot notice."
    network = fit(data, single_modality(preset('smoke'), 'text'), tmp_path, progress=False)
    model = Predictor.load(export(network, data, tmp_path))
    costs = shortcut_costs(model, test_rows, data.images_dir, store, progress=False)
    assert costs.index.tolist() == ['untouched', 'no description', 'raw text', 'raw text, HTML stripped',
                                    'ids shuffled']
    assert (costs.loc['ids shuffled', CHANGES] == 0).all()
    states = modality_states(model, test_rows, data.images_dir, store)
    assert states.index.tolist() == ['text', 'no description'] and states.ece.between(0, 1).all()
    assert model_facts(model, data).fact['image encoder'] == '–'


def test_unknown_code_is_an_error_and_no_crash(model, data, test_rows, store):
    "Listings of a category that came after the model."
    rows = test_rows.copy()
    new = np.arange(len(rows)) % 2 == 0
    rows.loc[new, 'prdtypecode'] = 99_999
    targets = targets_of(rows, model.codes)
    assert ((targets == -1) == new).all()
    probs = model.probs_of(rows, data.images_dir, store, progress=False)
    table = slices(probs, targets, rows, model.codes)
    unknown = table[table['slice'] == 'unknown to the model'].iloc[0]
    assert (table.groupby('kind').n.sum() == len(rows)).all()
    assert unknown.n == new.sum() and (unknown[['f1_weighted', 'f1_macro', 'accuracy', 'top3_accuracy']] == 0).all()
    states = modality_states(model, rows, data.images_dir, store)
    costs = shortcut_costs(model, rows, data.images_dir, store, progress=False)
    right = (probs.argmax(1) == targets).mean()
    assert right <= .5
    assert states.accuracy.iloc[0] == pytest.approx(right) and costs.accuracy.iloc[0] == pytest.approx(right)
    report = class_sizes(class_report(probs.argmax(1), targets, model.codes, model.names), data.products)
    assert len(class_balance_figure(report).axes[0].texts) == (report.support > 0).sum()
    data.products.loc[rows.index[new], 'prdtypecode'] = 99_999
    try: assert f'{new.sum()} of {len(rows)} test listings carry a code' in use_and_limits(model, data, report)
    finally: data.products.loc[test_rows.index, 'prdtypecode'] = test_rows.prdtypecode
