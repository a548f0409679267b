"Tables and pictures as people really have them: saved by spreadsheets, named by hand, with spoilt numbers."
import io
import re
import shutil
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image
from xlsxwriter import Workbook

from rakuten_mm.cli.main import cli
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.feedback import Correction, write_delivery
from rakuten_mm.data.image_files import ImageFolder
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.schema import MAX_NUMBER, read_chunks, read_products
from rakuten_mm.data.tables import MAX_RECORD, RawDataError, open_table

TITLES = ['Robot de piscine électrique', 'Étagère à thé', "Jeu d'échecs; 32 pièces, bois", 'Roman "broché" n°5', '1984']
CODES = [2583, 1560, 1281, 2705, 10]


def save(path, rows, encoding='utf-8', separator=',', end='\r\n', mark=b''):
    "Save rows as text; fields are quoted where they must be."
    quoted = lambda v: '"'+v.replace('"', '""')+'"' if re.search(f'["{separator}\r\n]', v) else v
    path.write_bytes(mark+''.join(separator.join(quoted(str(v)) for v in row)+end for row in rows).encode(encoding))


def save_workbook(path, rows, before=0):
    with Workbook(path) as book:
        book.add_worksheet('Notes'); sheet = book.add_worksheet('Données')
        for i,row in enumerate(rows): sheet.write_row(before+i, 0, row)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), 'uint8')
    Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC).save(path, format='JPEG')


@pytest.fixture
def raw(tmp_path):
    "A delivery of five listings, without its tables."
    for i in range(5): picture(tmp_path/'raw'/'images'/'image_train'/f'image_{100+i}_product_{11+i}.jpg', i)
    return tmp_path/'raw'


def x_rows(ids=range(5), products=range(11, 16), images=range(100, 105)):
    return [['', 'designation', 'description', 'productid', 'imageid'],
            *([i, t, '', p, m] for i,t,p,m in zip(ids, TITLES, products, images, strict=False))]


def y_rows(ids=range(5), codes=CODES): return [['', 'prdtypecode'], *map(list, zip(ids, codes, strict=False))]


def taken(raw, **kw):
    "What is ingested, by product."
    data = ingest(raw, raw.parent/'data', progress=False, max_quarantine=kw.pop('max_quarantine', 0), **kw)
    return data.products.set_index('productid')


def check(products):
    assert products.loc[range(11, 16), 'designation'].tolist() == TITLES
    assert products.loc[range(11, 16), 'prdtypecode'].tolist() == CODES


# -- 79, 80: numbers ---------------------------------------------------------------------------------------------------

def test_f79_ids_are_numbers_before_they_are_compared(raw):
    ids,products,images = '0|01| 2|3.0|="4"', "011|12.0| 13|'14|15,00", '100|0101|102.0|103|104'
    x = x_rows(*(s.split('|') for s in (ids, products, images)))
    save(raw/'X_train.csv', x)
    save(raw/'Y_train.csv', y_rows(ids=['00', '1', '2.0', '3', '4'], codes=['2583.0', '01560', ' 1281', "'2705", '10']))
    save(raw/'corrections.csv', [['productid', 'prdtypecode', 'source', 'time'], ['012', '10.0', 'anna', '2026-11-02']])
    products = taken(raw)
    assert products.designation.to_dict() == dict(zip(range(11, 16), TITLES, strict=True))
    assert products.prdtypecode.tolist() == [2583, 10, 1281, 2705, 10]


@pytest.mark.parametrize(('x', 'y', 'reason'), [(dict(products=['11', '011', 13, 14, 15]), {}, 'repeated_product'),
                                                (dict(ids=['0', '1', '1.0', 3, 4]), {}, 'repeated_id'),
                                                ({}, dict(ids=['0', '1', '01', 3, 4]), 'repeated_label')])
