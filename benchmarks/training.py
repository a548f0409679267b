"""Cost of training: with stored vectors, after 1 % new listings, and of fine-tuning over the bare arithmetic; memory.

    python -m benchmarks.training --data DIR --json [--quick]

DIR is a delivery in the challenge's format; without it the listings are synthetic. It is ingested into a temporary
folder in two parts, 99 % and 1 %. Every training runs in a process of its own, after a small one on other data, so
that imports and first calls do not count. Ratios compare things measured in this one run; with several rounds they
are medians of each round's ratio.

warm_over_cold   `fit` on the 99 % with all vectors stored, over the same with an empty store
delta_over_cold  `fit` after the 1 % came, going on from the first training (`init`), over the same
epoch_over_bare  the training batches of an epoch of fine-tuning an image encoder through Lightning, from the files on
                 the disk, over forward, backward and optimiser step of the same batches in memory; epochs alternate
"""
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from benchmarks.harness import call, in_turns, main, median_ratio, option, say
from rakuten_mm.core.config import PRESETS, EncoderConfig, FitConfig, NetworkConfig, TrainConfig, preset
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.models import embeddings, inputs, network
from rakuten_mm.models.bundle import save_bundle
from rakuten_mm.models.lda import LDAExpert
from rakuten_mm.models.network import build_network
from rakuten_mm.synthetic.catalogue import synthesize
from rakuten_mm.training import datamodule
from rakuten_mm.training import fit as fitting
from rakuten_mm.training.datamodule import ProductDataModule
from rakuten_mm.training.devices import choose_devices
from rakuten_mm.training.lightning_module import ProductClassifier, encoder_groups

PARTS = 'stored', 'fine-tuning'
KINDS = 'cold', 'warm', 'delta'
BARS = dict(warm_over_cold='<= 0.10', delta_over_cold='<= 0.05')
PHASES = [(embeddings.EmbeddingStore, 'fill', 'embedding'), (inputs, 'encoder_fingerprint', 'fingerprint'),
          (network.NgramEncoder, 'fit', 'lsa'), (network.NgramEncoder, 'matrix', 'ngrams'),
          (inputs, 'project_ngrams', 'ngrams'), (datamodule.LinearExpert, 'cross_fit', 'linear'),
          (datamodule.ProductDataModule, 'fit_scale', 'whitening'), (LDAExpert, 'fit', 'lda'),
          (fitting, 'frozen_runtime', 'graph'), (network.NgramEncoder, 'matrices', 'ngrams'),
          (fitting, 'run_epochs', 'epochs'), (fitting, 'fit_stack', 'stack'), (fitting, 'out_of_fold_probs', 'stack'),
          (fitting, 'fit_triage', 'stack'), (fitting, 'fit', 'rest')]


class Stopwatch:
    "Seconds by phase; time in an inner phase does not count for the outer one."
    def __init__(self): self.seconds,self.inner = Counter(), [0.]

    @contextmanager
    def phase(self, name:str):
        begin = time.perf_counter(); self.inner.append(0.)
        try: yield
        finally:
            took = time.perf_counter()-begin
            self.seconds[name] += took-self.inner.pop(); self.inner[-1] += took

    def watch(self, owner, attribute:str, name:str):
        "Count every call of `owner.attribute` from now on as `name`."
        f = getattr(owner, attribute)
        @wraps(f)
        def timed(*args, **kwargs):
            with self.phase(name): return f(*args, **kwargs)
        setattr(owner, attribute, timed)


