"Pictures by URL: fetched within limits, from public addresses only, as fault 10 asks of a server."
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from click.testing import CliRunner

from rakuten_mm.cli.main import cli
from rakuten_mm.sources import image_urls
from rakuten_mm.sources.image_urls import DownloadLimits, fetch_images, file_stem

PNG = b'\x89PNG\r\n\x1a\n'+bytes(3_000)


class Shop(BaseHTTPRequestHandler):
    "What servers have in store."
    def log_message(self, *args): pass

    def answer(self, body=b'', status=200, **headers):
        self.send_response(status)
        for k,v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        if body: self.wfile.write(body)

    def do_GET(self):
        shop = self.server
        with shop.lock:
            shop.asked.append(self.path); shop.at_once += 1; shop.most = max(shop.most, shop.at_once)
        try:
            with suppress(OSError): getattr(self, self.path.split('?')[0].split('/')[1].partition('.')[0])()
        finally:
            with shop.lock: shop.at_once -= 1

    def good(self): time.sleep(.02); self.answer(PNG, Content_Type='image/png', Content_Length=str(len(PNG)))
    def page(self): self.answer(b'<!doctype html><title>Sign in', Content_Type='image/jpeg')
    def gone(self): self.answer(status=404)
    def cut(self): self.answer(PNG[:1000], Content_Length=str(len(PNG)))
    def loop(self): self.answer(status=302, Location='/loop')
    def moved(self): self.answer(status=301, Location='/good.png')
    def inside(self): self.answer(status=302, Location='http://169.254.169.254/latest/meta-data/')
    def local(self): self.answer(status=302, Location=f'http://localhost:{self.server.server_port}/good.png')
    def script(self): self.answer(status=302, Location='file:///etc/passwd')
    def endless(self):
        self.answer(PNG)
        while True: self.wfile.write(bytes(100_000))
    def slow(self):
        self.answer(PNG[:100])
        while True: time.sleep(.05); self.wfile.write(b'\0')
    def headers_(self):
        while True: time.sleep(.05); self.wfile.write(b'X')
    def busy(self):
        again = self.server.asked.count(self.path) > 2
        self.answer(*([PNG] if again else [b'', 503]), Retry_After='1')


@pytest.fixture
def shop():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Shop)
    server.lock,server.asked,server.at_once,server.most = threading.Lock(), [], 0, 0
    server.site = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def mine(**kw): return DownloadLimits(**dict(hosts=frozenset(['127.0.0.1']), timeout_s=5, retries=0) | kw)


def get(urls, folder, limits):
    return fetch_images([(u, n) for n,u in enumerate(urls, 2)], folder, limits, progress=False)


def reasons(urls, folder, limits):
    return [f['reason'] for f in sorted(get(urls, folder, limits).failed, key=lambda f: f['line'])]


def test_pictures_are_fetched_once_and_few_at_a_time(shop, tmp_path):
    urls = [f'{shop.site}/good.png?{i}' for i in range(40)]
    assert get([*urls, *urls, 'image_1_product_2.jpg', ''], tmp_path, mine()).fetched == 40
    assert (tmp_path/f'{file_stem(urls[0])}.png').read_bytes() == PNG and shop.most <= 4
    shop.asked.clear(); (tmp_path/f'{file_stem(urls[3])}.png').unlink()
    again = get(urls, tmp_path, mine())
    assert (again.fetched, again.there) == (1, 39) and len(shop.asked) == 1
    assert not [*tmp_path.rglob('.tmp-*'), *tmp_path.rglob('failed.csv')]


def test_f10_nothing_that_is_not_public_is_connected_to(shop, tmp_path):
    port = shop.server_port
    places = ['127.0.0.1', 'localhost', '[::1]', '[::ffff:127.0.0.1]', '2130706433', '0x7f.1', '0', '169.254.169.254']
    urls = [f'http://{p}/' for p in places]+[f'http://127.0.0.1:{port}/good.png', 'file:///etc/passwd', 'gopher://x/']
    assert len(reasons(urls, tmp_path, DownloadLimits(retries=0, timeout_s=2))) == len(urls)
    assert shop.asked == []
    why = reasons([f'{shop.site}/{p}' for p in ('inside', 'local', 'script', 'loop')], tmp_path, mine())
    assert '169.254.169.254 is no public address' in why[0] and 'localhost' in why[1] and 'http://' in why[2]
    assert 'redirects' in why[3] and '/good.png' not in shop.asked


def test_f10_a_name_that_answers_differently_gains_nothing(shop, tmp_path, monkeypatch):
    "All addresses of a name are checked, and the connection goes to one of those."
    lookups,real = [], socket.getaddrinfo
    at = lambda ip: (socket.AF_INET, socket.SOCK_STREAM, 6, '', (ip, 80))
    def lookup(host, port, **kw):
        lookups.append(host)
        answers = {'mixed.example': ['93.184.216.34', '127.0.0.1'], 'once.example': ['10.0.0.7']}
        return [at(ip) for ip in answers[host]] if host in answers else real(host, port, **kw)
    monkeypatch.setattr(socket, 'getaddrinfo', lookup)
    why = reasons(['http://mixed.example/a.jpg', 'http://once.example/a.jpg'], tmp_path, DownloadLimits(retries=0))
    assert '127.0.0.1' in why[0] and '10.0.0.7' in why[1] and lookups.count('mixed.example') == 1


