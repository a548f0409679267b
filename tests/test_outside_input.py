"What strangers send costs no more than it is worth: pictures, texts, files of a delivery, names."
import html
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import struct
import tempfile
import time
import zlib
from contextlib import chdir
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from nbconvert.filters.markdown import markdown2html
from PIL import Image, ImageOps

from rakuten_mm.core import environment, process, tracking
from rakuten_mm.core.display import as_label, as_markdown, as_table, attempt
from rakuten_mm.core.files import sha256_file, write_atomic, write_csv
from rakuten_mm.core.process import cpu_quota
from rakuten_mm.data import diff as diff_module
from rakuten_mm.data import ingestion_report, leakage
from rakuten_mm.data.dataset import Dataset, damaged_images, versions
from rakuten_mm.data.diff import diff
from rakuten_mm.data.feedback import Correction, write_csv_rows, write_delivery
from rakuten_mm.data.image import InvalidImage, decode_image, load_pixels, open_image
from rakuten_mm.data.image_files import ImageFolder
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.ingestion_report import (
    arrivals,
    class_mix,
    language_shares,
    largest_groups,
    missing_descriptions_figure,
    refusals,
    sample_figure,
)
from rakuten_mm.data.schema import image_name
from rakuten_mm.data.tables import RawDataError, open_table
from rakuten_mm.data.text import clean_text, strip_tags
from rakuten_mm.evaluation.model_card import name_classes
from rakuten_mm.models.batch_inference import prepare_row
from rakuten_mm.models.predictor import Prepared
from rakuten_mm.synthetic.catalogue import synthesize


def encoded(im:Image.Image, fmt:str, **kw)->bytes:
    im.save(b := io.BytesIO(), fmt, **kw)
    return b.getvalue()


def peak_mb()->float:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(s.split()[1]) for s in lines if s.startswith('VmHWM'))/1024


def cost(data:bytes, size:int|None = 224)->tuple[float, float, str]:
    "CPU seconds, MB by which the peak of this process grew, and what was wrong."
    Path('/proc/self/clear_refs').write_text('5')
    before,start,why = peak_mb(), time.process_time(), ''
    try: decode_image(data, size)
    except InvalidImage as e: why = str(e)
    return time.process_time()-start, peak_mb()-before, why


def pictures(side:int)->dict[str, bytes]:
    "Small files that say that they are large pictures."
    size,palette = (side, side), Image.new('P', (side, side))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    see_through = Image.new('RGBA', size, (1, 2, 3, 100))
    return {'PNG of 16 bits': encoded(Image.fromarray(np.full(size, 60_000, 'uint16')), 'PNG'),
            'PNG with alpha': encoded(see_through, 'PNG', compress_level=1),
            'PNG, grey with alpha': encoded(Image.new('LA', size, (1, 100)), 'PNG', compress_level=1),
            'PNG, colours with alpha': encoded(palette, 'PNG', transparency=bytes([10, 20])),
            'PNG of 1 bit': encoded(Image.new('1', size), 'PNG'), 'BMP of 1 bit': encoded(Image.new('1', size), 'BMP'),
            'GIF': encoded(palette, 'GIF', transparency=0),
            'GIF, moving': encoded(palette, 'GIF', save_all=True, append_images=[Image.new('P', size, 1)])}


def webp(side:int)->dict[str, bytes]:
    "The three kinds of WEBP, where only the header says how large they are."
    riff = lambda kind,data: b'RIFF'+struct.pack('<I', 12+len(data))+b'WEBP'+kind+struct.pack('<I', len(data))+data
    bits = side-1 | side-1 << 14
    whole = struct.pack('<I', 0x10)+(side-1).to_bytes(3, 'little')*2
    return {'WEBP': riff(b'VP8 ', b'\x10\x00\x00\x9d\x01\x2a'+struct.pack('<HH', side, side)+bytes(8)),
            'WEBP lossless': riff(b'VP8L', b'/'+struct.pack('<I', bits)+bytes(9)),
            'WEBP extended': riff(b'VP8X', whole)}


def test_f59_pictures_cost_what_they_are_worth():
    "What is refused costs nothing, and what is accepted little: .3 s and 150 MB, with room for a slow machine."
    for name,data in (pictures(5_477) | webp(5_477)).items():
        seconds,mb,why = cost(data)
        assert '5477 × 5477 pixels, more than' in why, name
        assert seconds < .2 and mb < 20, (name, seconds, mb)
    rgba = encoded(Image.new('RGBA', (2_828, 2_828), (1, 2, 3, 100)), 'WEBP', method=0, quality=0)
    for name,data in (pictures(2_828) | {'WEBP': rgba}).items():
        seconds,mb,why = cost(data)
        assert not why, (name, why)
        assert seconds < 1 and mb < 190, (name, seconds, mb)


