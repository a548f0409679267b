"""The server under load: speed, tail latency, overload, memory, idling, and a change of models.

    python -m benchmarks.serving --json [--quick] [--bundle DIR] [--only PART]

Real server processes on this machine, real HTTP over loopback, one bundle. The client (load.py) asks with requests
that were encoded beforehand, over keep-alive connections, in a process of its own. Servers, client and the predictor
in this process share the same `--cores` cores, so what the client uses (`client_cpu_share`) the server lacks.
Requests are listings with text and a 500 px JPEG in base64, if nothing else is said. Things compared are measured in
this one run, in turns, and medians of each round's ratio count.

speed     `vs_fastapi`: products per second with 32 clients, each asking again as soon as it is answered, over those
          of plain.py. `vs_predictor`: the same over a `Predictor` in this process, in batches of 32, the next one
          decoded meanwhile, nothing on the wire. `overhead_ms`: median latency for one client less the median of the
          predictor, for the same products one by one
steady    `p99_over_p50`: latencies at 70 % of the capacity just measured, arrivals at random (Poisson) whatever the
          server does, timed from the moment a request was meant to be sent
overload  the same at ten times the capacity: answers by status, `overload_other` of them neither 200, 429, 503 nor
          504 (0 is a connection that broke); `shed_ms`: p99 of the time to a 503, from the moment it was meant to be
          sent, so it counts what the client is late by (`overload_late_ms`), `shed_sent_ms` without that;
          `overload_p99_ratio`: p99 of requests answered over that of 32 clients at capacity,
          `overload_p99_ratio_full` over that of as many clients as there are places; `recovery_s`: from the end of
          the burst until a single request, asked again and again, is answered within 1.5 times its normal latency
          three times running. The client cannot always send that many beside the server: `overload_factor` is what it
          did send, `overload_goodput` what was answered meanwhile, over the capacity
memory    `rss_growth`: resident bytes of all processes of the server after 10,000 requests over those after the first
          1,000, less 1; one request in ten has an image
idle      `idle_cpu`: share of one core that the server takes while nobody asks, following an alias of the registry
swap      `swap_failed_requests`: answers other than 200 while the champion changes under 16 clients;
          `swap_went_back`: answers of the old version to requests sent after the new one had answered; `swap_s`: from
          moving the alias to the first answer of the new version

`vs_fastapi` compares with the one file of a competent developer: FastAPI on one uvicorn process, a `def` endpoint in
FastAPI's thread pool, HTTP Basic, the listing cleaned and its image decoded by the same code as here, one listing a
call, the bundle's weights in PyTorch as it comes, with PyTorch's own number of threads. It records nothing and limits
nothing.

Of every kind of server (of a `bundle`, of the `champion`, of the `quick_champion` that looks at the registry every
second): `_ready_s` and `_ready_cpu_s` until it is ready; `_first_ms`, the slowest of 32 requests that are its first,
and come at once; they do not count elsewhere. With --quick, one server does for all parts.
"""
import base64
import itertools
import json
import math
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import load
from benchmarks.harness import ROOT, cpu_s, finish, in_turns, main, median_ratio, option, say, start, tree_rss
from benchmarks.inference import listings, make_bundle, pipeline, rows_of
from rakuten_mm.core.process import n_threads
from rakuten_mm.core.tracking import mlflow_client, tracked_run
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.registry.versions import MODEL, register_bundle
from rakuten_mm.synthetic.catalogue import synthesize
from serving.config import ServeConfig
from serving.testing import RunningServer, running_server

PARTS = 'speed', 'steady', 'overload', 'memory', 'idle', 'swap'
# A server for each, and its parts
PLAN = [('bundle', PARTS[:3]), ('bundle', ['memory']), ('champion', ['idle']), ('quick_champion', ['swap'])]
PLAN_QUICK = [('quick_champion', PARTS)]
CLIENTS = 32
BARS = dict(overhead_ms='<= 10', p99_over_p50='<= 3', overload_other='= 0', shed_ms='<= 50', recovery_s='<= 2',
            rss_growth='<= 0.05', idle_cpu='< 0.1', swap_failed_requests='= 0', swap_went_back='= 0')


def quantile(values, q:float)->float: return float(np.quantile(values, q)) if len(values) else math.nan


def request(designation:str, description:str, image:bytes|None)->dict:
    encoded = dict(image=base64.b64encode(image).decode()) if image else {}
    return dict(designation=designation, description=description) | encoded


def middle(runs:list[dict], key:str)->float: return statistics.median(r[key] for r in runs)


def register(bundle:Path)->int:
    "The new version of a bundle in the registry."
    with tracked_run() as run: return register_bundle(run, bundle)


def promote(version:int): mlflow_client().set_registered_model_alias(MODEL, 'champion', version)