def train_once(data:str, version:str, out:str, init:str, warm_up:str, name:str, quick:bool)->dict:
    "Warm up on other data, then train once; seconds, by phase too. For a process of its own."
    home,learnt = os.environ['RAKUTEN_MM_ARTIFACTS'], fitting.check_learnt
    cfg,watch = preset(name), Stopwatch()
    if quick: cfg = replace(cfg, fit=replace(cfg.fit, max_epochs=5, min_steps=0))
    light = replace(cfg, network=replace(cfg.network, dim=32), fit=replace(cfg.fit, max_epochs=1, min_steps=0))
    with tempfile.TemporaryDirectory() as d:
        os.environ['RAKUTEN_MM_ARTIFACTS'] = d
        fitting.check_learnt = lambda *args: None  # one epoch on a few listings need not learn
        fitting.fit(Dataset.open(warm_up), light, Path(d)/'out', progress=False)
    os.environ['RAKUTEN_MM_ARTIFACTS'] = home
    if not quick: fitting.check_learnt = learnt
    for phase in PHASES: watch.watch(*phase)
    fitted,out = fitting.fit(Dataset.open(data, version), cfg, Path(out), progress=False, init=init), Path(out)
    save_bundle(out/'bundle', fitted.net, fitted.codes, fitted.names)  # to go on from; `export` measures runtimes too
    fitted.oof.to_parquet(out/'oof.parquet')
    return dict(s=fitted.seconds, phases=dict(watch.seconds), epochs=len(fitted.history),
                f1_weighted=fitted.val['f1_weighted'])


def split_delivery(raw_dir:Path, work:Path, share:float = .01, seed:int = 0)->tuple[Path, Path]:
    "The delivery as two, the second with `share` of the listings; images are linked, not copied."
    x,y = (next(iter(raw_dir.glob(f'{c}_train*.csv')), None) for c in 'XY')
    if not (x and y): raise SystemExit(f'{raw_dir} is no delivery: it holds no X_train*.csv and Y_train*.csv')
    listings,labels = (pd.read_csv(p, dtype=str, keep_default_na=False, index_col=0) for p in (x, y))
    late = listings.sample(frac=share, random_state=seed).index
    for folder,rows in ((work/'most', listings.index.difference(late, sort=False)), (work/'late', late)):
        images = folder/'images'/'image_train'; images.mkdir(parents=True)
        listings.loc[rows].to_csv(folder/x.name); labels.loc[rows].to_csv(folder/y.name)
        if (raw_dir/'classes.csv').exists(): shutil.copy(raw_dir/'classes.csv', folder)
        for r in listings.loc[rows].itertuples():
            file = raw_dir/'images'/'image_train'/f'image_{r.imageid}_product_{r.productid}.jpg'
            if file.exists(): (images/file.name).symlink_to(file.resolve())
    return work/'most', work/'late'


def stored_vectors(work:Path, versions:tuple, name:str, rounds:int, quick:bool)->dict:
    "Cold, warm and delta trainings, in turn."
    calls = iter(range(rounds*len(KINDS)))
    def train(kind:str)->dict:
        store = work/f'store{next(calls)//len(KINDS)}'  # one a round
        job = dict(data=work/'data', version=versions[kind == 'delta'], out=store/kind, warm_up=work/'other-data',
                   init=store/'cold' if kind == 'delta' else '', name=name, quick=quick)
        r = call(train_once, job, RAKUTEN_MM_ARTIFACTS=str(store))
        say(f"  {kind}: {r['s']:.1f} s  "+'  '.join(f'{k} {v:.1f}' for k,v in r['phases'].items()))
        return r
    seen = in_turns({k: partial(train, k) for k in KINDS}, rounds)
    s = {k: [r['s'] for r in runs] for k,runs in seen.items()}
    out = {f'{k}_over_cold': median_ratio(s[k], s['cold']) for k in KINDS[1:]}
    for k,runs in seen.items():
        out[f'{k}_s'] = statistics.median(s[k])
        for p in sorted({p for r in runs for p in r['phases']}):
            out[f'{k}_{p}_s'] = statistics.median(r['phases'].get(p, 0.) for r in runs)
        out |= {f'{k}_epochs': runs[0]['epochs'], f'{k}_val_f1_weighted': runs[0]['f1_weighted'],
                f'{k}_peak_rss_mb': max(r['peak_mb'] for r in runs)}
    return out | dict(peak_rss_mb=max(out[f'{k}_peak_rss_mb'] for k in KINDS))