def test_f79_one_number_written_twice(raw, x, y, reason):
    save(raw/'X_train.csv', x_rows(**x)); save(raw/'Y_train.csv', y_rows(**y))
    ingest(raw, raw.parent/'data', progress=False, max_quarantine=.5)
    q = Dataset.open(raw.parent/'data').quarantine
    assert reason in set(q.reason) and set(q.reason) <= {reason, 'no_label', 'no_listing'}
    assert len(Dataset.open(raw.parent/'data').index) == 4


@pytest.mark.parametrize('spoilt', ['3,99E+09', '1.000', '1,234', '12.5', '-3', '1 2', '٣', str(MAX_NUMBER+1), '9'*30])
def test_f79_f80_a_number_that_was_spoilt_is_never_guessed(raw, spoilt):
    save(raw/'X_train.csv', x_rows(products=[11, 12, spoilt, 14, 15])); save(raw/'Y_train.csv', y_rows())
    products = taken(raw, max_quarantine=.3)
    q = Dataset.open(raw.parent/'data').quarantine
    assert 'bad_productid' in set(q.reason) and any(spoilt[:20] in d for d in q.detail) and len(products) == 4


def test_f80_the_largest_numbers(raw):
    folder = raw/'images'/'image_train'
    shutil.copyfile(folder/'image_100_product_11.jpg', folder/f'image_{MAX_NUMBER}_product_{MAX_NUMBER}.jpg')
    save(raw/'X_train.csv', x_rows(products=[MAX_NUMBER, 12, 13, 14, 15], images=[MAX_NUMBER, 101, 102, 103, 104]))
    save(raw/'Y_train.csv', y_rows(codes=[MAX_NUMBER, 1560, 1281, 2705, MAX_NUMBER+1]))
    products = taken(raw, max_quarantine=.3)
    assert products.prdtypecode[MAX_NUMBER] == MAX_NUMBER and products.imageid[MAX_NUMBER] == MAX_NUMBER
    assert set(Dataset.open(raw.parent/'data').quarantine.reason) == {'bad_code', 'no_label'}


def test_f80_ids_of_served_listings_are_known_by_their_content(raw, tmp_path):
    "Our own deliveries of corrected listings have ids above 2**53; a partner's id of that size is refused."
    from rakuten_mm.core.files import sha256_file
    from rakuten_mm.data.feedback import text_hash
    image,when = next((raw/'images'/'image_train').iterdir()), datetime.fromisoformat('2026-11-01T10:00:00+00:00')
    texts = dict(designation='Étagère; "bois"\r\nblanc', description='une\rdeux')
    c = Correction(text_hash(**texts), sha256_file(image), when, when, 10, 1560, image=image, **texts)
    assert write_delivery([c], None, tmp_path/'served').added == 1
    data = ingest(tmp_path/'served', tmp_path/'data', progress=False, max_quarantine=0)
    assert len(data.index) == 1 and data.index.productid[0] > 10**17
    table = tmp_path/'served'/'X_train_update.csv'
    table.write_text(table.read_text(encoding='utf-8').replace('deux', 'trois'), encoding='utf-8', newline='')
    with pytest.raises(RawDataError, match='bad_productid'): ingest(tmp_path/'served', tmp_path/'other', progress=False)


# -- 81: tables --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('separator', [',', ';', '\t', '|'])
@pytest.mark.parametrize(('encoding', 'mark'), [
    ('utf-8', b''), ('utf-8', b'\xef\xbb\xbf'), ('utf-16', b''), ('utf-16-le', b''), ('utf-16-be', b'\xfe\xff'),
    ('cp1252', b''), ('mac_roman', b'')])
def test_f81_separators_and_encodings(raw, separator, encoding, mark):
    save(raw/'X_train_update.csv', x_rows(), encoding, separator, mark=mark)
    save(raw/'Y_train_CVw08PX.csv', y_rows(), 'utf-8', separator)
    check(taken(raw))