@dataclass
class Bench:
    "The parts' common ground."
    work:Path
    bundle:Path
    rows:list[tuple] # Designation, description and encoded image
    quick:bool
    cores:int

    def __post_init__(self): self.images = self.requests('images', self.rows)

    @cached_property
    def model(self): return Predictor.load(self.bundle)

    @cached_property
    def versions(self)->list[int]:
        "The bundle, registered twice."
        return [register(self.bundle), register(self.bundle)]

    def promote(self, i:int):
        "Let the alias point at one of `versions`."
        promote(self.versions[i])

    def requests(self, name:str, rows)->Path:
        "A file of request bodies."
        path = self.work/f'{name}.pickle'
        path.write_bytes(pickle.dumps([json.dumps(request(*r)).encode() for r in rows]))
        return path

    def home(self)->Path: return Path(tempfile.mkdtemp(dir=self.work))

    def serve(self, kind:str):
        "Our server of the bundle, or of a champion."
        if kind == 'bundle': return running_server(self.bundle, home=self.home())
        self.promote(0)
        env = dict(API_POLL_S='1') if kind == 'quick_champion' else {}
        return running_server(home=self.home(), **env)

    def plain(self):
        command = sys.executable, '-m', 'uvicorn', 'benchmarks.plain:app', '--port', '{port}'
        # FastAPI's HTTP Basic knows ASCII only
        env = dict(BUNDLE=str(self.bundle), PYTHONPATH=str(ROOT), API_PASSWORD='plain')
        return running_server(command=command, exit_code=-signal.SIGTERM, home=self.home(), **env)

    def start(self, server:RunningServer, how:str, bodies:Path|None = None, start_at:int = 0, versions:bool = False,
              **args)->subprocess.Popen:
        "A client process that has begun to load the server."
        job = dict(how=how, load=args, url=f'{server.url}/predict', bodies=bodies or self.images,
                   start=start_at, versions=versions, auth=server.auth)
        process = start(load.run, job)
        if not process.stdout.readline(): raise SystemExit(f'the client ended with exit code {process.wait(10)}')
        return process

    def finish(self, process:subprocess.Popen)->dict:
        "All that a client saw: `records` as a table, with `ms` from when it was due to the answer."
        out = finish(process, 600)
        df = out['records'] = pd.DataFrame(out['records'], columns=load.COLUMNS)
        df['ms'] = 1e3*(df.ended-df.due)
        return out

    def load(self, server:RunningServer, how:str, **job)->dict: return self.finish(self.start(server, how, **job))

    def answered(self, server:RunningServer, **job)->dict:
        "A closed loop in which every request gets 200."
        seen = self.load(server, 'closed', **job)
        statuses = Counter(seen['records'].status.tolist())
        if {*statuses} != {200}: raise SystemExit(f'answers by status: {statuses}')
        return seen

    def full(self, server:RunningServer, seconds:float, clients:int = CLIENTS)->dict:
        "A closed loop of `clients`: products per second, p50 and p99 in ms, the client's share of the CPU."
        seen = self.answered(server, clients=clients, warm_s=min(2., seconds/2), seconds=seconds)
        df = seen['records']; n = len(df)
        df = df[(df.ended >= seen['begin']) & (df.ended <= seen['begin']+seconds)]
        return dict(per_s=len(df)/seconds, p50=quantile(df.ms, .5), p99=quantile(df.ms, .99), asked=n,
                    client=seen['cpu_s']/seen['wall_s']/self.cores)


def check_same(bench:Bench, *servers:RunningServer):
    "All servers give the predictor's answers."
    for d,t,b in bench.rows[:8]:
        mine = bench.model.predict([bench.model.prepare(d, t, b)])[0]
        for server in servers:
            r = server.ask(timeout=60, **request(d, t, b)).raise_for_status().json()
            same = r['prdtypecode'] == mine.prdtypecode and abs(r['probability']-mine.probability) <= .02
            if not same: raise SystemExit(f'answers differ: {r} {mine}')


def in_process(bench:Bench, seconds:float)->dict:
    "Products per second of a `Predictor` in this process, in batches."
    n,begin = 0, time.perf_counter()
    while time.perf_counter()-begin < seconds: n += len(pipeline(bench.model, bench.rows))
    return dict(per_s=n/(time.perf_counter()-begin))


def one_by_one(bench:Bench, rows:list)->list[float]:
    "Milliseconds of each listing, alone."
    def ms(row):
        begin = time.perf_counter(); bench.model.predict([bench.model.prepare(*row)])
        return 1e3*(time.perf_counter()-begin)
    return [ms(r) for r in rows]


