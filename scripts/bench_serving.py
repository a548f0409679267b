"""The server under load: speed, tail latency, overload, memory, idling, and a change of models.

    python scripts/bench_serving.py --json out.json [--quick] [--bundle DIR] [--only PART]

Real server processes on this machine, real HTTP over loopback, one bundle. The client asks with requests that were encoded beforehand,
over keep-alive connections, in a process of its own. Servers, client and the predictor in this process share the same `--cores` cores,
so what the client uses (`client_cpu_share`) the server lacks. Requests are listings with text and a 500 px JPEG in base64, if nothing
else is said. Things compared are measured in this one run, in turns, and medians of each round's ratio count.

speed     `vs_fastapi`: products per second with 32 clients, each asking again as soon as it is answered, over those of the app below.
          `vs_predictor`: the same over a `Predictor` in this process, in batches of 32, the next one decoded meanwhile, nothing on the wire.
          `overhead_ms`: median latency for one client less the median of the predictor, for the same products one by one
steady    `p99_over_p50`: latencies at 70 % of the capacity just measured, arrivals at random (Poisson) whatever the server does, timed from
          the moment a request was meant to be sent
overload  the same at ten times the capacity: answers by status, `overload_other` of them neither 200, 429, 503 nor 504 (0 is a connection that
          broke); `shed_ms`: p99 of the time to a 503, from the moment it was meant to be sent, so it counts what the client is late by
          (`overload_late_ms`), `shed_sent_ms` without that; `overload_p99_ratio`: p99 of requests answered over that of 32 clients at capacity,
          `overload_p99_ratio_full` over that of as many clients as there are places; `recovery_s`: from the end of the burst until a single
          request, asked again and again, is answered within 1.5 times its normal latency three times running. The client cannot always send
          that many beside the server: `overload_factor` is what it did send, over the capacity; `overload_goodput` is what was answered
          meanwhile, over the capacity
memory    `rss_growth`: resident bytes of all processes of the server after 10,000 requests over those after the first 1,000, less 1; one request
          in ten has a picture
idle      `idle_cpu`: share of one core that all processes of the server take while nobody asks, following an alias of the registry
swap      `swap_failed_requests`: answers other than 200 while the champion changes under 16 clients; `swap_went_back`: answers of the old version
          to requests that were sent after the new one had answered; `swap_s`: from moving the alias to the first answer of the new version

What `vs_fastapi` compares with (`PLAIN` below) is what a competent developer writes in one file: FastAPI on one uvicorn process, a `def`
endpoint in FastAPI's thread pool, HTTP Basic, the listing cleaned and its picture decoded with Pillow by the same code as here, one listing a
call, and the bundle's weights in PyTorch as it comes, with PyTorch's own number of threads. It records nothing and limits nothing.

For every kind of server (of a `bundle`, of the `champion`, of the `quick_champion` that looks at the registry every second):
`_ready_s` and `_ready_cpu_s` until it is ready; `_first_ms`, the slowest of 32 requests that are its first, and come at once; they do not count
elsewhere. With --quick, one server does for all parts.
"""
import argparse
import asyncio
import base64
import gc
import itertools
import json
import math
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

# The client is this file too, and must be light: whatever is large is imported where it is needed.

ROOT = Path(__file__).parents[1]
PARTS = 'speed', 'steady', 'overload', 'memory', 'idle', 'swap'
PLAN = [('bundle', PARTS[:3]), ('bundle', ['memory']), ('champion', ['idle']), ('quick_champion', ['swap'])] # A server for each, and its parts
PLAN_QUICK = [('quick_champion', PARTS)]
CLIENTS,LINKS = 32, 512
BARS = dict(overhead_ms='<= 10', p99_over_p50='<= 3', overload_other='= 0', shed_ms='<= 50', recovery_s='<= 2', rss_growth='<= 0.05', idle_cpu='< 0.1',
            swap_failed_requests='= 0', swap_went_back='= 0')