@pytest.mark.parametrize('form', ['workbook', 'parquet', 'tsv', 'misnamed'])
def test_f81_formats(raw, form):
    x,y = x_rows(), y_rows()
    if form == 'workbook': save_workbook(raw/'X_train.xlsx', x, before=2); save_workbook(raw/'Y_train.XLSX', y)
    elif form == 'parquet':
        for name,rows in (('X_train', x), ('Y_train', y)):
            pd.DataFrame(rows[1:], columns=['id', *rows[0][1:]]).to_parquet(raw/f'{name}.parquet', index=False)
    else:
        ending = '.tsv' if form == 'tsv' else '.xls'
        save(raw/f'X_train{ending}', x, separator='\t'); save(raw/f'y_TRAIN_1{ending}', y, separator='\t')
    check(taken(raw))


def test_f81_what_spreadsheets_leave_behind(raw):
    "A line that names the separator, a title, blank rows and columns, a header again, other case."
    x = [['sep=;', *['']*5], ['Catalogue de novembre', *['']*5], ['']*6,
         ['', 'DESIGNATION ', 'Description', 'ProductID', ' imageid', '']]
    x += [[*r, ''] for r in x_rows()[1:3]]+[['']*6]+[x[3]]+[[*r, ''] for r in x_rows()[3:]]+[['']*6]*20
    save(raw/'x_train_novembre.CSV', x, 'cp1252', ';'); save(raw/'Y_Train.csv', y_rows(), separator=';')
    check(taken(raw))


@pytest.mark.parametrize(('x', 'y', 'told'), [
    ([r[1:] for r in x_rows()], y_rows(), "first column must be the row's id"),
    (x_rows(), [r[1:] for r in y_rows()], "first column must be the row's id"),
    ([[*r, r[2]] for r in x_rows()], y_rows(), 'two columns are named description'),
    ([r[:1]+r[2:] for r in x_rows()], y_rows(), 'no column designation.*--columns designation=NAME'),
    ([r[:4] for r in x_rows()], y_rows(), 'no column imageid'),
    (x_rows(), None, 'expected one Y_train table.*prdtypecode'),
    (x_rows()[:1], y_rows(), 'no listing was accepted|no_listing')])
def test_f81_what_cannot_be_read_is_named(raw, x, y, told):
    save(raw/'X_train.csv', x)
    if y: save(raw/'Y_train.csv', y)
    with pytest.raises(RawDataError, match=told): taken(raw)
    assert not (raw.parent/'data'/'CURRENT').exists()


@pytest.mark.parametrize(('content', 'told'), [
    (b'%PDF-1.7', 'PDF'), (b'<!DOCTYPE html><table>', 'a web page'), (b'\x1f\x8b\x08', 'gzip'), (b'', 'empty'),
    (b'PK\x03\x04 no zip', 'cannot be read'), (b'PAR1 cut off', 'cannot be read')])
def test_f81_what_is_no_table(raw, content, told):
    (raw/'X_train.csv').write_bytes(content); save(raw/'Y_train.csv', y_rows())
    with pytest.raises(RawDataError, match=told): taken(raw)


def test_f81_labels_beside_listings(raw):
    "One table, with names instead of codes."
    names = ['piscine et ACCESSOIRES', 'Furniture', '1281', 'Romans, essais, histoire', 'Livres']
    rows = [['designation', 'prdtypecode', 'productid', 'imageid'],
            *map(list, zip(TITLES, names, range(11, 16), range(100, 105), strict=True))]
    save(raw/'produits.csv', rows, 'cp1252', ';')
    check(taken(raw))


