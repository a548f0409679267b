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
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.models.manifest import write_manifest
from rakuten_mm.monitoring.access_check import Prober
from rakuten_mm.monitoring.api_check import check_state
from rakuten_mm.registry.versions import register_bundle
from serving import server as front
from serving.registry_watcher import remember, remembered
from serving.testing import PASSWORD, USER, free_port, running_server

FAULTY = (sys.executable, str(ROOT/'tests'/'faulty_server.py'), '{model}', '{port}')


def until(what, timeout_s:float=60)->float:
    "Wait until `what()` is true, and return the seconds it took; fails if it does not become so."
    start = time.monotonic()
    while time.monotonic()-start < timeout_s:
        try:
            if what(): return time.monotonic()-start
        except (httpx.TransportError, StopIteration): pass  # not there yet
        time.sleep(.05)
    raise AssertionError(f'did not happen within {timeout_s} s')


@pytest.fixture(scope='module')
def faulty(bundle, tmp_path_factory):
    "A server of a model that misbehaves on request, with a short deadline and little room."
    mark = tmp_path_factory.mktemp('mark')/'died'
    with running_server(bundle, FAULTY, API_TIMEOUT_S='4', API_MAX_IN_FLIGHT='8', DIED_ONCE=str(mark),
                        API_FORWARDED='127.0.0.3/32') as served:
        served.mark = mark
        yield served