PLAIN = '''"A plain prediction API: FastAPI and PyTorch."
import base64
import json
import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel

from rakuten_mm.models.bundle import load_bundle
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.stats.triage import Triage

bundle = Path(os.environ['BUNDLE'])
net,config = load_bundle(bundle)
triage = bundle/'triage.json'
model = Predictor(net, config, Triage.from_dict(json.loads(triage.read_text())) if triage.exists() else None)
app = FastAPI()


class Product(BaseModel):
    designation:str
    description:str = ''
    image:str|None = None


class Answer(BaseModel):
    prdtypecode:int
    label:str
    probability:float
    top_k:list[dict]
    lane:str


def user(given:Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]):
    for a,b in ((given.username, 'API_USERNAME'), (given.password, 'API_PASSWORD')):
        if not secrets.compare_digest(a.encode(), os.environ[b].encode()): raise HTTPException(401, 'wrong credentials')


@app.post('/predict', dependencies=[Depends(user)])
def predict(p:Product)->Answer:
    try: listing = model.prepare(p.designation, p.description, base64.b64decode(p.image) if p.image else None)
    except ValueError as e: raise HTTPException(422, str(e))
    return Answer(**vars(model.predict([listing])[0]))


@app.get('/ready')
def ready(): return 'ok'
'''


# The client


class Link(asyncio.Protocol):
    "A keep-alive connection, which asks one thing at a time."
    def __init__(self): self.buffer,self.need,self.closed,self.answer = bytearray(), 0, False, None

    def connection_made(self, transport): self.transport = transport

    def data_received(self, data:bytes):
        self.buffer += data
        if not self.need:
            if (end := self.buffer.find(b'\r\n\r\n')) < 0: return
            head = bytes(self.buffer[:end]).lower()
            self.status,self.last = int(head[9:12]), b'\r\nconnection: close' in head
            self.body = end+4; self.need = self.body+int(re.search(rb'\r\ncontent-length: *(\d+)', head)[1])
        if len(self.buffer) < self.need: return
        body,self.buffer,self.need = bytes(self.buffer[self.body:self.need]), bytearray(), 0
        if self.last: self.closed = True; self.transport.close()
        if self.answer and not self.answer.done(): self.answer.set_result((self.status, body))

    def connection_lost(self, exc):
        self.closed = True
        if self.answer and not self.answer.done(): self.answer.set_result((0, b''))

    async def ask(self, request:bytes)->tuple[int, bytes]: # Status, or 0 if the connection breaks, and the body
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


