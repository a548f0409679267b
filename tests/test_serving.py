"""The server's answers: in process for their content, over HTTP to a real process for what it is sent.

Its life is in test_server_life.py.
"""
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import jwt
import numpy as np
import pytest
from conftest import ROOT
from fastapi.testclient import TestClient
from PIL import Image, features

from rakuten_mm.api import basic_auth
from rakuten_mm.models.manifest import read_golden
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.monitoring.access_check import APICheckError, Prober, check_credentials, check_roles
from rakuten_mm.monitoring.api_check import ask_golden, check_api, check_server
from serving.admission import AdmissionControl
from serving.auth import add_user
from serving.budgets import MAX_BODY
from serving.config import ServeConfig, kept_images
from serving.middleware import RequestMiddleware
from serving.schema import MAX_BATCH
from serving.server import make_server
from serving.store import Store
from serving.testing import PASSWORD, USER, running_server

AUTH = {'Authorization': basic_auth(USER, PASSWORD)}


def encoded(fmt='JPEG', mode='RGB', size=(60,80), **kw):
    "An encoded image in base64."
    Image.new(mode, size).save(buf := io.BytesIO(), fmt, **kw)
    return base64.b64encode(buf.getvalue()).decode()


@pytest.fixture
def http(server):
    "A client with the right credentials."
    with server.http() as client: yield client


def rejected(r, status=422):
    "The error of an answer, which has the one error body."
    assert r.status_code == status, r.text
    error = r.json()['error']
    assert error.keys() == {'code', 'message', 'fields'} and error['message']
    return error


def test_in_process(bundle, monkeypatch, tmp_path):
    "The server's answer is the predictor's."
    monkeypatch.setenv('API_USERNAME', USER); monkeypatch.setenv('API_PASSWORD', PASSWORD)
    monkeypatch.setenv('API_DATABASE_URL', f'sqlite:///{tmp_path/"feedback.db"}')
    with TestClient(make_server(str(bundle)).app) as client:
        r = client.post('/predict', json={'designation': 'Piscine ronde', 'image': encoded(), 'top_k': 2}, headers=AUTH)
        assert r.status_code == 200, r.text
        answer,model = r.json(), Predictor.load(bundle)
        want = model.predict([model.prepare('Piscine ronde', image=base64.b64decode(encoded()))], 2)[0]
        assert answer['prdtypecode'] == want.prdtypecode
        assert answer['probability'] == pytest.approx(want.probability, abs=1e-4)
        assert len(answer['top_k']) == 2 and answer['modalities'] == ['text', 'image']
        assert len(answer['prediction_id']) == 36
        assert client.post('/predict', json={'designation': 'x'}).status_code == 401


def test_api_check(server, bundle):
    "A server that is all right passes every check, and holds nothing afterwards that was not there before."
    from sqlalchemy import create_engine, text
    def recorded():
        counted = text('select count(*) from predictions')
        with create_engine(server.database).connect() as c: return c.execute(counted).scalar()
    before = recorded()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        found = check_server(client, USER, PASSWORD, str(bundle), max_p95_ms=0)
        p = Prober(client)
        impossible = read_golden(bundle)[0] | {'prdtypecode': -1}
        assert 'instead of -1' in ask_golden(p, AUTH['Authorization'], [impossible], 'bundle').found[0]
        slow = check_server(client, USER, PASSWORD, str(bundle), open_pages='docs,version', max_p95_ms=.01, at_least=1)
    assert found.failures == [] and found.role == 'admin' and found.version == 'bundle'
    assert {c.kind for c in found.checks} == {'credentials', 'pages', 'roles', 'state', 'golden', 'latency', 'figures'}
    assert set(json.loads((bundle/'config.json').read_text())['codes']) <= set(found.classes.index)
    assert (found.classes.golden <= 1).all() and len(found.golden) == found.classes.golden.sum() > 5
    assert found.latency['n'] >= 100 and 0 < found.latency['p50_ms'] <= found.latency['p95_ms']
    assert [f.split(':')[0] for f in slow.failures] == ['pages GET /version', 'latency p95']
    assert recorded() == before


def test_open_and_closed_pages(server):
    get = lambda path: httpx.get(server.url+path)
    assert get('/health').text == 'ok' and get('/ready').json() == dict(status='ready', model_version='bundle')
    schema,page = get('/openapi.json').json(), get('/docs').text
    assert 'http' not in page.replace('http-equiv', '')  # nothing is loaded from elsewhere
    for asset in ('/static-docs/swagger-ui-bundle.js', '/static-docs/swagger-ui.css'):
        assert asset in page and get(asset).status_code == 200
    for path,operations in schema['paths'].items():
        for operation in operations.values():
            for code,r in operation['responses'].items():
                if code in ('200', '503'): continue
                assert r['content']['application/json']['schema']['$ref'].endswith('ErrorBody'), (path, code)
    assert {'200', '401', '413', '422'} <= schema['paths']['/predict']['post']['responses'].keys()
    parts = schema['components']['schemas']
    assert 'ErrorBody' in parts and 'designation' in parts['PredictRequest']['properties']