def test_f13_burst(faulty):
    "Ten times too many: those without room are told so at once, the others are answered, and then all is well."
    alone = min(faulty.ask().elapsed.total_seconds() for _ in range(3))
    links = httpx.Limits(max_connections=80)
    with faulty.http(30, limits=links) as http, ThreadPoolExecutor(80) as pool:
        list(pool.map(lambda _: http.get('/health'), range(80)))  # connected before
        blocked = pool.submit(http.post, '/predict', json={'designation': 'dawdle 1'})
        time.sleep(.2)
        out = list(pool.map(lambda _: http.post('/predict', json={'designation': 'Livre'}), range(80)))
        assert blocked.result().status_code == 200
    shed = [r for r in out if r.status_code == 503]
    assert {r.status_code for r in out} == {200, 503} and len(shed) >= 70
    assert all(int(r.headers['retry-after']) >= 1 and r.json()['error']['code'] == 'overloaded' for r in shed)
    assert until(lambda: faulty.ask().status_code == 200 and faulty.ask().elapsed.total_seconds() < 3*alone+.1) < 2
    times = [json.loads(l)['ms'] for l in faulty.log.read_text().splitlines() if '"status": 503' in l]
    assert len(times) >= 70
    assert sorted(times)[len(times)//2] < 50  # of the server's own time; on the way there are 80 threads of this test


def half_a_request(server, body=b'{"designation": ')->socket.socket:
    at = urlsplit(server.url)
    s = socket.create_connection((at.hostname, at.port), timeout=20)
    head = server.auth | {'Host': 'x', 'Content-Type': 'application/json', 'Content-Length': '100'}
    lines = ['POST /predict HTTP/1.1', *map(': '.join, head.items()), '', '']
    s.sendall('\r\n'.join(lines).encode()+body)
    return s


def test_f14_slow_and_vanishing_clients(faulty):
    "A body that does not come loses its place at the deadline, a client that goes leaves it at once; nothing is kept."
    taken = lambda: faulty.metric('rakuten_in_flight_listings')
    slow = [half_a_request(faulty) for _ in range(8)]
    until(lambda: taken() == 8, 5)
    assert faulty.ask().status_code == 503
    answer = slow[0].recv(1000)
    assert answer.startswith(b'HTTP/1.1 408')
    for s in slow: s.close()
    until(lambda: taken() == 0, 5)
    for _ in range(50): half_a_request(faulty).close()  # mid-body
    for _ in range(20): half_a_request(faulty, b'{"designation": "Livre"}'.ljust(100)).close()  # mid-wait
    until(lambda: taken() == 0, 5)
    assert faulty.ask().status_code == 200
    front = faulty.family()[0]
    before = front.memory_info().rss
    for _ in range(500): half_a_request(faulty).close()
    until(lambda: taken() == 0, 5)
    assert front.memory_info().rss-before < 20e6


def test_lines_of_the_log_have_the_clients_address(faulty):
    "Answered, refused or turned away: as the proxy says it, and as nobody else does."
    def ask(via, client, **auth):
        with httpx.Client(transport=httpx.HTTPTransport(local_address=via)) as c:
            r = c.post(faulty.url+'/predict', json={'designation': 'Livre'},
                       headers=auth | {'x-forwarded-for': f'6.6.6.6, {client}', 'x-request-id': f'x{client}'})
        return r.status_code, r.headers['x-request-id']
    taken = lambda: faulty.metric('rakuten_in_flight_listings')
    asked = {'198.51.100.1': ask('127.0.0.3', '198.51.100.1', **faulty.auth),
             '198.51.100.2': ask('127.0.0.3', '198.51.100.2'),
             '127.0.0.1': ask('127.0.0.1', '198.51.100.3', **faulty.auth)}
    slow = [half_a_request(faulty) for _ in range(8)]
    until(lambda: taken() == 8, 5)
    asked |= {'198.51.100.4': ask('127.0.0.3', '198.51.100.4', **faulty.auth),
              '127.0.0.2': ask('127.0.0.2', '198.51.100.5', **faulty.auth)}
    for s in slow: s.close()
    until(lambda: taken() == 0, 5)
    assert [status for status,_ in asked.values()] == [200, 401, 200, 503, 503]
    said = {l['request_id']: l for l in map(json.loads, faulty.log.read_text().splitlines()) if 'request_id' in l}
    assert {client: (said[id]['status'], said[id]['client']) for client,(_,id) in asked.items()} == {
        client: (status, client) for client,(status,_) in asked.items()}


def test_f15_worker_dies(faulty):
    "The listing that kills the worker is given up; its neighbours are answered by the next worker."
    pid = faulty.worker().pid
    with ThreadPoolExecutor(8) as pool:
        held = pool.submit(faulty.ask, 'dawdle 0.5')
        time.sleep(.1)
        neighbours = [pool.submit(faulty.ask, f'Livre {i}') for i in range(3)]
        killer = pool.submit(faulty.ask, 'die once')
        neighbours += [pool.submit(faulty.ask, f'Jeu {i}') for i in range(2)]
        until(lambda: not faulty.ready(), 10)
        assert httpx.get(faulty.url+'/health').status_code == 200
        results = [f.result() for f in (held, killer, *neighbours)]
    late = [r.status_code for r in results if r.status_code not in (200, 504)]
    assert not late and faulty.mark.exists() and until(lambda: faulty.ready()) < 60 and faulty.worker().pid != pid
    assert faulty.metric('rakuten_worker_restarts_total') == 1


@pytest.mark.system
def test_f15_neighbours_survive_a_killer(bundle):
    "With time enough for another worker to start, nobody is lost but the killer."
    with running_server(bundle, FAULTY, API_TIMEOUT_S='90') as server, ThreadPoolExecutor(8) as pool:
        held = pool.submit(server.ask, 'dawdle 0.5', 120)
        time.sleep(.1)
        killer = pool.submit(server.ask, 'die', 120)
        neighbours = [pool.submit(server.ask, f'Livre {i}', 120) for i in range(5)]
        assert [f.result().status_code for f in (held, *neighbours)] == [200]*6
        r = killer.result()
        assert r.status_code == 500 and r.json()['error']['code'] == 'worker_crashed'
        until(lambda: server.ready())  # the killer may have been answered last, when its second worker had just died
        server.worker().kill()  # as the kernel does when memory ends
        assert server.ask(timeout=120).status_code == 200


def test_f16_hang(faulty):
    "What hangs gets 504 at the deadline, and the worker is replaced."
    until(lambda: faulty.ready())
    pid = faulty.worker().pid
    r = faulty.ask('hang')
    assert r.status_code == 504 and r.json()['error']['code'] == 'timeout' and 3.5 < r.elapsed.total_seconds() < 8
    until(lambda: faulty.ready() and faulty.worker().pid != pid)
    assert faulty.ask().status_code == 200


def test_f06_mistake_of_ours_spoils_one(faulty):
    until(lambda: faulty.ready())
    products = [{'designation': t} for t in ('Livre', 'raise', 'Jeu')]
    r = faulty.client.post('/predict/batch', json={'products': products}).json()
    assert [i['status'] for i in r['results']] == [200, 500, 200] and 'a mistake of ours' not in str(r)


def test_f17_sigterm_under_load(bundle):
    "What was accepted is answered, then the port is free, and no process is left."
    with running_server(bundle, FAULTY) as server, ThreadPoolExecutor(12) as pool:
        family = server.family()
        work = [pool.submit(server.ask, 'dawdle 0.3') for _ in range(10)]
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert [w.result().status_code for w in work] == [200]*10
        assert server.process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=5)[1]
        with pytest.raises(httpx.ConnectError): server.ask()
    assert 'Traceback' not in server.log.read_text()


