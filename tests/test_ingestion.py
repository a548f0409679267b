"Ingestion under everything that deliveries, disks and people do to it."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.ingestion import fingerprint, group_quality
from rakuten_mm.cli.main import cli
from rakuten_mm.core.files import write_csv
from rakuten_mm.data.dataset import Dataset, versions
from rakuten_mm.data.diff import diff
from rakuten_mm.data.image import InvalidImage, decode_image
from rakuten_mm.data.ingestion import DataBusyError, ingest
from rakuten_mm.data.leakage import LeakError, leak_report, tabular_features
from rakuten_mm.data.schema import image_name
from rakuten_mm.data.tables import RawDataError
from rakuten_mm.synthetic.catalogue import synthesize

N = 300
INGEST = 'import sys\nfrom rakuten_mm.data.ingestion import ingest\ningest(sys.argv[1], sys.argv[2], progress=False)'


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp('ingestion')/'raw', N, 0, total=4*N, progress=False)


@pytest.fixture
def copy(raw, tmp_path):
    "A delivery to spoil."
    return shutil.copytree(raw, tmp_path/'raw')


def read(path): return pd.read_csv(path, dtype=str, keep_default_na=False).rename(columns={'Unnamed: 0': ''})


def rewrite(path, change):
    "Change a table of a delivery."
    change(read(path)).to_csv(path, index=False)


def image_path(raw_dir, i):
    "Path of the image of row `i`."
    x = read(raw_dir/'X_train_update.csv')
    return raw_dir/'images'/'image_train'/image_name(x.imageid[i], x.productid[i])


# -- 33: killed at any point -------------------------------------------------------------------------------------------

def test_f33_killed_at_ten_random_points(raw, tmp_path):
    "kill -9, then a rerun: the same bytes, nothing half-made, and readers never saw anything but a whole version."
    ingest(raw, tmp_path/'whole', progress=False)
    want,rng,inside = fingerprint(tmp_path/'whole'), random.Random(0), 0
    start = time.perf_counter()
    for i in range(11):
        data_dir = tmp_path/f'killed{i}'
        pid = os.fork()
        if pid == 0:  # everything is imported already, so that the moment falls into the work
            try: ingest(raw, data_dir, progress=False)
            finally: os._exit(0)
        if i == 0:    # the first one runs through, to know how long it takes
            os.waitpid(pid, 0); took = time.perf_counter()-start; continue
        time.sleep(took*rng.uniform(.02, .98))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        inside += bool(list(data_dir.glob('.stage-*')))
        if (data_dir/'CURRENT').exists(): assert len(Dataset.open(data_dir).products) == N
        ingest(raw, data_dir, progress=False)
        assert fingerprint(data_dir) == want and not list(data_dir.glob('.*-*'))
        shutil.rmtree(data_dir)
    assert inside >= 5


def test_f33_killed_with_workers(tmp_path):
    "The same with worker processes, which are left alone when their parent dies."
    raw = synthesize(tmp_path/'raw', 2_100, 0, image_size=32, progress=False)
    ingest(raw, tmp_path/'whole', progress=False)
    for after in (2.5, 4.5):
        process = subprocess.Popen([sys.executable, '-c', INGEST, str(raw), str(tmp_path/'data')])
        time.sleep(after); process.kill(); process.wait()
    ingest(raw, tmp_path/'data', progress=False)
    assert fingerprint(tmp_path/'data') == fingerprint(tmp_path/'whole')


SCRIPT = """
import sys
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.synthetic.catalogue import synthesize
print('a run of the script', flush=True)
raw = synthesize(sys.argv[1]+'/raw', 2_500, 0, image_size=32, progress=False, workers=2)
print(len(ingest(raw, sys.argv[1]+'/data', progress=False).index))
"""


