"""The machinery of all benchmarks: arguments, results with machine and commit, rounds, memory, child processes.

A benchmark is a function of its arguments and an empty folder, and returns figures by name; `main` does the rest.
"""
import argparse
import inspect
import json
import math
import operator
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from rakuten_mm.core.environment import QUIET
from rakuten_mm.core.process import n_threads

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'benchmarks'/'results'
LIBRARIES = 'numpy', 'scikit-learn', 'torch', 'onnxruntime', 'pytorch-lightning', 'timm', 'litserve', 'mlflow', 'zenml'
SIGNS = {'<=': operator.le, '>=': operator.ge, '<': operator.lt, '>': operator.gt, '=': operator.eq}
CHILD = ('import importlib, json, sys; where, name, job = sys.argv[1:]; '
         'print(json.dumps(getattr(importlib.import_module(where), name)(**json.loads(job))))')


def say(*args): print(*args, file=sys.stderr, flush=True)


def option(*flags, **how)->tuple: return flags, how


def met(value:float|None, bar:str)->bool: # The bar is a sign and a number: '<= 0.15'
    sign,limit = bar.split()
    return value is not None and SIGNS[sign](value, float(limit))


def machine()->dict:
    "The machine that this runs on, without its name and paths."
    import torch
    cpus = Path('/proc/cpuinfo')
    name = re.search(r'model name\s*: (.+)', cpus.read_text()) if cpus.exists() else None
    variables = {k: v for k,v in os.environ.items() if re.match('(OMP|MKL|OPENBLAS)_', k)}
    return dict(cpu=name[1] if name else platform.processor(), instructions=torch.backends.cpu.get_cpu_capability(),
                cores=n_threads(), memory_gb=round(psutil.virtual_memory().total/1e9, 1),
                system=f'{platform.system()} {platform.machine()}', python=platform.python_version(),
                libraries={l: version(l) for l in LIBRARIES},
                threads=dict(torch=torch.get_num_threads(), **variables))


