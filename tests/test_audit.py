"Wrong labels are found, listed safely, and come back as corrections."
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from rakuten_mm.data.ingestion import ingest
from rakuten_mm.evaluation.label_audit import audit_labels, audit_scores, suspected_pairs, suspects_figure, write_audit
from rakuten_mm.evaluation.oof import read_oof
from rakuten_mm.synthetic.catalogue import demo
from zenml_pipelines.run_notebook import NotebookError, run_notebook


def catalogue(n=1_200, k=4, share=.05, seed=0):
    "Rows, probabilities, codes and true codes: a decent model, and a few labels turned to a neighbour."
    rng = np.random.default_rng(seed)
    codes,true = [10, 40, 50, 2583][:k], rng.integers(0, k, n)
    given = np.where(rng.random(n) < share, (true+1)%k, true)
    probs = np.eye(k)[true]*2+rng.normal(size=(n, k)); probs = np.exp(1.5*probs); probs /= probs.sum(1, keepdims=True)
    rows = pd.DataFrame(dict(id=range(n), productid=np.arange(n)+10**9, title='Titre', group=np.arange(n),
                             prdtypecode=np.array(codes)[given]))
    return rows, probs, codes, pd.Series(np.array(codes)[true], rows.productid)


def test_injected_noise_is_found():
    rows,probs,codes,truth = catalogue()
    s = audit_scores(audit_labels(probs, rows, codes), truth)
    assert s['average_precision'] > 5*s['noise'] and s['precision'] > 5*s['noise']
    assert s['recall'] > .5 and s['suggestion_right'] > .7


def test_order_of_rows_does_not_matter():
    rows,probs,codes,_ = catalogue()
    order = np.random.default_rng(1).permutation(len(rows))
    pd.testing.assert_frame_equal(audit_labels(probs, rows, codes), audit_labels(probs[order], rows.iloc[order], codes))


def test_a_class_that_nobody_has():
    "A code that the model knows and no row carries, and a class of one."
    rows,probs,codes,_ = catalogue(300)
    rows.loc[rows.prdtypecode == 40, 'prdtypecode'] = 10
    rows.loc[0, 'prdtypecode'] = 40
    found = audit_labels(probs, rows, codes, {10: 'Livres'})
    assert len(found) == 300 and set(found.given_name) == {'Livres', '40', '50', '2583'}
    assert (found.given != found.suggested).all()


def test_copies_are_evidence():
    rows,probs,codes,_ = catalogue(300)
    rows.loc[:2, 'group'],rows.loc[:2, 'prdtypecode'] = 0, [10, 40, 40]
    probs[0] = [.01, .97, .01, .01]
    one = audit_labels(probs, rows, codes).set_index('productid').loc[rows.productid[0]]
    assert one.suspect and one.suggested == 40
    assert (one.copies, one.copies_otherwise, one.copies_as_suggested) == (2, 2, 2)


@pytest.mark.parametrize(('spoil', 'why'), [
    (lambda r, p: (r, p[:-1]), 'but there are'), (lambda r, p: (r, p*np.nan), 'are no probabilities'),
    (lambda r, p: (r.assign(prdtypecode=7), p), 'no probabilities for the code 7')])
def test_refused(spoil, why):
    rows,probs,codes,_ = catalogue(50)
    rows,probs = spoil(rows, probs)
    with pytest.raises(ValueError, match=why): audit_labels(probs, rows, codes)


def test_scores_need_the_truth():
    rows,probs,codes,truth = catalogue(200)
    found = audit_labels(probs, rows, codes)
    with pytest.raises(ValueError, match='no truth about 1 of 200'): audit_scores(found, truth[1:])
    given = rows.set_index('productid').prdtypecode
    with pytest.raises(ValueError, match='every label is right'): audit_scores(found, given)


def test_oof_that_does_not_fit(tmp_path):
    rows,*_ = catalogue(20)
    with pytest.raises(FileNotFoundError, match='no out-of-fold probabilities'): read_oof(tmp_path/'oof.parquet', rows)
    pd.DataFrame(dict(productid=[1])).to_parquet(tmp_path/'oof.parquet')
    with pytest.raises(ValueError, match='needs columns productid and p_<code>'): read_oof(tmp_path/'oof.parquet', rows)
    pd.DataFrame(dict(productid=[1, 1], p_10=.5, p_40=.5)).to_parquet(tmp_path/'oof.parquet')
    with pytest.raises(ValueError, match='more than one row'): read_oof(tmp_path/'oof.parquet', rows)


