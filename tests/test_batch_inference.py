"Predictions for lists of products as people have them: every line answered, whatever is in it, and nothing lost."
import csv
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image
from python_calamine import CalamineWorkbook

from rakuten_mm.cli.main import cli
from rakuten_mm.core.config import preset, single_modality
from rakuten_mm.models import batch_inference
from rakuten_mm.models.batch_inference import COLUMNS, SHARD, OutputBusy, predict_file
from rakuten_mm.models.bundle import save_bundle
from rakuten_mm.models.network import build_network
from rakuten_mm.models.predictor import Predictor

CODES = [10, 2583, 2**53-1]
WORDS = ['robot', 'piscine', 'livre', 'roman', 'jeu', 'console', 'figurine', 'carte', 'table', 'chat', 'drone']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An untrained model of texts and pictures: what it says does not matter, that it always says the same does."
    torch.manual_seed(0)
    net = build_network(preset('smoke'), ['Piscine ronde', 'Livre de poche']*2, ['']*4, 3)
    return save_bundle(tmp_path_factory.mktemp('model')/'bundle', net, CODES, dict(zip(CODES, 'abc', strict=True)))


@pytest.fixture(scope='module')
def text_model(tmp_path_factory):
    torch.manual_seed(0)
    net = build_network(single_modality(preset('smoke'), 'text'), ['Piscine ronde', 'Livre de poche']*2, ['']*4, 3)
    return save_bundle(tmp_path_factory.mktemp('texts')/'bundle', net, CODES, dict(zip(CODES, 'abc', strict=True)))


@pytest.fixture
def ask(model, tmp_path):
    "Run `predict` on a list in a folder."
    def run(*more, products='list.csv', out='out.csv', stdin=None):
        names = ['--products', products if products == '-' else str(tmp_path/products),
                 '--out', out if out == '-' else str(tmp_path/out)]
        return CliRunner().invoke(cli, ['predict', '--bundle', str(model), *names, *map(str, more)], input=stdin)
    return run


def answers(path, **how)->pd.DataFrame:
    return pd.read_csv(path, dtype={'id': str}, keep_default_na=False, **how)


def picture(path, color='blue'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 30), color).save(path)


def titles(path, n:int):
    rng = random.Random(0)
    with path.open('w') as f:
        print('id,designation', file=f)
        for i in range(n): print(f"{i},{' '.join(rng.choices(WORDS, k=12))}", file=f)


def test_f82_one_bad_line_costs_itself(ask, tmp_path):
    picture(tmp_path/'image_1_product_11.jpg'); (tmp_path/'image_7_product_17.jpg').write_bytes(b'<html>')
    (tmp_path/'list.csv').write_bytes('\n'.join([
        ',designation,description,productid,imageid', '1,Robot,,11,1', '2,Roman,,12,', '3,Lampe,,13,x', '4,cut off',
        '5,,<p>,15,', '6,"nobody closes this,,,', '7,Table,,17,7', '8,Chaise,,18,8', '9,gar\xff', '10,Livre,,20,']
        ).encode('latin-1'))
    r = ask('--images', tmp_path)
    assert r.exit_code == 0, r.output
    t = answers(tmp_path/'out.csv')
    assert list(t) == COLUMNS
    # a line of which not even the id can be read has its place all the same
    assert t.id.tolist() == ['1', '2', '3', '4', '5', '', '7', '8', '9', '10']
    assert t.id[t.prdtypecode != ''].tolist() == ['1', '2', '3', '7', '8', '10']
    p = pd.read_csv(tmp_path/'out.problems.csv', keep_default_na=False)
    assert list(p) == ['line', 'id', 'reason', 'detail']
    assert dict(zip(p.line, p.reason, strict=True)) == {
        4: 'bad_imageid', 5: 'ragged', 6: 'empty', 7: 'malformed', 8: 'image_invalid', 9: 'image_missing',
        10: p.reason.iloc[-1]} and p.reason.iloc[-1] in ('ragged', 'not_utf8')
    assert 'image_8_product_18.jpg' in p.detail[p.line == 9].item()
    assert '6 predictions for 10 listings' in r.output
    assert '1 pictures are not there; 1 pictures are damaged; 1 listings have nothing to read; 3 lines' in r.output


def test_f82_no_problems_no_file(ask, tmp_path):
    (tmp_path/'list.csv').write_text('id,designation\n1,Robot\n')
    (tmp_path/'out.problems.csv').write_text('of an earlier run')
    assert ask().exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['list.csv', 'out.csv']


