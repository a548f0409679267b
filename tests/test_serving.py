"The server: in process for what the answer is, as a real process over HTTP for what it survives."
import base64
import io
import os
import signal
import subprocess
import sys

import httpx
import pytest
from conftest import PASSWORD, USER
from fastapi.testclient import TestClient
from litserve.utils import wrap_litserve_start
from PIL import Image

from rakuten_mm.api_check import APICheckError, basic, check_auth, check_golden
from rakuten_mm.predictor import Predictor, read_golden
from serving.server import make_server

AUTH = basic(USER, PASSWORD)


def picture(fmt='JPEG', mode='RGB', size=(60,80), **kw):
    "An encoded picture in base64."
    Image.new(mode, size).save(buf := io.BytesIO(), fmt, **kw)
    return base64.b64encode(buf.getvalue()).decode()


@pytest.fixture
def http(server):
    "A client with the right credentials."
    with httpx.Client(base_url=server, headers=AUTH, timeout=60) as client: yield client


def rejected(r, status=422):
    "The error of an answer, which has the one error body."
    assert r.status_code == status, r.text
    error = r.json()['error']
    assert error.keys() == {'code', 'message', 'fields'} and error['message']
    return error


def test_in_process(bundle, monkeypatch):
    "The server's answer is the predictor's."
    monkeypatch.setenv('API_USERNAME', USER); monkeypatch.setenv('API_PASSWORD', PASSWORD)
    with wrap_litserve_start(make_server(str(bundle))) as server, TestClient(server.app) as client:
        r = client.post('/predict', json={'designation': 'Piscine ronde', 'image': picture(), 'top_k': 2}, headers=AUTH)
        assert r.status_code == 200, r.text
        answer,model = r.json(), Predictor.load(bundle)
        want = model.predict([model.prepare('Piscine ronde', image=base64.b64decode(picture()))], 2)[0]
        assert answer['prdtypecode'] == want.prdtypecode and answer['probability'] == pytest.approx(want.probability, abs=1e-4)
        assert len(answer['top_k']) == 2 and answer['modalities'] == ['text', 'image'] and len(answer['prediction_id']) == 36
        assert client.post('/predict', json={'designation': 'x'}).status_code == 401


def test_golden_over_http(http, bundle):
    golden = read_golden(bundle)
    assert len(golden) > 5 and check_golden(http, AUTH, golden, bundle.name) == []
    assert 'instead of -1' in check_golden(http, AUTH, [golden[0] | {'prdtypecode': -1}], bundle.name)[0]


def test_open_and_closed_pages(server):
    assert httpx.get(f'{server}/health').text == 'ok'
    schema = httpx.get(f'{server}/openapi.json').json()
    page = httpx.get(f'{server}/docs').text
    assert 'http' not in page.replace('http-equiv', '')  # nothing is loaded from elsewhere
    for asset in ('/static-docs/swagger-ui-bundle.js', '/static-docs/swagger-ui.css'):
        assert asset in page and httpx.get(server+asset).status_code == 200
    assert {'200', '401', '413', '422'} <= schema['paths']['/predict']['post']['responses'].keys()
    assert 'ErrorBody' in schema['components']['schemas'] and 'designation' in schema['components']['schemas']['PredictRequest']['properties']


@pytest.mark.parametrize('body,kind', [(b'{"designation": ', 'application/json'), (b'[1, 2]', 'application/json'), (b'"x"', 'application/json'),
    (b'null', 'application/json'), (b'', 'application/json'), (b'designation=x', 'application/x-www-form-urlencoded'), (b'\xff\xfe', 'application/json'),
    (b'{"designation": "x"}', 'text/plain')], ids=['cut', 'list', 'string', 'null', 'empty', 'form', 'not utf-8', 'plain text'])
def test_f01_malformed_body(http, body, kind):
    rejected(http.post('/predict', content=body, headers={'Content-Type': kind}))


@pytest.mark.parametrize('body', [{'designation': 5}, {'designation': 'x', 'top_k': 0}, {'designation': 'x', 'top_k': '3'}, {'designation': 'x', 'top_k': 1.5},
    {'designation': 'x', 'colour': 'red'}, {'designation': 'x'*20_001}, {'designation': 'x', 'image': 5}, {'designation': 'x', 'image': 'é'}], ids=str)
def test_f01_wrong_types(http, body):
    error = rejected(http.post('/predict', json=body))
    assert error['fields'][0]['field'] in body and 'x'*100 not in str(error)