def test_f59_a_photo_of_a_phone_goes_on_working():
    for w,h in ((4_000, 3_000), (8_160, 6_120)):
        im = Image.new('RGB', (w, h), 'navy'); im.paste('orange', (0, 0, w//2, h))
        exif = Image.Exif(); exif[0x0112] = 6  # held upright
        data = encoded(im, 'JPEG', exif=exif)
        assert open_image(data).size == (w, h)
        for size in (224, None):
            seconds,mb,why = cost(data, size)
            assert not why and seconds < 1 and mb < 150, (w, size, seconds, mb, why)
        seen = np.asarray(decode_image(data, 224))
        assert seen.shape[0] > seen.shape[1] >= 224
        assert (abs(seen[5, 5].astype(int)-[255, 165, 0]) < 9).all()
        assert (abs(seen[-5, -5].astype(int)-[0, 0, 128]) < 9).all()


def chunk(kind:bytes, data:bytes)->bytes:
    return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))


def crafted()->dict[str, bytes]:
    "Files that make a decoder work without many pixels."
    small = Image.new('RGB', (9, 9))
    jpeg,png,gif = (encoded(small, f) for f in ('JPEG', 'PNG', 'GIF'))
    gif_head = 13+3*(2 << (gif[10] & 7))
    many = encoded(Image.new('RGB', (2_000, 2_000)), 'JPEG', progressive=True)
    scan = many[many.rindex(b'\xff\xda'):-2]
    entries = b''.join(struct.pack('<HHII', 1_000+i, 1, 60_000, 8) for i in range(5_000))
    exif = (b'Exif\0\0II*\0\x08\0\0\0'+struct.pack('<H', 5_000)+entries).ljust(65_000, b'\0')
    tables = b'\xff\xc4'+struct.pack('>H', 17*3_800+2)+bytes(17)*3_800
    rle = b'\x01\x02'*2_800*1_600
    bmp = b'BM'+struct.pack('<IHHIIiiHHIIiiII', 1_078+len(rle), 0, 0, 1_078, 40, 2_800, 1_600, 1, 8, 1, len(rle), 0, 0,
                            256, 0)+bytes(1_024)+rle
    return {'JPEG of many scans': many[:-2]+scan*3_000+many[-2:],
            'JPEG whose EXIF points at itself': b'\xff\xd8\xff\xe1'+struct.pack('>H', len(exif)+2)+exif+jpeg[20:],
            'JPEG of comments': jpeg[:2]+b'\xff\xfe\0\2'*2_000_000+jpeg[2:],
            'JPEG of padding': jpeg[:2]+b'\xff'*9_000_000+jpeg[2:],
            'JPEG of tables': jpeg[:2]+tables*150+jpeg[2:],
            'GIF of comments': gif[:gif_head]+b'!\xfe'+(b'\xff'+b'a'*255)*38_000+b'\0'+gif[gif_head:],
            'BMP of runs': bmp,
            'PNG of chunks': png[:33]+chunk(b'abCd', b'')*800_000+png[33:],
            'PNG of packed texts': png[:33]+chunk(b'zTXt', b'a\0\0'+zlib.compress(bytes(1_000_000)))*63+png[33:]}


def test_f59_no_file_makes_a_decoder_work_for_ever():
    for name,data in crafted().items():
        seconds,mb,_ = cost(data)
        assert seconds < .5 and mb < 50, (name, seconds, mb)  # .7 s to a minute before


def test_f59_what_a_camera_says_is_read_without_its_parser():
    "All eight ways to hold a camera, in each format that says so."
    im = Image.fromarray(np.arange(20*30*3, dtype='uint8').reshape(20, 30, 3))
    for turn in range(1, 9):
        exif = Image.Exif(); exif[0x010f] = 'a maker'; exif[0x0112] = turn
        for fmt,kw in (('PNG', {}), ('WEBP', dict(lossless=True)), ('JPEG', dict(quality=100, subsampling=0))):
            whole = Image.open(io.BytesIO(encoded(im, fmt, exif=exif, **kw)))
            want = ImageOps.exif_transpose(whole).convert('RGB')
            assert decode_image(encoded(im, fmt, exif=exif, **kw)).tobytes() == want.tobytes(), (fmt, turn)
    assert load_pixels(open_image(encoded(im, 'PNG')), 8, 'L').mode == 'L'


