"""Cost of ingestion: speed of checking images, memory, reruns, small deliveries, duplicate groups, kill -9.

    python -m benchmarks.ingestion --json [--rows 85000] [--raw DIR] [--only PART]

Every ingestion runs in a process of its own, whose memory is the sum of the resident sizes of its whole process tree.
The catalogues are synthetic and made anew in a temporary folder. Ratios compare things measured in this one run.
"""
import hashlib
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks.harness import call, in_turns, main, option, say, start
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.features import check_images
from rakuten_mm.data.ingestion import fingerprints_of, ingest
from rakuten_mm.data.near_duplicates import duplicate_groups
from rakuten_mm.synthetic.catalogue import synthesize

PARTS = 'images', 'deliveries', 'four', 'kills'


def ingest_once(raw_dir:str, data_dir:str)->dict:
    "Seconds and version; for a process of its own."
    begin = time.perf_counter()
    version = ingest(raw_dir, data_dir, progress=False).manifest['version']
    return dict(s=time.perf_counter()-begin, version=version)


def timed_ingest(raw_dir:Path, data_dir:Path)->dict: return call(ingest_once, dict(raw_dir=raw_dir, data_dir=data_dir))


def middle(runs)->dict:
    "The run of three that took neither the least nor the most time."
    return sorted(runs, key=lambda r: r['s'])[1]


def images_of(raw:Path)->list[str]: return sorted(map(str, (raw/'images'/'image_train').iterdir()))


def decode(paths:list[str])->int:
    "Nothing but decoding, with the same library."
    for p in paths:
        with Image.open(p) as im: im.load(); im.convert('RGB')
    return len(paths)


def check(paths:list[str], images_dir:Path|None = None)->int: return len(check_images(paths, images_dir))


def image_ratios(paths:list[str], rounds:int = 3)->dict:
    "Images per second in as many processes as cores: decoded, checked, checked and copied into a store."
    pieces = [paths[i:i+256] for i in range(0, len(paths), 256)]
    with ProcessPoolExecutor(n_threads(), mp_context=get_context('forkserver')) as pool:
        def rate(f):
            begin = time.perf_counter(); done = sum(pool.map(f, pieces))
            return done/(time.perf_counter()-begin)
        def copied():
            with tempfile.TemporaryDirectory() as d: return rate(partial(check, images_dir=Path(d)))
        for f in (decode, check): list(pool.map(f, pieces[:4]))
        seen = in_turns(dict(decode=partial(rate, decode), check=partial(rate, check), copy=copied), rounds)
    per_s = {k: statistics.median(v) for k,v in seen.items()}
    return dict(image_ratio=per_s['check']/per_s['decode'], image_ratio_with_copy=per_s['copy']/per_s['decode'],
                decoded_per_s=per_s['decode'], checked_per_s=per_s['check'])


def pairs(groups)->float:
    "Pairs of rows in one group."
    n = groups.size()
    return float((n*(n-1)/2).sum())


def group_quality(data:Dataset, raw_dir:Path)->dict:
    "Precision and recall of pairs of listings in one group, against the generator's truth."
    truth = pd.read_csv(raw_dir/'truth.csv').set_index('productid')['group']
    df = pd.DataFrame(dict(found=data.index.group, true=data.index.productid.map(truth)))
    both = pairs(df.groupby(['found', 'true']))
    return dict(group_precision=both/pairs(df.groupby('found')), group_recall=both/pairs(df.groupby('true')))


def group_seconds(data:Dataset)->float:
    keys = fingerprints_of(data.parts, data.index)
    begin = time.perf_counter(); duplicate_groups(*keys)
    return time.perf_counter()-begin


def fingerprint(data_dir:Path)->str:
    "A hash of every published byte: pointer, versions, images."
    h,published = hashlib.sha256(), ('CURRENT', 'versions', 'images')
    for p in sorted(p for p in data_dir.rglob('*') if p.is_file() and p.relative_to(data_dir).parts[0] in published):
        h.update(f'{p.relative_to(data_dir)}\0'.encode()+hashlib.sha256(p.read_bytes()).digest())
    return h.hexdigest()