def speed(bench:Bench, ours:RunningServer)->dict:
    "Our server, the plain app, and the predictor without a server, in turns."
    rounds,seconds = (2, 2.5) if bench.quick else (5, 10.)
    def measured():
        before = sum(map(cpu_s, ours.family())); r = bench.full(ours, seconds)
        return r | dict(work=1e3*(sum(map(cpu_s, ours.family()))-before)/r['asked'])
    with bench.plain() as plain:
        check_same(bench, ours, plain)
        in_process(bench, seconds); bench.full(ours, 1.); bench.full(plain, 1.)
        runs = dict(ours=measured, plain=partial(bench.full, plain, seconds),
                    predictor=partial(in_process, bench, seconds))
        seen = in_turns(runs, rounds, .5, lambda r: f"{r['per_s']:.1f} products/s")
    per_s = {k: [r['per_s'] for r in v] for k,v in seen.items()}
    out = dict(vs_fastapi=median_ratio(per_s['ours'], per_s['plain']),
               vs_predictor=median_ratio(per_s['ours'], per_s['predictor']),
               client_cpu_share=middle(seen['ours'], 'client'), server_cpu_ms=middle(seen['ours'], 'work'))
    out |= {f'{k}_per_s': statistics.median(v) for k,v in per_s.items()}
    out |= {f'{k}_{p}_ms': middle(seen[k], p) for k in ('ours', 'plain') for p in ('p50', 'p99')}
    rows = bench.rows[:24 if bench.quick else 64]
    wire = lambda: bench.answered(ours, clients=1, count=len(rows))['records'].ms.tolist()
    single = in_turns(dict(predictor=partial(one_by_one, bench, rows), wire=wire), rounds+1, .2)
    # the first round warms up
    alone,wire = (statistics.median(itertools.chain(*single[k][1:])) for k in ('predictor', 'wire'))
    return out | dict(overhead_ms=wire-alone, single_ms=wire, single_predictor_ms=alone)


def steady(bench:Bench, ours:RunningServer, capacity:dict)->dict:
    "Tail latency at 70 % of the capacity."
    seen,other,seconds = [], 0, 5. if bench.quick else 25.
    for seed in range(1 if bench.quick else 3):
        df = bench.load(ours, 'open', rate=.7*capacity['per_s'], seconds=seconds, seed=seed)['records']
        fine = df.status == 200; other += int((~fine).sum())
        p50,p99 = (quantile(df.ms[fine], q) for q in (.5, .99))
        seen.append(dict(ratio=p99/p50, p50=p50, p99=p99))
        say(f'  {len(df)} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms')
    return dict(p99_over_p50=middle(seen, 'ratio'), steady_p50_ms=middle(seen, 'p50'),
                steady_p99_ms=middle(seen, 'p99'), steady_other=other)


def overload(bench:Bench, ours:RunningServer, capacity:dict)->dict:
    "Ten times the capacity for some seconds, and the time after."
    per_s,runs = capacity['per_s'], []
    full = bench.full(ours, 2.5 if bench.quick else 10., ServeConfig().max_in_flight)
    for seed in range(1 if bench.quick else 3):
        r = bench.load(ours, 'burst', rate=10*per_s, seconds=4. if bench.quick else 10., seed=seed)
        runs.append(r); counts = dict(sorted(Counter(r['records'].status.tolist()).items()))
        say(f"  {r['arrived']} arrivals, {r['unsent']} not sent; {counts}; recovered after {r['recovery_s']} s")
        time.sleep(2)
    df,wall = pd.concat([r['records'] for r in runs]), sum(r['wall_s'] for r in runs)
    counts,fine,shed = Counter(df.status.tolist()), df[df.status == 200], df[df.status == 503]
    meanwhile = sum(int(((r['records'].status == 200) & (r['records'].ended <= r['end'])).sum()) for r in runs)
    recovery,p99 = [r['recovery_s'] for r in runs], quantile(fine.ms, .99)
    return dict(overload_other=sum(n for s,n in counts.items() if s not in (200, 429, 503, 504)),
                overload_by_status={s: counts[s] for s in sorted(counts)},
                shed_ms=quantile(shed.ms, .99), shed_sent_ms=quantile(1e3*(shed.ended-shed.sent), .99),
                shed_p50_ms=quantile(shed.ms, .5), overload_late_ms=quantile(1e3*(df.sent-df.due), .99),
                overload_p99_ratio=p99/capacity['p99'], overload_p99_ratio_full=p99/full['p99'], overload_p99_ms=p99,
                capacity_p99_ms=capacity['p99'], full_p99_ms=full['p99'], overload_goodput=meanwhile/wall/per_s,
                overload_factor=len(df)/wall/per_s,
                overload_client_cpu_share=sum(r['cpu_s'] for r in runs)/wall/bench.cores,
                overload_unsent=sum(r['unsent'] for r in runs), recovery_usual_ms=middle(runs, 'usual_ms'),
                recovery_s=None if None in recovery else max(recovery),
                worker_restarts=ours.metric('rakuten_worker_restarts_total'),
                unrecorded_answers=ours.metric('rakuten_unrecorded_answers'))


