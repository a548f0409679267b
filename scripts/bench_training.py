"""Cost of training: with stored vectors, after 1 % new listings, and of fine-tuning over the bare arithmetic; memory.

    python scripts/bench_training.py --data DIR --json out.json [--quick]

DIR is a delivery in the challenge's format; without it the listings are synthetic. It is ingested into a temporary folder in
two parts, 99 % and 1 %. Every training runs in a process of its own, after a small one on other data, so that imports and first
calls do not count. Ratios compare things measured in this one run; with several rounds they are medians of each round's ratio.

warm_over_cold   `fit` on the 99 % with all vectors stored, over the same with an empty store
delta_over_cold  `fit` after the 1 % came, going on from the first training (`init`), over the same
epoch_over_bare  the training batches of an epoch of fine-tuning an image encoder through Lightning, from the files on the
                 disk, over forward, backward and optimiser step of the same batches in memory; epochs alternate
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import wraps
from pathlib import Path

import pandas as pd
from bench_ingestion import say, tree_rss

from rakuten_mm.core.config import PRESETS, EncoderConfig, FitConfig, NetworkConfig, TrainConfig, load_environment, n_threads, preset
from rakuten_mm.data.dataset import Dataset


class Stopwatch:
    "Seconds by phase; what happens in an inner phase does not count for the outer one."
    def __init__(self): self.seconds,self.inner = Counter(), [0.]

    @contextmanager
    def phase(self, name:str):
        start = time.perf_counter(); self.inner.append(0.)
        try: yield
        finally:
            took = time.perf_counter()-start
            self.seconds[name] += took-self.inner.pop(); self.inner[-1] += took

    def watch(self, owner, attribute:str, name:str):
        "Count every call of `owner.attribute` from now on as `name`."
        f = getattr(owner, attribute)
        @wraps(f)
        def timed(*args, **kwargs):
            with self.phase(name): return f(*args, **kwargs)
        setattr(owner, attribute, timed)


def watch_training()->Stopwatch:
    from rakuten_mm.models import embeddings as embedding
    from rakuten_mm.models import inputs as batches
    from rakuten_mm.models import network
    from rakuten_mm.training import datamodule
    from rakuten_mm.training import fit as fitting
    w = Stopwatch()
    w.watch(embedding.EmbeddingStore, 'fill', 'embedding')
    w.watch(batches, 'encoder_fingerprint', 'fingerprint')
    w.watch(network.NgramEncoder, 'fit', 'lsa')
    w.watch(network.NgramEncoder, 'matrix', 'ngrams')
    w.watch(batches, 'project', 'ngrams')
    w.watch(datamodule.LinearExpert, 'cross_fit', 'linear')
    w.watch(fitting, 'run_epochs', 'epochs')
    for f in ('fit_stack', 'answers', 'fit_triage'): w.watch(fitting, f, 'stack')
    w.watch(fitting, 'fit', 'rest')
    return w


def child(job:dict):
    "Warm up on other data, then train once; prints seconds, by phase too."
    from rakuten_mm.models.bundle import save_bundle
    from rakuten_mm.training import fit as fitting
    home = os.environ['RAKUTEN_MM_ARTIFACTS']
    with tempfile.TemporaryDirectory() as d:
        os.environ['RAKUTEN_MM_ARTIFACTS'] = d
        cfg = preset(job['preset'])
        if job['quick']: cfg = replace(cfg, fit=replace(cfg.fit, max_epochs=5, min_steps=0))
        light = replace(cfg, network=replace(cfg.network, dim=32), fit=replace(cfg.fit, max_epochs=1, min_steps=0))
        small = Dataset.open(job['warm_up'])
        learnt,fitting.check_learnt = fitting.check_learnt, lambda *args: None  # one epoch on a few listings need not learn
        fitting.fit(small, light, Path(d)/'out', progress=False)
    os.environ['RAKUTEN_MM_ARTIFACTS'] = home
    if not job['quick']: fitting.check_learnt = learnt
    data,watch = Dataset.open(job['data'], job['version']), watch_training()
    fitted = fitting.fit(data, cfg, Path(job['out']), progress=False, init=job['init'])
    save_bundle(Path(job['out'])/'bundle', fitted.net, fitted.codes, fitted.names)  # to go on from; `export` measures runtimes besides
    fitted.oof.to_parquet(Path(job['out'])/'oof.parquet')
    print(json.dumps(dict(s=fitted.seconds, phases=dict(watch.seconds), epochs=len(fitted.history), f1_weighted=fitted.val['f1_weighted'])))


def timed_fit(artifacts:Path, **job)->dict:
    "Train in a new process whose vectors are stored below `artifacts`: s, phases, peak_mb."
    env,peak = os.environ | dict(RAKUTEN_MM_ARTIFACTS=str(artifacts)), [0]
    process = subprocess.Popen([sys.executable, __file__, '--child', json.dumps(job, default=str)], stdout=subprocess.PIPE, text=True, env=env)
    def watch():
        while process.poll() is None: peak[0] = max(peak[0], tree_rss(process.pid)); time.sleep(.05)
    watcher = threading.Thread(target=watch)
    watcher.start()
    out = process.communicate()[0]
    watcher.join()
    if process.returncode: raise SystemExit(f'training failed with exit code {process.returncode}')
    return json.loads(out.splitlines()[-1]) | dict(peak_mb=peak[0]/1e6)


def split_delivery(raw_dir:Path, work:Path, share:float=.01, seed:int=0)->tuple[Path, Path]:
    "The delivery as two, the second with `mark_seen` of the listings; pictures are linked, not copied."
    x,y = (next(iter(raw_dir.glob(f'{c}_train*.csv')), None) for c in 'XY')
    if not (x and y): raise SystemExit(f"{raw_dir} holds no X_train*.csv and Y_train*.csv; --data takes a delivery in the challenge's format")
    listings,labels = (pd.read_csv(p, dtype=str, keep_default_na=False, index_col=0) for p in (x, y))
    late = listings.sample(frac=share, random_state=seed).index
    out = []
    for name,rows in (('most', listings.index.difference(late, sort=False)), ('late', late)):
        folder = work/name; images = folder/'images'/'image_train'
        images.mkdir(parents=True); out.append(folder)
        listings.loc[rows].to_csv(folder/x.name); labels.loc[rows].to_csv(folder/y.name)
        if (raw_dir/'classes.csv').exists(): shutil.copy(raw_dir/'classes.csv', folder)
        for r in listings.loc[rows].itertuples():
            file = f'image_{r.imageid}_product_{r.productid}.jpg'
            if (raw_dir/'images'/'image_train'/file).exists(): (images/file).symlink_to((raw_dir/'images'/'image_train'/file).resolve())
    return tuple(out)


def stored_vectors(work:Path, data_dir:Path, versions:tuple, warm_up:Path, name:str, rounds:int, quick:bool)->dict:
    "Cold, warm and delta trainings, in turn."
    seen = {k: [] for k in ('cold', 'warm', 'delta')}
    for r in range(rounds):
        artifacts = work/f'artifacts{r}'
        job = dict(data=data_dir, warm_up=warm_up, preset=name, quick=quick)
        for kind in seen:
            seen[kind].append(timed_fit(artifacts, **job, version=versions[kind == 'delta'], out=artifacts/kind,
                                        init=artifacts/'cold' if kind == 'delta' else ''))
            say(f"  {kind}: {seen[kind][-1]['s']:.1f} s  "+'  '.join(f'{k} {v:.1f}' for k,v in seen[kind][-1]['phases'].items()))
        shutil.rmtree(artifacts)
    middle = lambda values: statistics.median(values)
    out = {f'{k}_over_cold': middle([a['s']/c['s'] for a,c in zip(seen[k], seen['cold'], strict=True)]) for k in ('warm', 'delta')}
    for k,runs in seen.items():
        out[f'{k}_s'] = middle([r['s'] for r in runs])
        for p in sorted({p for r in runs for p in r['phases']}): out[f'{k}_{p}_s'] = middle([r['phases'].get(p, 0.) for r in runs])
        out |= {f'{k}_epochs': runs[0]['epochs'], f'{k}_val_f1_weighted': runs[0]['f1_weighted'], f'{k}_peak_rss_mb': max(r['peak_mb'] for r in runs)}
    return out | dict(peak_rss_mb=max(r['peak_mb'] for runs in seen.values() for r in runs))


def bare_epoch(net, opt, batches:list[dict], autocast, smoothing:float)->float:
    "Seconds of forward, backward and optimiser step over `batches`."
    import torch.nn.functional as F
    start = time.perf_counter()
    for b in batches:
        opt.zero_grad()
        with autocast():
            logits = net(b)
            loss = F.cross_entropy(logits.reshape(-1, net.n_classes), b['target'].repeat(logits.shape[0]*logits.shape[1]), label_smoothing=smoothing)
        loss.backward(); opt.step()
    return time.perf_counter()-start


def fine_tuning(work:Path, data:Dataset, rows:int, size:int, epochs:int)->dict:
    "Epochs of fine-tuning, each followed by a bare one over the same batches."
    import pytorch_lightning as pl
    import torch

    from rakuten_mm.models.network import build_network
    from rakuten_mm.training.datamodule import ProductDataModule
    from rakuten_mm.training.fit import make_trainer
    from rakuten_mm.training.lightning_module import ProductClassifier, encoder_groups
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'fine-tuning')
    cfg = TrainConfig(EncoderConfig(ngrams=False, text=None, image_size=size, train_image=True), NetworkConfig(members=1), FitConfig(batch_size=32))
    df = data.products
    keep = df[df.split == 'train'].sample(frac=1, random_state=0).head(rows)
    data.__dict__['products'] = pd.concat([keep, df[df.split == 'val'].head(max(32, rows//10))])
    codes = sorted(int(c) for c in data.products.prdtypecode.unique())
    torch.set_num_threads(n_threads()); pl.seed_everything(0, verbose=False)
    net = build_network(cfg, [], [], len(codes))
    dm = ProductDataModule(data, net, codes, work/'fine-tuning'/'store', progress=False)
    dm.setup()
    bare = deepcopy(net)
    fast = [p for n,p in bare.named_parameters() if not n.startswith('image.') and p.requires_grad]
    opt = torch.optim.AdamW([dict(params=fast, lr=cfg.fit.lr), *encoder_groups(bare.image, cfg.fit)], fused=True)
    trainer = make_trainer(cfg, work/'fine-tuning', '', False, epochs)
    mixed = str(trainer.precision).startswith('bf16')
    autocast = lambda: torch.autocast('cpu', torch.bfloat16, enabled=mixed)
    ours,plain,whole,loading = [], [], [], []

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *args):
            sampler = dm.train_dataloader().sampler
            sampler.set_epoch(trainer.current_epoch)
            start = time.perf_counter(); batches = [dm.splits['train'][i] for i in sampler]; loading.append(time.perf_counter()-start)
            if trainer.current_epoch: plain.append(bare_epoch(bare, opt, batches, autocast, cfg.fit.label_smoothing))
            else: bare_epoch(bare, opt, batches[:2], autocast, cfg.fit.label_smoothing)
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args): self.last = time.perf_counter()

        def on_train_epoch_end(self, *args):  # after validation
            if trainer.current_epoch: ours.append(self.last-self.start); whole.append(time.perf_counter()-self.start)

    trainer.callbacks.insert(0, Clock())
    trainer.fit(ProductClassifier(net), dm)
    middle = statistics.median
    return dict(epoch_over_bare=middle([a/b for a,b in zip(ours, plain, strict=True)]), epoch_s=middle(ours), bare_epoch_s=middle(plain),
                epoch_with_validation_s=middle(whole), decoding_s=middle(loading), epoch_rows=len(keep), epoch_image_size=size,
                epoch_precision=str(trainer.precision))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help="a delivery in the challenge's format; synthetic listings if left out")
    parser.add_argument('--preset', choices=list(PRESETS), default='cpu')
    parser.add_argument('--rounds', type=int, default=3, help='cold, warm and delta trainings, so many times in turn')
    parser.add_argument('--only', choices=['stored', 'fine-tuning'], help='only this half')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--quick', action='store_true', help='one round and few epochs, to see that it works (figures mean little)')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    args = parser.parse_args()
    load_environment('no.env')
    if args.child: child(json.loads(args.child)); return
    work = Path(tempfile.mkdtemp(prefix='bench-training-'))
    try: result = bench(work, args)
    finally: shutil.rmtree(work, ignore_errors=True)
    width = max(map(len, result))
    for k,v in result.items(): print(f'{k:{width}}  {v:,.3f}' if isinstance(v, float) else f'{k:{width}}  {v}')
    if args.json: args.json.write_text(json.dumps(result, indent=1))


def bench(work:Path, args)->dict:
    from rakuten_mm.data.ingestion import ingest
    from rakuten_mm.synthetic.catalogue import synthesize
    if not args.data:
        say('making listings')
        synthesize(work/'raw', 600 if args.quick else 4_000, 0, image_size=224, progress=False)
    synthesize(work/'other', 200, 0, seed=7, progress=False)
    ingest(work/'other', work/'other-data', progress=False)
    most,late = split_delivery((args.data or work/'raw').resolve(), work)
    say('ingesting')
    versions = tuple(ingest(part, work/'data', progress=False).manifest['version'] for part in (most, late))
    rows = [len(Dataset.open(work/'data', v).products) for v in versions]
    out = dict(rows=rows[0], new_rows=rows[1]-rows[0], preset=args.preset, cores=n_threads())
    if args.only != 'fine-tuning':
        say('training with an empty store, with a full one, after new listings')
        out |= stored_vectors(work, work/'data', versions, work/'other-data', args.preset, 1 if args.quick else args.rounds, args.quick)
    if args.only != 'stored':
        say('fine-tuning')
        out |= fine_tuning(work, Dataset.open(work/'data'), 96 if args.quick else 192, 96, 3 if args.quick else 5)
    return out


if __name__ == '__main__': main()