JSON = {'Content-Type': 'application/json'}
MALFORMED = {
    'cut': (b'{"designation": ', 'application/json'), 'list': (b'[1, 2]', 'application/json'),
    'string': (b'"x"', 'application/json'), 'null': (b'null', 'application/json'), 'empty': (b'', 'application/json'),
    'form': (b'designation=x', 'application/x-www-form-urlencoded'), 'not utf-8': (b'\xff\xfe', 'application/json'),
    'plain text': (b'{"designation": "x"}', 'text/plain')}

@pytest.mark.parametrize(('body', 'kind'), MALFORMED.values(), ids=MALFORMED)
def test_f01_malformed_body(http, body, kind):
    rejected(http.post('/predict', content=body, headers={'Content-Type': kind}))


@pytest.mark.parametrize('body', [
    {'designation': 5}, {'designation': 'x', 'top_k': 0}, {'designation': 'x', 'top_k': '3'},
    {'designation': 'x', 'top_k': 1.5}, {'designation': 'x', 'colour': 'red'}, {'designation': 'x'*20_001},
    {'designation': 'x', 'image': 5}, {'designation': 'x', 'image': 'é'}], ids=str)
def test_f01_wrong_types(http, body):
    error = rejected(http.post('/predict', json=body))
    assert error['fields'][0]['field'] in body and 'x'*100 not in str(error)


@pytest.mark.parametrize('path', ['/predict/batch', '/explain', '/feedback', '/predict/upload', '/token'])
@pytest.mark.parametrize('body', [b'{"a": ', b'[1, 2]', b'null', b'', b'\xff\xfe', b'{"products": 5}',
                                  b'{"products": []}'])
def test_f01_malformed_body_elsewhere(http, path, body):
    r = http.post(path, content=body, headers=JSON)
    assert rejected(r, 415 if path in ('/predict/upload', '/token') else 422)


def test_f02_missing_parts(http):
    for body in ({}, {'designation': ''}, {'designation': '  ', 'description': ''}, {'designation': '<p> </p>'}):
        rejected(http.post('/predict', json=body))
    text,image = {'designation': 'Livre'}, {'image': encoded()}
    answers = [http.post('/predict', json=b).json() for b in (text, image, text | image)]
    assert [a['modalities'] for a in answers] == [['text'], ['image'], ['text', 'image']]


def test_f06_bad_images(http):
    "Each is a 422 with a reason, and requests sent at the same time are answered."
    whole = base64.b64decode(encoded(size=(300,300)))
    bad = dict(truncated=whole[:200], header=b'\xff\xd8\xff\xe0', page=b'<html>404</html>', text=b'photo.jpg',
               empty_zip=b'PK\x05\x06'+bytes(18),
               bomb=base64.b64decode(encoded('PNG', '1', (10_000,9_000))))
    for name,data in bad.items():
        error = rejected(http.post('/predict', json={'designation': 'Livre', 'image': base64.b64encode(data).decode()}))
        assert error['code'] == 'invalid_image' and error['fields'][0]['field'] == 'image', name
        assert http.post('/predict', json={'designation': 'Livre', 'image': encoded()}).status_code == 200
    for fmt,mode in (('PNG', 'RGBA'), ('PNG', 'I;16'), ('JPEG', 'CMYK'), ('GIF', 'P'), ('WEBP', 'RGB'), ('PNG', 'LA')):
        assert http.post('/predict', json={'image': encoded(fmt, mode)}).status_code == 200, (fmt, mode)


def raw(server, head:str, chunks, wait:float=10)->tuple[bytes, int]: # What came back, and bytes that were sent before
    "Send a request by hand, until an answer comes."
    at,sent = urlsplit(server.url), 0
    with socket.create_connection((at.hostname, at.port), timeout=wait) as s:
        s.sendall((head+f'Host: x\r\nAuthorization: {basic_auth(USER, PASSWORD)}\r\n\r\n').encode())
        s.setblocking(False)
        for c in chunks:
            end = time.monotonic()+wait
            while c and time.monotonic() < end:
                try: got = s.recv(100_000)
                except BlockingIOError: got = None
                except ConnectionError: return b'', sent
                if got is not None: return got, sent
                try: n = s.send(c); c,sent = c[n:], sent+n
                except BlockingIOError: time.sleep(.001)
                except ConnectionError: c = b''
        s.settimeout(wait)
        return s.recv(100_000), sent