def test_f10_limits_of_bytes_and_seconds(shop, tmp_path):
    t0 = time.monotonic()
    why = reasons([f'{shop.site}/{p}' for p in ('endless', 'slow', 'headers_', 'page', 'gone', 'cut')], tmp_path,
                  mine(timeout_s=1, max_bytes=1_000_000))
    assert time.monotonic()-t0 < 10
    parts = '1,000,000 bytes', 'too long', 'too long', 'no picture', '404', 'ended before'
    assert all(part in said for said,part in zip(why, parts, strict=True)), why
    some = [f'{shop.site}/good.png?{i}' for i in range(8)]
    few = get(some, tmp_path/'few', mine(max_total=10_000, at_once=1))
    assert few.fetched == 3 and len(few.failed) == 5 and '--max-total' in few.failed[-1]['reason']
    assert get(some, tmp_path/'few', mine()).there == 3, 'the rest is fetched by the next run'
    late = get(some, tmp_path/'late', mine(max_s=0))
    assert late.fetched == 0 and 'time' in late.failed[0]['reason']
    assert [p.suffix for p in tmp_path.rglob('by_url/*/*')] == ['.png']*8


@pytest.mark.skipif(not shutil.which('openssl'), reason='openssl is not installed')
def test_over_tls_the_certificate_counts(shop, tmp_path, monkeypatch):
    "One that nobody vouches for is refused at once; a server that never finishes its greeting ends in its time."
    key,cert = tmp_path/'key.pem', tmp_path/'cert.pem'
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes',
                    '-keyout', key, '-out', cert, '-days', '2', '-subj', '/CN=localhost', '-addext',
                    'subjectAltName=DNS:localhost'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(cert, key)
    shop.socket = context.wrap_socket(shop.socket, server_side=True)
    url,limits = f'https://localhost:{shop.server_port}/good.png', mine(hosts=frozenset(['localhost']))
    assert 'the certificate: self' in reasons([url], tmp_path, limits)[0] and shop.asked == []
    monkeypatch.setattr(image_urls, 'TLS', ssl.create_default_context(cafile=cert))
    assert get([url], tmp_path, limits).fetched == 1
    with socket.create_server(('127.0.0.1', 0)) as mute:
        why = reasons([f'https://localhost:{mute.getsockname()[1]}/a.png'], tmp_path, mine(
            hosts=frozenset(['localhost']), timeout_s=.5))
    assert 'too long' in why[0] or 'timed out' in why[0], why


def test_a_busy_server_is_asked_again_when_it_said(shop, tmp_path):
    t0 = time.monotonic()
    assert get([f'{shop.site}/busy.png'], tmp_path, mine(retries=3)).fetched == 1
    assert shop.asked.count('/busy.png') == 3 and 2 <= time.monotonic()-t0 < 8


def test_a_host_that_is_down_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(image_urls, 'GIVE_UP', 3)
    with socket.create_server(('127.0.0.1', 0)) as s: closed = s.getsockname()[1]
    why = reasons([f'http://127.0.0.1:{closed}/{i}.jpg' for i in range(12)], tmp_path, mine(at_once=1))
    assert sum('no connection' in w for w in why) == 3 and sum('not tried' in w for w in why) == 9


def test_from_the_command_line_to_a_dataset(shop, raw, tmp_path):
    "A table whose column `image` has URLs: fetched, then ingested; one that fails is listed and costs itself only."
    from rakuten_mm.data.dataset import Dataset
    rows = pd.read_csv(next(raw.glob('X_train*.csv')), dtype=str, keep_default_na=False).head(12)
    labels = pd.read_csv(next(raw.glob('Y_train*.csv')), dtype=str).head(12)
    photo = next((raw/'images'/'image_train').iterdir()).read_bytes()
    Shop.photo = lambda self: self.answer(photo)
    rows['image'] = [f'{shop.site}/photo.jpg?{i}' for i in range(11)]+[f'{shop.site}/gone.jpg']
    to = tmp_path/'raw'; to.mkdir()
    rows.drop(columns='imageid').to_csv(to/'X_train.csv', index=False); labels.to_csv(to/'Y_train.csv', index=False)
    run = lambda *a: CliRunner().invoke(cli, [*map(str, a)])
    planned = run('fetch-images', to, '--dry-run', '--host', '127.0.0.1')
    assert planned.exit_code == 0 and 'fetch: 12 (12 from 127.0.0.1)' in planned.output, planned.output
    assert shop.asked == []
    alone = run('fetch-images', to, '--retries', 0)
    assert alone.exit_code == 1 and shop.asked == [] and '--host 127.0.0.1' in alone.output, alone.output
    done = run('fetch-images', to, '--host', '127.0.0.1', '--retries', 0)
    assert done.exit_code == 0 and '11 pictures fetched' in done.output and '1 failed' in done.output, done.output
    failed = pd.read_csv(to/'images'/'by_url'/'failed.csv')
    assert [u.rsplit('/')[-1] for u in failed.url] == ['gone.jpg'] and '404' in failed.reason[0]
    got = run('ingest', to, tmp_path/'data', '--max-quarantine', .5)
    assert got.exit_code == 0 and len(Dataset.open(tmp_path/'data').index) == 11, got.output
