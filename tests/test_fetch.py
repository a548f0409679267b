"Faults 36 and 37: a delivery arrives whole through a bad line, and an archive from a stranger does no harm."
import hashlib
import io
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from rakuten_mm.sources.archive import STAGE, ArchiveError, Limits, unpack
from rakuten_mm.sources.fetch import FLAGS, FetchError, fetch
from rakuten_mm.sources.sync import describe_fetch

PASSWORD = 'Xq7-geheim-42'
needs_rclone = pytest.mark.skipif(not shutil.which('rclone'), reason='rclone is not installed')


def tree(root):
    "Content by name of all that is below `root`."
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in root.rglob('*')}


def sha(data): return hashlib.sha256(data).hexdigest()


# 37: archives ------------------------------------------------------------------------------------------------------

def zipped(path, *entries, **kw):
    "A zip of `(name or ZipInfo, bytes)`."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name,data in entries: z.writestr(name, data, **kw)


def zip_entry(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system,info.external_attr = 3, mode<<16
    return info


def tarred(path, *entries, mode='w'):
    "A tar of `(name, bytes, attributes)`."
    with tarfile.open(path, mode) as t:
        for name,data,attrs in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for k,v in attrs.items(): setattr(info, k, v)
            t.addfile(info, io.BytesIO(data))


def patched(path, *changes):
    "Overwrite bytes of a file that was just made."
    data = path.read_bytes()
    for old,new in changes:
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)


def encrypted(path):
    zipped(path, ('X.csv', b'id\n'))
    data = bytearray(path.read_bytes())
    data[6] |= 1; data[data.index(b'PK\1\2')+8] |= 1
    path.write_bytes(data)


def lying(path):
    "The directory promises ten bytes of a file that holds a million."
    zipped(path, ('X.csv', bytes(1_000_000)))
    patched(path, ((1_000_000).to_bytes(4, 'little'), (10).to_bytes(4, 'little')))


def truncated(path):
    tarred(path, ('X.csv', b'id\n', {}), ('Y.csv', b'id\n'*1000, {}))
    path.write_bytes(path.read_bytes()[:1024])


def tar_bomb(path):
    "50 MB of zeros in 50 kB."
    tarred(path, ('X.csv', bytes(50_000_000), {}), mode='w:gz')


def header_bomb(path):
    "A long name of 100 MB would be read into memory at once."
    info = tarfile.TarInfo('x'); info.type,info.size = tarfile.GNUTYPE_LONGNAME, 100_000_000
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT)+bytes(4096))


def good(name): return lambda path: zipped(path, ('X.csv', b'id\n'), (name, b'id\n'))
def link(**kw): return lambda path: tarred(path, ('X.csv', b'id\n', {}), ('link', b'', kw))
def folded(*names): return lambda path: zipped(path, *[(n, b'id\n') for n in names])