def texts(n:int)->dict[str, str]:
    "Texts of `n` characters that are work for a parser."
    fill = lambda s: (s*(n//len(s)+1))[:n]
    parts = ['<', '<!--', '<a ', '<b><p>', '<div><p>x', '<table><tr><td>', '&', '&#', '&lt;b&gt;', '\n\t ', 'a\n',
             '<svg><style>', 'e\u0301\u0327', 'Ã©', '\x1b[0m', '</p>', '<![CDATA[', '<?', '&ampamp', '&eacute', '<!']
    return {p: fill(p) for p in parts} | {
        'ampersands': '&'+'amp;'*(n//4-5)+'lt;b&gt;', 'numbers': '&'+'#38;'*(n//4), 'pairs': fill('&amp;amp;'),
        'tags in tags': ''.join(f'<b id={i}><p>' for i in range(n//12)), 'spaces': 'a'+' '*n, 'marks': 'e'+'\u0301'*n,
        'attributes': '<a '+' '.join(f'a{i}=1' for i in range(n//6))+'>'}


def seconds_of(f, *args)->float:
    "CPU time of a call, the better of two."
    took = []
    for _ in range(2):
        start = time.process_time(); f(*args)
        took.append(time.process_time()-start)
    return min(took)


def test_f60_texts_are_cleaned_in_linear_time():
    "About 20 ms for 20,000 characters, up to 1.9 s before; a million are cut first."
    clean_text('Ã© <b>x</b>')
    for n,limit in ((20_000, .1), (1_000_000, .1)):
        for name,s in texts(n).items(): assert seconds_of(clean_text, s) < limit, (name, n)
    assert seconds_of(strip_tags, texts(1_000_000)['tags in tags']) < 1
    for s in texts(20_000).values(): assert clean_text(once := clean_text(s)) == once


def test_f60_what_was_escaped_more_than_once_is_still_read():
    for depth in (1, 2, 3, 7, 8, 9, 30, 2_000):
        assert clean_text(f"a &{'amp;'*depth}eacute; b &{'amp;'*depth} c") == 'a é b & c', depth
    assert clean_text('&amp;amp;lt;b&amp;gt;Lot&lt;/b&gt; de 3 &amp;eacute;charpes') == 'Lot de 3 écharpes'
    assert clean_text('Vélo\n&EACUTE;lectrique Â· grÃ¢ce') == 'Vélo Électrique · grâce'
    assert clean_text('<ul>'+'<li>un <b>lot</b></li>'*400+'</ul>') == ' '.join(['un lot']*400)


# -- 66: what is no picture --------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    return synthesize(tmp_path_factory.mktemp('outside')/'raw', 200, 0, image_size=48, total=400, progress=False)


@pytest.fixture
def copy(raw, tmp_path):
    "A delivery to spoil."
    return shutil.copytree(raw, tmp_path/'raw')


def no_pictures(folder:Path)->dict[str, Path]:
    "Whatever else can have a name in a folder."
    folder.mkdir()
    out = {k: folder/k for k in ('pipe', 'sparse', 'folder', 'dangling', 'loop', 'device', 'socket', 'endless')}
    os.mkfifo(out['pipe']); out['folder'].mkdir()
    with out['sparse'].open('wb') as f: f.truncate(3_000_000_000)
    out['dangling'].symlink_to('nowhere'); out['loop'].symlink_to('loop')
    out['device'].symlink_to('/dev/zero'); out['endless'].symlink_to('/proc/self/mem')
    with socket.socket(socket.AF_UNIX) as s, chdir(folder): s.bind('socket')
    return out


def put(path:Path, dest:Path):
    "Move it; a link to itself is one there too."
    path.rename(dest)
    if path.name == 'loop': dest.unlink(); dest.symlink_to(dest.name)


def test_f66_a_picture_is_refused_by_what_it_is(copy, tmp_path):
    "One line each in the quarantine, no bytes read, and no waiting for a pipe."
    images = sorted((copy/'images'/'image_train').iterdir())
    for old,new in zip(images, no_pictures(tmp_path/'odd').values(), strict=False): old.unlink(); put(new, old)
    before = peak_mb()
    data = ingest(copy, tmp_path/'data', max_quarantine=.1, progress=False)
    q = data.quarantine
    assert q.reason.value_counts().to_dict() == {'image_invalid': 7, 'image_missing': 1}
    details = ' '.join(q.detail)
    assert details.count('not a regular file') == 4 and '3,000,000,000 bytes, more than' in details
    assert len(data.products) == 192 and peak_mb()-before < 500
    assert len(ingest(copy, tmp_path/'data', max_quarantine=.1, progress=False).products) == 192  # nothing new


def test_f66_beside_a_products_file(tmp_path):
    "What a listing has instead of a picture costs this listing its picture, and the file nothing."
    seen = []
    class Model:
        modalities = 'text','image'
        def prepare(self, designation, description, data=None):
            seen.append(data)
            return Prepared(designation)
    for name,path in no_pictures(tmp_path/'odd').items():
        put(path, path.with_name(image_name(1, 2)))
        row = SimpleNamespace(designation='Lot', description='', image='', imageid=1, productid=2)
        p,picture,_ = prepare_row(Model(), row, ImageFolder(tmp_path/'odd'))
        assert p.title == 'Lot' and picture == ('missing' if name == 'dangling' else 'invalid'), name
        path = path.with_name(image_name(1, 2))
        path.rmdir() if name == 'folder' else path.unlink()
    assert seen == [None]*8


def test_f66_tables_are_files(copy, tmp_path):
    for name in ('classes.csv', 'X_train_update.csv', 'corrections.csv'):
        path,kept = copy/name, (copy/name).read_bytes() if (copy/name).exists() else None
        path.unlink(missing_ok=True); os.mkfifo(path)
        with pytest.raises(RawDataError, match=f'{name}: not a regular file'):
            ingest(copy, tmp_path/'data', progress=False)
        path.unlink()
        if kept: path.write_bytes(kept)


# -- 67: cores ---------------------------------------------------------------------------------------------------------

def test_f67_a_quota_limits_threads(tmp_path, monkeypatch):
    "Both layouts of control groups; the narrowest on the way to the process counts, rounded up."
    def quota(groups:str, **files)->float:
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        for name,text in files.items():
            p = root/name.replace('__', '/').replace('cpu_', 'cpu.', 1); p.parent.mkdir(parents=True, exist_ok=True)
            p.write_text(text)
        (root/'self').write_text(groups)
        return cpu_quota(root, root/'self')
    assert quota('0::/\n', cpu_max='400000 100000\n') == 4
    assert quota('0::/a/b\n', a__cpu_max='150000 100000', a__b__cpu_max='max 100000') == 1.5
    assert quota('0::/a/b\n', cpu_max='max 100000', a__cpu_max='800000 100000', a__b__cpu_max='20000 100000') == .2
    assert quota('0::/a\n', a__cpu_max='max 100000', b__cpu_max='1000 100000') == math.inf
    assert quota('0::/../x\n', cpu_max='200000 100000') == 2
    v1 = dict(cpu__d__cpu_cfs_period_us='100000')
    v1 = {k.replace('cpu__d__cpu_', 'cpu__d__cpu.'): v for k,v in v1.items()}
    assert quota('5:memory:/m\n4:cpu,cpuacct:/d\n', **v1, **{'cpu__d__cpu.cfs_quota_us': '250000'}) == 2.5
    assert quota('4:cpu:/d\n', **v1, **{'cpu__d__cpu.cfs_quota_us': '-1'}) == math.inf
    assert quota('', cpu_max='nonsense') == quota('nonsense') == math.inf
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)), raising=False)
    for cores,threads in ((math.inf, 64), (4., 4), (2.5, 3), (.1, 1), (100., 64)):
        monkeypatch.setattr(process, 'cpu_quota', lambda c=cores: c)
        assert process.n_threads() == threads and process.n_threads(7) == 7


# -- 74: who may read --------------------------------------------------------------------------------------------------

def test_f74_the_umask_and_what_is_private(tmp_path):
    mode = lambda p: stat.S_IMODE(p.stat().st_mode)
    old = os.umask(0)
    try:
        for mask in (0o022, 0o027, 0o077, 0o002):
            os.umask(mask)
            home = tmp_path/f'{mask:o}'
            write_atomic(home/'a', b''); write_atomic(home/'b', b'', private=True)
            write_atomic(home/'p'/'c', b'', private=True)
            assert (mode(home/'a'), mode(home/'b'), mode(home/'p'/'c')) == (0o666 & ~mask, 0o600, 0o600)
            assert (mode(home), mode(home/'p')) == (0o777 & ~mask, 0o700) and os.umask(mask) == mask
    finally: os.umask(old)


def test_f74_a_dataset_can_be_shared_and_answers_cannot(raw, tmp_path):
    old = os.umask(0o027)
    try: data = ingest(raw, tmp_path/'data', progress=False)
    finally: os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path/'data'/'versions').rglob('*') if p.is_file()}
    assert modes == {0o640} and stat.S_IMODE(data.folder.stat().st_mode) == 0o750
    spoken = datetime.now(UTC)
    picture = data.images_dir/data.products.image[0]
    said = [Correction('a', 'b', spoken, spoken, 10, 10, 'Lot\r', 'un\rdeux\r\n', picture)]
    write_delivery(said, None, tmp_path/'out')
    for p in [tmp_path/'out', *(tmp_path/'out').rglob('*')]:
        assert stat.S_IMODE(p.stat().st_mode) == (0o700 if p.is_dir() else 0o600), p


def test_f72_a_lone_carriage_return_stays_in_its_record(tmp_path):
    "In what reviewers said, read back by the ingestion, and in what goes to spreadsheets."
    titles = ['abc\r', '\rabc', 'a\rb', 'a\r\nb', 'a"\rb', 'plain', 'a, b']
    write_csv_rows(tmp_path/'x.csv', ['', 'designation'], [[i, t] for i,t in enumerate(titles)])
    back = [f for _,f,why in open_table(tmp_path/'x.csv', []).all_records() if not why]
    assert back == [['', 'designation'], *([str(i), t] for i,t in enumerate(titles))]
    write_csv(pd.DataFrame(dict(id=range(7), title=titles)), tmp_path/'y.csv')
    back = open_table(tmp_path/'y.csv', []).all_records()
    assert [f[0] for _,f,why in back if not why] == ['id', *map(str, range(7))]


# -- 76: a version is what its name says -------------------------------------------------------------------------------

def test_f76_labels_and_manifest_changed_together(raw, tmp_path):
    data = ingest(raw, tmp_path/'data', progress=False)
    path,manifest = data.folder/'index.parquet', data.folder/'manifest.json'
    text,sha = manifest.read_text(), sha256_file(path)
    data.index.assign(prdtypecode=10).to_parquet(path, index=False)
    with pytest.raises(ValueError, match='does not match its manifest'): Dataset.open(tmp_path/'data')
    manifest.write_text(text.replace(sha, sha256_file(path)))
    with pytest.raises(ValueError, match='was changed: a version is named by the hash'): Dataset.open(tmp_path/'data')
    other = {**json.loads(manifest.read_text()), 'version': 'f'*16}
    manifest.write_text(json.dumps(other))
    with pytest.raises(ValueError, match='was changed'): Dataset.open(tmp_path/'data')
    for torn in ('[]', text[:40], ''):
        manifest.write_text(torn)
        with pytest.raises(ValueError, match='is damaged'): Dataset.open(tmp_path/'data')


def test_f76_a_torn_manifest_of_another_version(copy, tmp_path):
    "It is left out, and said; the ingestion goes on. Pictures are compared with their names when asked for."
    first = ingest(copy, tmp_path/'data', progress=False)
    x = pd.read_csv(copy/'X_train_update.csv', dtype=str, keep_default_na=False)
    def deliver(title): x.assign(designation=[title, *x.designation[1:]]).to_csv(copy/'X_train_update.csv', index=False)
    deliver('Another title'); second = ingest(copy, tmp_path/'data', progress=False)
    for torn in ('{"version": "ab', '', '{}', '[1]'):
        (first.folder/'manifest.json').write_text(torn)
        with pytest.warns(UserWarning, match='is damaged; this version is left out'): rest = versions(tmp_path/'data')
        assert first.folder.name not in rest
    deliver('A third title'); third = ingest(copy, tmp_path/'data', progress=False)
    assert third.manifest['parent'] == second.folder.name
    assert damaged_images(third) == []
    a,b = [third.images_dir/n for n in sorted({*third.products.image})[:2]]
    a.write_bytes(a.read_bytes()[:-1]+b'?'); b.unlink()
    assert [s.split(' ', 1)[1] for s in damaged_images(third)] == ['is not the picture that it was',
                                                                    'cannot be read: No such file or directory']


# -- 71: names and titles on pages -------------------------------------------------------------------------------------

HOSTILE = ['<img src=x onerror=alert(1)>', '[x](javascript:alert(1))', '$x_{$', '`a` | *b*', '=1+1', '$$', '5 $ <b>']


def test_f71_no_table_sentence_or_figure_runs_what_it_shows():
    import matplotlib.pyplot as plt
    for s in HOSTILE:
        table = pd.DataFrame({'name': [s], s: [.5]}, index=[s])
        for shown in (as_table(table, precision=1), as_table(table, {'name': str.upper}), as_table(table, index=False)):
            assert not {'<img', '<IMG', '<b>', '<B>'} & {*re.findall(r'<\w+>?', shown.to_html())}, s
        assert markdown2html(as_markdown(s)).strip() == f'<p>{html.escape(s, quote=False)}</p>'
        fig,ax = plt.subplots(); plt.close(fig)
        ax.set_title(as_label(s)); ax.set_xticks([0], [as_label(s)])
        fig.draw_without_rendering()


@pytest.fixture
def hostile(copy):
    "A delivery whose categories and titles are code."
    codes = pd.read_csv(copy/'Y_train_CVw08PX.csv').prdtypecode.unique()
    labels = [HOSTILE[i%len(HOSTILE)] for i in range(len(codes))]
    pd.DataFrame(dict(prdtypecode=codes, label=labels)).to_csv(copy/'classes.csv', index=False)
    x = pd.read_csv(copy/'X_train_update.csv', dtype=str, keep_default_na=False)
    x['designation'] = [f'{t} {HOSTILE[i%len(HOSTILE)]}' for i,t in enumerate(x.designation)]
    x.loc[0, 'designation'] = ''; x.to_csv(copy/'X_train_update.csv', index=False)
    return copy


def test_f71_the_report_of_a_hostile_delivery(hostile, tmp_path):
    data = ingest(hostile, tmp_path/'data', progress=False)
    assert {HOSTILE[0], HOSTILE[2]} <= {*data.manifest['names'].values()}
    for f in (missing_descriptions_figure, sample_figure): f(data).draw_without_rendering()
    pages = [class_mix(data), class_mix(data, diff(data, data)), arrivals(data), refusals(data), largest_groups(data),
             language_shares(data)]
    for p in pages: assert not re.search('<img|<b>', p.to_html()), p
    report = pd.DataFrame(dict(prdtypecode=range(7), name=HOSTILE))
    page = markdown2html(name_classes(report, [1]*7, 7))
    assert not re.search('<(img|b|a|code|em)[ >]', page)


def test_f71_a_report_that_cannot_be_made_fails_nothing(hostile, tmp_path, monkeypatch):
    "All cells of the run notebook, executed in order, with every part of the report broken."
    for f in ('arrivals', 'refusals', 'class_mix', 'language_shares', 'largest_groups', 'sample_figure',
              'missing_descriptions_figure'):
        monkeypatch.setattr(ingestion_report, f, lambda *a, f=f: {}[f])
    monkeypatch.setattr(leakage, 'leak_report', lambda *a: 1/0)
    monkeypatch.setattr(diff_module, 'diff', lambda *a: 1/0)
    monkeypatch.setattr(tracking, 'mlflow_client', lambda *a: 1/0)
    monkeypatch.setattr(environment, 'load_environment', lambda *a: None)
    out = dict(raw_dir=str(hostile), data_dir=str(tmp_path/'data'), out_dir=str(tmp_path/'out'), run_id='abc')
    with chdir(tmp_path):
        for c in nbformat.read(ROOT/'nbs'/'runs'/'ingest.ipynb', 4).cells:
            if c.cell_type == 'code': exec(c.source, out)
            if 'parameters' in c.metadata.get('tags', []): out |= dict(
                raw_dir=str(hostile), data_dir=str(tmp_path/'data'), out_dir=str(tmp_path/'out'), run_id='abc')
    assert json.loads((tmp_path/'out'/'result.json').read_text())['new'] is True
    assert attempt(lambda: 1/0) == 'This part could not be made: ZeroDivisionError: division by zero'


def test_f71_no_run_notebook_goes_round_the_escaping():
    for p in sorted((ROOT/'nbs'/'runs').glob('*.ipynb')):
        code = '\n'.join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == 'code')
        assert not re.search(r'\.style\b|to_html|HTML\(|set_title\(f|\.(text|annotate)\(', code), p.name
