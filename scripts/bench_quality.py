"""Quality of the default CPU preset beside strong baselines, on the same grouped folds.

    python scripts/bench_quality.py --data DIR --json out.json [--e5 FOLDER] [--seeds 3] [--folds 2]

DIR is a delivery in the challenge's format. Each seed deals its listings anew into five folds, near-duplicates together; a fold is
the test split, an eighth of the rest the validation split. The preset trains on the training split and calibrates on validation.
Each baseline chooses its regularisation on the validation split of its seed's first fold, and is then given both splits to train on.
All figures are on test splits, which decide nothing. FOLDER holds a multilingual-e5 in Hugging Face's layout; without it (the default
looks for ../../models/multilingual-e5-* beside DIR) the e5 baselines are left out, and the output says so.
"""
import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from rakuten_mm.core.config import EncoderConfig, artifacts_dir, load_environment, n_threads, preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.models.embeddings import EmbeddingStore, encode_pixels
from rakuten_mm.models.encoders import encoder_fingerprint, hf_encoder, image_encoder
from rakuten_mm.models.inputs import ProductDataset
from rakuten_mm.models.stacking import STATES
from rakuten_mm.stats.calibration import ece
from rakuten_mm.stats.triage import resample_promise
from rakuten_mm.training.fit import expert_logits, fit, out_of_fold_probs


def say(*args): print(*args, file=sys.stderr, flush=True)


def deal(data:Dataset, seed:int, fold:int)->Dataset:
    "The dataset with fold `fold` of the seed's deal as its test split."
    df = data.products.reset_index(drop=True)
    five = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(df, df.prdtypecode, df.group)
    rest,test = list(five)[fold]
    r = df.iloc[rest]
    _,val = next(StratifiedGroupKFold(8, shuffle=True, random_state=seed).split(r, r.prdtypecode, r.group))
    split = np.full(len(df), 'train', object); split[test] = 'test'; split[rest[val]] = 'val'
    out = copy.copy(data)
    out.__dict__['products'] = df.assign(split=split)
    return out


def baseline_features(data:Dataset, e5:Path|None)->dict[str, np.ndarray]:
    "What the dense baselines read, one row a product: pooled features of the preset's image encoder, and e5's vectors."
    df,store = data.products, artifacts_dir()/'embeddings'
    enc = image_encoder('timm:tf_efficientnet_lite0')
    images = EmbeddingStore(store, encoder_fingerprint(enc, 'baseline'))
    out = dict(image=images.fill_images(df.image.tolist(), data.images_dir, 224, lambda x: encode_pixels(enc, x)).take(df.image.tolist()))
    if e5:
        text = hf_encoder(str(e5), EncoderConfig(text_prefix='query: '))
        texts = EmbeddingStore(store, encoder_fingerprint(text, 'baseline'))
        out['e5'] = texts.take(texts.fill_texts(df.title.tolist(), df.text.tolist(), text.encode))
        out['e5+image'] = np.concatenate([out['e5'], out['image']], 1)
    return out


def tfidf(df:pd.DataFrame, fit_rows:np.ndarray)->sparse.csr_matrix:
    "Word and character n-grams, title and description apart, with the vocabulary of `fit_rows`."
    parts = []
    for field in ('title', 'text'):
        if not df[field].iloc[fit_rows].str.strip().any(): continue
        for analyzer,ngrams in (('word', (1, 2)), ('char_wb', (3, 5))):
            v = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True, strip_accents='unicode', token_pattern=r'(?u)\b\w+\b')
            parts.append(v.fit(df[field].iloc[fit_rows]).transform(df[field]))
    return sparse.hstack(parts).tocsr()


def linear(name:str, x, y:np.ndarray, rows:np.ndarray, c:float, k:int)->np.ndarray:
    "Logits of all rows by a linear SVM or a logistic regression that was fitted on `rows`."
    out = np.full((len(y), k), -5.)
    if name == 'tfidf': m = LinearSVC(C=c).fit(x[rows], y[rows])
    else:
        x = StandardScaler().fit(x[rows]).transform(x).clip(-6, 6)
        m = LogisticRegression(C=c, max_iter=150).fit(x[rows], y[rows])
    out[:, m.classes_] = m.decision_function(x)
    return out


