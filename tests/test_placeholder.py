"A picture that many listings with unrelated texts share is no evidence that they are one product."
import io
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from rakuten_mm.data.dataset import Dataset, publish
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.ingestion_report import placeholder_figure, placeholder_pictures
from rakuten_mm.data.schema import image_name
from rakuten_mm.synthetic.catalogue import synthesize


def photo(size:int = 160, quality:int = 85)->bytes:
    "'Photo à venir', in any size."
    im = Image.new('RGB', (320, 320), (235, 235, 235)); pen = ImageDraw.Draw(im)
    pen.rectangle((60, 90, 260, 230), outline=(120, 120, 120), width=8)
    pen.ellipse((120, 120, 200, 200), fill=(160, 160, 160)); pen.rectangle((60, 250, 250, 264), fill=(90, 90, 90))
    out = io.BytesIO(); im.resize((size, size)).save(out, 'JPEG', quality=quality)
    return out.getvalue()


def read(path): return pd.read_csv(path, keep_default_na=False).rename(columns={'Unnamed: 0': ''})


def delivery(path, rows, placeholder=lambda i: False, titles=None, start:int = 0, picture=lambda i: photo()):
    "Synthetic listings, some with another picture or another title."
    raw = synthesize(path, rows, 0, image_size=48, start=start, total=2_000, progress=False)
    x = read(raw/'X_train_update.csv')
    for i,(p,m) in enumerate(zip(x.productid, x.imageid, strict=True)):
        if placeholder(i): (raw/'images'/'image_train'/image_name(m, p)).write_bytes(picture(i))
    if titles: x.assign(designation=titles, description='').to_csv(raw/'X_train_update.csv', index=False)
    return raw


def held(df)->int: return int(df.grouped.isin(['val', 'test']).sum())


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A few listings; then 200 of which every other one has the placeholder."
    d = tmp_path_factory.mktemp('half')
    first = ingest(delivery(d/'first', 20, start=1_000), d/'data', progress=False)
    raw = delivery(d/'raw', 200, lambda i: i % 2, picture=lambda i: photo(150+i % 3*40, 70+i % 7*4))
    return first, ingest(raw, d/'data', progress=False)


def test_f85_a_placeholder_is_no_edge(half):
    first,data = half
    there = data.index.productid.isin(first.index.productid)
    old,new = data.index[there], data.index[~there]
    with_it = new[new.placeholder]
    assert len(with_it) == 100 == data.manifest['placeholders'] and not old.placeholder.any()
    assert with_it.group.value_counts().max() <= 3 and held(with_it) >= max(5, held(new[~new.placeholder])/3)
    assert old.set_index('productid').grouped.to_dict() == first.index.set_index('productid').grouped.to_dict()


def test_f85_it_is_a_column_and_in_the_report(half):
    _,data = half
    assert data.products.placeholder.sum() == 100 and data.products.placeholder.dtype == bool
    seen = placeholder_pictures(data)
    assert seen.listings.sum() == 100 and seen.listings.is_monotonic_decreasing
    assert len(seen) == 21 and seen.categories.max() > 2  # files
    placeholder_figure(data).draw_without_rendering()


def test_f85_variants_with_one_photo_stay_one_group(tmp_path):
    sizes = [f'{a} x {b} cm' for a in range(40, 140, 10) for b in range(60, 200, 10)]
    titles = [f"Coussin {c} déhoussable coton bio {s}" for s in sizes for c in ('rouge', 'bleu')][:150]
    data = ingest(delivery(tmp_path/'raw', 150, lambda i: True, titles), tmp_path/'data', progress=False)
    assert not data.index.placeholder.any() and data.index.group.nunique() == 1 and data.index.grouped.nunique() == 1
    assert placeholder_figure(data) is None and not len(placeholder_pictures(data))