def bare_epoch(net, opt, batches:list[dict], autocast, smoothing:float)->float:
    "Seconds of forward, backward and optimiser step over `batches`."
    begin = time.perf_counter()
    for b in batches:
        opt.zero_grad()
        with autocast():
            logits = net(b)
            targets = b['target'].repeat(logits.shape[0]*logits.shape[1])
            loss = F.cross_entropy(logits.reshape(-1, net.n_classes), targets, label_smoothing=smoothing)
        loss.backward(); opt.step()
    return time.perf_counter()-begin


class Clock(pl.Callback):
    "Epochs of fine-tuning, each after a bare one over the same batches; the first of both does not count."
    def __init__(self, dm, bare): self.dm,self.bare,self.seen = dm, bare, dict(ours=[], plain=[], whole=[], loading=[])

    def on_train_epoch_start(self, trainer, module):
        sampler = self.dm.train_dataloader().sampler; sampler.set_epoch(trainer.current_epoch)
        begin = time.perf_counter(); batches = [self.dm.splits['train'][i] for i in sampler]
        self.seen['loading'].append(time.perf_counter()-begin)
        took = self.bare(batches if trainer.current_epoch else batches[:2])
        if trainer.current_epoch: self.seen['plain'].append(took)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *args): self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):  # after validation
        if not trainer.current_epoch: return
        self.seen['ours'].append(self.last-self.begin); self.seen['whole'].append(time.perf_counter()-self.begin)


def fine_tuning(work:Path, data:Dataset, rows:int, size:int, epochs:int)->dict:
    "Seconds of an epoch of fine-tuning, beside a bare one."
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'fine-tuning')
    encoders = EncoderConfig(ngrams=False, text=None, image_size=size, train_image=True)
    cfg,df = TrainConfig(encoders, NetworkConfig(members=1), FitConfig(batch_size=32)), data.products
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
    trainer = fitting.make_trainer(cfg, choose_devices(cfg), work/'fine-tuning', '', False, epochs)
    autocast = partial(torch.autocast, 'cpu', torch.bfloat16, enabled=str(trainer.precision).startswith('bf16'))
    clock = Clock(dm, lambda batches: bare_epoch(bare, opt, batches, autocast, cfg.fit.label_smoothing))
    trainer.callbacks.insert(0, clock)
    trainer.fit(ProductClassifier(net), dm)
    s = {k: statistics.median(v) for k,v in clock.seen.items()}
    return dict(epoch_over_bare=median_ratio(clock.seen['ours'], clock.seen['plain']), epoch_s=s['ours'],
                bare_epoch_s=s['plain'], epoch_with_validation_s=s['whole'], decoding_s=s['loading'],
                epoch_rows=len(keep), epoch_image_size=size, epoch_precision=str(trainer.precision))


def bench(args, work:Path)->dict:
    if not args.data:
        say('making listings')
        synthesize(work/'raw', 600 if args.quick else 4_000, 0, image_size=224, progress=False)
    ingest(synthesize(work/'other', 200, 0, seed=7, progress=False), work/'other-data', progress=False)
    parts = split_delivery((args.data or work/'raw').resolve(), work)
    say('ingesting')
    versions = [ingest(part, work/'data', progress=False).manifest['version'] for part in parts]
    rows = [len(Dataset.open(work/'data', v).products) for v in versions]
    out = dict(rows=rows[0], new_rows=rows[1]-rows[0], preset=args.preset, cores=n_threads())
    if 'stored' in args.only:
        say('training with an empty store, with a full one, after new listings')
        out |= stored_vectors(work, versions, args.preset, 1 if args.quick else args.rounds, args.quick)
    if 'fine-tuning' in args.only:
        say('fine-tuning')
        out |= fine_tuning(work, Dataset.open(work/'data'), 96 if args.quick else 192, 96, 3 if args.quick else 5)
    return out


if __name__ == '__main__':
    main(bench, __doc__, option('--data', type=Path, help='a delivery; synthetic listings if left out'),
         option('--preset', choices=list(PRESETS), default='cpu'),
         option('--rounds', type=int, default=3, help='cold, warm and delta trainings, so many times in turn'),
         parts=PARTS, bars=BARS)