class Client:
    "Asks, and keeps when what was answered."
    def __init__(self, port:int, bodies:str, user:str, start:int=0, versions:bool=False):
        auth = base64.b64encode(user.encode()).decode()
        head = f'POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Basic {auth}\r\nContent-Type: application/json\r\nContent-Length: '
        self.requests = [f'{head}{len(b)}\r\n\r\n'.encode()+b for b in pickle.loads(Path(bodies).read_bytes())]
        self.port,self.first,self.versions,self.records = port, start, versions, []
        self.old,self.changed = '', math.inf  # the version that answered first, and when another one did

    async def ask(self, link:Link|None, i:int, due:float, keep:bool=True)->Link|None: # The connection, to be used again
        "Send request number `i` on `link` or a new connection, and record due, sent, ended, status, version."
        sent,status,body = time.monotonic(), 0, b''
        try:
            if link is None or link.closed: _,link = await asyncio.get_running_loop().create_connection(Link, '127.0.0.1', self.port)
            status,body = await link.ask(self.requests[(self.first+i)%len(self.requests)])
        except OSError: pass
        found = re.search(rb'"model_version":"([^"]*)"', body) if self.versions else None
        record = (due, sent, time.monotonic(), status, found[1].decode() if found else '')
        self.old = self.old or record[4]
        if record[4] not in ('', self.old): self.changed = min(self.changed, record[2])
        self.last = record
        if keep: self.records.append(record)
        if link and not status: link.transport.abort(); return None
        return link

    async def closed(self, clients:int, warm_s:float=0, seconds:float=600, count:int|None=None, settle_s:float=math.inf)->dict:
        """So many ask again as soon as they are answered, for `seconds` after `warm_s`, or until `count` were asked,
        or until `settle_s` after a version other than the first answered."""
        numbers,begin = itertools.count() if count is None else iter(range(count)), time.monotonic()+warm_s
        async def one():
            link = None
            for i in numbers:
                now = time.monotonic()
                if now > min(begin+seconds, self.changed+settle_s): break
                link = await self.ask(link, i, now)
                if link is None: await asyncio.sleep(.01)
            if link: link.transport.close()
        async def watch():
            await asyncio.sleep(warm_s); cpu,at = time.process_time(), time.monotonic()
            await asyncio.wait(asking, timeout=seconds)
            return dict(begin=at, wall_s=time.monotonic()-at, cpu_s=time.process_time()-cpu)
        asking = [asyncio.create_task(one()) for _ in range(clients)]
        out = await watch()
        await asyncio.gather(*asking)
        return out

    async def open(self, rate:float, seconds:float, seed:int, links:int=LINKS, drop:bool=False, start:float=0)->dict:
        "Requests arrive at random, `rate` a second, whatever becomes of those before; `drop` those not sent by the end."
        rng,slots,tasks,unsent,cpu = random.Random(seed), asyncio.LifoQueue(), set(), 0, time.process_time()
        for _ in range(links): slots.put_nowait(None)
        due = begin = start or time.monotonic()
        async def one(i:int, due:float):
            nonlocal unsent
            link = await slots.get()
            if drop and time.monotonic() > begin+seconds: unsent += 1
            else: link = await self.ask(link, i, due)
            slots.put_nowait(link)
        for i in itertools.count():
            due += rng.expovariate(rate)
            if due > begin+seconds: break
            await asyncio.sleep(max(due-time.monotonic(), 0))
            tasks.add(t := asyncio.create_task(one(i, due))); t.add_done_callback(tasks.discard)
        out = dict(end=begin+seconds, wall_s=time.monotonic()-begin, cpu_s=time.process_time()-cpu)
        if tasks: await asyncio.gather(*tasks)
        while not slots.empty():
            if link := slots.get_nowait(): link.transport.close()
        return out | dict(unsent=unsent, arrived=i)

    async def burst(self, rate:float, seconds:float, seed:int, give_up_s:float=30)->dict:
        "An open loop with a single request, asked one by one, before and after it."
        link,normal = None, []
        for _ in range(25):
            link = await self.ask(link, 0, time.monotonic(), keep=False)
            normal.append(self.last[2]-self.last[1])
        usual,start = statistics.median(normal[5:]), time.monotonic()+.1
        loop,end = asyncio.create_task(self.open(rate, seconds, seed, drop=True, start=start)), start+seconds
        await asyncio.sleep(end-time.monotonic())
        fine,recovery = [], None
        while len(fine) < 3 and time.monotonic() < end+give_up_s:
            link = await self.ask(link, 0, time.monotonic(), keep=False)
            fine = [*fine, self.last[2]] if self.last[3] == 200 and self.last[2]-self.last[1] <= 1.5*usual else []
            await asyncio.sleep(.01)
        if len(fine) == 3: recovery = fine[0]-end
        return await loop | dict(usual_ms=1e3*usual, recovery_s=recovery)


def client(job:dict):
    "Load a server as told; prints what was seen."
    import uvloop
    me,limit_s = Client(**job['client']), job['limit_s']
    gc.collect(); gc.disable()
    print('started', flush=True)
    async def run(): return await asyncio.wait_for(getattr(me, job['how'])(**job['load']), limit_s)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner: print(json.dumps(runner.run(run()) | dict(records=me.records)))


# The bench


def say(*args): print(*args, file=sys.stderr, flush=True)


def tree(pid:int)->list:
    "A process and everything below it."
    import psutil
    return [p := psutil.Process(pid), *p.children(recursive=True)]