def test_f03_body_over_the_limit(http, server):
    "With a length it is refused unread; without, as soon as it is too long. The process does not keep it."
    big = b'{"designation": "'+b'x'*(MAX_BODY+1)+b'"}'
    rejected(http.post('/predict', content=big, headers=JSON), 413)
    head = f'POST /predict HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {10**9}\r\n'
    answer,sent = raw(server, head, [])
    assert answer.startswith(b'HTTP/1.1 413') and sent == 0
    before = max(p.memory_info().rss for p in server.family())
    block = b'10000\r\n'+b'x'*65536+b'\r\n'
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    for kind in ('application/json', 'multipart/form-data; boundary=b'):
        start = b'' if kind.endswith('json') else b'50\r\n'+part.ljust(80, b'x')+b'\r\n'
        path = '/predict' if kind.endswith('json') else '/predict/upload'
        answer,sent = raw(server, f'POST {path} HTTP/1.1\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n',
                          [start, *[block]*1000])
        assert answer.startswith(b'HTTP/1.1 413'), (kind, answer[:200])
        assert sent < 2*MAX_BODY, (kind, sent)  # what the sockets hold included
        time.sleep(1)  # the log's line comes after the answer
        last = [json.loads(l) for l in server.log.read_text().splitlines() if f'"path": "{path}"' in l][-1]
        assert last['status'] == 413 and last['bytes'] <= MAX_BODY+2*262_144  # uvicorn reads up to 256 KiB at once
    assert max(p.memory_info().rss for p in server.family())-before < 100e6
    assert rejected(http.post('/feedback', content=b'x'*200_000), 413)


def test_f04_texts(http):
    "What people and machines write is read, or refused with a reason."
    fine = ['مرحبا بالعالم كتاب', 'zero\u200bwidth\u200djoiner\ufeff', 'NUL\0inside', '👍🏽'*1000, 'a'*20_000,
            '\u202eevil', 'Ａ ﬁ ½ ﷺ', '<b>Livre</b> &eacute;']
    for t in fine:
        r = http.post('/predict', json={'designation': t, 'description': t})
        assert r.status_code == 200, (t[:20], r.text)
    long = json.dumps({'designation': '👍'*1_000_000})
    halves = b'{"designation": "\\ud83d"}', b'{"designation": "\xed\xa0\xbd"}'
    for body in (*halves, long, '{"designation": "<p> </p>"}'):
        rejected(http.post('/predict', content=body, headers=JSON))
    rejected(http.post('/predict', json={'designation': 'x'*10_000_000}))
    r = http.post('/predict', json={'designation': 'mot '*5000, 'description': 'mot '*5000})
    assert r.status_code == 200 and r.elapsed.total_seconds() < 2


def test_f05_not_a_number(http):
    for what in ('"top_k": NaN', '"top_k": Infinity', '"description": NaN', '"top_k": 1e999'):
        body = f'{{"designation": "x", {what}}}'
        rejected(http.post('/predict', content=body, headers=JSON))
    rejected(http.post('/explain', content='{"designation": "x", "prdtypecode": NaN}', headers=JSON))


def test_f07_decompression_bombs(http, server):
    "A small file that says it is a huge image is refused by its header."
    worker = server.worker()
    files = [encoded('PNG', '1', s) for s in ((10_000, 9_000), (13_400, 13_400), (20_000, 20_000))]
    http.post('/predict', json={'image': encoded()})
    before = worker.memory_info().rss
    for f in files:
        took = []
        for _ in range(3):  # the fastest counts: other things run on this machine
            start = time.monotonic()
            rejected(http.post('/predict', json={'image': f}))
            took.append(time.monotonic()-start)
        assert min(took) < .1
    assert worker.memory_info().rss-before < 50e6