def test_f17_second_sigterm_ends_at_once(bundle):
    with running_server(bundle, FAULTY, exit_code=None) as server, ThreadPoolExecutor(1) as pool:
        family = server.family()
        pool.submit(server.ask, 'dawdle 8')
        time.sleep(.5)
        for _ in range(2): server.process.send_signal(signal.SIGTERM); time.sleep(.3)
        start = time.monotonic()
        assert server.process.wait(5) != 0 and time.monotonic()-start < 3
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_killed_front_leaves_no_worker(bundle):
    with running_server(bundle, exit_code=None) as server:
        family = server.family()
        server.process.kill()
        assert not psutil.wait_procs(family, timeout=5)[1]


def test_f18_idle(server):
    "A server that nobody asks does nothing."
    spent = lambda: sum(sum(p.cpu_times()[:2]) for p in server.family())
    server.ask(); time.sleep(1)
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


REFUSED = [
    ('weights', 'does not match its checksum'), ('missing file', 'config.json is missing'),
    ('no manifest', 'no finished bundle'), ('pickle', 'is not in the manifest'), ('labels', 'could not be loaded'),
    ('pickled weights', 'could not be loaded'), ('golden', 'answers a golden product differently')]

@pytest.mark.parametrize(('how', 'says'), REFUSED)
def test_f19_f28_refuses_to_start(bundle, tmp_path, monkeypatch, caplog, how, says):
    "Damaged, incomplete, of other labels, or with a pickle in it: exit code 1, a line that says so, and never ready."
    for k,v in dict(USERNAME=USER, PASSWORD=PASSWORD, DATABASE_URL=f'sqlite:///{tmp_path/"feedback.db"}').items():
        monkeypatch.setenv(f'API_{k}', v)
    monkeypatch.setattr(front, 'log_as_json', lambda: None)
    with pytest.raises(SystemExit) as ended: front.serve(str(broken(bundle, tmp_path, how)), port=free_port())
    assert says in ended.value.code and ended.value.code.startswith('Error: ')  # a text is exit code 1
    assert 'documentation at' not in caplog.text


def test_f19_no_model(tmp_path):
    env = os.environ | dict(API_USERNAME=USER, API_PASSWORD=PASSWORD, RAKUTEN_MM_ARTIFACTS=str(tmp_path))
    command = [sys.executable, '-m', 'rakuten_mm', 'serve', '--port', '9']
    res = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
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
    "A server that follows the champion, and has the challenger as its shadow if there is one."
    version = registry(bundle)
    env = dict(RAKUTEN_MM_ARTIFACTS=str(registry.home), API_POLL_S='0.5', API_SHADOW='models:/rakuten-mm@challenger')
    with running_server(**env) as server:
        server.version = f'rakuten-mm/{version}'
        yield server


@pytest.fixture
def following(follower, registry):
    "The same, serving the version it began with, and content."
    registry.client.set_registered_model_alias('rakuten-mm', 'champion', follower.version.split('/')[1])
    until(lambda: follower.ready() == dict(status='ready', model_version=follower.version))
    return follower


def wrong_state(server, wait_s=0.)->list[str]:
    "What `check_state` says of a server that should serve the champion."
    with httpx.Client(base_url=server.url, timeout=30) as http:
        checks = check_state(Prober(http), server.auth['Authorization'], 'models:/rakuten-mm@champion', wait_s)[0]
    return [str(c) for c in checks if c.found]


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
        assert wrong_state(server, 60) == []  # the check waits for it as well
        assert server.ready()['model_version'] == new
        time.sleep(.5)
        registry.client.set_registered_model_alias('rakuten-mm', 'champion', server.version.split('/')[1])
        until(lambda: server.ready()['model_version'] == server.version)
        time.sleep(.5)
    finally:
        stop.set()
        for t in threads: t.join()
    assert {s for s,_ in seen} == {200}, [x for x in seen if x[0] != 200][:3]
    assert {v for _,v in seen} == {server.version, new} and len(seen) > 20