def cpu(process)->float:
    "Seconds of CPU time that a process has used."
    t = process.cpu_times()
    return t.user+t.system


def tree_cpu(pid:int)->float:
    "Seconds of CPU time that a process and everything below it have used."
    return sum(cpu(p) for p in tree(pid))


def quantile(values, q:float)->float:
    "NaN for no values."
    import numpy as np
    return float(np.quantile(values, q)) if len(values) else math.nan


@dataclass
class Served:
    "A server that runs."
    port:int
    pid:int
    seconds:float # That it took to become ready
    cpu_s:float # Of CPU time until then


@dataclass
class Bench:
    "What the parts have in common."
    work:Path
    bundle:Path
    rows:list[tuple] # Designation, description and encoded picture
    quick:bool
    cores:int
    user:str = 'bench'
    password:str = field(default_factory=lambda: secrets.token_urlsafe(16))

    def __post_init__(self):
        os.environ.update(API_USERNAME=self.user, API_PASSWORD=self.password, API_RATE='10000000/minute', BUNDLE=str(self.bundle), PYTHONPATH=str(ROOT))
        (self.work/'plain.py').write_text(PLAIN, encoding='utf-8')
        self.pictures = self.requests('pictures', self.rows)

    @cached_property
    def model(self):
        from rakuten_mm.models.predictor import Predictor
        return Predictor.load(self.bundle)

    @cached_property
    def versions(self)->list[int]:
        "The bundle, registered twice."
        from rakuten_mm.core.tracking import register_bundle, tracked_run
        def register():
            with tracked_run() as run: return register_bundle(run, self.bundle)
        return [register(), register()]

    def promote(self, i:int):
        "Let the alias point at one of `versions`."
        from rakuten_mm.core.tracking import MODEL, mlflow_client
        mlflow_client().set_registered_model_alias(MODEL, 'champion', self.versions[i])

    def requests(self, name:str, rows)->Path:
        "A file of request bodies."
        body = lambda d,t,b: json.dumps(dict(designation=d, description=t) | (dict(image=base64.b64encode(b).decode()) if b else {})).encode()
        path = self.work/f'{name}.pickle'
        path.write_bytes(pickle.dumps([body(d, t, b) for d,t,b in rows]))
        return path

    def serve(self, model, **env): return self.running([sys.executable, '-m', 'rakuten_mm', 'serve', '--model', str(model)], 0, **env)

    def champion(self, **env):
        self.promote(0)
        return self.serve('models:/rakuten-mm@champion', **env)

    def plain(self): return self.running([sys.executable, '-m', 'uvicorn', 'plain:app', '--app-dir', str(self.work)], -signal.SIGTERM)

    @contextmanager
    def running(self, command:list, ends_with:int, **env):
        "A server process that is ready; it must end with this exit code."
        import httpx
        from serve_once import free_port
        port,log,begin = free_port(0), self.work/f'server-{len(list(self.work.glob("server-*.log")))}.log', time.monotonic()
        with log.open('w') as f:
            process = subprocess.Popen([*command, '--port', str(port)], stdout=f, stderr=f, cwd=self.work, env=os.environ | env)
        try:
            for _ in range(1200):
                with suppress(httpx.TransportError):
                    if httpx.get(f'http://127.0.0.1:{port}/ready', timeout=5).status_code == 200: break
                if process.poll() is not None: break
                time.sleep(.1)
            else: raise SystemExit(f'no server after two minutes\n{log.read_text()[-3000:]}')
            if process.poll() is not None: raise SystemExit(f'the server ended with exit code {process.returncode}\n{log.read_text()[-3000:]}')
            yield Served(port, process.pid, time.monotonic()-begin, tree_cpu(process.pid))
            process.terminate()
            code = process.wait(60)
            assert code == ends_with, f'{command[2]} ended with exit code {code}\n{log.read_text()[-3000:]}'
        finally:
            if process.poll() is None:
                for p in tree(process.pid): p.kill()
                process.wait(10)

    def start(self, port:int, how:str, bodies:Path|None=None, start:int=0, versions:bool=False, limit_s:float=300, **load)->subprocess.Popen:
        "A client that has begun to load the server at `port`."
        who = dict(port=port, bodies=str(bodies or self.pictures), user=f'{self.user}:{self.password}', start=start, versions=versions)
        job = dict(client=who, how=how, load=load, limit_s=limit_s)
        process = subprocess.Popen([sys.executable, __file__, '--client', json.dumps(job)], stdout=subprocess.PIPE, text=True, cwd=self.work)
        if process.stdout.readline() != 'started\n': raise SystemExit(f'the client could not start: exit code {process.wait(10)}')
        return process

    def finish(self, process:subprocess.Popen)->dict:
        "What a client saw: `records` as a table, with `ms` from when it was due to the answer."
        import pandas as pd
        try: out = process.communicate(timeout=600)[0]
        finally: process.kill()
        if process.returncode: raise SystemExit(f'the client ended with exit code {process.returncode}')
        out = json.loads(out)
        df = out['records'] = pd.DataFrame(out['records'], columns=['due', 'sent', 'ended', 'status', 'version'])
        df['ms'] = 1e3*(df.ended-df.due)
        return out

    def load(self, port:int, how:str, **job)->dict: return self.finish(self.start(port, how, **job))

    def full(self, port:int, seconds:float, clients:int=CLIENTS)->dict:
        "A closed loop of `clients`: products per second, p50 and p99 in ms, and the client's share of the CPU."
        seen = self.load(port, 'closed', clients=clients, warm_s=min(2., seconds/2), seconds=seconds)
        df = seen['records']
        if (df.status != 200).any(): raise SystemExit(f'{clients} clients got {Counter(df.status.tolist())}, so speeds cannot be compared')
        df = df[(df.ended >= seen['begin']) & (df.ended <= seen['begin']+seconds)]
        return dict(per_s=len(df)/seconds, p50=quantile(df.ms, .5), p99=quantile(df.ms, .99), client=seen['cpu_s']/seen['wall_s']/self.cores,
                    asked=len(seen['records']))