BAD = {
    'zip-slip.zip': (good('../evil'), r"'\.\./evil' leaves"), 'deep.zip': (good('a/../../evil'), 'leaves'),
    'absolute.zip': (good('/tmp/rakuten-mm-evil'), 'absolute'), 'drive.zip': (good('C:/evil'), 'absolute'),
    'backslash.zip': (good('..\\evil'), 'backslash'), 'newline.zip': (good('a\nb'), 'control'),
    'stage.zip': (good(f'{STAGE}/x'), 'temporary'),
    'symlink.zip': (lambda p: zipped(p, (zip_entry('way', stat.S_IFLNK|0o777), b'/tmp'), ('way/evil', b'')),
                    "'way' is a symbolic link"),
    'device.zip': (lambda p: zipped(p, (zip_entry('dev', stat.S_IFCHR|0o666), b'')), 'device'),
    'encrypted.zip': (encrypted, "'X.csv' is encrypted"), 'lying.zip': (lying, 'X.csv'),
    'nested.zip': (good('more.tar.gz'), 'archive inside'), 'nested-case.zip': (good('more.ZIP'), 'archive inside'),
    'bomb.zip': (lambda p: zipped(p, ('X.csv', bytes(5_000_000))), '100 times'), 'empty.zip': (zipped, 'no files'),
    'many.zip': (folded(*map(str, range(60))), 'more than 50 members'),
    'page.zip': (lambda p: p.write_text('<html>Sign in'), 'damaged'),
    'large.zip': (lambda p: zipped(p, *[(n, os.urandom(900_000)) for n in ('X.csv', 'Y.csv')]),
                  'more than 1,000,000 bytes'),
    'case.zip': (folded('images/A.jpg', 'images/a.jpg'), 'replace'),
    'folder-case.zip': (folded('Images/a.jpg', 'images/b.jpg'), 'replace'),
    'unicode.zip': (folded('caf\u00e9', 'cafe\u0301'), 'replace'),
    'file-and-folder.zip': (folded('a', 'a/b'), 'replace'), 'kept.zip': (good('SHA256SUMS'), 'replace'),
    'slip.tar': (lambda p: tarred(p, ('../evil', b'x', {})), 'leaves'),
    'absolute.tar.xz': (lambda p: tarred(p, ('/tmp/rakuten-mm-evil', b'x', {}), mode='w:xz'), 'absolute'),
    'symlink.tar': (link(type=tarfile.SYMTYPE, linkname='/tmp'), 'symbolic link'),
    'hardlink.tar': (link(type=tarfile.LNKTYPE, linkname='X.csv'), 'hard link'),
    'fifo.tar': (link(type=tarfile.FIFOTYPE), 'pipe'), 'device.tar': (link(type=tarfile.BLKTYPE, devmajor=8), 'device'),
    'twice.tar.bz2': (lambda p: tarred(p, ('X.csv', b'1', {}), ('./X.csv', b'2', {}), mode='w:bz2'), 'replace'),
    'bomb.tar.gz': (tar_bomb, '100 times'), 'header.tar': (header_bomb, '1 MB'),
    'truncated.tar': (truncated, 'damaged'),
    'renamed.rar': (good('Y.csv'), 'not one of'),
}


@pytest.mark.parametrize('name', BAD)
def test_f37_bad_archives_are_refused(name, tmp_path):
    build,why = BAD[name]
    dest = tmp_path/'box'/'raw'
    dest.mkdir(parents=True); (dest/'X.csv').write_text('before')
    build(tmp_path/name)
    before,t0 = tree(tmp_path), time.monotonic()
    limits = Limits(max_files=50, max_bytes=1_000_000 if name == 'large.zip' else 10**9)
    with pytest.raises(ArchiveError, match=why) as e:
        unpack(tmp_path/name, dest, limits, keep=['SHA256SUMS'], progress=False)
    assert tree(tmp_path) == before and not Path('/tmp/rakuten-mm-evil').exists()
    assert name in str(e.value) and time.monotonic()-t0 < 5


def test_f37_a_flipped_bit_leaves_the_folder_alone(tmp_path):
    zipped(tmp_path/'x.zip', ('a', os.urandom(5000)), ('b', os.urandom(5000)))
    data = bytearray((tmp_path/'x.zip').read_bytes()); data[7000] ^= 1
    (tmp_path/'x.zip').write_bytes(data)
    with pytest.raises(ArchiveError, match='damaged'): unpack(tmp_path/'x.zip', tmp_path/'raw', progress=False)
    assert not tree(tmp_path/'raw')


@pytest.mark.parametrize('name', ['x.zip', 'x.tar', 'x.tar.gz', 'x.TGZ', 'x.tar.bz2', 'x.tar.xz'])
def test_f37_good_archives_unpack(name, tmp_path):
    files = {'X_train.csv': 'id,titre\n1,Café\n'.encode()*1000, 'images/image_train/a.jpg': os.urandom(100_000),
             'images/vide': b''}
    members = [('./', b'', {'type': tarfile.DIRTYPE}), *[(f'./{n}', data, {}) for n,data in files.items()]]
    kind = name.lower().rsplit('.')[-1]
    if name == 'x.zip': zipped(tmp_path/name, ('images/', b''), *files.items())
    else: tarred(tmp_path/name, *members, mode='w:'+{'tar': '', 'tgz': 'gz'}.get(kind, kind))
    (tmp_path/'raw'/STAGE).mkdir(parents=True); (tmp_path/'raw'/STAGE/'left').write_text('by a killed run')
    assert unpack(tmp_path/name, tmp_path/'raw', progress=False) == {n: len(data) for n,data in files.items()}
    assert {n: data for n,data in tree(tmp_path/'raw').items() if data is not None} == files