def memory(bench:Bench, ours:RunningServer)->dict:
    "Resident bytes as requests go by."
    step,total = (200, 1_000) if bench.quick else (1_000, 10_000)
    images,texts = itertools.cycle(bench.rows), zip(*listings(total), strict=True)
    bodies = bench.requests('mixed', ((t, d, next(images)[2] if i%10 == 0 else None) for i,(t,d) in enumerate(texts)))
    def rss(): time.sleep(.2); return tree_rss(ours.process.pid)/1e6
    seen = [rss()]
    for begin in range(0, total, step):
        bench.answered(ours, bodies=bodies, start_at=begin, clients=16, count=step)
        time.sleep(1); seen.append(statistics.median(rss() for _ in range(5)))
        say(f'  {begin+step} requests: {seen[-1]:.1f} MB')
    return dict(rss_growth=seen[-1]/seen[1]-1, rss_mb=seen)


def idle(bench:Bench, ours:RunningServer)->dict:
    "CPU time while nobody asks."
    bench.load(ours, 'closed', clients=4, count=32)
    time.sleep(2 if bench.quick else 10)
    begin,before = time.monotonic(), [(p, cpu_s(p)) for p in ours.family()]
    time.sleep(5 if bench.quick else 20)
    each = [(cpu_s(p)-was)/(time.monotonic()-begin) for p,was in before]
    return dict(idle_cpu=sum(each), idle_cpu_each=[round(x, 4) for x in each])


def swap(bench:Bench, ours:RunningServer)->dict:
    "Another champion while clients ask; the server must look at the registry every second."
    names = [f'{MODEL}/{v}' for v in bench.versions]
    bench.load(ours, 'closed', clients=16, count=64)
    process = bench.start(ours, 'closed', clients=16, versions=True, seconds=60, settle_s=3)
    time.sleep(2 if bench.quick else 5)
    moved = time.monotonic(); bench.promote(1)
    df = bench.finish(process)['records']
    counts,fine = Counter(df.version.tolist()), df[df.status == 200]
    first,before = fine.ended[fine.version == names[1]].min(), fine[fine.ended < moved]
    during = fine[(fine.ended >= moved) & (fine.ended < first)]
    return dict(swap_failed_requests=int((df.status != 200).sum()),
                swap_went_back=int(((fine.version == names[0]) & (fine.sent > first)).sum()),
                swap_both_answered=all(counts[n] for n in names), swap_s=float(first-moved), swap_requests=len(df),
                swap_by_version=dict(counts), swap_before_p99_ms=quantile(before.ms, .99),
                swap_during_p99_ms=quantile(during.ms, .99))


RUN = dict(zip(PARTS, (speed, steady, overload, memory, idle, swap), strict=True))


def bench(args, work:Path)->dict:
    "A server for each line of the plan, and its parts."
    torch.set_num_threads(n_threads())
    (size,n),capacity = (250, 64) if args.quick else (500, 256), {}
    if args.bundle:
        bundle = args.bundle.resolve()
        rows = rows_of(synthesize(work/'raw', n+n//2, 0, image_size=size, progress=False))
    else: say('training'); bundle,rows = make_bundle(work, args.quick)
    b = Bench(work, bundle, rows[:n], args.quick, args.cores)
    runtime = json.loads((bundle/'config.json').read_text())['info']['runtime'].get('image')
    out = dict(cores=n_threads(), quick=args.quick, picture_px=size, image_runtime=runtime,
               request_kb=statistics.median(len(i)*4/3e3 for *_,i in b.rows))
    for kind,some in PLAN_QUICK if args.quick else PLAN:
        if not (some := [p for p in some if p in args.only]): continue
        say(f'starting a server for {", ".join(some)}')
        with b.serve(kind) as ours:
            cpu = sum(map(cpu_s, ours.family()))
            first = b.answered(ours, clients=CLIENTS, count=CLIENTS)['records']
            ready = dict(ready_s=ours.start_s, ready_cpu_s=cpu, first_ms=first.ms.max())
            out |= {f'{kind}_{k}': v for k,v in ready.items()}
            b.full(ours, 1.)
            for part in some:
                say(part)
                loaded = part in ('steady', 'overload')
                if loaded and not capacity: capacity = b.full(ours, 3. if args.quick else 15.)
                out |= RUN[part](b, ours, *([capacity] if loaded else []))
    return out | ({'capacity_per_s': capacity['per_s']} if capacity else {})


if __name__ == '__main__':
    bundle = option('--bundle', type=Path, help='a bundle; one is trained if left out')
    main(bench, __doc__, bundle, parts=PARTS, bars=BARS, cores=2)