def check_same(bench:Bench, ours:int, plain:int):
    "Both servers give the predictor's answers."
    import httpx
    for d,t,b in bench.rows[:8]:
        mine = bench.model.predict([bench.model.prepare(d, t, b)])[0]
        for port in (ours, plain):
            body = dict(designation=d, description=t, image=base64.b64encode(b).decode())
            r = httpx.post(f'http://127.0.0.1:{port}/predict', json=body, auth=(bench.user, bench.password), timeout=60).raise_for_status().json()
            if r['prdtypecode'] != mine.prdtypecode or abs(r['probability']-mine.probability) > .02: raise SystemExit(f'answers differ: {r} {mine}')


def in_process(bench:Bench, seconds:float)->float:
    "Products per second of a `Predictor` in this process, in batches."
    from bench_inference import pipeline
    n,begin = 0, time.perf_counter()
    while time.perf_counter()-begin < seconds: n += len(pipeline(bench.model, bench.rows))
    return n/(time.perf_counter()-begin)


def one_by_one(bench:Bench, rows:list)->list[float]:
    "Milliseconds of each listing, alone."
    def ms(row):
        begin = time.perf_counter(); bench.model.predict([bench.model.prepare(*row)])
        return 1e3*(time.perf_counter()-begin)
    return [ms(r) for r in rows]