GRID = dict(tfidf=(.3, 1, 3), image=(3e-4, 1e-3, 3e-3, 1e-2, .1), e5=(1e-3, 3e-3, 1e-2, .1), **{'e5+image': (3e-4, 1e-3, 3e-3, 1e-2, .1)})


def baselines(data:Dataset, dense:dict, y:np.ndarray, chosen:dict)->dict[str, np.ndarray]:
    "Probabilities of the test rows by each baseline; `chosen` keeps what the seed's first fold decided."
    df,k = data.products, y.max()+1
    train,val,test = (np.flatnonzero(df.split == s) for s in ('train', 'val', 'test'))
    both,out = np.concatenate([train, val]), {}
    for name in ('tfidf', *dense):
        x = tfidf(df, both) if name == 'tfidf' else dense[name]
        if name not in chosen:
            tried = {c: linear(name, x, y, train, c, k)[val] for c in GRID[name]}
            c = max(tried, key=lambda c: f1_score(y[val], tried[c].argmax(1), average='weighted'))
            nll = lambda t: -log_softmax(tried[c]*np.exp(t), axis=1)[np.arange(len(val)), y[val]].mean()  # noqa: B023
            chosen[name] = c, float(np.exp(minimize_scalar(nll, bounds=(-3, 4), method='bounded').x))
        c,scale = chosen[name]
        out[name] = softmax(linear(name, x, y, both, c, k)[test]*scale, axis=1)
    experts = [n for n in ('tfidf', 'image', 'e5') if n in out]
    out['product of '+'*'.join(experts)] = softmax(sum(np.log(out[n]+1e-12) for n in experts), axis=1)
    return out