@pytest.mark.parametrize('how', ['weights', 'labels', 'golden'])
def test_f20_bad_champion(following, registry, bundle, tmp_path, how):
    "A new champion that is damaged, of other labels, or answers otherwise is left alone; the old one says so."
    server,before = following, following.metric('rakuten_refused_models_total')
    if how == 'weights':  # whole when it was registered, damaged since
        version = registry(shutil.copytree(bundle, tmp_path/'whole'), 'champion-to-be')
        source = registry.client.get_model_version('rakuten-mm', str(version)).source
        f = Path(source.removeprefix('file://'))/'weights.safetensors'
        f.write_bytes(f.read_bytes()[:-1]+b'\x7f')
        registry.client.set_registered_model_alias('rakuten-mm', 'champion', version)
    else: version = registry(broken(bundle, tmp_path, how))
    until(lambda: server.metric('rakuten_refused_models_total') > before)
    told = server.client.get('/version').json()
    assert told['model_version'] == server.version and f'rakuten-mm/{version} is not served' in told['problem']
    assert server.ready()['status'] == 'degraded' and server.metric('rakuten_degraded') == 1
    assert server.ask().json()['model_version'] == server.version
    wrong = ' '.join(wrong_state(server))
    if how == 'weights': assert 'state registry: BundleError' in wrong
    else: assert 'state ready: degraded' in wrong and 'state version' in wrong


def test_f22_registry_down(following, registry):
    "Without its registry the server goes on, and starts again from what it served before."
    server,models = following, registry.home/'models'
    until(lambda: server.version in (models/'rakuten-mm-champion.json').read_text())
    lock = sqlite3.connect(registry.home/'mlflow.db', isolation_level=None)
    lock.execute('BEGIN EXCLUSIVE')  # nobody else can read
    try:
        until(lambda: server.ready()['status'] == 'degraded')
        assert server.ask().json()['model_version'] == server.version
    finally: lock.rollback(); lock.close()
    until(lambda: server.ready()['status'] == 'ready')
    down = dict(MLFLOW_TRACKING_URI=f'http://127.0.0.1:{free_port()}', RAKUTEN_MM_ARTIFACTS=str(registry.home))
    with running_server(**down) as again:
        assert again.ask().json()['model_version'] == server.version
        assert again.ready() == dict(status='degraded', model_version=server.version)


def test_shadow_sees_and_says_nothing(following, registry, bundle):
    server,shadow = following, registry(bundle, 'challenger')
    agreed = f'rakuten_shadow_total{{agreement="same",model_version="rakuten-mm/{shadow}"}}'
    def seen():
        server.ask()
        return agreed in server.client.get('/metrics').text
    until(seen)
    assert server.ask().json()['model_version'] == server.version


@pytest.fixture(scope='module')
def sufferer(registry, bundle, tmp_path_factory):
    "A server that follows champion and challenger, and dies of those that its file names."
    killers = tmp_path_factory.mktemp('killers')/'killers'; killers.write_text('')
    registry(bundle); registry.client.delete_registered_model_alias('rakuten-mm', 'challenger')
    env = dict(RAKUTEN_MM_ARTIFACTS=str(registry.home), KILLERS=str(killers), API_POLL_S='0.5',
               API_SHADOW='models:/rakuten-mm@challenger')
    with running_server(command=FAULTY, **env) as server:
        server.killers = killers
        yield server


