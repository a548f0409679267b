"Fault 80: codes and ids up to 2^53-1 everywhere; larger ones are refused, except those of listings that were served."
import hashlib
from datetime import UTC, datetime

import httpx
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from rakuten_mm.core.config import preset, single_modality
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.feedback import Correction, served_id, text_hash, write_delivery
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.splits import FEEDBACK_ID_BASE, settle_groups
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.synthetic.catalogue import synthesize
from serving.schema import ExplainRequest, FeedbackRequest
from serving.testing import running_server

LARGEST = 2**53-1


def read(path): return pd.read_csv(path, dtype=str, keep_default_na=False)


def renumbered(raw):
    "A delivery whose largest ids and most codes do not fit into 32 bits, and the codes that it now has."
    x,y = next(raw.glob('X_train*.csv')), next(raw.glob('Y_train*.csv'))
    listings,labels = read(x), read(y)
    codes = sorted(labels.prdtypecode.unique(), key=int)
    large = {c: str(LARGEST-i if i < 9 else 2**31-1+i) for i,c in enumerate(codes)}
    labels.assign(prdtypecode=labels.prdtypecode.map(large)).to_csv(y, index=False)
    for i in (0, 1):
        old,new = listings.productid[i], str(LARGEST-i)
        photo = raw/'images'/'image_train'/f'image_{listings.imageid[i]}_product_{old}.jpg'
        photo.rename(photo.with_name(photo.name.replace(old, new)))
        listings.loc[i, 'productid'] = new
    listings.to_csv(x, index=False)
    return {int(c) for c in large.values()}


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    top = tmp_path_factory.mktemp('large')
    raw = synthesize(top/'raw', 240, 0, image_size=32, progress=False)
    codes = renumbered(raw)
    return ingest(raw, top/'data', progress=False), codes


def test_f80_ingestion_keeps_large_numbers_and_corrects_them(large, tmp_path):
    data,codes = large
    assert {*data.index.prdtypecode} == codes and LARGEST in {*data.index.productid} and len(data.index) == 240
    assert {int(c) for c in data.manifest['classes']} == codes
    code = LARGEST if data.index.prdtypecode[1] != LARGEST else LARGEST-1
    (tmp_path/'corrections.csv').write_text('productid,prdtypecode,source,time\n'
                                            f'{LARGEST-1},{code},anna,2026-01-01T00:00\n')
    again = ingest(tmp_path, data.folder.parents[1], progress=False).index
    assert again.set_index('productid').prdtypecode[LARGEST-1] == code
    pd.testing.assert_series_equal(again.code, data.index.code)


def test_f80_larger_numbers_are_refused_with_the_reason(tmp_path):
    raw = synthesize(tmp_path/'raw', 40, 0, image_size=32, progress=False)
    x,y = next(raw.glob('X_train*.csv')), next(raw.glob('Y_train*.csv'))
    listings,labels = read(x), read(y)
    listings.loc[[0, 1], 'productid'] = [str(LARGEST+1), str(FEEDBACK_ID_BASE+12_345)]
    labels.loc[2, 'prdtypecode'] = str(LARGEST+1)
    listings.to_csv(x, index=False); labels.to_csv(y, index=False)
    data = ingest(raw, tmp_path/'data', max_quarantine=.2, progress=False)
    q = data.quarantine
    assert q[q.reason == 'bad_productid'].productid.astype(int).tolist() == [LARGEST+1, FEEDBACK_ID_BASE+12_345]
    assert (q.reason == 'bad_code').sum() == 1 and len(data.index) == 37


def test_f80_listings_that_were_served_keep_their_ids(large, tmp_path):
    "Ids of ours are known by what they name, and nobody else's number is taken for one."
    data = Dataset.open(large[0].folder.parents[1])
    photo = data.images_dir/data.products.image[0]
    said = dict(asked_at=datetime(2026, 1, 2, tzinfo=UTC), said_at=datetime(2026, 1, 3, tzinfo=UTC), image=photo,
                image_sha256=hashlib.sha256(photo.read_bytes()).hexdigest(), answered=LARGEST, prdtypecode=LARGEST-1)
    titles = 'Neuf numéro un', 'Autre objet'
    new = [Correction(text_hash(t, ''), designation=t, description='', **said) for t in titles]
    write_delivery(new, data, tmp_path/'feedback')
    after = ingest(tmp_path/'feedback', data.folder.parents[1], progress=False).index
    ids = {served_id(c.key) for c in new}
    assert min(ids) >= FEEDBACK_ID_BASE > LARGEST and ids < {*after.productid}
    assert {*after.group[after.productid.isin(ids)]} <= {*after.productid}, 'groups are products, to the last digit'


def test_f80_groups_of_served_listings_are_not_rounded():
    "Numbers above 2^53 do not go through floating point, also where some rows have none."
    old,new,other = FEEDBACK_ID_BASE+1, FEEDBACK_ID_BASE+3, FEEDBACK_ID_BASE+10_001
    rows = pd.DataFrame(dict(productid=[old, new, other, 5], component=[0, 0, 1, 2], group=[old, 0, 0, 5],
                             grouped=['train', '', '', 'test'], changed=False))
    settled = settle_groups(rows)
    assert settled.group.tolist() == [old, old, other, 5] and settled.grouped.tolist() == ['train', 'train', '', 'test']


def test_f80_the_api_takes_what_ingestion_takes():
    said = dict(prediction_id='0'*36)
    assert FeedbackRequest(**said, prdtypecode=LARGEST).prdtypecode == LARGEST
    assert ExplainRequest(designation='x', prdtypecode=2**31).prdtypecode == 2**31
    for code in (LARGEST+1, -1):
        with pytest.raises(ValidationError): FeedbackRequest(**said, prdtypecode=code)


def test_f80_training_and_serving(large, tmp_path):
    "From the dataset to a bundle, an answer, its explanation and its correction."
    from rakuten_mm.training.export import export, fit
    data,codes = large
    cfg = single_modality(preset('smoke'), 'text')
    bundle = export(fit(data, cfg, tmp_path/'run', progress=False), data, tmp_path/'run')
    model = Predictor.load(bundle)
    assert {*model.codes} <= codes and {*model.names} == codes
    assert np.array(model.codes, 'float64').astype('int64').tolist() == [*model.codes], 'exact in JavaScript'
    title = data.products.designation[data.products.prdtypecode == LARGEST].iloc[0]
    with (running_server(bundle) as served,
          httpx.Client(base_url=served.url, auth=(served.user, served.password)) as http):
        got = http.post('/predict', json=dict(designation=title)).json()
        assert got['prdtypecode'] in codes
        why = http.post('/explain', json=dict(designation=title, prdtypecode=LARGEST), timeout=60)
        assert why.status_code == 200 and why.json()['prdtypecode'] == LARGEST, why.text
        answered = dict(prediction_id=got['prediction_id'])
        for code in (LARGEST, LARGEST-1):
            said = http.post('/feedback', json=answered | dict(prdtypecode=code, reviewer=f'r{code}'))
            assert said.status_code == 200 and said.json()['prdtypecode'] == code, said.text
        assert http.post('/feedback', json=answered | dict(prdtypecode=2**53)).status_code == 422