def speed(bench:Bench, ours:Served)->dict:
    "Our server, the plain app, and the predictor without a server, in turns."
    (rounds,seconds),seen,work = (2, 2.5) if bench.quick else (5, 10.), {k: [] for k in ('ours', 'plain', 'predictor')}, []
    with bench.plain() as plain:
        check_same(bench, ours.port, plain.port)
        pipe = partial(in_process, bench, seconds)
        pipe(); bench.full(ours.port, 1.); bench.full(plain.port, 1.)
        for _ in range(rounds):
            before = tree_cpu(ours.pid)
            seen['ours'].append(bench.full(ours.port, seconds)); work.append(1e3*(tree_cpu(ours.pid)-before)/seen['ours'][-1]['asked']); time.sleep(.5)
            seen['plain'].append(bench.full(plain.port, seconds)); time.sleep(.5)
            seen['predictor'].append(dict(per_s=pipe()))
            say('  '+', '.join(f"{k} {v[-1]['per_s']:.1f}" for k,v in seen.items()), 'products per second')
    middle = lambda name,key: statistics.median(r[key] for r in seen[name])
    over = lambda name: statistics.median(a['per_s']/b['per_s'] for a,b in zip(seen['ours'], seen[name], strict=True))
    out = dict(vs_fastapi=over('plain'), vs_predictor=over('predictor')) | {f'{k}_per_s': middle(k, 'per_s') for k in seen}
    out |= dict(client_cpu_share=middle('ours', 'client'), server_cpu_ms=statistics.median(work))
    out |= {f'{name}_{p}_ms': middle(name, p) for name in ('ours', 'plain') for p in ('p50', 'p99')}
    rows,alone,wire = bench.rows[:24 if bench.quick else 64], [], []
    for r in range(rounds+1):
        a = one_by_one(bench, rows); time.sleep(.2)
        df = bench.load(ours.port, 'closed', clients=1, count=len(rows))['records']
        if (df.status != 200).any(): raise SystemExit(f'one client got {Counter(df.status.tolist())}')
        if r: alone += a; wire += df.ms.tolist()  # the first round warms up
    single = dict(single_ms=statistics.median(wire), single_predictor_ms=statistics.median(alone))
    return out | dict(overhead_ms=single['single_ms']-single['single_predictor_ms']) | single


def steady(bench:Bench, ours:Served, capacity:dict)->dict:
    "Tail latency at 70 % of the capacity."
    ratios,p50,p99,other = [], [], [], 0
    for seed in range(1 if bench.quick else 3):
        df = bench.load(ours.port, 'open', rate=.7*capacity['per_s'], seconds=5. if bench.quick else 25., seed=seed)['records']
        other += int((df.status != 200).sum())
        ms = df.ms[(df.status == 200)]
        p50.append(quantile(ms, .5)); p99.append(quantile(ms, .99)); ratios.append(p99[-1]/p50[-1])
        say(f'  {len(df)} requests, p50 {p50[-1]:.1f} ms, p99 {p99[-1]:.1f} ms')
    return dict(p99_over_p50=statistics.median(ratios), steady_p50_ms=statistics.median(p50), steady_p99_ms=statistics.median(p99), steady_other=other)


