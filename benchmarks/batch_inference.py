"""Speed, memory and endurance of `rakuten-mm predict`, from a list of products with pictures to a file of answers.

    python -m benchmarks.batch_inference --json [--rows 100000] [--before FOLDER] [--quick]

Every run is the command in a process of its own, start-up included, on synthetic listings with one model. `speedup`
compares the listings per second with those of another checkout, FOLDER, run by turns on the same list: e.g. after
`git worktree add FOLDER 6dd6e26`, the last commit without shards. Its answers must be the same. `rss_growth` is the
peak memory for the whole list over that for its first 5,000 listings. A run of those is killed at three random moments
and given again each time: its files must have the bytes of an undisturbed one.
"""
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from benchmarks.harness import ROOT, in_turns, main, option, say, tree_rss
from rakuten_mm.core.config import preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.synthetic.catalogue import synthesize
from rakuten_mm.training.export import export
from rakuten_mm.training.fit import fit

BARS = dict(speedup='>= 1.3', rss_growth='<= 1.05', killed_then_same_bytes='= 3')


def start(bundle:Path, products:Path, out:Path, checkout:Path = ROOT)->subprocess.Popen:
    "The command, as a checkout has it."
    images = products.parent/'images'/'image_test'
    command = [sys.executable, '-m', 'rakuten_mm', 'predict', '--bundle', bundle, '--products', products,
               '--images', images, '--out', out]
    return subprocess.Popen(command, cwd=checkout, env=os.environ | dict(PYTHONPATH=str(checkout)),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def predict(bundle:Path, products:Path, out:Path, checkout:Path = ROOT)->dict:
    "Wall and CPU seconds and the peak memory of a run."
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    begin,cpu,peak,process = time.perf_counter(), used(), 0, start(bundle, products, out, checkout)
    while process.poll() is None: peak = max(peak, tree_rss(process.pid)); time.sleep(.03)
    if process.returncode: raise SystemExit(f'predict of {checkout} ended with exit code {process.returncode}')
    return dict(s=time.perf_counter()-begin, cpu_s=used()-cpu, peak_mb=peak/1e6)


def first(products:Path, rows:int)->Path:
    "A list of the first listings, beside the whole."
    out = products.with_name('few.csv')
    df = pd.read_csv(products, dtype=str, keep_default_na=False, nrows=rows)
    df.rename(columns={'Unnamed: 0': ''}).to_csv(out, index=False)
    return out


def kill_points(bundle:Path, products:Path, whole:dict, want:Path, work:Path, n:int)->dict:
    "How many of `n` runs killed at a random moment end, given again, in the right bytes; and what was left to do."
    rng,out,same,left = random.Random(0), work/'killed.csv', 0, []
    for _ in range(n):
        at,process = rng.uniform(.4, .95)*whole['s'], start(bundle, products, out)
        time.sleep(at); process.kill(); process.wait()
        kept = len([*work.glob('.killed.csv.parts/*/*.parquet')])
        assert not out.exists() or not kept
        again = predict(bundle, products, out)
        ok = out.read_bytes() == want.read_bytes()
        same += ok; left.append(again['cpu_s']/whole['cpu_s'])
        what = 'same bytes' if ok else 'DIFFERENT'
        say(f"  killed after {at:.1f} s with {kept} shards kept: {what}, after {again['s']:.1f} s more")
        out.unlink()
    return dict(killed_then_same_bytes=same, resumed_cpu_share=left)


def largest_difference(a:Path, b:Path)->float:
    "Of the probabilities in two files of the same listings; ends the run if a category differs."
    a,b = (pd.read_csv(p, usecols=['id', 'prdtypecode', 'probability']) for p in (a, b))
    if not a.id.equals(b.id): raise SystemExit('the files are of other listings')
    far = (a.prdtypecode != b.prdtypecode) & ((a.probability-b.probability).abs() > 1e-5)
    if far.any(): raise SystemExit(f'{far.sum()} categories differ')
    return float((a.probability-b.probability).abs().max())


def bench(args, work:Path)->dict:
    rows,few,name,size = (2_500, 2_200, 'smoke', 64) if args.quick else (args.rows, 5_000, args.preset, args.image_size)
    say(f'making {rows:,} listings')
    raw = synthesize(work/'raw', 240 if args.quick else 1_200, rows, image_size=size, progress=False)
    say('training'); ingest(raw, work/'data', progress=False); data = Dataset.open(work/'data')
    bundle = export(fit(data, preset(name), work/'run', progress=False), data, work/'run')
    whole,part = raw/'X_test_update.csv', first(raw/'X_test_update.csv', few)

    checkouts = dict(now=ROOT) | (dict(before=args.before.resolve()) if args.before else {})
    say(f"predicting, {' and '.join(checkouts)} in turns")
    runs = {k: lambda k=k, c=c: predict(bundle, whole, work/f'{k}.csv', c) for k,c in checkouts.items()}
    seen = {k: v[0] for k,v in in_turns(runs, 1, tell=lambda r: f"{r['s']:.0f} s").items()}
    out = dict(rows=rows, preset=name, image_size=size, rows_per_s=rows/seen['now']['s'],
               rows_per_cpu_s=rows/seen['now']['cpu_s'], peak_rss_mb=seen['now']['peak_mb'])
    if args.before:
        out |= dict(before_rows_per_s=rows/seen['before']['s'], before_peak_rss_mb=seen['before']['peak_mb'],
                    speedup=seen['before']['s']/seen['now']['s'],
                    cpu_ratio=seen['before']['cpu_s']/seen['now']['cpu_s'],
                    largest_difference=largest_difference(work/'before.csv', work/'now.csv'))

    say(f'the first {few:,}'); small = predict(bundle, part, work/'few.csv')
    out |= dict(few=few, few_peak_rss_mb=small['peak_mb'], rss_growth=out['peak_rss_mb']/small['peak_mb'])
    say('kill -9'); out |= kill_points(bundle, part, small, work/'few.csv', work, 1 if args.quick else 3)
    for folder in (raw, work/'data'): shutil.rmtree(folder)
    return out


if __name__ == '__main__':
    main(bench, __doc__, option('--rows', type=int, default=100_000),
         option('--preset', default='smoke', help='of the model (%(default)s; cpu takes hours for so many)'),
         option('--image-size', type=int, default=500, help='side of the images in pixels (500, as in the challenge)'),
         option('--before', type=Path, help='also measure this checkout'), bars=BARS, cores=2)