def ours(data:Dataset, cfg, codes:list[int], seed:int, out_dir:Path)->dict:
    "Probabilities of the test rows by the preset, and F1 of its inputs and experts."
    shutil.rmtree(out_dir, ignore_errors=True)
    fitted = fit(data, cfg, out_dir, seed, progress=False)
    df,net = data.products, fitted.net
    test = ProductDataset(df[df.split == 'test'], net, fitted.codes, data.images_dir, artifacts_dir()/'embeddings', progress=False)
    f1 = {}
    for s in ('text', 'image'):
        logits,rows = expert_logits(net, test, s)
        score = lambda z,y=test.targets[rows]: f1_score(y, z.argmax(1), average='weighted')
        experts = dict(zip(net.stack.names, map(score, logits), strict=True))
        f1[f'{s}_only'] = score(np.tensordot(net.stack.weights[STATES.index(s)].numpy(), logits, 1))
        f1[f'{s}_expert'] = max(experts[n] for n in (('linear', 'text') if s == 'text' else ('image',)) if n in experts)
    probs = np.zeros((len(test), len(codes)))
    probs[:, [codes.index(c) for c in fitted.codes]] = out_of_fold_probs(net, test)
    return dict(probs=probs, seconds=fitted.seconds, **f1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--json', type=Path)
    parser.add_argument('--e5', type=Path, help='folder of a multilingual-e5 model')
    parser.add_argument('--preset', default='cpu')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--folds', type=int, default=2, help='test folds of each seed, of five')
    parser.add_argument('--quick', action='store_true', help='one seed, one fold, two members')
    parser.add_argument('--work', type=Path, help='keep the dataset and the embeddings in this folder')
    args = parser.parse_args()
    load_environment('no.env'); warnings.filterwarnings('ignore')
    work = args.work or Path(tempfile.mkdtemp(prefix='bench-quality-'))
    os.environ['RAKUTEN_MM_ARTIFACTS'] = str(work/'artifacts')
    try: result = bench(args, work)
    finally:
        if not args.work: shutil.rmtree(work, ignore_errors=True)
    if args.json: args.json.write_text(json.dumps(result, indent=1))


def bench(args, work:Path)->dict:
    torch.set_num_threads(n_threads())
    data,cfg = ingest(args.data, work/args.data.name, progress=False), preset(args.preset)
    if args.quick: args.seeds,args.folds,cfg = 1, 1, replace(cfg, network=replace(cfg.network, members=2))
    e5 = args.e5 or next(iter(sorted((args.data.resolve().parents[1]/'models').glob('multilingual-e5-*'))), None)
    if not e5: say('no e5 model: its baselines are left out')
    codes = sorted(int(c) for c in data.products.prdtypecode.unique())
    y = data.products.prdtypecode.map({c: i for i,c in enumerate(codes)}).to_numpy()
    dense = baseline_features(data, e5)
    rows,pool = [], {}
    for seed in range(args.seeds):
        chosen = {}
        for fold in range(args.folds):
            d,start = deal(data, seed, fold), time.perf_counter()
            test = np.flatnonzero(d.products.split == 'test')
            found = {n: dict(probs=p) for n,p in baselines(d, dense, y, chosen).items()}
            took = time.perf_counter()-start
            found['rakuten-mm '+args.preset] = ours(d, cfg, codes, seed, work/'run')
            for name,r in found.items():
                preds = r.pop('probs')
                rows.append(dict(model=name, seed=seed, fold=fold, **{f: f1_score(y[test], preds.argmax(1), average=f) for f in ('weighted', 'macro')}, **r))
                pool.setdefault(name, []).append((preds, y[test], data.products.group.to_numpy()[test], seed))
            last = rows[-1]
            say(f"seed {seed} fold {fold}: weighted {last['weighted']:.4f}, macro {last['macro']:.4f}; {last['seconds']:.0f} s, baselines {took:.0f} s")
    return report(args, pd.DataFrame(rows), pool, len(data.products), str(e5) if e5 else None)


def report(args, df:pd.DataFrame, pool:dict, n:int, e5)->dict:
    name = 'rakuten-mm '+args.preset
    by_seed = df.groupby(['model', 'seed'], sort=False)[['weighted', 'macro']].mean().groupby('model', sort=False).agg(['mean', 'std'])
    print(by_seed.round(4).to_string())
    mean,mine = by_seed.xs('mean', axis=1, level=1), df[df.model == name]
    margin = {f: float(mean.loc[name, f]-mean.drop(name)[f].max()) for f in ('weighted', 'macro')}
    probs,targets,groups = (np.concatenate([p[i] for p in pool[name]]) for i in range(3))
    seeds = sorted({p[3] for p in pool[name]})
    promises = []
    for s in seeds:  # of one seed no listing is there twice
        part = [np.concatenate([p[i] for p in pool[name] if p[3] == s]) for i in range(3)]
        promises.append(resample_promise(*part, n=200, seed=s))
    promise = pd.DataFrame(promises).mean().to_dict()
    out = dict(data=args.data.name, listings=n, seeds=args.seeds, folds=args.folds, e5=bool(e5), weighted_f1_margin=margin['weighted'],
               macro_f1_margin=margin['macro'],
               weighted_f1=float(mean.loc[name, 'weighted']), macro_f1=float(mean.loc[name, 'macro']), best_baseline=mean.drop(name).weighted.idxmax(),
               text_only_gap=float((mine.text_only-mine.text_expert).mean()), image_only_gap=float((mine.image_only-mine.image_expert).mean()),
               ece=ece(probs, targets), promise_held=promise['held'], auto_coverage=promise['coverage'], auto_accuracy=promise['accuracy'],
               naive_held=promise['naive_held'], naive_coverage=promise['naive_coverage'], fit_s=float(mine.seconds.median()),
               table={m: {f: {k: float(by_seed.loc[m, (f, k)]) for k in ('mean', 'std')} for f in ('weighted', 'macro')} for m in by_seed.index})
    for k,v in out.items():
        if k != 'table': print(f'{k:20} {v:+.4f}' if isinstance(v, float) else f'{k:20} {v}')
    return out


if __name__ == '__main__': main()