def overload(bench:Bench, ours:Served, capacity:dict)->dict:
    "Ten times the capacity for some seconds, and the time after."
    import httpx
    import pandas as pd

    from serving.config import ServeConfig
    full,runs = bench.full(ours.port, 2.5 if bench.quick else 10., ServeConfig().max_in_flight), []
    for seed in range(1 if bench.quick else 3):
        runs.append(bench.load(ours.port, 'burst', rate=10*capacity['per_s'], seconds=4. if bench.quick else 10., seed=seed))
        counts = dict(sorted(Counter(runs[-1]['records'].status.tolist()).items()))
        say(f"  {runs[-1]['arrived']} arrivals, {runs[-1]['unsent']} not sent; by status {counts}; recovered after {runs[-1]['recovery_s']} s")
        time.sleep(2)
    df = pd.concat([r['records'] for r in runs])
    counts,wall = Counter(df.status.tolist()), sum(r['wall_s'] for r in runs)
    fine,shed = df[df.status == 200], df[df.status == 503]
    meanwhile = sum(int(((r['records'].status == 200) & (r['records'].ended <= r['end'])).sum()) for r in runs)
    recovery = [r['recovery_s'] for r in runs]
    page = httpx.get(f'http://127.0.0.1:{ours.port}/metrics', auth=(bench.user, bench.password), timeout=30).raise_for_status().text
    figure = lambda name: float(re.search(rf'^{name} (\S+)$', page, re.M)[1])
    return dict(overload_other=sum(n for s,n in counts.items() if s not in (200, 429, 503, 504)),
                overload_by_status={str(k): counts[k] for k in sorted(counts)},
                shed_ms=quantile(shed.ms, .99), shed_sent_ms=quantile(1e3*(shed.ended-shed.sent), .99), shed_p50_ms=quantile(shed.ms, .5),
                overload_late_ms=quantile(1e3*(df.sent-df.due), .99), overload_p99_ratio=quantile(fine.ms, .99)/capacity['p99'],
                overload_p99_ratio_full=quantile(fine.ms, .99)/full['p99'], overload_p99_ms=quantile(fine.ms, .99), capacity_p99_ms=capacity['p99'],
                full_p99_ms=full['p99'], overload_goodput=meanwhile/wall/capacity['per_s'], overload_factor=len(df)/wall/capacity['per_s'],
                overload_client_cpu_share=sum(r['cpu_s'] for r in runs)/wall/bench.cores, overload_unsent=sum(r['unsent'] for r in runs),
                recovery_s=None if None in recovery else max(recovery), recovery_usual_ms=statistics.median(r['usual_ms'] for r in runs),
                worker_restarts=figure('rakuten_worker_restarts_total'), unrecorded_answers=figure('rakuten_unrecorded_answers'))


def memory(bench:Bench, ours:Served)->dict:
    "Resident bytes as requests go by."
    from bench_inference import listings
    from bench_ingestion import tree_rss
    step,total = (200, 1_000) if bench.quick else (1_000, 10_000)
    pictures = itertools.cycle(bench.rows)
    bodies = bench.requests('mixed', ((t, d, next(pictures)[2] if i%10 == 0 else None) for i,(t,d) in enumerate(zip(*listings(total), strict=True))))
    seen = []
    def rss(): time.sleep(.2); return tree_rss(ours.pid)/1e6
    seen.append(rss())
    for start in range(0, total, step):
        df = bench.load(ours.port, 'closed', bodies=bodies, start=start, clients=16, count=step)['records']
        if (df.status != 200).any(): raise SystemExit(f'memory: answers by status {Counter(df.status.tolist())}')
        time.sleep(1); seen.append(statistics.median(rss() for _ in range(5)))
        say(f'  {start+step} requests: {seen[-1]:.1f} MB')
    return dict(rss_growth=seen[-1]/seen[1]-1, rss_mb=seen)


def idle(bench:Bench, ours:Served)->dict:
    "CPU time while nobody asks."
    bench.load(ours.port, 'closed', clients=4, count=32)
    time.sleep(2 if bench.quick else 10)
    begin,before = time.monotonic(), [(p, cpu(p)) for p in tree(ours.pid)]
    time.sleep(5 if bench.quick else 20)
    each = [(cpu(p)-was)/(time.monotonic()-begin) for p,was in before]
    return dict(idle_cpu=sum(each), idle_cpu_each=[round(x, 4) for x in each])


def swap(bench:Bench, ours:Served)->dict:
    "Another champion while clients ask; the server must look at the registry every second."
    names = [f'rakuten-mm/{v}' for v in bench.versions]
    bench.load(ours.port, 'closed', clients=16, count=64)
    process = bench.start(ours.port, 'closed', clients=16, versions=True, seconds=60, settle_s=3)
    time.sleep(2 if bench.quick else 5)
    moved = time.monotonic(); bench.promote(1)
    df = bench.finish(process)['records']
    counts,fine = Counter(df.version.tolist()), df[df.status == 200]
    first,before = fine.ended[fine.version == names[1]].min(), fine[fine.ended < moved]
    during = fine[(fine.ended >= moved) & (fine.ended < first)]
    return dict(swap_failed_requests=int((df.status != 200).sum()), swap_went_back=int(((fine.version == names[0]) & (fine.sent > first)).sum()),
                swap_both_answered=all(counts[n] for n in names), swap_s=float(first-moved), swap_requests=len(df), swap_by_version=dict(counts),
                swap_before_p99_ms=quantile(before.ms, .99), swap_during_p99_ms=quantile(during.ms, .99))