def test_a_plain_script_may_ingest_with_workers(tmp_path):
    "Without `if __name__ == '__main__'`: no worker runs the script again."
    (tmp_path/'script.py').write_text(SCRIPT)
    r = subprocess.run([sys.executable, tmp_path/'script.py', tmp_path], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines() == ['a run of the script', '2500'] and 'Traceback' not in r.stderr


def test_f33_kept_features_are_used(raw, tmp_path, monkeypatch):
    "What was derived before a kill is not derived again."
    ingest(raw, tmp_path/'data', progress=False)
    shutil.rmtree(tmp_path/'data'/'versions'); (tmp_path/'data'/'CURRENT').unlink()
    from rakuten_mm.data import features
    monkeypatch.setattr(features, 'check_image', lambda *a: pytest.fail('an image was decoded again'))
    monkeypatch.setattr(features, 'text_features', lambda *a: pytest.fail('a text was cleaned again'))
    assert len(ingest(raw, tmp_path/'data', progress=False).products) == N


# -- 34, 35: two at once, twice the same -------------------------------------------------------------------------------

def test_f34_two_at_once(raw, tmp_path):
    "One wins, the other says so with an exit code of its own, and readers are not disturbed."
    ingest(raw, tmp_path/'data', progress=False)
    hold = ('import sys, time\nfrom filelock import FileLock\n'
            'with FileLock(sys.argv[1]): print("held", flush=True); time.sleep(60)')
    holder = subprocess.Popen([sys.executable, '-c', hold, str(tmp_path/'data'/'.lock')], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(DataBusyError, match='another ingestion is writing'):
            ingest(raw, tmp_path/'data', progress=False)
        res = CliRunner().invoke(cli, ['ingest', str(raw), str(tmp_path/'data')])
        assert res.exit_code == 75 and 'try again' in res.output
        assert len(Dataset.open(tmp_path/'data').products) == N
    finally: holder.kill(); holder.wait()
    ingest(raw, tmp_path/'data', progress=False)      # a lock does not outlive its process


def test_f35_same_input_makes_no_version(raw, copy, tmp_path):
    first = ingest(raw, tmp_path/'data', progress=False)
    image_path(copy, 0).touch()                           # other times, other folder, same bytes
    for same in (raw, copy): assert ingest(same, tmp_path/'data', progress=False).manifest == first.manifest
    assert versions(tmp_path/'data') == [first.manifest['version']]
    assert ingest(raw, tmp_path/'other', progress=False).manifest == first.manifest, 'a version is named by its content'


def test_f35_one_row_changed(raw, copy, tmp_path):
    a = ingest(raw, tmp_path/'data', progress=False)
    new = 'Un tout autre titre'
    rewrite(copy/'X_train_update.csv', lambda x: x.assign(designation=x.designation.where(x.index != 7, new)))
    b = ingest(copy, tmp_path/'data', progress=False)
    items = diff(a, b).items
    assert versions(tmp_path/'data') == [a.manifest['version'], b.manifest['version']]
    assert items[['productid', 'change', 'title']].values.tolist() == [[a.index.productid[7], 'changed', new]]
    assert b.manifest['delivery']['unchanged'] == N-1 and b.manifest['parent'] == a.manifest['version']
    assert Dataset.open(tmp_path/'data', a.manifest['version']).products.title[7] != new


def test_an_image_changed_in_place(copy, tmp_path):
    a = ingest(copy, tmp_path/'data', progress=False)
    Image.new('RGB', (50, 50), 'teal').save(image_path(copy, 3))
    b = ingest(copy, tmp_path/'data', progress=False)
    assert diff(a, b).items.change.tolist() == ['changed'] and (a.images_dir/a.products.image[3]).exists()


def test_snapshot_removes(raw, copy, tmp_path):
    a = ingest(raw, tmp_path/'data', progress=False)
    for f in ('X_train_update.csv', 'Y_train_CVw08PX.csv'): rewrite(copy/f, lambda t: t[:N-20])
    assert ingest(copy, tmp_path/'data', progress=False).manifest == a.manifest          # merged: nothing is lost
    b = ingest(copy, tmp_path/'data', snapshot=True, progress=False)
    assert diff(a, b).items.change.value_counts().to_dict() == {'removed': 20} and len(b.products) == N-20


# -- 38, 39: bad records, bad images -----------------------------------------------------------------------------------

def spoil(copy):
    "A delivery with one of each mistake: reason by line of its file."
    path = copy/'X_train_update.csv'
    x = read(path)
    quoted = lambda r: '"'+'","'.join(v.replace('"', '""').replace('\n', ' ') for v in r)+'"'
    lines = [','.join(x.columns), *map(quoted, x.itertuples(index=False))]
    lines[5] = '4,NA,NULL,"'+x.productid[4]+'",'+x.imageid[4]          # words, not missing values
    lines[6] = '5,"never closed,'+x.productid[5]+','+x.imageid[5]
    lines[7] = lines[7]+',one more'
    lines[8] = '7,"caf\udce9",,'+x.productid[7]+','+x.imageid[7]       # cp1252
    lines[9] = lines[9].replace(x.productid[8], x.productid[8]+'.5')
    lines[10] = lines[10].replace('"9"', '"8x"', 1)
    lines[11] = '"9","a second row nine","",'+x.productid[10]+','+x.imageid[10]
    lines[12] = '"11","","",'+x.productid[11]+','+x.imageid[11]
    lines[13] = '"12","the product of the first row","",'+x.productid[0]+','+x.imageid[12]
    lines[14] = lines[14].replace('"13"', '"999999"', 1)
    path.write_bytes(b'\xef\xbb\xbf'+'\r\n'.join(lines).encode('utf-8', 'surrogateescape'))
    image_path(copy_of_raw(x, copy), 14).unlink()
    return {7: 'malformed', 8: 'ragged', 9: 'not_utf8', 10: 'bad_productid', 11: 'bad_id', 13: 'empty_title',
            14: 'repeated_product', 15: 'no_label', 16: 'image_missing'}


def copy_of_raw(x, copy):
    "A folder whose table can be read, for `image_path`."
    other = copy.parent/'table'; other.mkdir(exist_ok=True)
    x.to_csv(other/'X_train_update.csv', index=False)
    if not (other/'images').exists(): (other/'images').symlink_to(copy/'images')
    return other


def test_f38_every_mistake_has_its_reason(copy, tmp_path):
    want = spoil(copy)
    wrong = lambda y: y.assign(prdtypecode=y.prdtypecode.where(y.index != 20, '1e1'))
    rewrite(copy/'Y_train_CVw08PX.csv', lambda y: pd.concat([wrong(y), y.iloc[[30]]]))
    data = ingest(copy, tmp_path/'data', progress=False, max_quarantine=.2)
    q = data.quarantine
    got = q[q.file == 'X_train_update.csv'].set_index('line').reason.to_dict()
    assert {k: got.get(k) for k in want} == want and got[22] == 'no_label'
    labels = q[q.file == 'Y_train_CVw08PX.csv'].set_index('line').reason
    assert labels[22] == 'bad_code' and labels[N+2] == 'repeated_label'
    assert set(labels) == {'bad_code', 'repeated_label', 'no_listing'}
    n = data.manifest['delivery']
    assert n['read']['X_train_update.csv'] == N == n['added']+len(got)
    row = data.products[data.products.id == 4].iloc[0]
    assert row.designation == row.title == 'NA' and row.text == 'NULL'
    assert (data.products.id == 9).sum() == 1


def test_f38_too_much_is_a_failure_with_a_report(copy, tmp_path):
    rewrite(copy/'X_train_update.csv', lambda x: x.assign(productid=x.productid.where(x.index >= 30, x.productid+'.5')))
    with pytest.raises(RawDataError, match=r'10\.0% of X_train_update\.csv was refused, more than the 5\.0%') as e:
        ingest(copy, tmp_path/'data', progress=False)
    assert '- bad_productid 30 times in X_train_update.csv, first in line 2' in str(e.value)
    rejected = pd.read_parquet(tmp_path/'data'/'rejected'/'quarantine.parquet')
    assert rejected.reason.eq('bad_productid').sum() == 30
    assert not (tmp_path/'data'/'CURRENT').exists()


def test_f38_a_whole_file_in_cp1252(copy, tmp_path):
    "It is read as what it is, and the manifest says so."
    path = copy/'X_train_update.csv'
    text = path.read_text(encoding='utf-8').encode('cp1252', 'ignore')
    path.write_bytes(text)
    data = ingest(copy, tmp_path/'data', progress=False)
    assert data.manifest['delivery']['tables'][path.name] == 'Windows-1252, commas between fields'
    want = pd.read_csv(path, encoding='cp1252', keep_default_na=False).designation.tolist()
    assert data.products.designation.tolist() == want


@pytest.mark.parametrize(('content', 'why'), [
    (b'', 'empty'), ('\ufeffid;designation\n'.encode(), 'no column imageid'),
    ('id,x\n'.encode('utf-16'), 'no column designation')])
def test_f38_no_table_at_all(copy, tmp_path, content, why):
    (copy/'X_train_update.csv').write_bytes(content)
    with pytest.raises(RawDataError, match=why): ingest(copy, tmp_path/'data', progress=False)


def test_f38_label_outside_the_taxonomy_in_use(copy, tmp_path):
    codes = sorted(read(copy/'Y_train_CVw08PX.csv').prdtypecode.unique(), key=int)
    counts = read(copy/'Y_train_CVw08PX.csv').prdtypecode.value_counts()
    rare = counts.index[-1]
    (copy/'classes.csv').write_text('prdtypecode,label\n'+''.join(f'{c},name {c}\n' for c in codes if c != rare))
    data = ingest(copy, tmp_path/'data', progress=False, max_quarantine=.2)
    assert data.manifest['delivery']['refused'] == {'no_label': counts[rare], 'unknown_code': counts[rare]}
    assert rare not in data.manifest['classes']
    assert data.manifest['names'][codes[0]] == f'name {codes[0]}'


def test_f38_x_and_y_of_different_length(copy, tmp_path):
    rewrite(copy/'Y_train_CVw08PX.csv', lambda y: y.sample(frac=1, random_state=0)[:-3])          # and in another order
    data = ingest(copy, tmp_path/'data', progress=False)
    truth = pd.read_csv(copy/'Y_train_CVw08PX.csv').set_index('Unnamed: 0').prdtypecode
    assert data.manifest['delivery']['refused'] == {'no_label': 3}
    assert (data.products.set_index('id').prdtypecode == truth.sort_index()).all()


def test_f39_unreadable_images(copy, tmp_path):
    "Quarantined and counted; no later stage meets them."
    cut = image_path(copy, 1).read_bytes()[:400]
    for i,data in enumerate([b'', cut, b'<html>404']): image_path(copy, i).write_bytes(data)
    Image.new('1', (9_000, 9_000)).save(image_path(copy, 3), 'PNG')
    image_path(copy, 4).unlink(); image_path(copy, 4).mkdir()
    data = ingest(copy, tmp_path/'data', progress=False)
    assert data.manifest['delivery']['refused'] == {'image_invalid': 5} and len(data.products) == N-5
    assert data.quarantine.detail.str.contains('empty|[Tt]runcated|not an image|pixels|directory').all()
    assert all((data.images_dir/n).exists() for n in data.products.image)


def test_f39_a_reduced_decode_misses_nothing(copy):
    "The check decodes small and grey; a file cut anywhere is noticed exactly when a full decode notices."
    from rakuten_mm.data.features import check_image
    whole,path = image_path(copy, 0).read_bytes(), image_path(copy, 0)
    for cut in np.linspace(1, len(whole)-1, 40).astype(int):
        path.write_bytes(whole[:cut])
        try: decode_image(whole[:cut]); full = ''
        except InvalidImage: full = 'bad'
        assert bool(check_image(str(path), None)[0]['image_error']) == bool(full), cut


def test_f39_an_image_lost_later(raw, tmp_path):
    "The store loses an image after ingestion: training warns and goes on without it, whichever way images are read."
    from dataclasses import replace

    from rakuten_mm.core.config import preset
    from rakuten_mm.models.inputs import ProductDataset
    from rakuten_mm.models.network import build_network
    from rakuten_mm.training.datamodule import ProductDataModule
    data = ingest(raw, tmp_path/'data', progress=False)
    df = data.products[data.products.split == 'train']
    (data.images_dir/df.image.iloc[0]).write_bytes(b'gone')
    codes = sorted(int(c) for c in data.products.prdtypecode.unique())
    make = lambda cfg: build_network(cfg, df.title.tolist(), df.text.tolist(), len(codes))
    cfg = preset('smoke')
    dm = ProductDataModule(data, make(cfg), codes, tmp_path/'store', progress=False)
    with pytest.warns(UserWarning, match=r'1 images .* cannot be read'): dm.setup()
    lost = df.image.eq(df.image.iloc[0]).to_numpy()
    assert (dm.splits['train'].has_image == ~lost).all()
    moving = replace(cfg, encoders=replace(cfg.encoders, train_image=True), network=replace(cfg.network, members=1))
    pixels = ProductDataset(df, make(moving), codes, data.images_dir, tmp_path/'store', progress=False, training=True)
    with pytest.warns(UserWarning, match='cannot be read any more'): batch = pixels[[0, int(np.flatnonzero(~lost)[0])]]
    assert batch['has_image'].tolist() == [False, True]


# -- 40: duplicates and splits -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def months(tmp_path_factory):
    "Three deliveries of one catalogue, and the dataset after each."
    root,out = tmp_path_factory.mktemp('months'), []
    for k in range(3):
        raw = synthesize(root/f'raw{k}', 800, 0, start=800*k, total=2_400, progress=False)
        out.append((raw, ingest(raw, root/'data', progress=False)))
    return out


def test_f40_no_group_crosses(months):
    "Neither the groups we found nor those that are true cross the grouped split; the random one leaks."
    for _,data in months:
        df = data.index[data.index.grouped != 'excluded']
        assert (df.groupby('group').grouped.nunique() == 1).all()
    truth = pd.concat([pd.read_csv(r/'truth.csv') for r,_ in months]).set_index('productid')['group']
    crossing = lambda split: (df.groupby(df.productid.map(truth))[split].nunique() > 1).sum()
    assert crossing('grouped') <= .01*truth.nunique() < crossing('reference')


def test_f40_what_is_decided_stays(months):
    first,*later = [d.index.set_index('productid').grouped for _,d in months]
    assert set(first) == {'train', 'val', 'test'}
    for now in later: assert (now.reindex(first.index) == first).all()
    shares = months[-1][1].index.grouped.value_counts(normalize=True)
    assert abs(shares['test']-.15) < .02 and abs(shares['val']-.15) < .02 and shares.get('excluded', 0) < .01


def test_f40_precision_and_recall(months, tmp_path):
    raw = synthesize(tmp_path/'raw', 3_000, 0, progress=False)
    found = group_quality(ingest(raw, tmp_path/'data', progress=False), raw)
    assert found['group_precision'] >= .98 and found['group_recall'] >= .98, found


# -- 41: spreadsheets --------------------------------------------------------------------------------------------------

def test_f41_formulas_are_text(raw, copy, tmp_path):
    a = ingest(raw, tmp_path/'data', progress=False)
    evil = ['=HYPERLINK("http://x")', '+1', '-1+2', '@SUM(A1)', 'Lot -3']
    rewrite(copy/'X_train_update.csv', lambda x: x.assign(designation=[*evil, *x.designation[5:]]))
    ingest(copy, tmp_path/'data', progress=False)
    args = ['data', 'diff', str(tmp_path/'data'), a.manifest['version'], '--csv', str(tmp_path/'diff.csv')]
    res = CliRunner().invoke(cli, args)
    assert res.exit_code == 0 and '5 changed' in res.output
    assert sorted(pd.read_csv(tmp_path/'diff.csv').title) == sorted([*("'"+e for e in evil[:4]), 'Lot -3'])
    assert pd.read_csv(tmp_path/'diff.csv').code_before.dtype == int


def test_f41_predictions(tmp_path):
    "The predictions file is written by the same function, and numbers stay numbers."
    write_csv(pd.DataFrame(dict(id=[1, -2], text=['\t=1', None])), tmp_path/'p.csv')
    assert (tmp_path/'p.csv').read_text() == "id,text\n1,'\t=1\n-2,\n"


# -- corrections -------------------------------------------------------------------------------------------------------

def test_corrections_merge_in_any_order(raw, tmp_path):
    "Two files, either order, twice: the same labels; bad lines are refused and the rest counts."
    ids = pd.read_csv(raw/'X_train_update.csv').productid
    files = dict(a=f'{ids[0]},10,anna,2026-11-02\n{ids[1]},40,anna,2026-11-02T10:00:00+02:00\n',
                 b=f'{ids[0]},2583,bob,2026-11-03\n{ids[2]},40,bob,soon\n77,10,bob,2026-11-03\n')
    for name,text in files.items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'corrections.csv').write_text('productid,prdtypecode,source,time\n'+text)
    ends = []
    for order in ('ab', 'ba', 'abab'):
        ingest(raw, tmp_path/order, progress=False)
        for name in order: data = ingest(tmp_path/name, tmp_path/order, progress=False, max_quarantine=.9)
        ends.append(data.index.set_index('productid').prdtypecode)
    assert all(e.equals(ends[0]) for e in ends) and ends[0][ids[0]] == 2583 and ends[0][ids[1]] == 40
    bad = pd.read_parquet(tmp_path/'ab'/'rejected'/'quarantine.parquet')
    assert bad.set_index('line').reason.to_dict() == {3: 'bad_time', 4: 'unknown_product'}


def test_corrections_as_parquet_beside_listings(copy, tmp_path):
    ids = pd.read_csv(copy/'X_train_update.csv').productid
    fix = dict(productid=[ids[5]], prdtypecode=[2583], source=['anna'], time=[pd.Timestamp('2026-11-02')])
    pd.DataFrame(fix).to_parquet(copy/'corrections.parquet')
    data = ingest(copy, tmp_path/'data', progress=False)
    assert data.products.prdtypecode[5] == 2583 and len(data.products) == N


# -- leaks -------------------------------------------------------------------------------------------------------------

def test_leak_canary(months, capsys):
    "What ids, padding and missing descriptions give away, on every split; ids must be asked for by name."
    df = months[-1][1].products
    report = leak_report(df)
    with capsys.disabled(): print('\n'+report.round(3).to_string())
    told = ['ids', 'padding', 'missing description']
    assert list(report) == ['grouped', 'reference', 'time'] and set(report.index) == {'nothing', *told, 'titles'}
    assert (report.loc[told, 'reference'] > report.loc['nothing', 'reference']+.02).all()
    assert report.loc['titles', 'reference'] > report.loc['titles', 'time'], 'the assortment moves'
    for c in ('productid', 'imageid', 'id', 'group'):
        with pytest.raises(LeakError, match='by who uploaded'): tabular_features(df, [c])


def test_versions_and_quarantine_from_the_command_line(raw, copy, tmp_path):
    image_path(copy, 0).unlink()
    run = lambda *a: CliRunner().invoke(cli, [str(x) for x in a])
    assert '299 added' in run('ingest', copy, tmp_path/'data').output
    out = run('data', 'quarantine', tmp_path/'data', '--csv', tmp_path/'q.csv').output
    assert '1  image_missing  the image is not there' in out
    assert pd.read_csv(tmp_path/'q.csv').reason.tolist() == ['image_missing']
    assert '1 added' in run('ingest', raw, tmp_path/'data').output
    listed = run('data', 'list', tmp_path/'data').output.splitlines()
    assert listed[0].split()[:3] == ['VERSION', 'LISTINGS', 'ADDED'] and len(listed) == 3 and listed[2].startswith('*')
    assert run('ingest', raw, tmp_path/'data', '--max-quarantine', '7').exit_code == 2


def test_a_manifest_proves_its_files(raw, tmp_path):
    data = ingest(raw, tmp_path/'data', progress=False)
    assert set(data.manifest['files']) == {p.name for p in data.folder.iterdir()}-{'manifest.json'}
    counts = {str(c): int(n) for c,n in data.index.prdtypecode.value_counts().sort_index().items()}
    assert json.loads((data.folder/'manifest.json').read_text())['classes'] == counts
    part = Path(data.parts[0]); part.write_bytes(part.read_bytes()[:-1]+b'x')
    with pytest.raises(ValueError, match='does not match its manifest'): Dataset.open(tmp_path/'data')


def test_what_checks_listings_is_small():
    "It runs in as many processes as there are cores; tables are read in one."
    said = "import sys, rakuten_mm.data.features; print({'pandas', 'pyarrow', 'torch', 'sklearn'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, '-c', said], capture_output=True, text=True).stdout == 'set()\n'