def test_f84_titles_alone_and_pictures_by_path(ask, tmp_path):
    (tmp_path/'list.csv').write_text('id,designation\nA-1,Robot\nA-2,Livre\n')
    r = ask()
    assert r.exit_code == 0 and 'warning' not in r.output, r.output
    plain = answers(tmp_path/'out.csv')
    picture(tmp_path/'photos'/'A.PNG')
    (tmp_path/'paths.csv').write_text('id,designation,image\nA-1,Robot,photos/a.png\nA-2,Livre,\nA-3,,photos\\A.jpg\n')
    r = ask('--images', tmp_path, products='paths.csv')
    assert r.exit_code == 0 and 'warning' not in r.output, r.output
    seen = answers(tmp_path/'out.csv')
    assert seen.probability[0] != plain.probability[0] and seen.probability[1] == plain.probability[1]
    assert seen.prdtypecode.ne('').all()
    r = ask(products='paths.csv')
    assert '2 listings name a picture, and no --images was given' in r.output


def test_f84_no_picture_found_is_said_with_a_name(ask, tmp_path):
    rows = ''.join(f'{i},Robot,,{i},{i}\n' for i in range(1, SHARD+2))
    (tmp_path/'list.csv').write_text(',designation,description,productid,imageid\n'+rows)
    picture(tmp_path/'images'/'test'/'other.jpg')
    r = ask('--images', tmp_path/'images')
    assert r.exit_code == 0
    assert re.search(f'warning: none of the {SHARD+1:,} pictures was found .*image_1_product_1.jpg', r.stderr)
    assert 'no picture was found so far' in r.stderr, 'told after the first shard, not after hours'
    picture(tmp_path/'images'/'image_9_product_9.jpg')
    r = ask('--images', tmp_path/'images')
    assert 'none of' not in r.stderr and f'{SHARD:,} pictures are not there' in r.stdout
    picture(tmp_path/'images'/'test'/'image_8_product_8.JPG')
    r = ask('--images', tmp_path/'images')
    assert 'warning: 1 pictures were found in folders of' in r.stderr and f'{SHARD-1:,} without a picture' in r.stdout


def test_pictures_alone_are_enough(ask, text_model, tmp_path):
    picture(tmp_path/'image_1_product_11.jpg')
    (tmp_path/'list.csv').write_text(',designation,description,productid,imageid\n5,,,11,1\n')
    assert ask('--images', tmp_path).exit_code == 0
    assert answers(tmp_path/'out.csv').prdtypecode.ne('').all()
    n = predict_file(text_model, tmp_path/'list.csv', tmp_path, tmp_path/'out.csv', progress=False)
    assert n['answered'] == 0 and n['empty'] == 1 and n['found'] == 0


def test_f81_lists_in_other_forms(ask, tmp_path):
    t = pd.DataFrame({'Réf': ['007', '8'], 'Libellé': ['Robot', 'Écran']})
    (tmp_path/'list.csv').write_bytes(t.to_csv(index=False, sep=';').encode('cp1252'))
    t.to_excel(tmp_path/'list.xlsx', index=False, engine='xlsxwriter')
    t.to_parquet(tmp_path/'list.parquet')
    seen = []
    for name in ('list.csv', 'list.xlsx', 'list.parquet'):
        r = ask('--columns', 'id=Réf,title=Libellé', products=name)
        assert r.exit_code == 0, r.output
        seen.append((tmp_path/'out.csv').read_bytes())
    assert seen[0] == seen[1] == seen[2] and b'\n007,' in seen[0]
    (tmp_path/'list.csv').write_text('id,designation\n')
    r = ask()
    assert r.exit_code == 1 and 'no listings below the header id, designation' in r.output
    (tmp_path/'list.csv').write_text('a,b\n1,2\n')
    assert ask().exit_code == 1 and not [*tmp_path.glob('.*')]


def test_forms_of_the_output(ask, tmp_path):
    (tmp_path/'list.csv').write_text('id,designation\n007,Robot\n8,<p>\n=1+1,Livre\n')
    for more in (['out.csv'], ['out.xlsx'], ['out.parquet'], ['sub.csv', '--format', 'submission'],
                 ['fr.csv', '--separator', ';', '--bom'], ['tab.csv', '--separator', 'tab']):
        r = ask(*more[1:], out=more[0])
        assert r.exit_code == 0, r.output
    plain,parquet = answers(tmp_path/'out.csv'), pd.read_parquet(tmp_path/'out.parquet')
    assert plain.id.tolist() == ['007', '8', "'=1+1"], 'a spreadsheet would run it'
    assert parquet.id.tolist() == ['007', '8', '=1+1'] and parquet.prdtypecode.isna().tolist() == [False, True, False]
    assert list(parquet) == COLUMNS and parquet.probability.dtype == float
    book = CalamineWorkbook.from_path(str(tmp_path/'out.xlsx')).get_sheet_by_index(0).to_python()
    assert book[0] == COLUMNS and [row[0] for row in book[1:]] == ['007', 8, '=1+1'] and book[2][1] == ''
    assert int(book[1][1]) == int(plain.prdtypecode[0]) and book[1][2] == plain.label[0]  # text above 15 digits
    codes = dict(zip(parquet.id, parquet.prdtypecode.astype('str'), strict=True)) | {'8': ''}
    assert (tmp_path/'sub.csv').read_bytes().decode() == ',prdtypecode\n'+''.join(f'{i},{c}\n' for i,c in codes.items())
    french = (tmp_path/'fr.csv').read_bytes()
    assert french.startswith(b'\xef\xbb\xbfid;prdtypecode;label;')
    assert answers(tmp_path/'fr.csv', sep=';').equals(plain) and answers(tmp_path/'tab.csv', sep='\t').equals(plain)
    for more in (['--bom'], ['--separator', ';']):
        assert ask(*more, out='out.xlsx').exit_code == 1