def rows_for(work:Path, image_size:int, n:int)->list[tuple]:
    "Designation, description and encoded picture of synthetic listings."
    from rakuten_mm.data.schema import image_name, read_listings
    from rakuten_mm.synthetic.catalogue import synthesize
    raw = synthesize(work/'requests', n, n_test=0, seed=0, image_size=image_size, progress=False)
    files = [(r, raw/'images'/'image_train'/image_name(r.imageid, r.productid)) for r in read_listings(raw/'X_train_update.csv').itertuples()]
    return [(r.designation, r.description, f.read_bytes()) for r,f in files if f.exists()]


RUN = dict(speed=speed, steady=steady, overload=overload, memory=memory, idle=idle, swap=swap)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bundle', type=Path, help='a sealed bundle; one is trained if left out')
    parser.add_argument('--only', choices=PARTS, action='append', help='only this part; may be given again')
    parser.add_argument('--cores', type=int, default=2)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--quick', action='store_true', help='less than two minutes, to see that it works (figures mean less)')
    parser.add_argument('--client', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client: client(json.loads(args.client)); return
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
    work = Path(tempfile.mkdtemp(prefix='bench-serving-'))
    try: result = run(work, args)
    finally: shutil.rmtree(work, ignore_errors=True)
    width = max(map(len, result))
    for k,v in result.items(): print(f'{k:{width}}  {f"{v:,.3f}" if isinstance(v, float) else v!s:24}  {BARS.get(k, "")}'.rstrip())
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    if args.json: args.json.write_text(json.dumps({k: finite(v) for k,v in result.items()}, indent=1))


def run(work:Path, args)->dict:
    import torch

    from rakuten_mm.core.config import load_environment, n_threads
    for k in [k for k in os.environ if k.startswith(('API_', 'MLFLOW_', 'RAKUTEN_MM_'))]: del os.environ[k]
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'artifacts')
    load_environment('no.env')
    torch.set_num_threads(args.cores)
    (size,n),parts,capacity = (250, 64) if args.quick else (500, 256), args.only or PARTS, {}
    if args.bundle: bundle,rows = args.bundle.resolve(), rows_for(work, size, n+n//2)
    else:
        from bench_inference import make_bundle
        say('training')
        bundle,rows = make_bundle(work, *((240, 'smoke', 250) if args.quick else (1_200, 'cpu', 500)))
    bench = Bench(work, bundle, rows[:n], args.quick, args.cores)
    out = dict(cores=n_threads(), quick=args.quick, picture_px=size, request_kb=statistics.median(len(b)*4/3e3 for _,_,b in bench.rows),
               image_runtime=json.loads((bundle/'config.json').read_text())['info']['runtime'].get('image'))
    for kind,some in PLAN_QUICK if args.quick else PLAN:
        if not (some := [p for p in some if p in parts]): continue
        say(f'starting a server for {", ".join(some)}')
        with bench.serve(bundle) if kind == 'bundle' else bench.champion(**{'API_POLL_S': '1'} if kind == 'quick_champion' else {}) as ours:
            first = bench.load(ours.port, 'closed', clients=CLIENTS, count=CLIENTS)['records']
            out |= {f'{kind}_ready_s': ours.seconds, f'{kind}_ready_cpu_s': ours.cpu_s, f'{kind}_first_ms': float(first.ms.max())}
            bench.full(ours.port, 1.)
            for part in some:
                say(part)
                if part not in ('steady', 'overload'): out |= RUN[part](bench, ours); continue
                if not capacity: capacity.update(bench.full(ours.port, 3. if args.quick else 15.)); out['capacity_per_s'] = capacity['per_s']
                out |= RUN[part](bench, ours, capacity)
    return out


if __name__ == '__main__': main()