def plain(x):
    "Values as JSON has them: no infinities, no NumPy, of a path only its name, also inside a text."
    if isinstance(x, dict): return {str(k): plain(v) for k,v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    if isinstance(x, Path): return x.name
    if isinstance(x, str): return re.sub(r'(?<![\w./])/(?:[^\s/]+/)+', '', x)
    if hasattr(x, 'item'): x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def parse(name:str, doc:str, options:tuple, seeds:int, parts:tuple, cores:int)->argparse.Namespace:
    "The command line: a benchmark's own options, and those of all."
    p = argparse.ArgumentParser(prog=f'python -m benchmarks.{name}', description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for flags,how in options: p.add_argument(*flags, **how)
    if seeds: p.add_argument('--seeds', type=int, default=seeds, help=f'{seeds}; one with --quick')
    if parts: p.add_argument('--only', choices=parts, action='append', help='leave the others out; may be repeated')
    p.add_argument('--quick', action='store_true', help='small, to see that it works; the figures mean little')
    p.add_argument('--cores', type=int, default=cores, help=f'keep to so many cores ({cores or "all"})')
    result = RESULTS/f'{name}.json'
    p.add_argument('--json', type=Path, nargs='?', const=result, help=f'write the figures here (results/{name}.json)')
    p.add_argument('--work', type=Path, help='work in this folder, and leave it there')
    args = p.parse_args()
    if seeds and args.quick: args.seeds = 1
    if parts: args.only = args.only or list(parts)
    return args


def isolate(work:Path):
    "Take no setting of the project from the environment, and write into `work`."
    for k in [*os.environ]:
        if k.startswith(('API_', 'MLFLOW_', 'RAKUTEN_MM_')) and k not in QUIET: del os.environ[k]
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'artifacts')


def main(
    bench, # Called with arguments and folder, returns figures
    doc:str,
    *options, # Arguments of its own, from `option`
    seeds:int = 0, # Default of --seeds, if it has seeds
    parts:tuple = (), # Choices of --only, if it has parts
    bars:dict|None = None, # By figure
    cores:int = 0, # Default of --cores; 0 is all
    isolated:bool = True, # Not for what looks at a running system
):
    "Run a benchmark as the command line says; print its figures, and write them with machine, commit and arguments."
    name = Path(inspect.getfile(bench)).stem
    args = parse(name, doc, options, seeds, parts, cores)
    if args.cores and hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
    work = (args.work or Path(tempfile.mkdtemp(prefix=f'bench-{name}-'))).resolve()
    if isolated: isolate(work)
    from rakuten_mm.core.tracking import git_commit  # MLflow, which children must not pay for
    commit,begin = git_commit(), time.perf_counter()
    try: figures = bench(args, work)
    finally:
        if not args.work: shutil.rmtree(work, ignore_errors=True)
    seconds = round(time.perf_counter()-begin)
    show(figures, bars or {}, args.quick); print(f'{seconds} s')
    if not args.json: return
    arguments = {k: v for k,v in vars(args).items() if k not in ('json', 'work')}
    about = dict(benchmark=name, date=f'{datetime.now(UTC):%Y-%m-%d}', commit=commit, seconds=seconds,
                 arguments=arguments, machine=machine())
    args.json.write_text(json.dumps(plain(about | figures), indent=1, ensure_ascii=False)+'\n')


def show(figures:dict, bars:dict, quick:bool):
    "Print figures beside their bars; tables are left to the JSON."
    if quick and bars: print('--quick: too small for the bars to be expected')
    short = {k: f'{v:,.4f}' if isinstance(v, float) else str(v) for k,v in figures.items()}
    for k,v in short.items():
        if len(v) > 120: continue
        bar = f"   {bars[k]} {'met' if met(figures[k], bars[k]) else 'MISSED'}" if k in bars else ''
        print(f'{k:{max(map(len, short))}}  {v}{bar}')


def in_turns(
    runs:dict, # Functions by name
    rounds:int,
    pause_s:float = 0., # Before each
    tell = None, # A result as text, for a progress line a round
)->dict[str, list]: # Results by name
    "Call every function once a round, so that what slows the machine down slows all of them."
    seen = {name: [] for name in runs}
    for _ in range(rounds):
        for name,run in runs.items(): time.sleep(pause_s); seen[name].append(run())
        if tell: say('  '+', '.join(f'{name} {tell(s[-1])}' for name,s in seen.items()))
    return seen


def median_ratio(above:list[float], below:list[float])->float:
    "Median of each round's ratio."
    return statistics.median(a/b for a,b in zip(above, below, strict=True))


def tree(pid:int)->list[psutil.Process]:
    "A process and everything below it; empty if it is gone."
    try: return [p := psutil.Process(pid), *p.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def tree_rss(pid:int)->int:
    "Resident bytes of a process and everything below it; shared pages count in each."
    total = 0
    for p in tree(pid):
        with suppress(psutil.NoSuchProcess): total += p.memory_info().rss
    return total


def cpu_s(process:psutil.Process)->float:
    "CPU seconds that a process has used."
    return sum(process.cpu_times()[:2])


def start(f, job:dict, **env)->subprocess.Popen:
    "A new process that calls `f`, a function of a benchmark, with `job`, and prints what it returns."
    where = f'benchmarks.{Path(inspect.getfile(f)).stem}'
    command = [sys.executable, '-c', CHILD, where, f.__name__, json.dumps(job, default=str)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | env)


def finish(process:subprocess.Popen, timeout_s:float|None = None)->dict:
    "The result of a process from `start`; ends the run if it failed."
    try: out = process.communicate(timeout=timeout_s)[0]
    finally: process.kill()
    if process.returncode: raise SystemExit(f'a child process ended with exit code {process.returncode}')
    return json.loads(out.splitlines()[-1])


def call(f, job:dict, **env)->dict:
    "The result of `f` in a new process, with `wall_s` (start-up too) and `peak_mb` of its process tree."
    begin,peak,process = time.perf_counter(), 0, start(f, job, **env)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(finish, process)
        while not result.done(): peak = max(peak, tree_rss(process.pid)); time.sleep(.03)
    return result.result() | dict(wall_s=time.perf_counter()-begin, peak_mb=peak/1e6)
