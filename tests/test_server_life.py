"The server's life: load, deaths, hangs, the end, and the change of models. Each server is a real process."
import base64
import io
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import PASSWORD, ROOT, USER, basic, running_server
from PIL import Image

from rakuten_mm.core.files import write_manifest
from rakuten_mm.core.tracking import mlflow_client, register_bundle, tracked_run
from rakuten_mm.monitoring.access_check import Prober
from rakuten_mm.monitoring.api_check import check_state

AUTH = {'Authorization': basic(USER, PASSWORD)}
FAULTY = (sys.executable, str(ROOT/'tests'/'faulty_server.py'), '{model}', '{port}')


def ask(server, title='Piscine ronde', timeout=30., **kw)->httpx.Response:
    return httpx.post(server.url+'/predict', json={'designation': title} | kw, headers=AUTH, timeout=timeout)


def until(what, timeout_s:float=60)->float:
    "Seconds until `what()` is true; fails if it does not become so."
    start = time.monotonic()
    while time.monotonic()-start < timeout_s:
        try:
            if what(): return time.monotonic()-start
        except (httpx.TransportError, StopIteration): pass  # not there yet
        time.sleep(.05)
    raise AssertionError(f'did not happen within {timeout_s} s')


def ready(server)->bool: return httpx.get(server.url+'/ready', timeout=5).status_code == 200


@pytest.fixture(scope='module')
def faulty(bundle, tmp_path_factory):
    "A server of a model that misbehaves on request, with a short deadline and little room."
    mark = tmp_path_factory.mktemp('mark')/'died'
    with running_server(bundle, FAULTY, API_TIMEOUT_S='4', API_MAX_IN_FLIGHT='8', DIED_ONCE=str(mark)) as served:
        served.mark = mark
        yield served