def odd_images()->dict[str, bytes]:
    "Images of every mode and shape that Pillow can write."
    rng,out = np.random.default_rng(0), {}
    base = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype='uint8'))
    def save(name, im, fmt, **kw): im.save(b := io.BytesIO(), fmt, **kw); out[name] = b.getvalue()
    for mode in ('L', 'CMYK'): save(f'jpeg {mode}', base.convert(mode), 'JPEG')
    for mode in ('L', 'LA', 'RGBA', '1'): save(f'png {mode}', base.convert(mode), 'PNG')
    save('png P transparent', base.convert('P'), 'PNG', transparency=3)
    save('png I;16', Image.fromarray(rng.integers(0, 65535, (30, 30), dtype='uint16')), 'PNG')
    exif = Image.Exif(); exif[0x0112] = 6
    save('jpeg turned', base, 'JPEG', exif=exif)
    more = [base.rotate(90*i) for i in range(3)]
    for fmt in ('GIF', 'PNG', *(['WEBP'] if features.check('webp') else [])):
        save(f'animated {fmt}', base, fmt, save_all=True, append_images=more, duration=50)
    save('one pixel', base.resize((1, 1)), 'PNG'); save('a line', base.resize((1, 20_000)), 'PNG')
    return out


def test_f08_odd_images_as_in_training(http, bundle):
    "The server sees what training saw: the same pixels give the same answer."
    model = Predictor.load(bundle)
    for name,data in odd_images().items():
        r = http.post('/predict', json={'image': base64.b64encode(data).decode()})
        assert r.status_code == 200, (name, r.text)
        want = model.predict([model.prepare(image=data)])[0]
        assert r.json()['prdtypecode'] == want.prdtypecode, name
        assert r.json()['probability'] == pytest.approx(want.probability, abs=1e-4), name


HEADS = dict(eps=b'%!PS-Adobe-3.0 EPSF-3.0', fits=b'SIMPLE  =                    T', pdf=b'%PDF-1.7',
             svg=b'<svg xmlns="http://www.w3.org/2000/svg"/>', psd=b'8BPS\0\1', tiff=b'II*\0', ico=b'\0\0\1\0',
             jp2=b'\0\0\0\x0cjP  ', ppm=b'P6 1 1 255 abc')

@pytest.mark.parametrize('head', HEADS.values(), ids=HEADS)
def test_f09_formats_that_are_not_read(http, head):
    r = http.post('/predict', json={'image': base64.b64encode(head.ljust(300)).decode()})
    assert rejected(r)['code'] == 'invalid_image'


def test_f10_addresses_are_not_followed(http):
    error = rejected(http.post('/predict', json={'designation': 'x', 'image_url': 'http://169.254.169.254/latest'}))
    assert error['fields'][0]['field'] == 'image_url'
    rejected(http.post('/predict', json={'image': 'http://127.0.0.1/a.jpg'}))


def test_f11_batches(http):
    "Order is kept, and what is wrong with one listing is said of that one."
    titles = ['Piscine ronde', 'Livre de poche', 'Jeu vidéo', 'Robot']
    products = [{'designation': titles[0]}, {}, {'designation': titles[1], 'image': encoded()}, 7,
                {'designation': titles[2], 'image': 'aGVsbG8='}, {'designation': titles[3], 'top_k': 1},
                {'designation': 'x', 'colour': 'red'}]
    r = http.post('/predict/batch', json={'products': products})
    assert r.status_code == 200, r.text
    out = r.json()['results']
    assert [o['status'] for o in out] == [200, 422, 200, 422, 422, 200, 422]
    assert out[4]['error']['code'] == 'invalid_image'
    for i in (0, 2, 5):
        alone,together = http.post('/predict', json=products[i]).json(), out[i]['prediction']
        assert out[i]['error'] is None and together['probability'] == pytest.approx(alone['probability'], abs=1e-4)
        assert together['prdtypecode'] == alone['prdtypecode'] and len(together['top_k']) == len(alone['top_k'])
    assert http.post('/predict/batch', json={'products': products[:1]*MAX_BATCH}).status_code == 200
    rejected(http.post('/predict/batch', json={'products': products[:1]*(MAX_BATCH+1)}), 413)


def test_upload(http):
    data = base64.b64decode(encoded())
    files = {'image': ('photo.jpg', data, 'image/jpeg')}
    r = http.post('/predict/upload', data={'designation': 'Piscine', 'top_k': 2}, files=files)
    j = http.post('/predict', json={'designation': 'Piscine', 'image': encoded(), 'top_k': 2}).json()
    assert r.status_code == 200 and r.json()['modalities'] == ['text', 'image']
    assert r.json()['probability'] == pytest.approx(j['probability'], abs=1e-4)