# 36: the line ------------------------------------------------------------------------------------------------------

class BadLine:
    "A TCP proxy that cuts a connection after `limit` bytes from the server and refuses for a moment, `cuts` times."
    def __init__(self, port):
        self.to,self.limit,self.pause_s,self.cuts = port, None, 1, 3
        self.refuse_until,self.cut,self.served = 0, 0, 0
        self.server = socket.create_server(('127.0.0.1', 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try: client,_ = self.server.accept()
            except OSError: return
            if time.monotonic() < self.refuse_until: client.close(); continue
            try: upstream = socket.create_connection(('127.0.0.1', self.to))
            except OSError: client.close(); continue
            for pair in ((client, upstream, False), (upstream, client, True)):
                threading.Thread(target=self.pump, args=pair, daemon=True).start()

    def pump(self, src, dst, counted):
        "Copy until one side ends or the line is cut."
        n = 0
        try:
            while data := src.recv(1<<14):
                if counted:
                    n += len(data); self.served += len(data)
                    if self.limit is not None and n > self.limit: self.down(); break
                dst.sendall(data)
        except OSError: pass
        for s in (src, dst):
            with suppress(OSError): s.shutdown(socket.SHUT_RDWR)
            s.close()

    def down(self):
        "Cut the line."
        self.cut += 1
        self.refuse_until = time.monotonic()+self.pause_s
        if self.cut == self.cuts: self.limit = None


def obscure(text): return subprocess.check_output(['rclone', 'obscure', text], text=True).strip()


@pytest.fixture
def partner(tmp_path, monkeypatch):
    "A WebDAV server with a delivery: its folder, and the line to it."
    folder = tmp_path/'partner'
    (folder/'images').mkdir(parents=True)
    (folder/'X_train.csv').write_text('id\n1\n')
    for i in range(3): (folder/'images'/f'{i}.jpg').write_bytes(os.urandom(700_000))
    sums(folder)
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    monkeypatch.setenv('RCLONE_CONFIG', os.devnull)
    cmd = ['rclone', 'serve', 'webdav', str(folder), '--addr', f'127.0.0.1:{port}', '--user', 'us', '--pass', PASSWORD,
           '--dir-cache-time', '0s']
    server = subprocess.Popen(cmd, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try: socket.create_connection(('127.0.0.1', port)).close(); break
        except OSError: time.sleep(.05)
    line = BadLine(port)
    url,secret = f'http://127.0.0.1:{line.port}', obscure(PASSWORD)
    for k,v in dict(TYPE='webdav', URL=url, VENDOR='other', USER='us', PASS=secret).items():
        monkeypatch.setenv(f'RCLONE_CONFIG_PARTNER_{k}', v)
    yield folder, line
    line.server.close()
    server.terminate(); server.wait(10)


def sums(folder):
    "Write the folder's SHA256SUMS."
    lines = [f'{sha(data)}  {n}\n' for n,data in tree(folder).items() if data is not None and n != 'SHA256SUMS']
    (folder/'SHA256SUMS').write_text(''.join(lines))


def delivered(raw_dir):
    return {n: data for n,data in tree(raw_dir).items() if data is not None and not n.startswith('.fetch')}


@needs_rclone
def test_f36_cut_in_the_middle(partner, tmp_path):
    folder,line = partner
    line.limit = 300_000
    got = fetch('partner:', tmp_path/'raw', timeout_s=5, progress=False)
    assert line.cut >= 3 and got.files == 5 and delivered(tmp_path/'raw') == delivered(folder)
    line.served = 0
    again = fetch('partner:', tmp_path/'raw', timeout_s=5, progress=False)
    assert (again.files, again.bytes) == (0, 0) and line.served < 20_000 and again.seconds < 5
    (folder/'images'/'1.jpg').write_bytes(os.urandom(700_000)); sums(folder)  # same size; WebDAV tells no time or hash
    third = fetch('partner:', tmp_path/'raw', timeout_s=5, progress=False)
    assert third.files == 2 and delivered(tmp_path/'raw') == delivered(folder), 'the image and the list'


@needs_rclone
def test_f36_a_line_that_stays_down(partner, tmp_path, capfd, monkeypatch):
    folder,line = partner
    line.limit,line.pause_s = 300_000, 3600  # less than an image: whichever connections rclone opens, none brings one
    few = [*FLAGS, '--low-level-retries', '2']  # rclone takes the last; ten would wait for minutes
    monkeypatch.setattr('rakuten_mm.sources.fetch.FLAGS', few)
    t0 = time.monotonic()
    with pytest.raises(FetchError, match='tried 2 times'): fetch('partner:', tmp_path/'raw', retries=2, timeout_s=2)
    assert time.monotonic()-t0 < 30 and line.cut
    assert all(delivered(folder)[n] == data for n,data in delivered(tmp_path/'raw').items()), 'only whole files'
    logged = ''.join(capfd.readouterr())
    assert 'trying again' in logged
    assert not any(s in logged for s in [PASSWORD, os.environ['RCLONE_CONFIG_PARTNER_PASS']])
    line.limit,line.refuse_until = None, 0
    fetch('partner:', tmp_path/'raw', timeout_s=5, progress=False)
    assert delivered(tmp_path/'raw') == delivered(folder)


@needs_rclone
def test_f36_a_silent_line(partner, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        os.environ['RCLONE_CONFIG_PARTNER_URL'] = f'http://us:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}'
        t0 = time.monotonic()
        with pytest.raises(FetchError) as e: fetch('partner:', tmp_path/'raw', retries=1, timeout_s=.5, progress=False)
    assert time.monotonic()-t0 < 20 and PASSWORD not in str(e.value)


@needs_rclone
@pytest.mark.parametrize(('remote', 'password', 'why'), [
    ('partner:', 'another', '401'), ('partner:nothing', PASSWORD, 'check the path'),
    ('gdirve:listings', '', "didn't find section"),
    ('/no/such/folder', '', 'check the path'), ('--config=/tmp/x', '', 'no remote')])
def test_f36_no_retry_where_it_is_hopeless(partner, tmp_path, remote, password, why):
    os.environ['RCLONE_CONFIG_PARTNER_PASS'] = obscure(password)
    t0 = time.monotonic()
    with pytest.raises(FetchError, match=why) as e: fetch(remote, tmp_path/'raw', progress=False)
    assert time.monotonic()-t0 < 3 and 'tried' not in str(e.value)
    assert not any(secret in str(e.value) for secret in [PASSWORD, os.environ['RCLONE_CONFIG_PARTNER_PASS']])


def test_f36_rclone_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FetchError, match='apt install rclone'):
        fetch(str(tmp_path), tmp_path.parent/'raw', progress=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A partner's folder on this machine."
    monkeypatch.setenv('RCLONE_CONFIG', os.devnull)
    folder = tmp_path/'partner'
    (folder/'images').mkdir(parents=True)
    (folder/'X_train.csv').write_text('id\n1\n'); (folder/'images'/'a.jpg').write_bytes(os.urandom(3000))
    return folder


@needs_rclone
def test_f36_only_what_changed(folder, tmp_path):
    raw,get = tmp_path/'raw', lambda: fetch(str(folder), tmp_path/'raw', progress=False)
    assert get().files == 2 and get().files == 0
    (folder/'X_train.csv').write_text('id\n2\n')
    assert (lambda r: (r.files, r.bytes))(get()) == (1, 5)
    (raw/'images'/'a.jpg').write_bytes((folder/'images'/'a.jpg').read_bytes()[:1000])
    assert get().files == 1 and delivered(raw) == delivered(folder)
    rotten = raw/'images'/'a.jpg'
    when = rotten.stat()
    rotten.write_bytes(bytes(3000)); os.utime(rotten, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert get().files == 1 and delivered(raw) == delivered(folder), 'same size and time, other bytes'
    (raw/'notes.txt').write_text('mine')
    assert get().files == 0 and (raw/'notes.txt').exists()


@needs_rclone
def test_f36_sums(folder, tmp_path):
    sums(folder)
    assert fetch(str(folder), tmp_path/'raw', progress=False).files == 3
    (folder/'SHA256SUMS').write_text(f"{'0'*64}  X_train.csv\n")
    with pytest.raises(FetchError, match=r"'X_train\.csv' does not have the sha256"):
        fetch(str(folder), tmp_path/'raw', progress=False)
    assert not (tmp_path/'raw'/'X_train.csv').exists()
    for text,why in [('hello\n', 'cannot read'), (f"{'0'*64}  ../partner/X_train.csv\n", 'not delivered')]:
        (folder/'SHA256SUMS').write_text(text)
        with pytest.raises(FetchError, match=why): fetch(str(folder), tmp_path/'raw', progress=False)
    assert (folder/'X_train.csv').exists()
    sums(folder)
    fetch(str(folder), tmp_path/'raw', progress=False)
    assert delivered(tmp_path/'raw') == delivered(folder)


@needs_rclone
def test_f36_a_killed_fetch(partner, tmp_path):
    "Neither a half file nor a lock nor an rclone is left; the next fetch completes."
    folder,line = partner
    (folder/'images'/'big.jpg').write_bytes(os.urandom(40_000_000)); sums(folder)
    raw = tmp_path/'raw'
    code = f"from rakuten_mm.sources.fetch import fetch; fetch('partner:', {str(raw)!r}, progress=False)"
    env = os.environ | dict(RCLONE_BWLIMIT='2M')
    p = subprocess.Popen([sys.executable, '-c', code], env=env)
    while line.served < 4_000_000: assert p.poll() is None; time.sleep(.05)
    with pytest.raises(FetchError, match='another fetch'): fetch('partner:', raw, progress=False)
    p.kill(); p.wait()
    assert 'images/big.jpg' not in delivered(raw)
    time.sleep(1.5)
    served = line.served
    time.sleep(.5)
    assert line.served-served < 200_000, 'its rclone went too'
    fetch('partner:', raw, progress=False)
    assert delivered(raw) == delivered(folder)


@needs_rclone
def test_f36_archives_of_a_delivery(folder, tmp_path):
    raw,get = tmp_path/'raw', lambda: fetch(str(folder), tmp_path/'raw', progress=False)
    zipped(folder/'more.zip', ('images/b.jpg', b'b'), ('Y_train.csv', b'id\n'))
    assert get().archives == ['more.zip'] and (raw/'images'/'b.jpg').read_bytes() == b'b'
    assert get().archives == []
    zipped(folder/'more.zip', ('images/b.jpg', b'new'), ('Y_train.csv', b'id\n'))
    assert get().archives == ['more.zip'] and (raw/'images'/'b.jpg').read_bytes() == b'new'
    zipped(folder/'other.zip', ('Y_train.csv', b'another\n'))
    with pytest.raises(ArchiveError, match=r"would replace 'Y_train\.csv'"): get()
    zipped(folder/'other.zip', ('.fetch/unpacked.json', b'{}'))
    with pytest.raises(ArchiveError, match=r"would replace '\.fetch'"): get()
    assert (raw/'Y_train.csv').read_bytes() == b'id\n'
    one = fetch(str(folder/'more.zip'), tmp_path/'one', progress=False)
    assert (one.files, one.delivered, one.archives) == (1, 1, ['more.zip']) and (tmp_path/'one'/'Y_train.csv').exists()
    copy = fetch(str(tmp_path/'one'), tmp_path/'copy', progress=False)
    assert copy.files == 3 and not (tmp_path/'copy'/'.fetch'/'.fetch').exists(), 'a raw folder as the remote'


@needs_rclone
def test_f36_names_that_break_lines(folder, tmp_path):
    "A name with a newline could forge a line of rclone's report."
    (folder/'a\n* ..').mkdir(); (folder/'a\n* ..'/'victim').write_text('x')
    (tmp_path/'victim').write_text('safe')
    with pytest.raises(ArchiveError, match='control characters'): fetch(str(folder), tmp_path/'raw', progress=False)
    assert (tmp_path/'victim').read_text() == 'safe' and not delivered(tmp_path/'raw')


# 86: what partners pack ---------------------------------------------------------------------------------------------

PICTURE = b'\xff\xd8\xff\xe0 a picture'


@needs_rclone
def test_f86_a_packed_folder_stays_a_folder(folder, tmp_path):
    "Two months side by side do not replace each other, and what a Mac adds is no listing."
    (folder/'X_train.csv').unlink()
    for month in ('october', 'november'):
        zipped(folder/f'{month}.zip', (f'{month}/X_train.csv', month.encode()), (f'{month}/images/a.jpg', PICTURE),
               (f'__MACOSX/{month}/._X_train.csv', b'mac'), (f'{month}/.DS_Store', b'mac'))
    fetch(str(folder), tmp_path/'raw', progress=False)
    found = tree(tmp_path/'raw')
    assert found['november/X_train.csv'] == b'november' and found['october/X_train.csv'] == b'october'
    assert found['november/images/a.jpg'] == PICTURE and not any('MACOSX' in n or '.DS' in n for n in found)
    assert fetch(str(folder), tmp_path/'raw', progress=False).archives == []
    (tmp_path/'raw/november/X_train.csv').unlink()
    assert fetch(str(folder), tmp_path/'raw', progress=False).archives == ['november.zip'], 'one of its files was gone'


@needs_rclone
@pytest.mark.parametrize(('archive', 'name', 'there'), [
    ('images.zip', 'image_train/image_1_product_2.jpg', 'images/image_train/image_1_product_2.jpg'),
    ('images.tgz', 'images/image_train/image_1_product_2.jpg', 'images/image_train/image_1_product_2.jpg'),
    ('photos.zip', 'image_1_product_2.jpg', 'images/image_train/image_1_product_2.jpg'),
    ('photos.zip', 'Photos November/image_1_product_2.JPG', 'images/image_train/image_1_product_2.JPG'),
    ('photos.zip', 'red/front.png', 'images/red/front.png'),
    ('images/image_train.zip', 'image_1_product_2.jpg', 'images/image_train/image_1_product_2.jpg'),
    ('images/more.zip', 'image_train/image_1_product_2.jpg', 'images/image_train/image_1_product_2.jpg'),
    ('images/image_train/1.zip', 'a.webp', 'images/image_train/a.webp'),
    ('november/photos.zip', 'IMAGES/front.png', 'november/images/front.png')])
def test_f86_pictures_packed_apart_are_put_where_listings_look(folder, tmp_path, archive, name, there):
    (folder/archive).parent.mkdir(parents=True, exist_ok=True)
    if archive.endswith('.zip'): zipped(folder/archive, (name, PICTURE))
    else: tarred(folder/archive, (name, PICTURE, {}), mode='w:gz')
    assert fetch(str(folder), tmp_path/'raw', progress=False).archives == [archive]
    assert (tmp_path/'raw'/there).read_bytes() == PICTURE
    assert fetch(str(folder), tmp_path/'raw', progress=False).archives == []


@needs_rclone
def test_f86_pictures_that_would_replace_others_are_refused(folder, tmp_path):
    "Also where only the places that they get are the same."
    zipped(folder/'a.zip', ('image_1_product_2.jpg', PICTURE))
    zipped(folder/'b.zip', ('other/image_1_product_2.jpg', b'another'))
    with pytest.raises(ArchiveError, match=r'b\.zip: .*replace'): fetch(str(folder), tmp_path/'raw', progress=False)
    zipped(folder/'b.zip', ('x/image_3_product_4.jpg', b'1'), ('y/IMAGE_3_product_4.jpg', b'2'),
           ('z/image_3_product_4.jpg', b'3'))
    with pytest.raises(ArchiveError, match='would replace'): fetch(str(folder), tmp_path/'raw', progress=False)


@needs_rclone
def test_f86_kinds_that_stay_packed_are_named(folder, tmp_path):
    for name in ('photos.rar', 'images/more.7z', 'big.zip.001', 'X_train.csv.gz'): (folder/name).write_bytes(b'Rar!')
    said = describe_fetch(fetch(str(folder), tmp_path/'raw', progress=False))
    assert 'left packed: X_train.csv.gz, big.zip.001, images/more.7z, photos.rar' in said and '.zip' in said
    assert 'left packed' in describe_fetch(fetch(str(folder), tmp_path/'raw', progress=False)), 'also the second time'