def test_f13_burst(faulty):
    "Ten times too many: those without room are told so at once, those with room are answered, and then all is well."
    alone = min(ask(faulty).elapsed.total_seconds() for _ in range(3))
    with httpx.Client(base_url=faulty.url, headers=AUTH, timeout=30, limits=httpx.Limits(max_connections=80)) as http, ThreadPoolExecutor(80) as pool:
        list(pool.map(lambda _: http.get('/health'), range(80)))  # connected before
        blocked = pool.submit(http.post, '/predict', json={'designation': 'dawdle 1'})
        time.sleep(.2)
        out = list(pool.map(lambda _: http.post('/predict', json={'designation': 'Livre'}), range(80)))
        assert blocked.result().status_code == 200
    shed = [r for r in out if r.status_code == 503]
    assert {r.status_code for r in out} == {200, 503} and len(shed) >= 70
    assert all(int(r.headers['retry-after']) >= 1 and r.json()['error']['code'] == 'overloaded' for r in shed)
    assert until(lambda: ask(faulty).status_code == 200 and ask(faulty).elapsed.total_seconds() < 3*alone+.1) < 2
    times = [json.loads(l)['ms'] for l in faulty.log.read_text().splitlines() if '"status": 503' in l]
    assert len(times) >= 70 and sorted(times)[len(times)//2] < 50  # of the server's own time; on the way there are 80 threads of this test


def half_a_request(server, body=b'{"designation": ')->socket.socket:
    at = urlsplit(server.url)
    s = socket.create_connection((at.hostname, at.port), timeout=20)
    head = f'Host: x\r\nAuthorization: {AUTH["Authorization"]}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n'
    s.sendall(b'POST /predict HTTP/1.1\r\n'+head.encode()+body)
    return s


def test_f14_slow_and_vanishing_clients(faulty):
    "A body that does not come loses its place at the deadline; a client that goes leaves its place at once; nothing is kept."
    taken = lambda: faulty.metric('rakuten_in_flight_listings')
    slow = [half_a_request(faulty) for _ in range(8)]
    until(lambda: taken() == 8, 5)
    assert ask(faulty).status_code == 503
    answer = slow[0].recv(1000)
    assert answer.startswith(b'HTTP/1.1 408')
    for s in slow: s.close()
    until(lambda: taken() == 0, 5)
    for _ in range(50): half_a_request(faulty).close()  # mid-body
    for _ in range(20): half_a_request(faulty, b'{"designation": "Livre"}'.ljust(100)).close()  # mid-wait
    until(lambda: taken() == 0, 5)
    assert ask(faulty).status_code == 200
    front = faulty.family()[0]
    before = front.memory_info().rss
    for _ in range(500): half_a_request(faulty).close()
    until(lambda: taken() == 0, 5)
    assert front.memory_info().rss-before < 20e6


def test_f15_worker_dies(faulty):
    "The listing that kills the worker is given up; its neighbours in the batch and in the queue are answered by the next worker."
    pid = faulty.worker().pid
    with ThreadPoolExecutor(8) as pool:
        held = pool.submit(ask, faulty, 'dawdle 0.5')
        time.sleep(.1)
        neighbours = [pool.submit(ask, faulty, f'Livre {i}') for i in range(3)]
        killer = pool.submit(ask, faulty, 'die once')
        neighbours += [pool.submit(ask, faulty, f'Jeu {i}') for i in range(2)]
        until(lambda: not ready(faulty), 10)
        assert httpx.get(faulty.url+'/health').status_code == 200
        results = [f.result() for f in (held, killer, *neighbours)]
    late = [r.status_code for r in results if r.status_code not in (200, 504)]
    assert not late and faulty.mark.exists() and until(lambda: ready(faulty)) < 60 and faulty.worker().pid != pid
    assert faulty.metric('rakuten_worker_restarts_total') == 1


def test_f15_neighbours_survive_a_killer(bundle):
    "With time enough for another worker to start, nobody is lost but the killer."
    with running_server(bundle, FAULTY, API_TIMEOUT_S='90') as server, ThreadPoolExecutor(8) as pool:
        held = pool.submit(ask, server, 'dawdle 0.5', 120)
        time.sleep(.1)
        killer = pool.submit(ask, server, 'die', 120)
        neighbours = [pool.submit(ask, server, f'Livre {i}', 120) for i in range(5)]
        assert [f.result().status_code for f in (held, *neighbours)] == [200]*6
        r = killer.result()
        assert r.status_code == 500 and r.json()['error']['code'] == 'worker_crashed'
        until(lambda: ready(server))  # the killer may have been answered last, when its second worker had just died
        server.worker().kill()  # as the kernel does when memory ends
        assert ask(server, timeout=120).status_code == 200


def test_f16_hang(faulty):
    "What hangs gets 504 at the deadline, and the worker is replaced."
    until(lambda: ready(faulty))
    pid = faulty.worker().pid
    r = ask(faulty, 'hang')
    assert r.status_code == 504 and r.json()['error']['code'] == 'timeout' and 3.5 < r.elapsed.total_seconds() < 8
    until(lambda: ready(faulty) and faulty.worker().pid != pid)
    assert ask(faulty).status_code == 200


def test_f06_mistake_of_ours_spoils_one(faulty):
    until(lambda: ready(faulty))
    r = httpx.post(faulty.url+'/predict/batch', json={'products': [{'designation': t} for t in ('Livre', 'raise', 'Jeu')]}, headers=AUTH, timeout=30).json()
    assert [i['status'] for i in r['results']] == [200, 500, 200] and 'a mistake of ours' not in str(r)


def test_f17_sigterm_under_load(bundle):
    "What was accepted is answered, then the port is free, and no process is left."
    import psutil
    with running_server(bundle, FAULTY) as server, ThreadPoolExecutor(12) as pool:
        family = server.family()
        work = [pool.submit(ask, server, 'dawdle 0.3') for _ in range(10)]
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert [w.result().status_code for w in work] == [200]*10
        assert server.process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]
        with pytest.raises(httpx.ConnectError): ask(server)
    assert 'Traceback' not in server.log.read_text()


def test_f17_second_sigterm_ends_at_once(bundle):
    import psutil
    with running_server(bundle, FAULTY, end=False) as server, ThreadPoolExecutor(1) as pool:
        family = server.family()
        pool.submit(lambda: pytest.raises(httpx.TransportError, ask, server, 'dawdle 8'))
        time.sleep(.5)
        for _ in range(2): server.process.send_signal(signal.SIGTERM); time.sleep(.3)
        start = time.monotonic()
        assert server.process.wait(5) != 0 and time.monotonic()-start < 3
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_killed_front_leaves_no_worker(bundle):
    import psutil
    with running_server(bundle, end=False) as server:
        family = server.family()
        server.process.kill()
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_f18_idle(server):
    "A server that nobody asks does nothing."
    spent = lambda: sum(sum(p.cpu_times()[:2]) for p in server.family())
    ask(server); time.sleep(1)
    before = spent(); time.sleep(10)
    assert (spent()-before)/10 < .1