def test_f81_columns_are_told_once(raw):
    rows = [['Réf', 'Libellé', 'Rayon', 'Photo'], *([11+k, t, c, f'image_{100+k}_product_{11+k}']
                                                     for k,(t,c) in enumerate(zip(TITLES, CODES, strict=True)))]
    save(raw/'novembre.csv', rows[:4], 'cp1252', ';')
    run = lambda *options: CliRunner().invoke(cli, ['ingest', str(raw), str(raw.parent/'data'), *options])
    done = run()
    assert done.exit_code == 1 and '--columns' in done.output and "'Libellé'" in done.output
    done = run('--columns', 'id=réf,title=Libellé,code=Rayon,image=photo')
    assert done.exit_code == 0 and 'novembre.csv: Windows-1252, semicolons between fields' in done.output, done.output
    (raw/'novembre.csv').unlink(); save_workbook(raw/'décembre.xlsx', [rows[0], *rows[4:]])
    done = run()
    assert done.exit_code == 0 and 'décembre.xlsx: workbook, sheet Données' in done.output
    check(Dataset.open(raw.parent/'data').products.set_index('productid'))
    fix = raw.parent/'fix'; fix.mkdir()  # our own names are understood as well
    save(fix/'corrections.csv', [['productid', 'prdtypecode', 'source', 'time'], [12, 'Livres', 'anna', '2026-11-02']])
    assert ingest(fix, raw.parent/'data', progress=False).manifest['delivery']['relabelled'] == 1


def test_f81_long_fields(tmp_path):
    long = '<img src="data:image/png;base64,'+'A\n'*100_000+'"> Robot'
    save(tmp_path/'x.csv', [['id', 'designation'], [1, long], [2, 'Jeu']])
    df = pd.concat(f for f,_ in read_chunks(tmp_path/'x.csv', ['id', 'designation']))
    assert df.designation.tolist() == [long, 'Jeu']


def test_f82_a_record_that_never_ends_costs_itself(tmp_path):
    "However many there are, and without reading the rest of the file again for each."
    lines = ['id,designation', *(f'{i},"never closed' if i % 50 == 0 else f'{i},{"Jeu "*25}' for i in range(20_000))]
    (tmp_path/'x.csv').write_text('\n'.join(lines))
    found = list(read_chunks(tmp_path/'x.csv', ['id', 'designation']))
    assert sum(len(b) for _,b in found) == 400 and sum(len(f) for f,_ in found) == 19_600
    assert MAX_RECORD < 10_000_000


def test_f81_corrections_from_a_spreadsheet(raw):
    save(raw/'X_train.csv', x_rows()); save(raw/'Y_train.csv', y_rows())
    taken(raw)
    fix = raw.parent/'fix'; fix.mkdir()
    header = ['productid', 'prdtypecode', 'source', 'time', 'title']
    rows = [[11.0, 'Livres', 'Hélène', '2026-11-02T10:00', TITLES[0]], [12, 99_999, 'Hélène', '2026-11-02', ''],
            ['x', 10, 'Hélène', '2026-11-02', '']]
    save_workbook(fix/'corrections.xlsx', [header, *rows])
    data = ingest(fix, raw.parent/'data', progress=False, max_quarantine=.7)
    assert data.manifest['delivery']['relabelled'] == 1 and data.products.set_index('productid').prdtypecode[11] == 10
    assert sorted(data.quarantine.reason) == ['bad_productid', 'unknown_code']
    (fix/'corrections.xlsx').unlink(); save(fix/'corrections.csv', [header])
    assert ingest(fix, raw.parent/'data', progress=False).manifest['version'] == data.manifest['version']


def test_f82_products_file(tmp_path):
    "Every record is there, in its place, whatever is wrong with it."
    text = 'id;designation;productid;imageid\nA;Étagère;1;2\nB;a;b;c;d\n\nC;"x\nD;"y";;\nE;Jeu;1e5;\n'
    (tmp_path/'p.csv').write_bytes(text.encode('cp1252'))
    df = pd.concat(read_products(tmp_path/'p.csv'))
    assert df.id.tolist() == ['A', 'B', '', 'D', 'E'] and df.line.tolist() == [2, 3, 5, 6, 7]
    assert df.problem.tolist() == ['', 'ragged', 'malformed', '', 'bad_productid']
    assert df.designation.tolist() == ['Étagère', '', '', 'y', 'Jeu']