# -- a dataset ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def noisy(tmp_path_factory):
    "A dataset, the truth about it, and what a training run would leave: probabilities that are right most of the time."
    root = tmp_path_factory.mktemp('noisy')
    data = demo(root, 600, n_test=0, image_size=32)
    truth = pd.read_csv(root/'raw'/'truth.csv').set_index('productid').true_code
    train = data.products[data.products.split == 'train']
    codes = sorted(data.products.prdtypecode.unique().tolist())
    z = np.random.default_rng(0).normal(size=(len(train), len(codes)))
    z[range(len(train)), [codes.index(truth[p]) for p in train.productid]] += 5
    probs = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    (root/'train').mkdir()
    oof = pd.DataFrame(probs, columns=[f'p_{c}' for c in codes]).assign(productid=train.productid.to_numpy())
    oof.to_parquet(root/'train'/'oof.parquet')
    (root/'train'/'result.json').write_text(json.dumps(dict(split='grouped', data_version=data.manifest['version'])))
    return root,data,truth


def test_suspects_come_back_as_corrections(noisy, tmp_path):
    "Run, pruned by a person, delivered: labels change, what was judged is not suspected again."
    root,_,truth = noisy
    shutil.copytree(root/'data', tmp_path/'data')
    res = run_notebook('audit', tmp_path/'audit', data_dir=tmp_path/'data', train_dir=root/'train', top=50)
    found = pd.read_excel(tmp_path/'audit'/'suspects.xlsx', engine='calamine')
    assert pd.read_csv(tmp_path/'audit'/'suspects.csv').productid.tolist() == found.productid.tolist()
    assert res['written'] == len(found) == min(50, res['suspects']) and res['reviewed'] == 0 and len(found) >= 3
    judged = found.assign(prdtypecode=found.productid.map(truth), source='anna')
    (tmp_path/'raw').mkdir(); judged.to_excel(tmp_path/'raw'/'corrections.xlsx', index=False, engine='xlsxwriter')
    data = ingest(tmp_path/'raw', tmp_path/'data', progress=False)
    labels = data.index.set_index('productid').prdtypecode
    assert data.quarantine.empty and (labels[found.productid] == truth[found.productid]).all()
    assert (labels[found.productid] != found.given.to_numpy()).any()
    with pytest.raises(NotebookError, match='was trained on data'):
        run_notebook('audit', tmp_path/'old', data_dir=tmp_path/'data', train_dir=root/'train')
    (tmp_path/'train').mkdir(); shutil.copy(root/'train'/'oof.parquet', tmp_path/'train')
    result = dict(split='grouped', data_version=data.manifest['version'])
    (tmp_path/'train'/'result.json').write_text(json.dumps(result))
    after = run_notebook('audit', tmp_path/'again', data_dir=tmp_path/'data', train_dir=tmp_path/'train')
    left = pd.read_csv(tmp_path/'again'/'suspects.csv')
    assert after['reviewed'] == len(found) and not left.productid.isin(found.productid).any()


def test_generator_noise_in_a_dataset(noisy):
    root,data,truth = noisy
    probs,rows,codes = read_oof(root/'train'/'oof.parquet', data.products)
    found = audit_labels(probs, rows, codes)
    s = audit_scores(found, truth)
    assert .005 < s['noise'] < .05 and s['average_precision'] > .5 and s['recall'] > .5
    assert suspected_pairs(found)['count'].sum() == found.suspect.sum()
    fig = suspects_figure(found, data.images_dir, 3); fig.canvas.draw()
    assert suspects_figure(found.assign(image='lost.img', title='$x^$ <b>'), data.images_dir, 3) is not None


def test_titles_stay_text(noisy, tmp_path):
    "A title with a formula is harmless in the file, and numbers stay numbers."
    root,data,_ = noisy
    probs,rows,codes = read_oof(root/'train'/'oof.parquet', data.products)
    found = audit_labels(probs, rows.assign(title='=1+1, "x"\n@SUM(A1)'), codes)
    written = write_audit(found, tmp_path/'suspects.csv', top=3)
    back = pd.read_csv(tmp_path/'suspects.csv')
    assert back.title.tolist() == ["'=1+1, \"x\"\n@SUM(A1)"]*3 and back.productid.tolist() == written.productid.tolist()
    assert back.columns[:4].tolist() == ['productid', 'prdtypecode', 'source', 'time'] and back.prdtypecode.dtype == int