def broken(bundle, folder, how)->Path:
    "A copy of a bundle that cannot be served."
    copy = shutil.copytree(bundle, folder/how)
    config = copy/'config.json'
    match how:
        case 'weights': (copy/'weights.safetensors').write_bytes((copy/'weights.safetensors').read_bytes()[:-1]+b'\x7f')
        case 'missing file': (copy/'config.json').unlink()
        case 'no manifest': (copy/'manifest.json').unlink()
        case 'pickle': (copy/'weights.pkl').write_bytes(b'\x80\x04.')
        case 'labels':
            c = json.loads(config.read_text()); c['codes'] = c['codes'][:-1]
            config.write_text(json.dumps(c)); write_manifest(copy)
        case 'pickled weights': (copy/'weights.safetensors').write_bytes(b'\x80\x04.'); write_manifest(copy)
        case 'golden':
            g = json.loads((copy/'golden'/'golden.json').read_text())
            for i in g: i['prdtypecode'] = -1
            (copy/'golden'/'golden.json').write_text(json.dumps(g)); write_manifest(copy)
    return copy


@pytest.mark.parametrize('how,says', [('weights', 'does not match its checksum'), ('missing file', 'config.json is missing'),
    ('no manifest', 'no finished bundle'),
    ('labels', 'could not be loaded'),
    ('pickled weights', 'could not be loaded'), ('pickle', 'is not in the manifest'), ('golden', 'answers a golden product differently')])
def test_f19_f28_refuses_to_start(bundle, tmp_path, how, says):
    "Damaged, incomplete, of other labels, or with a pickle in it: exit code 1, a line that says so, and never ready."
    from serve_once import free_port
    env = os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD, API_DATABASE_URL=f'sqlite:///{tmp_path/"feedback.db"}')
    res = subprocess.run([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(broken(bundle, tmp_path, how)), '--port', str(free_port(0))],
                         capture_output=True, text=True, env=env, timeout=120)
    assert res.returncode == 1 and says in res.stdout+res.stderr, res.stdout+res.stderr
    assert 'documentation at' not in res.stdout


def test_f19_no_model(tmp_path):
    env = os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD, RAKUTEN_MM_ARTIFACTS=str(tmp_path))
    res = subprocess.run([sys.executable, '-m', 'rakuten_mm', 'serve', '--port', '9'], capture_output=True, text=True, env=env, timeout=120)
    assert res.returncode == 1 and 'train and promote a model first' in res.stderr and 'Traceback' not in res.stderr


# Models come and go

@pytest.fixture(scope='module')
def registry(tmp_path_factory, bundle):
    "A registry of its own: a function that registers a bundle and gives its version, and its folder."
    home = tmp_path_factory.mktemp('registry')
    before = {k: os.environ.get(k) for k in ('RAKUTEN_MM_ARTIFACTS', 'MLFLOW_TRACKING_URI')}
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(home)
    try:
        client = mlflow_client()
        def add(folder, alias='champion')->int:
            with tracked_run(name='test') as run: version = register_bundle(run, folder)
            client.set_registered_model_alias('rakuten-mm', alias, version)
            return version
        add.home,add.client = home, client
        yield add
    finally:
        for k,v in before.items(): os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)


@pytest.fixture(scope='module')
def follower(registry, bundle):
    "A server that follows the champion."
    version = registry(bundle)
    with running_server('models:/rakuten-mm@champion', RAKUTEN_MM_ARTIFACTS=str(registry.home), API_POLL_S='0.5') as server:
        server.version = f'rakuten-mm/{version}'
        yield server


@pytest.fixture
def following(follower, registry):
    "The same, serving the version it began with, and content."
    registry.client.set_registered_model_alias('rakuten-mm', 'champion', follower.version.split('/')[1])
    until(lambda: httpx.get(follower.url+'/ready', timeout=5).json() == dict(status='ready', model_version=follower.version))
    return follower


def serving(server)->str: return httpx.get(server.url+'/ready', timeout=5).json()['model_version']


def test_f21_f23_swap_and_rollback_under_load(following, registry, bundle):
    "No request fails, each answer names its model, and the way back is as short."
    server,stop,seen = following, Event(), []
    def client():
        with server.http() as http:
            while not stop.is_set():
                r = http.post('/predict', json={'designation': 'Livre'})
                seen.append((r.status_code, r.json()['model_version'] if r.status_code == 200 else r.text))
    threads = [Thread(target=client) for _ in range(4)]
    for t in threads: t.start()
    try:
        time.sleep(1)
        new = f'rakuten-mm/{registry(bundle)}'
        with httpx.Client(base_url=server.url, timeout=30) as http:  # the check waits for it as well
            assert [str(c) for c in check_state(Prober(http), AUTH['Authorization'], 'models:/rakuten-mm@champion', 60)[0] if c.found] == []
        assert serving(server) == new
        time.sleep(.5)
        registry.client.set_registered_model_alias('rakuten-mm', 'champion', server.version.split('/')[1])
        until(lambda: serving(server) == server.version)
        time.sleep(.5)
    finally:
        stop.set()
        for t in threads: t.join()
    assert {s for s,_ in seen} == {200}, [x for x in seen if x[0] != 200][:3]
    assert {v for _,v in seen} == {server.version, new} and len(seen) > 20


