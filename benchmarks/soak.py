"""A server among honest and hostile clients, while its worker, its model and its database are taken from it.

    python -m benchmarks.soak --json [--minutes 20] [--seeds 3] [--quick]

(The minutes are shared out to the seeds, each of which has a server of its own.)

Honest clients send listings at random times, `--rate` a second; each has a deadline (API_TIMEOUT_S). Hostile ones send,
beside them, what once brought the server down. At random times the worker is killed or frozen, the champion is changed
for another, for a damaged one, and the database is locked. All of it follows from the seed.

The model is `up` from the moment /ready says so until the next time that the worker is taken away.

lost        honest requests sent and due while the model was up that got no answer, or another status than 200
late        of those, the ones answered after the deadline
wrong       answers to hostile requests that they should not have got, by kind
recovery_s  from a kill or freeze until /ready says yes, the slowest
p99_ms      of honest requests while the model was up
rss_growth  of the processes of the server, looked at every five seconds: the median of the last third of the time
            over that of the first, less 1 (a worker's memory depends on what it has met since it was started)
fds_growth  descriptors of the front, after all have gone, less those after the first tenth of the time
"""
import asyncio
import base64
import io
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from PIL import Image

from benchmarks.harness import main, option, say, tree_rss
from benchmarks.inference import make_bundle
from benchmarks.serving import promote, register
from rakuten_mm.api import basic_auth
from rakuten_mm.core.tracking import mlflow_client
from rakuten_mm.registry.versions import MODEL
from serving.testing import RunningServer, running_server

DEADLINE_S = 10.
BARS = dict(lost='= 0', late='= 0', wrong_statuses='= 0', unrecovered='= 0', rss_growth='<= 0.1', fds_growth='<= 10')


def picture(fmt:str, mode:str, size:int)->bytes:
    Image.new(mode, (size, size)).save(buf := io.BytesIO(), fmt)
    return buf.getvalue()


def listing(**parts)->bytes:
    "A request; bytes become base64."
    text = lambda v: base64.b64encode(v).decode() if isinstance(v, bytes) else v
    return json.dumps({k: text(v) for k,v in parts.items()}).encode()


def hostile_bodies()->dict[str, tuple[str, bytes, set[int]]]: # Path, body, and the statuses that are right
    "Bodies by kind. 503 and 504 are right for all: they say to try later."
    large = picture('WEBP', 'RGB', 2_800), picture('PNG', 'RGBA', 2_900), picture('PNG', 'I;16', 3_000)
    amps = '&'+'amp;'*4_999
    many = [json.loads(listing(designation='x', image=large[0]))]*32
    return {
        'large picture': ('/predict', listing(image=large[0]), {200, 422}),
        'picture with transparency': ('/predict', listing(image=large[1]), {200, 422}),
        '16-bit picture': ('/predict', listing(image=large[2]), {200, 422}),
        'bomb': ('/predict', listing(image=picture('PNG', '1', 9_000)), {422}),
        'batch of large pictures': ('/predict/batch', json.dumps(dict(products=many)).encode(), {200, 413, 422}),
        'escaped text': ('/predict', listing(designation=amps, description=amps), {200, 422}),
        'markup': ('/predict', listing(designation='<div>'*4_000), {200, 422}),
        'many keys': ('/predict', b'{'+b','.join(b'"k%d":1' % i for i in range(300_000))+b'}', {422}),
        'many products': ('/predict/batch', b'{"products":['+b','.join([b'{}']*1_000_000)+b']}', {422}),
        'long explanation': ('/explain', listing(designation=' '.join(f'mot{i}' for i in range(2_500))), {200}),
        'too much': ('/predict', b'x'*20_000_000, {413})}


