"Fault 79: what an older release or a hand did to a dataset is found, and mended or refused with a sentence."
import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from filelock import FileLock

from rakuten_mm.cli.main import cli
from rakuten_mm.data.dataset import Dataset, publish, versions
from rakuten_mm.data.ingestion import ingest, link_parts
from rakuten_mm.data.repair import find_damage, repair
from rakuten_mm.synthetic.catalogue import synthesize


def run(*args): return CliRunner().invoke(cli, [*map(str, args)])


@pytest.fixture(scope='module')
def deliveries(tmp_path_factory):
    "Two small deliveries."
    top = tmp_path_factory.mktemp('deliveries')
    return [synthesize(top/name, n, 0, start=start, total=400, image_size=32, progress=False)
            for name,n,start in (('raw', 90, 0), ('next', 30, 120))]


@pytest.fixture(scope='module')
def made(deliveries, tmp_path_factory):
    return ingest(deliveries[0], tmp_path_factory.mktemp('made')/'data', progress=False).folder.parents[1]


@pytest.fixture
def data_dir(made, tmp_path):
    "A dataset to be damaged."
    return Path(shutil.copytree(made, tmp_path/'data'))


def forge(data_dir, change, **manifest):
    "Publish the current version with a changed index, as a release with a mistake would have."
    data = Dataset.open(data_dir)
    stage = Path(tempfile.mkdtemp(dir=data_dir))
    (stage/'part.tmp').touch(); link_parts(data, stage, 0)
    change(data.index.copy()).to_parquet(stage/'index.parquet', index=False)
    for f in ('corrections.parquet', 'quarantine.parquet'): shutil.copyfile(data.folder/f, stage/f)
    old = {k: v for k,v in data.manifest.items() if k not in ('files', 'version')}
    publish(stage, old | dict(generation=old['generation']+1, parent=data.manifest['version']) | manifest, data_dir)
    return Dataset.open(data_dir)


def sound(data_dir, more):
    "The dataset has no damage left, and takes the next delivery."
    assert find_damage(data_dir) == [] and repair(data_dir) == []
    data = ingest(more, data_dir, progress=False)
    assert data.index.productid.is_unique and find_damage(data_dir) == [] and len(data.products) == len(data.index)
    return data


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*')
            if p.is_file() and p.name != '.lock' and p.parent.name != 'cache'}


def test_f79_a_product_twice_is_mended_by_the_next_ingestion(data_dir, deliveries):
    bad = forge(data_dir, lambda df: pd.concat([df, df[:2]], ignore_index=True))
    assert bad.index.productid.duplicated().sum() == 2 and 'stand there twice' in find_damage(data_dir)[0].what
    data = ingest(deliveries[1], data_dir, progress=False)
    assert data.manifest['delivery']['mended'] == 2 and data.manifest['parent'] == bad.manifest['version']
    assert data.index.productid.is_unique and find_damage(data_dir) == []


def test_f79_the_same_delivery_mends_too(data_dir, deliveries):
    forge(data_dir, lambda df: pd.concat([df, df[:1]], ignore_index=True))
    got = run('ingest', deliveries[0], data_dir)
    assert got.exit_code == 0 and '1 products were there twice' in got.output, got.output
    assert find_damage(data_dir) == []


def test_f79_a_product_twice_keeps_its_later_row(data_dir, deliveries):
    "The parent stays as it was, and corrections hold for the row that stays."
    first = Dataset.open(data_dir)
    ids = first.index.productid[:2].tolist()
    fixed = data_dir.parent/'fixes'; fixed.mkdir()
    code = int(first.index.prdtypecode[first.index.prdtypecode != first.index.prdtypecode[0]].iloc[0])
    (fixed/'corrections.csv').write_text(f'productid,prdtypecode,source,time\n{ids[0]},{code},anna,2026-01-01T00:00\n')
    ingest(fixed, data_dir, progress=False)
    bad = forge(data_dir, lambda df: pd.concat([df[df.productid.isin(ids)], df], ignore_index=True))
    before = content(bad.folder)
    assert run('data', 'verify', data_dir).exit_code == 1
    got = run('data', 'repair', data_dir)
    assert got.exit_code == 0 and f'{ids[0]}, {ids[1]}' in got.output, got.output
    after = Dataset.open(data_dir)
    assert content(bad.folder) == before and after.manifest['parent'] == bad.manifest['version']
    assert after.manifest['repaired']['twice'] == after.manifest['delivery']['mended'] == 2
    assert after.index.set_index('productid').prdtypecode[ids[0]] == code
    assert (after.index.set_index('productid').grouped == first.index.set_index('productid').grouped).all()
    assert 'repeated_product' in run('data', 'quarantine', data_dir).output
    assert run('data', 'list', data_dir).exit_code == 0 and run('data', 'verify', data_dir).exit_code == 0
    sound(data_dir, deliveries[1])