def test_f01_not_numbers_and_not_text(http):
    for body in ('{"designation": "x", "top_k": NaN}', '{"designation": "\\ud83d"}'):
        rejected(http.post('/predict', content=body, headers={'Content-Type': 'application/json'}))


def test_f02_missing_parts(http):
    for body in ({}, {'designation': ''}, {'designation': '  ', 'description': ''}, {'designation': '<p> </p>'}): rejected(http.post('/predict', json=body))
    text,image,both = (http.post('/predict', json=b) for b in ({'designation': 'Livre'}, {'image': picture()}, {'designation': 'Livre', 'image': picture()}))
    assert [r.json()['modalities'] for r in (text, image, both)] == [['text'], ['image'], ['text', 'image']]


def test_f06_bad_pictures(http):
    "Each is a 422 with a reason, and requests sent at the same time are answered."
    whole = base64.b64decode(picture(size=(300,300)))
    bad = dict(truncated=whole[:200], header=b'\xff\xd8\xff\xe0', page=b'<html>404</html>', text=b'photo.jpg', empty_zip=b'PK\x05\x06'+bytes(18),
               bomb=base64.b64decode(picture('PNG', '1', (10_000,9_000))))
    for name,data in bad.items():
        error = rejected(http.post('/predict', json={'designation': 'Livre', 'image': base64.b64encode(data).decode()}))
        assert error['code'] == 'invalid_image' and error['fields'][0]['field'] == 'image', name
        assert http.post('/predict', json={'designation': 'Livre', 'image': picture()}).status_code == 200
    for fmt,mode in (('PNG', 'RGBA'), ('PNG', 'I;16'), ('JPEG', 'CMYK'), ('GIF', 'P'), ('WEBP', 'RGB'), ('PNG', 'LA')):
        assert http.post('/predict', json={'image': picture(fmt, mode)}).status_code == 200, (fmt, mode)


def test_body_over_the_limit(http):
    rejected(http.post('/predict', content=b'{"designation": "'+b'x'*15_000_000+b'"}', headers={'Content-Type': 'application/json'}), 413)


def test_f25_credentials(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        assert check_auth(client, USER, PASSWORD) == []
        for header in ('Basic', 'basic '+'A'*7000, 'Digest x', 'Basic '+base64.b64encode(USER.encode()).decode(), 'Basic \xe9'):
            r = client.post('/predict', json={'designation': 'x'}, headers={'Authorization': header.encode('latin-1')})
            assert rejected(r, 401)['code'] == 'unauthorized' and r.headers['www-authenticate'].startswith('Basic')


@pytest.mark.parametrize('given', [{}, {'API_USERNAME': 'anna'}, {'API_USERNAME': 'anna', 'API_PASSWORD': ''}, {'API_PASSWORD': 'x'}],
                         ids=['none', 'no password', 'empty', 'no user'])
def test_f25_refuses_to_start_without_a_password(bundle, tmp_path, given):
    res = subprocess.run([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(bundle)], env=os.environ | given, cwd=tmp_path,
                         capture_output=True, text=True)
    assert res.returncode == 1 and 'set API_USERNAME and API_PASSWORD' in res.stderr and 'Traceback' not in res.stderr


def test_refuses_a_damaged_bundle(bundle, tmp_path):
    import shutil
    copy = shutil.copytree(bundle, tmp_path/'bundle')
    with (copy/'weights.safetensors').open('r+b') as f: f.seek(-1, 2); f.write(b'\x7f')
    res = subprocess.run([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(copy)], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD))
    assert res.returncode == 1 and 'weights.safetensors does not match its checksum' in res.stderr and 'Traceback' not in res.stderr


def test_sigterm_leaves_nothing_behind(bundle):
    import psutil
    from serve_once import free_port, wait_ready
    port = free_port(0)
    process = subprocess.Popen([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(bundle), '--port', str(port)],
                               env=os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD), stderr=subprocess.PIPE, text=True)
    wait_ready(f'http://127.0.0.1:{port}', process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _,err = process.communicate(timeout=30)
    assert process.returncode == 0 and 'Traceback' not in err
    assert family and not psutil.wait_procs(family, timeout=5)[1]


def test_api_check_says_who_is_down(monkeypatch, bundle):
    from rakuten_mm.api_check import check_api
    monkeypatch.setenv('API_USERNAME', USER); monkeypatch.setenv('API_PASSWORD', PASSWORD)
    with pytest.raises(APICheckError, match='no answer from'): check_api('http://127.0.0.1:9', str(bundle))


def test_serving_stays_light():
    code = "import sys, serving.server; print([m for m in ('pytorch_lightning', 'zenml', 'papermill', 'transformers', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