@dataclass
class Soak:
    "What is known while it runs."
    server:RunningServer
    seed:int
    rate:float # Honest requests a second
    bodies:dict[str, tuple[str, bytes, set[int]]]
    versions:list[int] # Of the registry: two good ones, and one that is damaged
    honest:list[tuple] = field(default_factory=list) # Sent, answered, status, what was wrong
    wrong:Counter = field(default_factory=Counter)
    asked:Counter = field(default_factory=Counter)
    outages:list[list[float]] = field(default_factory=list) # From, until
    events:list[tuple[float, str]] = field(default_factory=list) # When something was taken away, or is back
    memory:list[int] = field(default_factory=list) # Resident bytes of all processes, every five seconds

    def __post_init__(self): self.rng = random.Random(self.seed)

    async def send_honest(self, http:aiohttp.ClientSession, i:int, image:bytes):
        "One listing, with a picture in one of three."
        body = listing(designation=f'Piscine ronde {i}', **(dict(image=image) if i%3 == 0 else {}))
        sent,status,why = time.monotonic(), 0, ''
        try:
            async with http.post('/predict', data=body, headers={'Content-Type': 'application/json'}) as r:
                answer,status = await r.read(), r.status
                if status != 200: why = json.loads(answer)['error']['message']
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError) as e: why = type(e).__name__
        self.honest.append((sent, time.monotonic(), status, why))

    async def honest_clients(self, http:aiohttp.ClientSession, end:float):
        "Listings at random times."
        tasks,image,i = set(), picture('JPEG', 'RGB', 500), 0
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.expovariate(self.rate)); i += 1
            tasks.add(t := asyncio.create_task(self.send_honest(http, i, image))); t.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def post_hostile(self, http:aiohttp.ClientSession):
        "One of the bodies, with right credentials."
        kind = self.rng.choice([*self.bodies]); path,body,right = self.bodies[kind]
        self.asked[kind] += 1
        try:
            async with http.post(path, data=body, headers={'Content-Type': 'application/json'}) as r:
                await r.read()
                if r.status not in right | {503, 504}: self.wrong[f'{kind}: {r.status}'] += 1
        except (aiohttp.ClientError, OSError, TimeoutError): pass  # turned away while it was sending

    async def raw(self, head:bytes, more:bytes, times:int, hold_s:float):
        "A connection that says something odd, holds on, and goes."
        try:
            reader,writer = await asyncio.open_connection('127.0.0.1', self.server.port)
            writer.write(head)
            for _ in range(times): writer.write(more); await writer.drain()
            try: await asyncio.wait_for(reader.read(1_000), hold_s)
            finally: writer.close()
        except (OSError, TimeoutError): pass

    async def odd_connections(self):
        "Endless headers, many idle connections, bodies that stop."
        kind = self.rng.choice(['endless header', 'idle connections', 'half a body', 'half a header'])
        self.asked[kind] += 1
        auth = f"Authorization: {self.server.auth['Authorization']}\r\n".encode()
        post = b'POST /predict HTTP/1.1\r\nHost: x\r\n'+auth+b'Content-Length: 5000000\r\n\r\n'
        match kind:
            case 'endless header': await self.raw(b'GET / HTTP/1.1\r\nX-A: ', b'a'*65_536, 100, 1)
            case 'idle connections': await asyncio.gather(*(self.raw(b'', b'', 0, 12) for _ in range(200)))
            case 'half a body': await self.raw(post, b'x'*65_536, 20, self.rng.uniform(0, 3))
            case 'half a header': await asyncio.gather(*(self.raw(b'GET / HT', b'', 0, 12) for _ in range(50)))

    async def guess(self):
        "Wrong passwords, many at once, for a name that there is not."
        self.asked['guesses'] += 1
        wrong = {'Authorization': basic_auth('mallory', f'{self.rng.getrandbits(64):x}')}
        async def one():
            try:
                async with aiohttp.ClientSession(self.server.url, headers=wrong) as http, http.get('/version') as r:
                    if r.status not in (401, 429): self.wrong[f'guess: {r.status}'] += 1
            except (aiohttp.ClientError, OSError): pass
        await asyncio.gather(*(one() for _ in range(10)))

    async def hostile_clients(self, http:aiohttp.ClientSession, end:float):
        "One after the other, at random."
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.expovariate(1.))
            acts = lambda: self.post_hostile(http), self.odd_connections, self.guess
            await self.rng.choices(acts, [6, 3, 1])[0]()

    async def ready(self, http:aiohttp.ClientSession)->bool:
        try:
            async with http.get('/ready') as r: return r.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError): return False

    async def take_worker(self, http:aiohttp.ClientSession, how:signal.Signals):
        "Kill or freeze the worker, and wait until there is another one."
        begin = time.monotonic()
        self.outages.append([begin, float('inf')])
        pid = self.server.worker().pid
        os.kill(pid, how)
        while time.monotonic()-begin < 120:
            await asyncio.sleep(.1)
            gone = not Path(f'/proc/{pid}/stat').exists() or ' Z ' in Path(f'/proc/{pid}/stat').read_text()
            if gone and await self.ready(http):
                self.outages[-1][1] = time.monotonic(); self.events.append((time.monotonic(), 'ready')); return

    async def lock_database(self, seconds:float):
        "Let nobody else write."
        c = sqlite3.connect(self.server.database.removeprefix('sqlite:///'), isolation_level=None, timeout=20)
        try: c.execute('BEGIN EXCLUSIVE'); await asyncio.sleep(seconds); c.rollback()
        except sqlite3.OperationalError: pass
        finally: c.close()

    async def disturb(self, http:aiohttp.ClientSession, end:float):
        "Take something away, some time after what came before."
        while time.monotonic() < end-40:
            await asyncio.sleep(self.rng.uniform(10, 30))
            what = self.rng.choice(['kill', 'freeze', 'swap', 'damaged champion', 'database'])
            self.events.append((time.monotonic(), what)); say(f'  {what}')
            match what:
                case 'kill': await self.take_worker(http, signal.SIGKILL)
                case 'freeze': await self.take_worker(http, signal.SIGSTOP)
                case 'swap': await asyncio.to_thread(promote, self.rng.choice(self.versions[:2]))
                case 'damaged champion':
                    await asyncio.to_thread(promote, self.versions[2]); await asyncio.sleep(5)
                    await asyncio.to_thread(promote, self.versions[0])
                case 'database': await self.lock_database(self.rng.uniform(3, 12))

    def up(self, sent:float, answered:float)->bool:
        "True if the model was there from sending to the deadline, or to the answer if that came later."
        until = max(answered, sent+DEADLINE_S)
        return all(until < a or sent > b for a,b in self.outages)

    async def weigh(self, end:float):
        "Look at the memory while there is a model."
        while time.monotonic() < end:
            await asyncio.sleep(5)
            up = all(until < time.monotonic() for _,until in self.outages)
            if up: self.memory.append(tree_rss(self.server.process.pid))

    def fds(self)->int: return self.server.family()[0].num_fds()

    def since(self, t:float)->tuple[float, str]:
        "Seconds since what was disturbed last, and what that was."
        at,what = max(((a, w) for a,w in self.events if a <= t), default=(t, 'nothing'))
        return round(t-at, 1), what

    async def run(self, seconds:float)->dict:
        "All of it, and what was seen."
        end,timeout = time.monotonic()+seconds, aiohttp.ClientTimeout(total=60)
        auth = self.server.auth
        async with (aiohttp.ClientSession(self.server.url, headers=auth, timeout=timeout) as honest,
                    aiohttp.ClientSession(self.server.url, headers=auth, timeout=timeout) as hostile):
            early:list[int] = []
            async def watch(): await asyncio.sleep(seconds/10); early.append(self.fds())
            await asyncio.gather(self.honest_clients(honest, end), self.hostile_clients(hostile, end),
                                 self.disturb(honest, end), watch(), self.weigh(end))
        await asyncio.sleep(15)
        third,late = len(self.memory)//3, self.fds()
        first,last = (float(np.median(m)) for m in (self.memory[:third], self.memory[-third:]))
        fair = [(b-a, s) for a,b,s,_ in self.honest if self.up(a, b)]
        lost = [(a, s, why) for a,b,s,why in self.honest if self.up(a, b) and s != 200]
        return dict(
            honest=len(self.honest), honest_up=len(fair), lost=sum(s != 200 for _,s in fair),
            late=sum(t > DEADLINE_S+.5 for t,_ in fair),
            lost_requests=[[s, why, *self.since(a)] for a,s,why in lost],
            p99_ms=float(np.quantile([1e3*t for t,s in fair if s == 200], .99)),
            statuses=dict(Counter(s for _,_,s,_ in self.honest)), hostile=dict(self.asked), wrong=dict(self.wrong),
            wrong_statuses=self.wrong.total(), events=dict(Counter(w for _,w in self.events if w != 'ready')),
            recovery_s=max((b-a for a,b in self.outages), default=0.),
            unrecovered=sum(b == float('inf') for _,b in self.outages),
            rss_mb=[first/1e6, last/1e6], rss_growth=last/first-1, fds=[early[0], late], fds_growth=late-early[0],
            restarts=self.server.metric('rakuten_worker_restarts_total'),
            unrecorded=self.server.metric('rakuten_unrecorded_answers'))


