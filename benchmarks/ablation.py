"""What each expert and each option of the default preset is worth.

    python -m benchmarks.ablation --data DIR --json [--seeds 2]

DIR is a delivery in the challenge's format. Each seed deals its listings into five folds, near-duplicates together,
and takes the first as test split. The preset is trained as it is, then with one thing changed at a time, on the same
stored vectors. Experts are taken out of the trained network, and the others weighed anew. Figures are changes of
weighted and macro F1 on the test split, in points, against the preset as it is, mean and range over seeds; the test
split decides nothing here, and a change within the range of zero says nothing.
"""
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import f1_score

from benchmarks.harness import main, option, say
from benchmarks.quality import as_seen, deal
from rakuten_mm.core.config import TrainConfig, preset
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.training import fit as fitting

OPTIONS = {
    'no n-grams': dict(encoders=dict(ngrams=False)), 'no sentence encoder': dict(encoders=dict(text=None)),
    'last image level only': dict(encoders=dict(image_levels=False)),
    'all components': dict(network=dict(components=0)),
    'gated fusion': dict(network=dict(fusion='gated')), 'attention fusion': dict(network=dict(fusion='attention')),
    '4 members': dict(network=dict(members=4)), '16 members': dict(network=dict(members=16)),
    'no dropout': dict(network=dict(dropout=0.)), 'no input dropout': dict(network=dict(input_dropout=0.)),
    'no modality dropout': dict(network=dict(modality_dropout=0.)),
    'no description dropout': dict(network=dict(description_dropout=0.)),
    'no label smoothing': dict(fit=dict(label_smoothing=0.)), 'no weight decay': dict(fit=dict(weight_decay=0.)),
    'moving average': dict(fit=dict(ema=.9)), 'twice the epochs': dict(fit=dict(max_epochs=8, min_steps=160)),
    'classes balanced': dict(fit=dict(class_balance=.5)), 'validation held out': dict(fit=dict(hold_out='always'))}


def changed(cfg:TrainConfig, by:dict[str, dict])->TrainConfig:
    "The configuration with some fields of its parts changed."
    return replace(cfg, **{part: replace(getattr(cfg, part), **fields) for part,fields in by.items()})


def train(data:Dataset, cfg:TrainConfig, seed:int, folder:Path)->tuple[fitting.Fitted, list]:
    "A training, and what its stack was fitted on."
    seen,weigh = [], fitting.fit_stack
    def watched(*args): seen[:] = args; weigh(*args)
    shutil.rmtree(folder, ignore_errors=True)
    fitting.fit_stack = watched
    try: return fitting.fit(data, cfg, folder, seed, progress=False), seen
    finally: fitting.fit_stack = weigh


def score(fitted:fitting.Fitted, data:Dataset)->dict[str, float]:
    "Weighted and macro F1 on the test split."
    ds = as_seen(fitted, data, data.products[data.products.split == 'test'])
    preds = fitting.out_of_fold_probs(fitted.net, ds).argmax(1)
    return {a: 100*f1_score(ds.targets, preds, average=a) for a in ('weighted', 'macro')}


def without(fitted:fitting.Fitted, seen:list, name:str):
    "Weigh the experts anew, without one of them."
    stack = fitted.net.stack
    allowed = stack.allowed.clone(); stack.allowed[:, stack.names.index(name)] = False
    stack.weights.copy_(stack.allowed/stack.allowed.sum(1, keepdim=True).clamp(min=1))
    fitting.fit_stack(*seen)
    stack.allowed.copy_(allowed)


def bench(args, work:Path)->dict:
    warnings.filterwarnings('ignore'); torch.set_num_threads(n_threads())
    data,cfg,rows = ingest(args.data, work/args.data.name, progress=False), preset('cpu'), []
    options = dict([*OPTIONS.items()][:2]) if args.quick else OPTIONS
    for seed in range(args.seeds):
        d = deal(data, seed, 0)
        fitted,seen = train(d, cfg, seed, work/'run')
        base = score(fitted, d)
        say(f'seed {seed}: '+', '.join(f'{a} {v:.2f}' for a,v in base.items()))
        def add(what:str, now:dict):
            rows.append(dict(what=what, **{a: now[a]-base[a] for a in base}))  # noqa: B023
            say(f"  {what}: {rows[-1]['weighted']:+.2f}, {rows[-1]['macro']:+.2f}")
        for name in fitted.net.stack.names:
            without(fitted, seen, name); add(f'without the expert {name}', score(fitted, d))
        for what,by in options.items(): add(what, score(train(d, changed(cfg, by), seed, work/'run')[0], d))
    table = pd.DataFrame(rows).groupby('what', sort=False).agg(['mean', 'min', 'max']).round(2)
    print(table.to_string())
    return dict(data=args.data.name, listings=len(data.products),
                changes={w: {a: table.loc[w, a].to_dict() for a in ('weighted', 'macro')} for w in table.index},
                spread=float(np.mean([r['max']-r['min'] for _,r in table.weighted.iterrows()])))


if __name__ == '__main__': main(bench, __doc__, option('--data', type=Path, required=True), seeds=2)
