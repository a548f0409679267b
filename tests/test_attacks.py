"What brought the server down once: bodies, headers, guesses, workers, databases. Each server is a real process."
import asyncio
import base64
import io
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest
from PIL import Image
from small_worker import Launcher
from test_server_life import FAULTY, until
from test_store import postgres, postgres_process  # noqa: F401

from rakuten_mm.api import basic_auth
from serving import server as front
from serving.auth import Authenticator, MissingPassword, add_user
from serving.config import ServeConfig
from serving.errors import Refused
from serving.messages import Job
from serving.store import Store
from serving.testing import USER, free_port, running_server
from serving.worker import JobQueue
from serving.worker_client import WorkerClient

JSON = {'Content-Type': 'application/json'}


def connect(server)->socket.socket: return socket.create_connection(('127.0.0.1', server.port), timeout=20)


def drain(s:socket.socket, piece:bytes):
    "Send until the server has closed the connection."
    with pytest.raises((BrokenPipeError, ConnectionResetError)): s.sendall(piece*200)


def said(s:socket.socket)->bytes:
    "What the server says until it closes the connection."
    out = b''
    try:
        while chunk := s.recv(10_000): out += chunk
    except ConnectionError: pass
    return out


def front_rss(server)->int: return server.family()[0].memory_info().rss


