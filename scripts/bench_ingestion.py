"""Cost of ingestion: speed of checking pictures, memory, reruns, small deliveries, duplicate groups, kill -9.

    python scripts/bench_ingestion.py --rows 85000 --json out.json [--raw DIR]

Every ingestion runs in a process of its own, whose memory is the sum of the resident sizes of its whole process tree. The
catalogues are synthetic and made anew in a temporary folder. Ratios compare things measured in this one run.
"""
import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import psutil
from PIL import Image

from rakuten_mm.core.config import load_environment, n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.features import check_pictures
from rakuten_mm.data.ingestion import fingerprints_of
from rakuten_mm.data.near_duplicates import duplicate_groups
from rakuten_mm.synthetic.catalogue import synthesize

INGEST = '''
import json, sys, time
from rakuten_mm.core.config import load_environment
load_environment('no.env')
from rakuten_mm.data.ingestion import ingest
start = time.perf_counter()
m = ingest(sys.argv[1], sys.argv[2], progress=False).manifest
print(json.dumps(dict(s=time.perf_counter()-start, version=m['version'], rows=m['rows'], groups=m['groups'])))
'''


def say(*args): print(*args, file=sys.stderr, flush=True)


def tree_rss(pid:int)->int:
    "Resident bytes of a process and everything below it; shared pages count in each."
    total = 0
    try: processes = [p := psutil.Process(pid), *p.children(recursive=True)]
    except psutil.NoSuchProcess: return 0
    for p in processes:
        try: total += p.memory_info().rss
        except psutil.NoSuchProcess: pass
    return total


def timed_ingest(raw_dir:Path, data_dir:Path)->dict:
    "Ingest in a new process: s (inside `ingest`), wall_s (with start-up), peak_mb."
    start,peak = time.perf_counter(), [0]
    process = subprocess.Popen([sys.executable, '-c', INGEST, str(raw_dir), str(data_dir)], stdout=subprocess.PIPE, text=True)
    def watch():
        while process.poll() is None: peak[0] = max(peak[0], tree_rss(process.pid)); time.sleep(.03)
    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    watcher.join()
    if process.returncode: raise SystemExit(f'ingestion failed with exit code {process.returncode}')
    return json.loads(out) | dict(wall_s=time.perf_counter()-start, peak_mb=peak[0]/1e6)


def median(runs)->dict:
    "The run that took neither the least nor the most time."
    return sorted(runs, key=lambda r: r['s'])[1]


def decode(paths:list[str])->int:
    "Nothing but decoding, with the same library."
    for p in paths:
        with Image.open(p) as im: im.load(); im.convert('RGB')
    return len(paths)


def check(paths:list[str])->int: return len(check_pictures(paths, None))


def check_and_store(paths:list[str], images_dir:str)->int: return len(check_pictures(paths, Path(images_dir)))


def image_ratios(paths:list[str], rounds:int)->dict:
    "Pictures per second in two processes: decoded, checked, checked and copied into a store; rounds are interleaved."
    pieces,rates = [paths[i:i+256] for i in range(0, len(paths), 256)], {'decode': [], 'check': [], 'copy': []}
    with ProcessPoolExecutor(n_threads(), mp_context=get_context('forkserver')) as pool:
        for f in (decode, check): list(pool.map(f, pieces[:4]))
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as d:
                for name,f in dict(decode=decode, check=check, copy=partial(check_and_store, images_dir=d)).items():
                    start = time.perf_counter(); done = sum(pool.map(f, pieces))
                    rates[name].append(done/(time.perf_counter()-start))
    rate = {k: statistics.median(v) for k,v in rates.items()}
    return dict(image_ratio=rate['check']/rate['decode'], image_ratio_with_copy=rate['copy']/rate['decode'],
                decoded_per_s=rate['decode'], checked_per_s=rate['check'])


def pairs(sizes)->float: return float((sizes*(sizes-1)/2).sum())


def group_quality(data:Dataset, raw_dir:Path)->dict:
    "Precision and recall of pairs of listings in one group, against the generator's truth."
    truth = pd.read_csv(raw_dir/'truth.csv').set_index('productid')['group']
    df = pd.DataFrame(dict(found=data.index.group, true=data.index.productid.map(truth)))
    both = pairs(df.groupby(['found', 'true']).size())
    return dict(group_precision=both/pairs(df.groupby('found').size()), group_recall=both/pairs(df.groupby('true').size()))


def group_seconds(data:Dataset)->float:
    keys = fingerprints_of(data.parts, data.index)
    start = time.perf_counter(); duplicate_groups(*keys)
    return time.perf_counter()-start


def fingerprint(data_dir:Path)->str:
    "A hash of every published byte: pointer, versions, pictures."
    h = hashlib.sha256()
    for p in sorted(p for p in data_dir.rglob('*') if p.is_file() and p.relative_to(data_dir).parts[0] in ('CURRENT', 'versions', 'images')):
        h.update(f'{p.relative_to(data_dir)}\0'.encode()+hashlib.sha256(p.read_bytes()).digest())
    return h.hexdigest()