@pytest.mark.parametrize('how', ['load', 'work', 'shadow'])
def test_f55_model_that_ends_the_worker(sufferer, registry, bundle, how):
    "It is tried once, as the champion or as the shadow, and left alone until the alias moves."
    server,good = sufferer, sufferer.ready()['model_version']
    restarts = server.metric('rakuten_worker_restarts_total')
    bad = registry(bundle, 'challenger' if how == 'shadow' else 'next')
    server.killers.write_text(f'rakuten-mm/{bad} {how}')
    if how != 'shadow': registry.client.set_registered_model_alias('rakuten-mm', 'champion', bad)
    def died():
        if how != 'load': server.ask(timeout=60)
        return server.metric('rakuten_worker_restarts_total') > restarts
    until(died)
    until(lambda: server.ready().get('model_version') == good)
    time.sleep(3)
    log = server.log.read_text()
    assert server.metric('rakuten_worker_restarts_total') <= restarts+1+(how == 'work'), log
    assert (server.ask().json()['model_version'] == good and 'the shadow' in log) or how != 'shadow'
    if how == 'shadow': return
    assert f'rakuten-mm/{bad} is not served' in server.client.get('/version').json()['problem']
    server.killers.write_text('')
    registry.client.set_registered_model_alias('rakuten-mm', 'champion', good.split('/')[1])
    until(lambda: server.ready().get('status') == 'ready')


def test_f55_shadow_that_ended_the_worker_becomes_champion(sufferer, registry, bundle):
    "Whoever registers a version makes it the challenger, and so the shadow, before it is promoted."
    server,good = sufferer, sufferer.ready()['model_version']
    restarts = server.metric('rakuten_worker_restarts_total')
    next_ones = range(int(good.split('/')[1])+1, 100)
    server.killers.write_text('\n'.join(f'rakuten-mm/{v} load' for v in next_ones))
    bad = registry(bundle, 'next')
    until(lambda: server.metric('rakuten_worker_restarts_total') > restarts)
    server.killers.write_text(f'rakuten-mm/{bad} load')
    until(lambda: server.ready().get('model_version') == good)
    registry.client.set_registered_model_alias('rakuten-mm', 'champion', bad)
    until(lambda: f'rakuten-mm/{bad} is not served' in (server.client.get('/version').json()['problem'] or ''))
    assert server.metric('rakuten_worker_restarts_total') == restarts+1, server.log.read_text()
    for version,status in ((good.split('/')[1], 'ready'), (bad, 'degraded'), (good.split('/')[1], 'ready')):
        registry.client.set_registered_model_alias('rakuten-mm', 'champion', version)
        until(lambda status=status: server.ready().get('status') == status)  # said again when it comes back
    server.killers.write_text('')


@pytest.mark.system
def test_f55_champion_that_cannot_be_started_with(registry, bundle, tmp_path):
    "A server that starts takes the model that was served last."
    model,good = 'models:/rakuten-mm@other', registry(bundle, 'other')
    killers = tmp_path/'killers'; killers.write_text('')
    env = dict(RAKUTEN_MM_ARTIFACTS=str(registry.home), KILLERS=str(killers))
    with running_server(model, FAULTY, **env) as server: until(lambda: server.ask().status_code == 200)
    bad = registry(bundle, 'other')
    killers.write_text(f'rakuten-mm/{bad} load')
    with running_server(model, FAULTY, **env) as server:
        assert server.ready() == dict(status='degraded', model_version=f'rakuten-mm/{good}')


def test_f75_model_of_before_moves_with_the_artifacts(bundle, tmp_path, monkeypatch):
    old,new = tmp_path/'old', tmp_path/'new'
    monkeypatch.setenv('RAKUTEN_MM_ARTIFACTS', str(old))
    remember(front.CHAMPION, str(shutil.copytree(bundle, old/'models'/'v1')), 'rakuten-mm/1')
    old.rename(new); monkeypatch.setenv('RAKUTEN_MM_ARTIFACTS', str(new))
    assert remembered(front.CHAMPION) == (new/'models'/'v1', 'rakuten-mm/1')


def test_f24_disk_full(bundle):
    "Nothing can be written any more: answers go on, and what was not recorded is counted."
    with running_server(bundle) as server:
        photo = io.BytesIO(); Image.new('RGB', (50, 50), 'red').save(photo, 'JPEG')
        assert server.ask().status_code == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        out = [server.ask(image=base64.b64encode(photo.getvalue()).decode()) for _ in range(5)]
        assert [r.status_code for r in out] == [200]*5
        until(lambda: (server.ask(), server.metric('rakuten_unrecorded_answers') >= 5)[1], 20)
        said = dict(prediction_id=out[0].json()['prediction_id'], prdtypecode=10)
        r = server.client.post('/feedback', json=said)
        assert r.status_code in (404, 503)  # it was not recorded, and is not said to have been
        assert server.ask().status_code == 200