@contextmanager
def health_of(server):
    "The median answer of /health while the block runs, in seconds."
    stop,times = threading.Event(), []
    def ask():
        with httpx.Client(timeout=30) as http:
            while not stop.is_set():
                start = time.monotonic(); http.get(server.url+'/health'); times.append(time.monotonic()-start)
                time.sleep(.02)
    asking,seen = threading.Thread(target=ask), {}
    asking.start()
    try: yield seen
    finally: stop.set(); asking.join(40); seen['median'] = sorted(times)[len(times)//2] if times else 0.


# Budgets before work

def test_f61_headers_without_end(server):
    "Refused by their size, whatever they are made of, and whether it is the first request or a later one."
    before = front_rss(server)
    endless = [b'GET / HTTP/1.1\r\nHost: x\r\nX-A: ', b'GET /', b'GET / HTTP/1.1\r\nHost: x\r\nA']
    with health_of(server) as health:
        for start in endless:
            with connect(server) as s:
                s.sendall(start)
                drain(s, b'a'*100_000)
        fields = b''.join(b'X-%d: a\r\n' % i for i in range(200))
        for many in (fields, b'X-Long: '+b'a'*40_000+b'\r\n'):
            with connect(server) as s:
                s.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n'+many+b'\r\n')
                assert said(s).startswith(b'HTTP/1.1 431')
        with connect(server) as s:  # after an honest request, and in the trailers of another
            s.sendall(b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n'); assert b'200' in s.recv(1000)
            s.sendall(b'POST /token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n')
            drain(s, b'X-A: '+b'a'*100_000+b'\r\n')
    assert front_rss(server)-before < 50e6 and health['median'] < .1


def test_f61_idle_connections(bundle):
    "They are closed after ten seconds, and until then they make room for those that ask."
    serve = 'ulimit -n 160; exec "$0" -m rakuten_mm serve --model "$1" --port "$2"'
    with running_server(bundle, ('bash', '-c', serve, sys.executable, '{model}', '{port}')) as server:
        idle = [connect(server) for _ in range(200)]
        for s in idle[::2]:
            with suppress(ConnectionError): s.sendall(b'GET /health HTTP/1.1\r\nHo')
        assert [server.ask().status_code for _ in range(5)] == [200]*5
        server.worker().kill()  # f53: there are descriptors for another one
        start = time.monotonic()
        assert all(said(s) == b'' for s in idle) and time.monotonic()-start < 15
        until(lambda: server.ask().status_code == 200, 30)


def test_f59_large_pictures_hold_nobody_up(server):
    "Each is refused by its header or takes its share; whoever asks meanwhile is answered by the same worker."
    pid,image = server.worker().pid, io.BytesIO()
    Image.new('RGB', (2_800, 2_800)).save(image, 'WEBP')
    small = (b'RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f'+(5476 | 5476 << 14).to_bytes(4, 'little')).ljust(40, b'\0')
    pictures = [base64.b64encode(p).decode() for p in (image.getvalue(), small)]
    many = dict(products=[dict(image=p) for p in pictures*4])
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(server.client.post, '/predict/batch', json=many)
        time.sleep(.2)
        assert server.ask().status_code == 200
        assert [r['status'] for r in batch.result().json()['results']] == [200, 422]*4
    assert server.worker().pid == pid and server.metric('rakuten_worker_restarts_total') == 0


MANY = {
    'keys': b'{'+b','.join(b'"k%d":1' % i for i in range(1_000_000))+b'}',
    'products': b'{"products":['+b','.join([b'{}']*4_500_000)+b']}',
    'lists': b'['*13_000_000, 'spaces': b' '*13_000_000, 'number': b'{"top_k":'+b'1'*13_000_000+b'}',
    'quotes': b'{"designation":"'+b'\\"'*6_000_000+b'"}', 'open': b'\\"'*390_000}

@pytest.mark.parametrize('path', ['/predict', '/predict/batch', '/explain'])
def test_f62_json_of_many_parts(server, path):
    "It is refused before it is made into objects."
    before = front_rss(server)
    for name,body in MANY.items():
        r = server.client.post(path, content=body, headers=JSON)
        assert r.status_code == 422 and len(r.json()['error']['fields']) <= 20, name
    assert front_rss(server)-before < 150e6
    wrong = dict(designation='x') | {f'k{i}': 1 for i in range(300)}
    assert len(server.client.post('/predict', json=wrong).json()['error']['fields']) == 20


def test_f63_bytes_in_flight(bundle):
    "What does not fit beside what is held is told so; small listings and the next large one are answered."
    from test_serving import encoded
    with running_server(bundle, FAULTY, API_MAX_BYTES='2000000', API_TIMEOUT_S='20') as server:
        large = json.dumps(dict(designation='dawdle 2', image=encoded('BMP', size=(500, 500)))).encode()  # 1 MB
        def post(body, length=True):
            sent = body if length else iter([body[:500_000], body[500_000:]])
            return server.client.post('/predict', content=sent, headers=JSON).status_code
        with ThreadPoolExecutor(9) as pool:
            held = [pool.submit(post, large, i % 2 == 0) for i in range(6)]
            time.sleep(1)
            assert server.ask('Livre').status_code == 200
            codes = sorted(h.result() for h in held)
        assert set(codes) == {200, 503} and codes.count(200) >= 1
        assert server.metric('rakuten_in_flight_bytes') == 0 and post(large) == 200


def test_f65_explanation_that_takes_long(bundle):
    "It is 504 at its deadline, then stopped; nobody waits for it."
    with running_server(bundle, API_TIMEOUT_S='1') as server, ThreadPoolExecutor(2) as pool:
        words = ' '.join(f'mot{i}' for i in range(3_000))[:19_000]
        long = dict(designation=words, description=words)
        def explain(): return server.client.post('/explain', json=long).status_code
        seen = [pool.submit(explain) for _ in range(2)]
        assert server.ask().status_code == 200
        assert {f.result() for f in seen} <= {200, 504}
        small = lambda: server.client.post('/explain', json=dict(designation='Livre')).status_code
        until(lambda: small() == 200, 5)


# Identity

def authenticator(tmp_path, **cfg)->Authenticator:
    store = Store(f'sqlite:///{tmp_path}/users.db', tmp_path)
    return Authenticator(store, ServeConfig(**cfg), 'boss', 'long enough, really')


def test_f68_guesses_are_counted_before_they_are_checked(tmp_path):
    "Many at once: no more are checked than may be, and neighbours of the same address go on."
    a = authenticator(tmp_path, failed_logins='10/minute')
    for name in ('anna', 'bert'): add_user(a.store, name, f'the password of {name}', 'predict')
    checked = []
    real = a.verified
    async def verified(seen, stored, password): checked.append(password); return await real(seen, stored, password)
    a.verified = verified
    async def attack():
        tries = [a.check(f'anna:guess {i}'.encode(), '10.0.0.1') for i in range(39)]
        tries.append(a.check(b'anna:the password of anna', '10.0.0.1'))
        out = await asyncio.gather(*tries, return_exceptions=True)
        return out, await a.check(b'bert:the password of bert', '10.0.0.1')
    out,neighbour = asyncio.run(attack())
    assert len(checked) == 11 and neighbour.name == 'bert'
    assert all(isinstance(e, Refused) and e.status_code == 429 for e in out[10:])
    assert a.checks._max_workers == 2
    a.store.close()


def test_f68_expired_tokens_are_no_guesses(tmp_path):
    a = authenticator(tmp_path, failed_logins='3/minute', token_s=1)
    async def ask():
        token = a.token(await a.check(b'boss:long enough, really', 'x'))['access_token']
        assert (await a.identify(f'Bearer {token}', 'x')).role == 'admin'
        time.sleep(2.1)
        for _ in range(10):
            with pytest.raises(Refused) as e: await a.identify(f'Bearer {token}', 'x')
            assert e.value.status_code == 401
        assert (await a.identify(basic_auth('boss', 'long enough, really'), 'x')).role == 'admin'
    asyncio.run(ask())
    a.store.close()


def test_f69_a_name_has_one_owner(tmp_path, monkeypatch):
    "Who bears the name of the environment's user is not that user."
    a = authenticator(tmp_path)
    add_user(a.store, 'boss', 'another password', 'predict')
    async def ask():
        await a.read_users()
        assert await a.check(b'boss:another password', 'x') is None
        assert (await a.check(b'boss:long enough, really', 'x')).role == 'admin'
    asyncio.run(ask())
    monkeypatch.setenv('API_USERNAME', 'boss')
    with pytest.raises(ValueError, match='API_USERNAME'): add_user(a.store, 'boss', 'another password', 'predict')
    a.store.close()
    with pytest.raises(MissingPassword, match='fewer than 12'): Authenticator(a.store, ServeConfig(), 'boss', 'a')


@pytest.mark.parametrize('sent', [{'Sec-Fetch-Site': 'cross-site'}, {'Sec-Fetch-Site': 'same-site'},
                                  {'Origin': 'https://evil.example'}, {'Origin': 'null'}], ids=str)
def test_f70_posts_of_another_site(server, sent):
    "A page of another site cannot use the credentials that a browser keeps; ours, and programs, can."
    form = dict(designation='Livre')
    for path,kw in (('/predict/upload', dict(data=form, files={'top_k': (None, '3')})), ('/predict', dict(json=form)),
                    ('/feedback', dict(json={})), ('/token', dict(data=dict(username=USER, password='x')))):
        assert server.client.post(path, headers=sent, **kw).status_code == 403, path
    assert server.client.get('/health', headers=sent).status_code == 200
    for ours in ({'Sec-Fetch-Site': 'same-origin'}, {'Origin': server.url}):
        assert server.client.post('/predict', json=form, headers=ours).status_code == 200


def test_f70_no_page_can_be_framed(server):
    for path in ('/', '/docs', '/openapi.json', '/health'):
        h = server.client.get(path).headers
        assert h['x-frame-options'] == 'DENY' and "frame-ancestors 'none'" in h['content-security-policy'], path


def test_f72_texts_that_databases_refuse(server):
    "Zero bytes, halves of characters and a return at the end are taken away at the door."
    store = Store(server.database, '.')
    for sent in ('Livre\0 ancien', 'Livre\ud83d ancien', 'Livre ancien\r'):
        body = json.dumps(dict(designation=sent))
        r = server.client.post('/predict', content=body, headers=JSON)
        assert r.status_code == 200, r.text
    r = server.client.post('/predict', content=json.dumps(dict(designation='\0\ud83d')), headers=JSON)
    assert r.status_code == 422
    store.close()


def test_small_things_that_clients_do(server):
    "HEAD, a slash at the end, an encoding that there is not, two hosts, a transfer encoding that there is not."
    assert server.client.head('/').status_code == server.client.head('/health').status_code == 200
    assert server.client.head('/health').content == b''
    assert server.client.get('/review/', follow_redirects=False).status_code == 404
    odd = {'Content-Type': 'multipart/form-data; boundary=x; charset=undefined'}
    body = b'--x\r\nContent-Disposition: form-data; name="designation"\r\n\r\nLivre\r\n--x--\r\n'
    assert server.client.post('/predict/upload', content=body, headers=odd).status_code in (200, 422)
    for head in (b'Host: a\r\nHost: b', b'X-A: a', b'Host: a\r\nTransfer-Encoding: gzip, chunked'):
        with connect(server) as s:
            s.sendall(b'POST /token HTTP/1.1\r\n'+head+b'\r\nConnection: close\r\n\r\n0\r\n\r\n')
            assert said(s).startswith(b'HTTP/1.1 400'), head


# The worker

async def soon(what, seconds=20.):
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic() < end, 'did not happen'
        await asyncio.sleep(.05)


def with_worker(test, **kw):
    "Run a test with a worker client and what starts its workers."
    async def run():
        launcher = Launcher()
        client = WorkerClient(launcher, **dict(hang_s=1., restart_s=30., give_up_s=60.) | kw)
        await client.start()
        try: await test(client, launcher)
        finally: client.stop()
    asyncio.run(run())


def fds()->int: return psutil.Process().num_fds()


def test_f53_worker_that_cannot_be_started():
    "It is tried again until it can be, and nothing stays open."
    async def test(client, launcher):
        launcher.refusals,before = 4, fds()
        launcher.started[-1].kill()
        await soon(lambda: launcher.refusals == 0)
        await soon(lambda: client.ready, 10)
        assert await client.ask('predict', {}) == ('v1', {}) and fds() <= before
    with_worker(test)


def test_f53_no_worker_at_all_ends_the_server():
    async def test(client, launcher):
        launcher.refusals = 1_000
        launcher.started[-1].kill()
        assert 'no worker for 2 seconds' in await asyncio.wait_for(client.given_up, 15)
    with_worker(test, give_up_s=2.)


def test_f55_what_ends_the_worker_is_given_up():
    "A load, a shadow or an explanation once, a listing twice; the model of an unproven version is named."
    async def test(client, launcher):
        guilty = []
        client.on_guilty = guilty.append
        for op in ('load', 'shadow', 'explain'):
            await soon(lambda: client.ready)
            with pytest.raises(Refused) as e: await client.ask(op, dict(do='die'))
            assert e.value.error.code == 'worker_crashed', op
        assert len(launcher.started) <= 4
        await soon(lambda: client.ready)
        with pytest.raises(Refused): await client.ask('predict', dict(do='die'))
        assert guilty[0] == 'model'
        await soon(lambda: client.ready)
        assert await client.ask('predict', {}) == ('v1', {})
        guilty.clear()
        with pytest.raises(Refused): await client.ask('predict', dict(do='die'))
        assert not guilty  # it has answered before: the listing is to blame
    with_worker(test)


def test_f56_worker_stopped_between_batches():
    "It is noticed though nobody asks, and a worker that is slow but at work is left alone."
    async def test(client, launcher):
        assert await client.ask('predict', dict(do='slow')) == ('v1', {}) and len(launcher.started) == 1
        os.kill(launcher.started[-1].pid, signal.SIGSTOP)
        await soon(lambda: not client.ready, 5)
        await soon(lambda: client.ready and len(launcher.started) == 2, 15)
        assert await client.ask('predict', {}) == ('v1', {})
    with_worker(test)


@pytest.mark.parametrize('at', ['starting', 'ready'])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_every_edge_of_the_worker(at, how):
    "Killed or frozen at its start or later: another takes its place, and what waits is answered."
    async def test(client, launcher):
        if at == 'starting':
            launcher.started[-1].kill()
            await soon(lambda: len(launcher.started) == 2)
        os.kill(launcher.started[-1].pid, how)
        waiting = asyncio.create_task(client.ask('predict', {}))
        assert await asyncio.wait_for(waiting, 30) == ('v1', {})
    with_worker(test, restart_s=3.)


# The database

def test_f54_frozen_database_and_the_server(postgres, bundle):  # noqa: F811
    "Pages that need no database, and users who are known, notice nothing; the server ends when it is told to."
    main = postgres_process(postgres)
    with running_server(bundle, API_DATABASE_URL=postgres, API_TIMEOUT_S='20') as server:
        store = Store(postgres, '.')
        add_user(store, 'rita', 'the password of rita', 'review'); store.close()
        right = {'Authorization': basic_auth('rita', 'the password of rita')}
        rita = httpx.Client(base_url=server.url, headers=right, timeout=30)
        assert rita.post('/predict', json=dict(designation='Livre')).status_code == 200
        frozen = [main, *main.children()]
        for p in frozen: p.suspend()
        try:
            until(lambda: httpx.get(server.url+'/ready', timeout=2).json()['status'] == 'degraded', 30)
            with health_of(server) as health:
                for _ in range(3):
                    assert rita.post('/predict', json=dict(designation='Livre')).status_code == 200
                    assert server.ask().status_code == 200
                assert rita.get('/review').status_code in (503, 504)
            assert health['median'] < .1
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0 and time.monotonic()-start < 30
        finally:
            for p in frozen: p.resume()
        log = server.log.read_text()
        assert log.count('the database cannot be used') == 1 and 'Traceback' not in log


def test_f54_database_that_does_not_answer_at_the_start(bundle):
    "The user of the environment is served; nobody else is known."
    with socket.socket() as hole:
        hole.bind(('127.0.0.1', 0)); hole.listen(1)
        url = f'postgresql+psycopg://rakuten@127.0.0.1:{hole.getsockname()[1]}/postgres'
        with running_server(bundle, API_DATABASE_URL=url) as server:
            assert server.ready()['status'] == 'degraded' and server.ask().status_code == 200


def test_f78_server_and_a_database_that_cannot_be_used(bundle, tmp_path, monkeypatch):
    "One line, and exit code 1."
    (tmp_path/'feedback.db').write_bytes(b'no database at all'*1000)
    env = dict(USERNAME='boss', PASSWORD='long enough, really', DATABASE_URL=f'sqlite:///{tmp_path}/feedback.db')
    for k,v in env.items(): monkeypatch.setenv(f'API_{k}', v)
    monkeypatch.setattr(front, 'log_as_json', lambda: None)
    with pytest.raises(SystemExit) as e: front.serve(str(bundle), port=free_port())
    assert e.value.code.startswith('Error: ') and len(e.value.code.splitlines()) == 1


OPEN:list = []

def test_f59_batches_are_overtaken():
    "A listing of a batch waits for what others ask a little later; whatever is due first is done first."
    near,far = mp.Pipe(False)
    waiting = JobQueue(near); OPEN.append(far)  # a worker whose front has gone ends its process, which is this one
    for uid,due in ((1, 5.), (2, 5.1), (3, 5.2), (4, 5.05), (5, 6.)): far.send(Job(uid, 'predict', {}, uid == 5, due))
    until(lambda: waiting.jobs.qsize() == 5, 5)
    assert [j.uid for j in waiting.take(2, 0)] == [1, 4] and [j.uid for j in waiting.take(9, 0)] == [2, 3]
    waiting.wake()
    assert [j.uid for j in waiting.take(9, 0)] == [5] and waiting.take(9, 0) == []