def kill_points(raw_dir:Path, work:Path, n:int, seed:int=0)->int:
    "How many of `n` ingestions killed at a random moment end, after a rerun, in the bytes of an undisturbed one."
    whole = timed_ingest(raw_dir, work/'whole')
    want,rng,same = fingerprint(work/'whole'), random.Random(seed), 0
    for i in range(n):
        process = subprocess.Popen([sys.executable, '-c', INGEST, str(raw_dir), str(work/f'killed{i}')], stdout=subprocess.DEVNULL)
        at = rng.uniform(.1, .95)*whole['wall_s']
        time.sleep(at)
        process.kill(); process.wait()
        left = len(list((work/f'killed{i}').glob('.stage-*')))
        timed_ingest(raw_dir, work/f'killed{i}')
        ok = fingerprint(work/f'killed{i}') == want and not list((work/f'killed{i}').glob('.stage-*'))
        say(f'  killed after {at:.2f} s ({"in the middle of a version" if left else "outside of one"}): {"same bytes" if ok else "DIFFERENT"}')
        same += ok; shutil.rmtree(work/f'killed{i}')
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=85_000)
    parser.add_argument('--image-size', type=int, default=500, help='side of the synthetic pictures in pixels (500, as in the challenge)')
    parser.add_argument('--raw', type=Path, help='also check the pictures of this delivery')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--quick', action='store_true', help='3,000 rows, to see that it works (figures mean little)')
    parser.add_argument('--keep', type=Path, help='work in this folder and leave it')
    args = parser.parse_args()
    load_environment('no.env')
    rows = 3_000 if args.quick else args.rows
    work = args.keep or Path(tempfile.mkdtemp(prefix='bench-ingestion-'))
    try: result = bench(work, rows, args)
    finally:
        if not args.keep: shutil.rmtree(work, ignore_errors=True)
    width = max(map(len, result))
    for k,v in result.items(): print(f'{k:{width}}  {v:,.3f}' if isinstance(v, float) else f'{k:{width}}  {v}')
    if args.json: args.json.write_text(json.dumps(result, indent=1))


def bench(work:Path, rows:int, args)->dict:
    out = dict(rows=rows, image_size=args.image_size, cores=n_threads())
    say(f'making {rows:,} listings'); start = time.perf_counter()
    synthesize(work/'raw', rows, 0, image_size=args.image_size, total=2*rows, progress=False)
    few = max(1, rows//100)
    for k in range(3): synthesize(work/f'next{k}', few, 0, start=rows+k*few, total=2*rows, image_size=args.image_size, progress=False)
    out['synthesis_s'] = time.perf_counter()-start

    say('checking pictures'); rounds = 3
    paths = sorted(str(p) for p in (work/'raw'/'images'/'image_train').iterdir())[:8_000]
    out |= image_ratios(paths, rounds)
    synthesize(work/'small', 3_000, 0, image_size=128, progress=False)
    small = image_ratios(sorted(str(p) for p in (work/'small'/'images'/'image_train').iterdir()), rounds)
    out |= {f'{k}_128px': v for k,v in small.items()}
    if args.raw: out |= {f'{k}_raw': v for k,v in image_ratios(sorted(str(p) for p in (args.raw/'images'/'image_train').iterdir()), rounds).items()}

    say('first ingestion'); first = timed_ingest(work/'raw', work/'data')
    say('rerun, three times'); rerun = median(timed_ingest(work/'raw', work/'data') for _ in range(3))
    assert rerun['version'] == first['version']
    data = Dataset.open(work/'data')
    out |= group_quality(data, work/'raw')
    seconds = group_seconds(data)
    say('three deliveries of 1 % new rows'); delivery = median(timed_ingest(work/f'next{k}', work/'data') for k in range(3))
    assert len(Dataset.open(work/'data').index) == rows+3*few
    out |= dict(first_s=first['s'], rows_per_s=rows/first['s'], rerun_s=rerun['s'], rerun_speedup=first['s']/rerun['s'], delivery_s=delivery['s'],
                delivery_over_first=delivery['s']/first['s'], rerun_speedup_with_startup=first['wall_s']/rerun['wall_s'],
                delivery_over_first_with_startup=delivery['wall_s']/first['wall_s'], peak_rss_mb=first['peak_mb'])
    shutil.rmtree(work/'data'); shutil.rmtree(work/'raw')

    say(f'four times the rows: making {4*rows:,} listings')
    synthesize(work/'raw4', 4*rows, 0, image_size=min(64, args.image_size), progress=False)
    say('ingesting them'); four = timed_ingest(work/'raw4', work/'data4')
    seconds4 = group_seconds(Dataset.open(work/'data4'))
    out |= dict(peak_rss_mb_4x=four['peak_mb'], peak_rss_growth=four['peak_mb']/first['peak_mb'], four_s=four['s'],
                group_seconds=seconds, group_seconds_4x=seconds4, group_seconds_growth=seconds4/seconds)
    shutil.rmtree(work/'raw4'); shutil.rmtree(work/'data4')

    say('kill -9 at ten random points')
    out['killed_then_same_bytes'] = kill_points(work/'small', work, 10)
    return out


if __name__ == '__main__': main()