def kill_points(raw_dir:Path, work:Path, n:int)->int:
    "How many of `n` ingestions killed at a random moment end, after a rerun, in the bytes of an undisturbed one."
    whole,rng,same = timed_ingest(raw_dir, work/'whole'), random.Random(0), 0
    want,home = fingerprint(work/'whole'), work/'killed'
    for _ in range(n):
        process,at = start(ingest_once, dict(raw_dir=raw_dir, data_dir=home)), rng.uniform(.1, .95)*whole['wall_s']
        time.sleep(at); process.kill(); process.communicate()
        staged = lambda: list(home.glob('.stage-*'))
        where = 'in the middle of a version' if staged() else 'outside of one'
        timed_ingest(raw_dir, home)
        ok = fingerprint(home) == want and not staged()
        say(f'  killed after {at:.2f} s ({where}): {"same bytes" if ok else "DIFFERENT"}')
        same += ok; shutil.rmtree(home)
    return same


def deliveries(raw:Path, later:list[Path], work:Path, rows:int)->dict:
    "A first ingestion, the same again, and three deliveries of 1 % new rows."
    say('first ingestion'); first = timed_ingest(raw, work/'data')
    say('rerun, three times'); rerun = middle(timed_ingest(raw, work/'data') for _ in range(3))
    assert rerun['version'] == first['version']
    data = Dataset.open(work/'data')
    out = group_quality(data, raw) | dict(group_seconds=group_seconds(data))
    say('three deliveries of 1 % new rows'); delivery = middle(timed_ingest(d, work/'data') for d in later)
    assert len(Dataset.open(work/'data').index) == rows+3*max(1, rows//100)
    shutil.rmtree(work/'data')
    return out | dict(
        first_s=first['s'], rows_per_s=rows/first['s'], rerun_s=rerun['s'], rerun_speedup=first['s']/rerun['s'],
        delivery_s=delivery['s'], delivery_over_first=delivery['s']/first['s'],
        rerun_speedup_with_startup=first['wall_s']/rerun['wall_s'],
        delivery_over_first_with_startup=delivery['wall_s']/first['wall_s'], peak_rss_mb=first['peak_mb'])


def four_times(raw:Path, work:Path, first:dict)->dict:
    "What grows with four times the rows of the first ingestion."
    four = timed_ingest(raw, work/'data4')
    seconds = group_seconds(Dataset.open(work/'data4'))
    shutil.rmtree(work/'data4')
    return dict(peak_rss_mb_4x=four['peak_mb'], peak_rss_growth=four['peak_mb']/first['peak_rss_mb'], four_s=four['s'],
                group_seconds_4x=seconds, group_seconds_growth=seconds/first['group_seconds'])


def bench(args, work:Path)->dict:
    rows,size = 3_000 if args.quick else args.rows, args.image_size
    made = partial(synthesize, n_test=0, progress=False)
    say(f'making {rows:,} listings'); begin = time.perf_counter()
    raw,few = made(work/'raw', rows, image_size=size, total=2*rows), max(1, rows//100)
    later = [made(work/f'next{k}', few, start=rows+k*few, total=2*rows, image_size=size) for k in range(3)]
    out = dict(rows=rows, image_size=size, cores=n_threads(), synthesis_s=time.perf_counter()-begin)
    small = made(work/'small', 3_000, image_size=128)
    if 'images' in args.only:
        say('checking images')
        out |= image_ratios(images_of(raw)[:8_000])
        out |= {f'{k}_128px': v for k,v in image_ratios(images_of(small)).items()}
        if args.raw: out |= {f'{k}_raw': v for k,v in image_ratios(images_of(args.raw)).items()}
    if {'deliveries', 'four'} & {*args.only}: out |= deliveries(raw, later, work, rows)
    shutil.rmtree(raw)
    if 'four' in args.only:
        say(f'four times the rows: making {4*rows:,} listings')
        raw = made(work/'raw4', 4*rows, image_size=min(64, size))
        say('ingesting them'); out |= four_times(raw, work, out)
        shutil.rmtree(raw)
    if 'kills' in args.only:
        say('kill -9 at ten random points'); out['killed_then_same_bytes'] = kill_points(small, work, 10)
    return out


if __name__ == '__main__':
    main(bench, __doc__, option('--rows', type=int, default=85_000, help='%(default)s, as in the challenge'),
         option('--image-size', type=int, default=500, help='side of the images in pixels (500, as in the challenge)'),
         option('--raw', type=Path, help='also check the images of this delivery'), parts=PARTS)