def test_f88_what_clients_mean(http):
    "A file field that was left empty, null as title, base64 in lines, a data: URL, a form without a file."
    parts = lambda **listing: http.post('/predict', json=listing).json()['modalities']
    image = encoded()
    lines = '\r\n'.join(image[i:i+76] for i in range(0, len(image), 76))
    for sent in (lines, f'data:image/jpeg;base64,{image}', f'data:;base64,{lines}', f' {image}\n'):
        assert parts(designation='Livre', image=sent) == ['text', 'image'], sent[:30]
    assert parts(designation=None, image=image) == ['image'] and parts(designation='Livre', image='') == ['text']
    for files in ({'designation': (None, 'Livre'), 'image': ('', b'')}, {'designation': (None, 'Livre')}):
        r = http.post('/predict/upload', files=files)
        assert r.status_code == 200 and r.json()['modalities'] == ['text'], r.text
    empty = (b'--x\r\nContent-Disposition: form-data; name="designation"\r\n\r\nLivre\r\n--x\r\nContent-Disposition: '
             b'form-data; name="image"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n--x--\r\n')
    kind = {'Content-Type': 'multipart/form-data; boundary=x'}
    assert http.post('/predict/upload', content=empty, headers=kind).json()['modalities'] == ['text']
    for bad in ('data:,###', 'é', 'a'*77):
        rejected(http.post('/predict', json={'designation': 'x', 'image': bad}))


def test_f12_forms(http):
    "Parts that are there twice, of the wrong kind, or unknown."
    jpg = ('a.jpg', base64.b64decode(encoded()), 'image/jpeg')
    text = lambda name,value: (name, (None, value))
    for files in ([('image', jpg), ('image', jpg)], [('designation', jpg)], [text('image', 'text')], [('photo', jpg)],
                  [text('designation', 'a'), text('designation', 'b')], [text('designation', 'a'), text('top_k', 'x')],
                  [('image', ('a.jpg', b'', 'image/jpeg'))], [('image', ('a.jpg', b'not an image', 'image/jpeg'))]):
        assert rejected(http.post('/predict/upload', files=files))['fields'], files
    bounded = 'multipart/form-data; boundary=b'
    for kind,body in (('multipart/form-data', b'x'), (bounded, b'--b\r\n'), (bounded, b'junk')):
        r = http.post('/predict/upload', content=body, headers={'Content-Type': kind})
        assert r.status_code in (400, 422), r.text