@pytest.mark.parametrize('how', ['weights', 'labels', 'golden'])
def test_f20_bad_champion(following, registry, bundle, tmp_path, how):
    "A new champion that is damaged, of other labels, or answers otherwise is left alone; the old one goes on, and says so."
    server,before = following, following.metric('rakuten_refused_models_total')
    if how == 'weights':  # whole when it was registered, damaged since
        version = registry(shutil.copytree(bundle, tmp_path/'whole'), 'champion-to-be')
        source = registry.client.get_model_version('rakuten-mm', str(version)).source
        f = Path(source.removeprefix('file://'))/'weights.safetensors'
        f.write_bytes(f.read_bytes()[:-1]+b'\x7f')
        registry.client.set_registered_model_alias('rakuten-mm', 'champion', version)
    else: version = registry(broken(bundle, tmp_path, how))
    until(lambda: server.metric('rakuten_refused_models_total') > before)
    told = server.http().get('/version').json()
    assert told['model_version'] == server.version and f'rakuten-mm/{version} is not served' in told['problem']
    assert httpx.get(server.url+'/ready').json()['status'] == 'degraded' and server.metric('rakuten_degraded') == 1
    assert ask(server).json()['model_version'] == server.version
    with httpx.Client(base_url=server.url, timeout=30) as http: said = check_state(Prober(http), AUTH['Authorization'], 'models:/rakuten-mm@champion', 0)[0]
    wrong = ' '.join(str(c) for c in said if c.found)
    assert 'state registry: BundleError' in wrong if how == 'weights' else 'state ready: degraded' in wrong and 'state version' in wrong


def test_f22_registry_down(registry, bundle, tmp_path):
    "Without its registry the server goes on, and starts again from what it served before."
    from serve_once import free_port
    version = registry(bundle)
    env = dict(RAKUTEN_MM_ARTIFACTS=str(registry.home), API_POLL_S='0.5')
    database = registry.home/'mlflow.db'
    with running_server('models:/rakuten-mm@champion', **env) as server:
        until(lambda: (registry.home/'models'/'rakuten-mm-champion.json').exists())
        lock = sqlite3.connect(database, isolation_level=None)
        lock.execute('BEGIN EXCLUSIVE')  # nobody else can read
        try:
            until(lambda: httpx.get(server.url+'/ready').json()['status'] == 'degraded')
            assert ask(server).json()['model_version'] == f'rakuten-mm/{version}'
        finally: lock.rollback(); lock.close()
        until(lambda: httpx.get(server.url+'/ready').json()['status'] == 'ready')
    down = f'http://127.0.0.1:{free_port(0)}'
    with running_server('models:/rakuten-mm@champion', MLFLOW_TRACKING_URI=down, **env) as server:
        assert ask(server).json()['model_version'] == f'rakuten-mm/{version}'
        assert httpx.get(server.url+'/ready').json() == dict(status='degraded', model_version=f'rakuten-mm/{version}')


def test_shadow_sees_and_says_nothing(registry, bundle):
    champion,shadow = registry(bundle), registry(bundle, 'challenger')
    env = dict(RAKUTEN_MM_ARTIFACTS=str(registry.home), API_POLL_S='0.5', API_SHADOW=f'models:/rakuten-mm/{shadow}')
    with running_server('models:/rakuten-mm@champion', **env) as server:
        def agreed(): ask(server); return server.metric('rakuten_shadow_total') > 0
        until(agreed)
        assert ask(server).json()['model_version'] == f'rakuten-mm/{champion}'
        text = server.http().get('/metrics').text
        assert f'agreement="same",model_version="rakuten-mm/{shadow}"' in text


def test_f24_disk_full(bundle):
    "Nothing can be written any more: answers go on, and what was not recorded is counted."
    with running_server(bundle) as server:
        photo = io.BytesIO(); Image.new('RGB', (50, 50), 'red').save(photo, 'JPEG')
        assert ask(server).status_code == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        out = [ask(server, image=base64.b64encode(photo.getvalue()).decode()) for _ in range(5)]
        assert [r.status_code for r in out] == [200]*5
        until(lambda: (ask(server), server.metric('rakuten_unrecorded_answers') >= 5)[1], 20)
        r = httpx.post(server.url+'/feedback', json=dict(prediction_id=out[0].json()['prediction_id'], prdtypecode=10), headers=AUTH)
        assert r.status_code in (404, 503)  # it was not recorded, and is not said to have been
        assert ask(server).status_code == 200