# -- 84, 86: pictures and folders --------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['image_{i}_product_{p}.JPG', 'Image_{i}_Product_{p}.jpeg',
                                  'image_{i}_product_{p}.PNG', 'sub/image_{i}_product_{p}.webp'])
def test_f84_names_of_pictures(raw, name):
    folder = raw/'images'/'image_train'
    (folder/'sub').mkdir()
    for k in range(5): (folder/f'image_{100+k}_product_{11+k}.jpg').rename(folder/name.format(i=100+k, p=11+k))
    save(raw/'X_train.csv', x_rows()); save(raw/'Y_train.csv', y_rows())
    check(taken(raw))


@pytest.mark.parametrize('spelling', ['photos/{n}', 'photos\\{n}', './photos/{n}', 'C:\\Users\\anna\\Pictures\\{n}',
                                      '/home/anna/{n}', '../{n}', '{n}', '{s}'])
def test_f84_pictures_by_a_column(raw, spelling):
    "A picture outside of the delivery is never read, one inside is found by its name."
    shutil.rmtree(raw/'images')
    for k in range(5): picture(raw/'photos'/f'Été {k}.jpg', k)
    picture(raw.parent/'Été 0.jpg', 99)  # beside the delivery
    rows = [[i, t, c, 11+i, spelling.format(n=f'Été {i}.jpg', s=f'été {i}')]
            for i,(t,c) in enumerate(zip(TITLES, CODES, strict=True))]
    save(raw/'listings.csv', [['id', 'designation', 'prdtypecode', 'productid', 'image'], *rows])
    products = taken(raw)
    check(products)
    want = (raw/'photos'/'Été 0.jpg').read_bytes()
    assert (raw.parent/'data'/'images'/products.image[11]).read_bytes() == want


def test_f84_a_missing_picture_is_named(raw):
    (raw/'images'/'image_train'/'image_100_product_11.jpg').unlink()
    save(raw/'X_train.csv', x_rows()); save(raw/'Y_train.csv', y_rows())
    with pytest.raises(RawDataError, match=r'images/image_train/image_100_product_11\.jpg'): taken(raw)


def test_f84_two_folders_with_one_name(tmp_path):
    "A name that could be two pictures is none."
    for folder in ('a', 'b'): picture(tmp_path/folder/'1.jpg', 0)
    found = ImageFolder(tmp_path)
    assert found.find('b/1.JPG').endswith('b/1.jpg') and found.find('1.jpg') == f'{tmp_path}/1.jpg'


def test_f86_a_folder_in_the_folder(raw):
    save(raw/'X_train.csv', x_rows()); save(raw/'Y_train.csv', y_rows())
    (raw.parent/'unpacked').mkdir(); raw.rename(raw.parent/'unpacked'/'livraison novembre')
    data = ingest(raw.parent/'unpacked', raw.parent/'data', progress=False)
    check(data.products.set_index('productid'))
    shutil.copytree(raw.parent/'unpacked'/'livraison novembre', raw.parent/'unpacked'/'décembre')
    with pytest.raises(RawDataError, match='several folders hold tables'):
        ingest(raw.parent/'unpacked', raw.parent/'other')


def test_f81_the_reader_is_told_what_was_found(tmp_path):
    save(tmp_path/'t.csv', x_rows(), 'utf-16', '\t')
    assert open_table(tmp_path/'t.csv', ['designation']).told == 'UTF-16, tabs between fields'
    buffer = io.BytesIO()
    pd.DataFrame(dict(designation=['a'])).to_parquet(buffer)
    (tmp_path/'t.csv').write_bytes(buffer.getvalue())
    assert open_table(tmp_path/'t.csv', ['designation']).told == 'Parquet'