def test_f25_credentials(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert not [c for c in check_credentials(Prober(client), USER, PASSWORD)[0] if c.found]
        no_colon = 'Basic '+base64.b64encode(USER.encode()).decode()
        for header in ('Basic', 'basic '+'A'*7000, 'Digest x', no_colon, 'Basic \xe9'):
            r = client.post('/predict', json={'designation': 'x'}, headers={'Authorization': header.encode('latin-1')})
            assert rejected(r, 401)['code'] == 'unauthorized', header
            assert r.headers['www-authenticate'].startswith('Basic'), header


INCOMPLETE = {'none': {}, 'no password': {'API_USERNAME': 'anna'},
              'empty': {'API_USERNAME': 'anna', 'API_PASSWORD': ''}, 'no user': {'API_PASSWORD': 'x'}}

@pytest.mark.parametrize('given', INCOMPLETE.values(), ids=INCOMPLETE)
def test_f25_refuses_to_start_without_a_password(bundle, tmp_path, given):
    env = os.environ | dict(API_DATABASE_URL=f'sqlite:///{tmp_path/"feedback.db"}') | given
    command = [sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(bundle)]
    res = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode == 1 and 'set API_USERNAME and API_PASSWORD' in res.stderr and 'Traceback' not in res.stderr


def test_api_check_says_who_is_down(monkeypatch, bundle):
    monkeypatch.setenv('API_USERNAME', USER); monkeypatch.setenv('API_PASSWORD', PASSWORD)
    with pytest.raises(APICheckError, match='no answer from'): check_api('http://127.0.0.1:9', str(bundle))


def test_serving_stays_light():
    heavy = 'torch', 'sklearn', 'pandas', 'pytorch_lightning', 'zenml', 'papermill', 'transformers', 'mlflow'
    code = f'import sys, serving.server; print([m for m in {heavy} if m in sys.modules])'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert res.stdout.strip() == '[]'


def test_f25_wrong_credentials_take_as_long(server):
    "Whether the name exists does not show in the time."
    def took(user):
        wrong,start = {'Authorization': basic_auth(user, 'wrong')}, time.monotonic()
        assert httpx.post(server.url+'/predict', json={'designation': 'x'}, headers=wrong).status_code == 401
        return time.monotonic()-start
    known,unknown = ([took(u) for _ in range(7)] for u in (USER, 'nobody'))
    assert .3 < np.median(known)/np.median(unknown) < 3.3


def test_roles_and_tokens(bundle, tmp_path):
    "Users of the database: what each may do, and tokens that end or are forged."
    secret,password = 'a key that only this test and its server know', 'correct horse battery'
    store = Store(f'sqlite:///{tmp_path/"users.db"}', kept_images())
    for role in ('predict', 'review', 'admin'): add_user(store, role, password, role)
    env = dict(API_DATABASE_URL=f'sqlite:///{tmp_path/"users.db"}', API_USERNAME='', API_PASSWORD='', API_SECRET=secret)
    with running_server(bundle, **env) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        def ask(method, path, auth, **kw):
            return client.request(method, path, headers={'Authorization': auth}, **kw).status_code
        login = lambda name,password=password: client.post('/token', data=dict(username=name, password=password))
        for role in ('predict', 'review', 'admin'):
            assert login(role, 'wrong').status_code == 401
            r = login(role)
            assert r.status_code == 200, r.text
            token = r.json()
            assert token['role'] == role and token['token_type'] == 'bearer' and token['expires_in'] == 3600
            for auth in (basic_auth(role, password), 'Bearer '+token['access_token']):
                assert ask('POST', '/predict', auth, json={'designation': 'x'}) == 200
                assert ask('GET', '/review', auth) == (403 if role == 'predict' else 200)
                assert ask('GET', '/metrics', auth) == (200 if role == 'admin' else 403)
                assert not [c for c in check_roles(Prober(client), auth, role, 'docs') if c.found]
        mark = jwt.decode(token['access_token'], options={'verify_signature': False})['mark']
        def sign(key=secret, alg='HS256', **claims):
            return 'Bearer '+jwt.encode(dict(sub='admin', exp=time.time()+60, mark=mark) | claims, key, algorithm=alg)
        assert ask('GET', '/metrics', sign()) == ask('GET', '/metrics', sign(iat=time.time()+5)) == 200
        head,body,signature = sign().split('.')
        for bad in (sign(exp=time.time()-1), sign(sub='nobody'), sign(key='another key that is long enough, too'),
                    sign(key=None, alg='none'), sign(alg='HS512'), 'Bearer '+jwt.encode(dict(sub='admin'), secret),
                    sign(mark='0'*32), sign(sub='predict'), sign(iat=time.time()+60),
                    f'{head}.{body}.{signature[::-1]}', f'{head}.{body}', 'Bearer x', 'Bearer'):
            assert ask('GET', '/version', bad) == 401, bad
        bearer = {role: f"Bearer {login(role).json()['access_token']}" for role in ('predict', 'review', 'admin')}
        add_user(store, 'predict', password+'!', 'predict'); add_user(store, 'admin', password, 'predict')
        store.drop_user('review')  # f69: a token ends with the record that it was given for
        end = time.monotonic()+20
        while ask('GET', '/review', basic_auth('review', password)) != 401:
            assert time.monotonic() < end
            time.sleep(.5)
        assert [ask('GET', '/version', b) for b in bearer.values()] == [401]*3
        add_user(store, 'review', password, 'admin')
        while login('review').status_code != 200: assert time.monotonic() < end+20; time.sleep(.5)
        assert ask('GET', '/version', bearer['review']) == 401
    store.close()


def test_f26_f27_limits_and_pages(bundle):
    "Guessing is slowed down, also for the right password; pages are open as configured; nothing secret is in the log."
    secret = 'ein-sehr-geheimes-Wort'
    env = dict(API_FAILED_LOGINS='5/minute', API_RATE='20/minute', API_PASSWORD=secret,
               API_OPEN_PAGES='metrics,categories')
    with running_server(bundle, **env) as server:
        get = lambda path,**kw: httpx.get(server.url+path, **kw).status_code
        for p in ('/metrics', '/categories', '/health', '/', '/static/app.js'): assert get(p) == 200, p
        for p in ('/docs', '/openapi.json', '/version', '/review', '//', '//docs'): assert get(p) == 401, p
        for p in ('/health', '/ready'): assert secret not in httpx.get(server.url+p).text
        right = {'Authorization': basic_auth(USER, secret)}
        assert httpx.post(server.url+'/predict', json={'image': encoded()}, headers=right).status_code == 200
        def guess(i):
            wrong = {'Authorization': basic_auth(USER, f'guess{i}')}
            return httpx.post(server.url+'/predict', json={'designation': 'x'}, headers=wrong)
        out = [guess(i) for i in range(8)]
        assert [r.status_code for r in out] == [401]*5+[429]*3 and 0 < int(out[-1].headers['retry-after']) <= 60
        assert httpx.post(server.url+'/token', data=dict(username='other', password=secret)).status_code == 401
        assert get('/version', headers=right) == 200  # whoever was let in before goes on
        codes = [get('/version', headers=right) for _ in range(25)]
        assert codes[0] == 200 and codes[-1] == 429
        log = server.log.read_text()
    assert '"path": "/predict"' in log and USER in log
    for word in (secret, basic_auth(USER, secret)[6:], 'guess1', encoded()[:60], 'Authorization'):
        assert word not in log


@pytest.fixture(scope='module')
def remembering(bundle):
    "A server that remembers answers, and a client of it."
    with running_server(bundle, API_CACHE='100') as server, server.http() as http: yield server, http


def test_feedback_and_review(remembering, bundle):
    "What waits is asked for in order of use, is corrected once, and comes back while reviewers disagree."
    http = remembering[1]
    listing = lambda g: {k: g[k] for k in ('designation', 'description', 'image')}
    sent = [http.post('/predict', json=listing(g)).json() for g in read_golden(bundle)]
    waits = [a for a in sent if a['lane'] == 'review']
    assert len(waits) > 3, [a['lane'] for a in sent]
    queue = http.get('/review?limit=100').json()
    assert {i['prediction_id'] for i in queue['items']} == {a['prediction_id'] for a in waits}
    assert queue['waiting'] == len(waits)
    margin = lambda i: i['top_k'][0]['probability']-i['top_k'][1]['probability']
    assert [margin(i) for i in queue['items']] == sorted(margin(i) for i in queue['items'])
    first = queue['items'][0]
    assert first['has_image'] and first['designation'] in {g['designation'] for g in read_golden(bundle)}
    image = http.get(f"/review/{first['prediction_id']}/image")
    assert image.headers['content-type'] == 'image/jpeg' and max(Image.open(io.BytesIO(image.content)).size) > 30
    said = dict(prediction_id=first['prediction_id'])
    say = lambda code,**kw: http.post('/feedback', json=said | dict(prdtypecode=code, **kw))
    want = dict(prediction_id=first['prediction_id'], prdtypecode=10, reviewer=USER, verdict=10, conflict=False)
    assert {k: v for k,v in say(10).json().items() if k in want} == want
    assert first['prediction_id'] not in {i['prediction_id'] for i in http.get('/review?limit=100').json()['items']}
    disputed = say(2403, reviewer='bob').json()
    assert disputed['verdict'] is None and disputed['conflict'] and disputed['reviewer'] == 'bob'
    assert say(10, reviewer='eve').json()['verdict'] == 10
    assert rejected(say(999_999))['fields'][0]['field'] == 'prdtypecode'
    assert rejected(http.post('/feedback', json=dict(prediction_id='0'*36, prdtypecode=10)), 404)
    second = queue['items'][1]
    why = http.get(f"/review/{second['prediction_id']}/explanation?prdtypecode=10").json()
    assert why['prdtypecode'] == 10 and why['words'] and len(why['regions']) == 7
    assert rejected(http.get(f"/review/{'0'*36}/explanation"), 404)
    code = second['prdtypecode']
    only = http.get(f'/review?limit=100&prdtypecode={code}').json()
    assert {i['prdtypecode'] for i in only['items']} == {code} and only['waiting'] == len(only['items'])
    assert {c['prdtypecode']: c['waiting'] for c in only['categories']}[code] == only['waiting']
    none = http.post('/feedback', json=dict(prediction_id=second['prediction_id'], unusable='several')).json()
    assert none['verdict'] is none['prdtypecode'] is None and none['is_unusable'] and none['unusable'] == 'several'
    assert http.get(f'/review?limit=100&prdtypecode={code}').json()['waiting'] == only['waiting']-1
    for wrong in (dict(unusable='boring'), dict(unusable='several', prdtypecode=10), {}):
        assert rejected(http.post('/feedback', json=dict(prediction_id=second['prediction_id']) | wrong))
    assert 'rakuten_unusable_total{reason="several"} 1.0' in http.get('/metrics').text
    names = http.get('/categories').json()
    assert len(names) == 27 and {'prdtypecode': 10, 'fr': 'Livres', 'en': 'Books'} in names


def test_explain(http):
    r = http.post('/explain', json={'designation': 'Piscine ronde', 'image': encoded(), 'prdtypecode': 10})
    out = r.json()
    assert r.status_code == 200 and out['prdtypecode'] == 10 and len(out['regions']) == 7
    assert [w['word'] for w in out['words']] == ['Piscine', 'ronde']
    assert sum(out['modalities'].values()) == pytest.approx(1) and out['model_version'] == 'bundle'
    wrong = rejected(http.post('/explain', json={'designation': 'x', 'prdtypecode': 999_999}))
    assert wrong['fields'][0]['field'] == 'prdtypecode'
    assert rejected(http.post('/explain', json={'image': 'aGVsbG8='}))['code'] == 'invalid_image'


def test_request_ids_and_log(http, server):
    r = http.post('/predict', json={'designation': 'Piscine'}, headers={'X-Request-ID': 'abc-123'})
    assert r.headers['x-request-id'] == 'abc-123' and r.headers['x-content-type-options'] == 'nosniff'
    assert len(http.get('/version', headers={'X-Request-ID': 'bad id\t{}'}).headers['x-request-id']) == 16
    line = next(json.loads(l) for l in server.log.read_text().splitlines() if 'abc-123' in l)
    assert line['path'] == '/predict' and line['status'] == 200 and line['user'] == USER and 'Piscine' not in str(line)


def test_unexpected_errors_are_logged_by_their_lines():
    "Whoever reads the log finds the place and its causes, and nothing that was sent."
    import asyncio

    from structlog.testing import capture_logs

    def deeper(sent): raise KeyError(sent)
    async def app(scope, receive, send):
        try: deeper(scope['query_string'].decode())
        except KeyError as e: raise RuntimeError(f'cannot read {e}') from e
    async def ask():
        passing = RequestMiddleware(app, None, AdmissionControl(1, 1), ServeConfig(open_pages='docs'))
        transport = httpx.ASGITransport(passing)
        async with httpx.AsyncClient(transport=transport, base_url='http://server') as http:
            return await http.get('/docs?customer')
    with capture_logs() as logs: r = asyncio.run(ask())
    assert rejected(r, 500)['code'] == 'internal_error'
    line = next(l for l in logs if l['event'] == 'unexpected')
    assert line['log_level'] == 'error' and line['request_id'] == r.headers['x-request-id']
    assert 'customer' not in str(logs) and 'in deeper' in line['trace'] and __file__ in line['trace']
    assert line['trace'].index('KeyError') < line['trace'].index('RuntimeError')


def test_cache_and_probes(remembering):
    "An answer is remembered; a probe is answered by the model itself, and leaves nothing for reviewers."
    server,http = remembering
    listing = {'designation': 'Piscine ronde'}
    ask = lambda k,**headers: http.post('/predict', json=listing | {'top_k': k}, headers=headers).json()
    figures = lambda: [server.metric(f'rakuten_{n}_total') for n in ('cached_answers', 'lanes')]
    cached,answers = figures()
    a,b = ask(3), ask(2)
    assert a['prediction_id'] != b['prediction_id'] and a['top_k'][:2] == b['top_k']
    assert figures() == [cached+1, answers+2]
    probe = ask(3, **{'X-Probe': '1'})
    assert probe['top_k'] == a['top_k'] and figures() == [cached+1, answers+2]
    said = lambda answer: dict(prediction_id=answer['prediction_id'], prdtypecode=10)
    assert [http.post('/feedback', json=said(x)).status_code for x in (probe, a)] == [404, 200]


@pytest.mark.filterwarnings('ignore')
def test_schemathesis(server, tmp_path):
    "What the documentation promises, asked for in hundreds of strange ways."
    command = [sys.executable, '-m', 'schemathesis.cli', '--config-file', str(ROOT/'tests'/'schemathesis.toml'), 'run',
               f'{server.url}/openapi.json', '--checks', 'all', '--max-examples', '25',
               '--phases', 'examples,coverage,fuzzing', '-H', f"Authorization: {AUTH['Authorization']}",
               '--workers', '1', '--seed', '1', '--request-timeout', '30', '--no-color']
    res = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert res.returncode == 0, res.stdout[-6000:]+res.stderr[-2000:]


def test_f31_no_secrets_in_the_repository():
    "Keys, tokens and passwords have a shape."
    import re
    shapes = [r'AKIA[0-9A-Z]{16}', r'-----BEGIN [A-Z ]*PRIVATE KEY', r'ghp_[0-9A-Za-z]{36}', r'hf_[0-9A-Za-z]{34}',
              r'eyJhbGciOi[\w-]{10,}\.[\w-]{20,}\.', r'sk-[0-9A-Za-z]{32}', r'ya29\.[\w-]{20,}',
              r'(?im:^[ \t]*(?:export )?API_(?:PASSWORD|SECRET)=(?!["\']?\$|["\']?<|\.\.\.)\S+)']
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files,secret = listed.splitlines(), re.compile('|'.join(shapes).encode())
    assert len(files) > 100 and '.env' not in files
    texts = {f: (ROOT/f).read_bytes() for f in files if (ROOT/f).is_file()}
    assert {f: m.group()[:20] for f,t in texts.items() if (m := secret.search(t))} == {}