def damage(version:int):
    "Change a byte of a registered bundle."
    source = mlflow_client().get_model_version(MODEL, str(version)).source
    file = Path(source.removeprefix('file://'))/'weights.safetensors'
    file.write_bytes(file.read_bytes()[:-1]+b'\x7f')


def bench(args, work:Path)->dict:
    "A server of its own for each seed."
    bundle,_ = make_bundle(work, True)
    versions = [register(bundle) for _ in range(3)]
    damage(versions[2]); bodies,out = hostile_bodies(), []
    minutes = 1. if args.quick else args.minutes/args.seeds
    for seed in range(args.seeds):
        say(f'seed {seed}'); promote(versions[0])
        env = dict(API_POLL_S='1', API_HANG_S='5', API_TIMEOUT_S=str(DEADLINE_S), API_FAILED_LOGINS='30/minute')
        (home := work/f'home{seed}').mkdir()
        with running_server(home=home, **env) as server:
            out.append(asyncio.run(Soak(server, seed, args.rate, bodies, versions).run(60*minutes)))
        say(f'  {out[-1]}')
    worst = {k: max(r[k] for r in out) for k in (*BARS, 'p99_ms', 'recovery_s')}
    return worst | dict(minutes=minutes, honest=sum(r['honest'] for r in out), runs=out)


if __name__ == '__main__':
    main(bench, __doc__,
         option('--minutes', type=float, default=20., help='of all seeds together; one with --quick (%(default)s)'),
         option('--rate', type=float, default=5., help='honest requests a second (%(default)s)'), seeds=3, bars=BARS)