def elsewhere(df):
    "Products 0 to 2 point at rows of other products."
    return df.assign(row=df.row.where(df.index > 2, df.row+3))


def outside(df): return df.assign(row=df.row.where(df.index != 5, 10**7), part=df.part.where(df.index != 6, 3))


@pytest.mark.parametrize(('change', 'fact', 'gone'), [
    (outside, 'misplaced', 2), (elsewhere, 'misplaced', 3),
    (lambda df: df.assign(row=df.row.where(df.index != 5, -1)), 'misplaced', 1),
    (lambda df: df.assign(prdtypecode=df.prdtypecode.where(df.index != 7, 99)), 'labels', 0),
    (lambda df: df.assign(prdtypecode=df.prdtypecode.where(df.index != 7, 99), code=df.code.where(df.index != 7, 99)),
     'unknown', 1)], ids=['outside', 'of another product', 'negative', 'label', 'category'])
def test_f79_rows_that_cannot_be(data_dir, deliveries, change, fact, gone):
    before = Dataset.open(data_dir).index
    forge(data_dir, change)
    assert find_damage(data_dir), 'found'
    repair(data_dir)
    after = Dataset.open(data_dir)
    assert after.manifest['repaired'][fact] and len(after.index) == len(before)-gone
    kept = before.set_index('productid').loc[after.index.productid]
    assert (kept.prdtypecode.to_numpy() == after.index.prdtypecode.to_numpy()).all()
    assert (kept.grouped.to_numpy() == after.index.grouped.to_numpy()).all(), 'nothing decided moves'
    sound(data_dir, deliveries[1])


def test_f79_a_group_on_both_sides_of_the_split(data_dir, deliveries):
    "What a model has seen stays; what was to measure it is excluded, also where only the texts show the copy."
    def cross(df):
        df.loc[df.index[:4], 'group'] = df.productid[0]
        df.loc[df.index[:4], 'grouped'] = ['test', 'train', 'val', 'excluded']
        return df
    bad = forge(data_dir, cross)
    repair(data_dir)
    after = Dataset.open(data_dir).index
    assert after.grouped[:4].tolist() == ['excluded', 'train', 'excluded', 'excluded']
    assert after[after.grouped != 'excluded'].groupby('group').grouped.nunique().max() == 1
    assert len(after) == len(bad.index)
    sound(data_dir, deliveries[1])


def test_f79_pictures_from_a_delivery_or_without_their_listing(data_dir, deliveries):
    data = Dataset.open(data_dir)
    names = [*data.products.image.unique()[:4]]
    right = [(data.images_dir/n).read_bytes() for n in names]
    (data.images_dir/names[0]).unlink(); (data.images_dir/names[1]).write_bytes(right[1][::-1])
    planned = run('data', 'repair', data_dir, '--raw', deliveries[0], '--dry-run')
    assert planned.exit_code == 0 and planned.output.count('it is copied from') == 2, planned.output
    assert not (data.images_dir/names[0]).exists()
    assert run('data', 'repair', data_dir, '--raw', deliveries[0]).exit_code == 0
    assert [(data.images_dir/n).read_bytes() for n in names] == right
    assert versions(data_dir) == [data.manifest['version']], 'nothing in a version was wrong'
    (data.images_dir/names[2]).unlink(); (data.images_dir/names[3]).write_bytes(b'?'*len(right[3]))
    got = run('data', 'repair', data_dir)
    gone = data.index.productid[data.products.image.isin(names[2:])]
    assert got.exit_code == 0 and str(gone.iloc[0]) in got.output and '--raw' in got.output, got.output
    after = Dataset.open(data_dir)
    assert not after.index.productid.isin(gone).any()
    assert sorted(after.manifest['repaired']['lost']) == sorted(names[2:])
    assert not (data.images_dir/names[3]).exists(), 'a delivery with the right picture must not take it for that'
    later = sound(data_dir, deliveries[1])
    again = ingest(deliveries[0], data_dir, snapshot=True, progress=False)
    assert again.index.productid.isin(gone).sum() == len(gone) and len(again.index) < len(later.index)
    assert find_damage(data_dir) == []


@pytest.mark.parametrize('pointer', ['0123456789abcdef\n', '', '../../etc', b'\xff\xfe\0', None])
def test_f79_current_names_no_version(data_dir, deliveries, pointer):
    newest = ingest(deliveries[1], data_dir, progress=False).manifest['version']
    if pointer is None: (data_dir/'CURRENT').unlink()
    else: (data_dir/'CURRENT').write_bytes(pointer if isinstance(pointer, bytes) else pointer.encode())
    assert run('data', 'verify', data_dir).exit_code == 1
    got = run('data', 'repair', data_dir)
    assert got.exit_code == 0 and newest in got.output and Dataset.open(data_dir).manifest['version'] == newest
    assert find_damage(data_dir) == []