def test_large_codes_stay_whole(model, tmp_path):
    (tmp_path/'list.csv').write_text('id,designation\n'+''.join(f'{i},{w}\n' for i,w in enumerate(WORDS)))
    predict_file(model, tmp_path/'list.csv', None, tmp_path/'out.csv', progress=False)
    cells = [r for row in csv.reader((tmp_path/'out.csv').open()) for r in (row[1], *row[4:6])]
    assert {*cells}-{'prdtypecode', 'top_2', 'top_3'} == {str(c) for c in CODES}


def test_standard_input_and_output(ask, tmp_path):
    text = 'id;designation\n1;Robot\n2;<p>\n3;É\n'
    (tmp_path/'list.csv').write_text(text)
    assert ask().exit_code == 0
    r = ask(products='-', out='-', stdin=text)
    assert r.exit_code == 0 and r.stdout == (tmp_path/'out.csv').read_text()
    assert '2 predictions for 3 listings in standard output' in r.stderr
    r = ask('--problems', tmp_path/'why.csv', products='-', out='-', stdin=text)
    assert (tmp_path/'why.csv').read_text().startswith('line,id,reason,detail\n3,2,empty')


def test_a_reader_that_leaves_early(model, tmp_path):
    titles(tmp_path/'list.csv', 4_000)
    files = '--products', tmp_path/'list.csv', '--out', '-'
    command = [sys.executable, '-m', 'rakuten_mm', 'predict', '--bundle', model, *files]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline().startswith('id,prdtypecode')
    p.stdout.close()
    said = p.stderr.read(); p.wait()
    assert 'Traceback' not in said and 'Errno' not in said and 'Exception' not in said, said[-500:]


def test_f52_an_answer_is_the_same_among_others(model, tmp_path):
    titles(tmp_path/'list.csv', 150)
    for i in range(0, 150, 3): picture(tmp_path/f'image_{i+1}_product_{i}.jpg', (i, 9, 255-i))
    t = pd.read_csv(tmp_path/'list.csv').assign(description='', productid=range(150), imageid=range(1, 151))
    t.to_csv(tmp_path/'list.csv', index=False)
    one,many = (predict_file(model, tmp_path/'list.csv', tmp_path, tmp_path/f'{b}.csv', batch_size=b, progress=False)
                for b in (1, 64))
    assert one == many and one['found'] == 50 and one['missing'] == 100
    a,b = (pd.read_csv(tmp_path/f'{n}.csv') for n in (1, 64))
    assert (a.prdtypecode == b.prdtypecode).all() and np.allclose(a.probability, b.probability, atol=1e-5)
    m = Predictor.load(model)
    alone = m.predict([m.prepare(t.designation[3], image=(tmp_path/'image_4_product_3.jpg').read_bytes())])[0]
    assert a.prdtypecode[3] == alone.prdtypecode and abs(a.probability[3]-alone.probability) < 1e-5


# Killed and resumed --------------------------------------------------------------------------------------------------

SMALL = 256 # Records in a shard, so that short lists have several
COMMAND = ('from rakuten_mm.cli.main import main\nfrom rakuten_mm.models import batch_inference\n'
           f'batch_inference.SHARD = {SMALL}\nmain()')