def test_f85_a_placeholder_that_comes_little_by_little_moves_nothing(tmp_path):
    "Too few at first, and therefore one group; then enough; then few again."
    few = delivery(tmp_path/'few', 40, lambda i: i < 5)
    one = ingest(few, tmp_path/'data', progress=False)
    with_it = one.index.productid[:5]
    assert not one.index.placeholder.any() and one.index.group[:5].nunique() == 1
    two = ingest(delivery(tmp_path/'many', 60, lambda i: i % 2, start=100), tmp_path/'data', progress=False)
    before,after = (v.index.set_index('productid') for v in (one, two))
    assert (after.grouped[before.index] == before.grouped).all() and (after.group[before.index] == before.group).all()
    assert after.placeholder[with_it].all() and after.placeholder.sum() == 35
    assert after[after.placeholder].grouped.nunique() == 3
    snapshot = delivery(tmp_path/'rest', 60, lambda i: i % 2, start=100)
    tables = snapshot/'X_train_update.csv', snapshot/'Y_train_CVw08PX.csv'
    kept = read(tables[0]).productid.isin(after.index[after.placeholder & (after.grouped != 'train')]).to_numpy()
    kept = kept | (np.arange(len(kept)) < 3)
    for t in tables: read(t)[kept].to_csv(t, index=False)
    three = ingest(snapshot, tmp_path/'data', snapshot=True, progress=False)
    left = three.index.set_index('productid')
    assert len(left) == kept.sum() and left.placeholder.any()
    assert (left.grouped == after.grouped[left.index]).all() and not (left.grouped == 'excluded').any()
    back = delivery(tmp_path/'back', 41, lambda i: i < 5)  # with products that were gone
    again = ingest(back, tmp_path/'data', progress=False).index.set_index('productid')
    assert (again.grouped[left.index] == left.grouped).all() and again.placeholder[with_it].all()


def test_f85_pictures_of_one_colour_are_placeholders_too(tmp_path):
    white = io.BytesIO(); Image.new('RGB', (100, 100), 'white').save(white, 'JPEG')
    raw = delivery(tmp_path/'raw', 40, lambda i: i < 20, picture=lambda i: white.getvalue())
    data = ingest(raw, tmp_path/'data', progress=False)
    assert data.index.placeholder.sum() == 20 and data.index[data.index.placeholder].group.nunique() > 15


def test_f85_a_dataset_from_before_is_read_and_marked_by_its_next_delivery(half, tmp_path):
    _,data = half
    root = data.folder.parents[1]
    shutil.copytree(root, tmp_path/'data')
    stage = tmp_path/'data'/'.stage-old'; shutil.copytree(data.folder, stage)
    (stage/'manifest.json').unlink()
    data.index.drop(columns='placeholder').to_parquet(stage/'index.parquet', index=False)
    manifest = {k: v for k,v in data.manifest.items() if k not in ('version', 'files', 'placeholders')}
    publish(stage, manifest, tmp_path/'data')
    old = Dataset.open(tmp_path/'data')
    assert not old.index.placeholder.any() and not old.products.placeholder.any()
    assert not len(placeholder_pictures(old)) and 'placeholders' not in old.manifest
    new = ingest(delivery(tmp_path/'raw', 10, start=1_500), tmp_path/'data', progress=False)
    assert new.index.placeholder.sum() == 100 and len(new.index) == 230
    assert (new.index.grouped[:220] == old.index.grouped).all()


def test_f85_one_photo_of_a_range_is_no_placeholder_and_that_of_a_specialised_shop_is(tmp_path):
    "In one category, a picture on 20 listings may show what they have in common; on 60 unrelated ones it does not."
    for n,expected in ((20, 0), (60, 60)):
        raw = delivery(tmp_path/f'raw{n}', n, lambda i: True)
        y = read(raw/'Y_train_CVw08PX.csv').assign(prdtypecode=2583); y.to_csv(raw/'Y_train_CVw08PX.csv', index=False)
        data = ingest(raw, tmp_path/f'data{n}', progress=False)
        assert data.index.placeholder.sum() == expected and (data.index.group.nunique() > 1) == bool(expected)