def test_f79_files_of_a_version_that_another_has(data_dir, deliveries):
    old = Dataset.open(data_dir)
    new = ingest(deliveries[1], data_dir, progress=False)
    part = new.folder/new.manifest['parts'][0]
    part.unlink(); (new.folder/'index.parquet').rename(data_dir/'kept')
    assert repair(data_dir, dry_run=True)[0].cure and not part.exists()
    (data_dir/'kept').rename(new.folder/'index.parquet')
    got = run('data', 'repair', data_dir)
    assert got.exit_code == 0 and 'taken from another version' in got.output, got.output
    assert Dataset.open(data_dir).manifest['version'] == new.manifest['version'] and part.exists()
    (new.folder/'index.parquet').unlink()  # which only this version had
    got = run('data', 'repair', data_dir)
    assert got.exit_code == 0 and old.manifest['version'] in got.output, got.output
    assert Dataset.open(data_dir).manifest['version'] == old.manifest['version']
    assert (data_dir/'damaged'/new.folder.name/'manifest.json').exists(), 'nothing is thrown away'
    sound(data_dir, deliveries[1])


def test_f79_older_releases_and_nothing_whole_are_refused_with_a_sentence(data_dir, tmp_path):
    folder = Dataset.open(data_dir).folder
    m = json.loads((folder/'manifest.json').read_text())
    (folder/'manifest.json').write_text(json.dumps({k: v for k,v in m.items() if k != 'files'}))
    before = content(data_dir)
    got = run('data', 'repair', data_dir)
    assert got.exit_code == 1 and 'older release' in got.output, got.output
    assert 'ingest the deliveries again' in got.output
    assert isinstance(got.exception, SystemExit) and content(data_dir) == before
    none = run('data', 'repair', tmp_path)
    assert none.exit_code == 1 and 'holds no dataset' in none.output
    forge_dir = tmp_path/'old'
    shutil.copytree(data_dir, forge_dir); (forge_dir/'versions'/folder.name/'manifest.json').write_text(json.dumps(m))
    forge(forge_dir, lambda df: df.drop(columns='time'))
    got = run('data', 'repair', forge_dir)
    assert got.exit_code == 1 and 'has no time' in got.output, got.output


def spoil_page(path):
    with closing(sqlite3.connect(path)) as db: db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    data = bytearray(path.read_bytes()); data[4096:8192] = np.random.default_rng(0).bytes(4096); path.write_bytes(data)


def spoil_values(path):
    with closing(sqlite3.connect(path)) as db, db: db.execute("UPDATE facts SET value = substr(value, 1, 9)")


@pytest.mark.parametrize('spoil', [lambda p: p.write_bytes(b'no database at all'*300), spoil_page, spoil_values])
def test_f79_a_damaged_cache_of_features(data_dir, deliveries, spoil):
    cache = data_dir/'cache'/'facts.sqlite'
    for p in cache.parent.glob('*-wal'):
        with closing(sqlite3.connect(cache)) as db: db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
        assert not p.exists() or p.stat().st_size == 0
    spoil(cache)
    assert 'facts.sqlite' in find_damage(data_dir)[0].what
    assert run('data', 'repair', data_dir).exit_code == 0 and not cache.exists()
    sound(data_dir, deliveries[1])


def test_f79_remains_and_a_lock(data_dir, deliveries):
    (data_dir/'.stage-killed').mkdir(); (data_dir/'.stage-killed'/'part.tmp').write_bytes(b'x')
    (data_dir/'.tmp-killed').write_bytes(b'x'); (next((data_dir/'images').iterdir())/'.0.part').write_bytes(b'x')
    (data_dir/'settings.json').write_text('{')
    with FileLock(data_dir/'.lock'):
        busy = run('data', 'repair', data_dir)
        assert busy.exit_code == 75 and 'try again' in busy.output and (data_dir/'.tmp-killed').exists()
    planned = run('data', 'repair', data_dir, '--dry-run')
    assert '3 remains' in planned.output and 'nothing was changed' in planned.output
    assert (data_dir/'.tmp-killed').exists()
    assert run('data', 'repair', data_dir).exit_code == 0
    assert not [*data_dir.glob('.stage-*'), *data_dir.glob('.tmp-*'), *data_dir.glob('images/*/.*')]
    assert (data_dir/'damaged'/'settings.json').exists()
    sound(data_dir, deliveries[1])