def start(model, folder, *more)->subprocess.Popen:
    command = [sys.executable, '-c', COMMAND, 'predict', '--bundle', model, '--products', folder/'list.csv',
               '--out', folder/'out.csv', *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def shards(folder)->list:
    return sorted(folder.glob('.out.csv.parts/*/*.parquet'))


def wait_for(what, seconds=60):
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(.01)


def test_f87_killed_it_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_inference, 'SHARD', SMALL)
    titles(tmp_path/'list.csv', 5*SMALL+100)
    whole = predict_file(model, tmp_path/'list.csv', None, tmp_path/'whole.csv', progress=False)
    for n in (1, 3):
        p = start(model, tmp_path)
        wait_for(lambda n=n: len(shards(tmp_path)) >= n)
        p.send_signal(signal.SIGKILL); p.communicate()
        assert not (tmp_path/'out.csv').exists()
    kept = {s: s.stat().st_mtime_ns for s in shards(tmp_path)[:2]}
    p = start(model, tmp_path)
    wait_for(lambda: len(shards(tmp_path)) >= 5)
    assert {s: s.stat().st_mtime_ns for s in kept} == kept, 'finished shards are not made again'
    assert p.wait(60) == 0
    assert (tmp_path/'out.csv').read_bytes() == (tmp_path/'whole.csv').read_bytes()
    assert not [*tmp_path.glob('.*')]
    assert whole['rows'] == whole['answered'] == 5*SMALL+100


def interrupted(model, folder, monkeypatch, **how):
    "Stop after the first shard."
    b,write = batch_inference, batch_inference.Shards.write
    def stop(self, k, lines): write(self, k, lines); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(b.Shards, 'write', stop)
        with pytest.raises(KeyboardInterrupt):
            predict_file(model, folder/'list.csv', how.pop('images', None), folder/'out.csv', progress=False, **how)
    assert len(shards(folder)) == 1
    return shards(folder)[0].parent


def test_f87_another_run_begins_anew(model, text_model, tmp_path, monkeypatch):
    titles(tmp_path/'list.csv', SHARD+10)
    first = interrupted(model, tmp_path, monkeypatch)
    (tmp_path/'images').mkdir()
    others = [interrupted(text_model, tmp_path, monkeypatch),
              interrupted(model, tmp_path, monkeypatch, images=tmp_path/'images'),
              interrupted(model, tmp_path, monkeypatch, columns={'description': 'id'})]
    with (tmp_path/'list.csv').open('a') as f: print('x,Robot', file=f)
    others.append(interrupted(model, tmp_path, monkeypatch))
    assert len({first, *others}) == 5 and [*tmp_path.glob('.out.csv.parts/*/')] == others[-1:]
    n = predict_file(model, tmp_path/'list.csv', None, tmp_path/'out.csv', progress=False)
    assert n['rows'] == SHARD+11 and answers(tmp_path/'out.csv').id.tolist()[-1] == 'x' and not [*tmp_path.glob('.*')]


def test_f87_a_damaged_shard_is_made_again(model, tmp_path, monkeypatch):
    titles(tmp_path/'list.csv', SHARD+10)
    predict_file(model, tmp_path/'list.csv', None, tmp_path/'whole.csv', progress=False)
    interrupted(model, tmp_path, monkeypatch)
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:500])
    predict_file(model, tmp_path/'list.csv', None, tmp_path/'out.csv', progress=False)
    assert (tmp_path/'out.csv').read_bytes() == (tmp_path/'whole.csv').read_bytes()


def test_f87_two_at_once(model, ask, tmp_path):
    titles(tmp_path/'list.csv', 10)
    (tmp_path/'.out.csv.parts').mkdir()
    with FileLock(tmp_path/'.out.csv.parts'/'lock'):
        r = ask()
        assert r.exit_code == 75 and 'another predict is writing' in r.output
        with pytest.raises(OutputBusy): predict_file(model, tmp_path/'list.csv', None, tmp_path/'out.csv')
    assert ask().exit_code == 0 and not [*tmp_path.glob('.*')]


def test_f87_memory_does_not_grow_with_rows(model, tmp_path, monkeypatch):
    "What was read is answered and written before much more is read."
    monkeypatch.setattr(batch_inference, 'SHARD', SMALL)
    read,write,ahead = batch_inference.read_products, batch_inference.Shards.write, []
    def counted(*args):
        for piece in read(*args): ahead.append(len(piece)); yield piece
    def written(self, k, lines):
        write(self, k, lines)
        assert sum(ahead) <= 3*SMALL, 'read far ahead of what is written'
        ahead.append(-len(lines))
    monkeypatch.setattr(batch_inference, 'read_products', counted)
    monkeypatch.setattr(batch_inference.Shards, 'write', written)
    titles(tmp_path/'list.csv', 12*SMALL)
    assert predict_file(model, tmp_path/'list.csv', None, tmp_path/'out.csv', progress=False)['rows'] == 12*SMALL
    assert sum(ahead) == 0 and len(ahead) == 24


def test_the_list_is_not_overwritten(ask, tmp_path):
    (tmp_path/'list.csv').write_text('id,designation\n1,Robot\n')
    (tmp_path/'link.csv').symlink_to(tmp_path/'list.csv')
    for out in ('list.csv', 'link.csv'):
        r = ask(out=out)
        assert r.exit_code == 1 and 'give each its own name' in r.output
    assert (tmp_path/'list.csv').read_text() == 'id,designation\n1,Robot\n'
