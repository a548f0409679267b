"""Quality of the default CPU preset beside strong baselines, on the same grouped folds.

    python -m benchmarks.quality --data DIR --json [--e5 FOLDER] [--seeds 3] [--folds 5]

DIR is a delivery in the challenge's format. Each seed deals its listings anew into five folds, near-duplicates
together; a fold is the test split, an eighth of the rest the validation split. Each baseline chooses its
regularisation on the validation split of its seed's first fold, and is then given both splits to train on, as the
preset is. `kernel` is a kernel ridge regression on the preset's own vectors of n-grams, text and image together, with
fixed widths; the margins are over the best of the others, and `over_kernel` over it. All figures are on test splits,
which decide nothing. FOLDER holds a multilingual-e5 in Hugging Face's layout; without it (the default looks for
../../models/multilingual-e5-* beside DIR) the e5 baselines are left out, and the output says so.
"""
import copy
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import linalg, sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from benchmarks.harness import main, option, say
from rakuten_mm.core.config import EncoderConfig, preset
from rakuten_mm.core.environment import artifacts_dir, graphs_dir
from rakuten_mm.core.process import n_threads
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.models.embeddings import EmbeddingStore
from rakuten_mm.models.encoders import StaticEncoder, encoder_fingerprint, hf_encoder, image_encoder
from rakuten_mm.models.inputs import ProductDataset
from rakuten_mm.models.runtime import frozen_runtime
from rakuten_mm.models.stacking import STATES
from rakuten_mm.stats.calibration import ece
from rakuten_mm.stats.triage import Triage
from rakuten_mm.training.fit import Fitted, expert_logits, fit, out_of_fold_probs

F1 = 'weighted', 'macro'
C = dict(tfidf=(.3, 1, 3), image=(3e-4, 1e-3, 3e-3, 1e-2, .1), e5=(1e-3, 3e-3, 1e-2, .1))
C['e5+image'] = C['use+image'] = C['image']
WIDTHS = dict(image=(.25, .5), ngrams=(.15, 0.), use=(.15, 0.)) # Of the kernel, and how far its parts are whitened
KERNEL,RIDGE = 'kernel', .1


def deal(data:Dataset, seed:int, fold:int)->Dataset:
    "The dataset with fold `fold` of the seed's deal as its test split."
    df = data.products.reset_index(drop=True)
    folds = lambda n: StratifiedGroupKFold(n, shuffle=True, random_state=seed)
    parts = lambda n,rows: list(folds(n).split(rows, rows.prdtypecode, rows.group))
    rest,test = parts(5, df)[fold]
    split = np.full(len(df), 'train', object); split[test] = 'test'; split[rest[parts(8, df.iloc[rest])[0][1]]] = 'val'
    out = copy.copy(data)
    out.__dict__['products'] = df.assign(split=split)
    return out


def baseline_features(data:Dataset, e5:Path|None)->dict[str, np.ndarray]:
    "Inputs of the dense baselines, one row a product: pooled image features, USE's vectors and e5's, joined with them."
    df,store = data.products, artifacts_dir()/'embeddings'
    enc,names = image_encoder('timm:tf_efficientnet_lite0'), df.image.tolist()
    images,use = EmbeddingStore(store, encoder_fingerprint(enc, 'baseline')), StaticEncoder()
    encode = frozen_runtime(enc, 224, graphs_dir())
    out = dict(image=images.fill_images(names, data.images_dir, 224, encode).take(names))
    out['use+image'] = np.concatenate([use.encode(df.title.tolist(), df.text.tolist()), out['image']], 1)
    if e5:
        text = hf_encoder(str(e5), EncoderConfig(text_prefix='query: '))
        texts = EmbeddingStore(store, encoder_fingerprint(text, 'baseline'))
        out['e5'] = texts.take(texts.fill_texts(df.title.tolist(), df.text.tolist(), text.encode))
        out['e5+image'] = np.concatenate([out['e5'], out['image']], 1)
    return out


def tfidf(df:pd.DataFrame, fit_rows:np.ndarray)->sparse.csr_matrix:
    "Word and character n-grams, title and description apart, with the vocabulary of `fit_rows`."
    parts,how = [], dict(sublinear_tf=True, strip_accents='unicode', token_pattern=r'(?u)\b\w+\b')
    for field in ('title', 'text'):
        if not df[field].iloc[fit_rows].str.strip().any(): continue
        for analyzer,ngrams in (('word', (1, 2)), ('char_wb', (3, 5))):
            v = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, **how)
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


def baselines(data:Dataset, dense:dict, y:np.ndarray, chosen:dict)->dict[str, np.ndarray]:
    "Probabilities of the test rows by each baseline; `chosen` keeps what the seed's first fold decided."
    df,k = data.products, y.max()+1
    train,val,test = (np.flatnonzero(df.split == s) for s in ('train', 'val', 'test'))
    both,out = np.concatenate([train, val]), {}
    for name in ('tfidf', *dense):
        x = tfidf(df, both) if name == 'tfidf' else dense[name]
        if name not in chosen:
            tried = {c: linear(name, x, y, train, c, k)[val] for c in C[name]}
            c = max(tried, key=lambda c: f1_score(y[val], tried[c].argmax(1), average='weighted'))
            nll = lambda t: -log_softmax(tried[c]*np.exp(t), axis=1)[np.arange(len(val)), y[val]].mean()  # noqa: B023
            chosen[name] = c, float(np.exp(minimize_scalar(nll, bounds=(-3, 4), method='bounded').x))
        c,scale = chosen[name]
        out[name] = softmax(linear(name, x, y, both, c, k)[test]*scale, axis=1)
    experts = [n for n in ('tfidf', 'image', 'e5') if n in out]
    out['product of '+'*'.join(experts)] = softmax(sum(np.log(out[n]+1e-12) for n in experts), axis=1)
    return out


def principal(x:np.ndarray, rows:np.ndarray, whiten:float, components:int = 384)->np.ndarray:
    "`x` on the principal components of `rows`, whitened by a power, with mean square norm 1 there."
    mean,std = x[rows].mean(0), x[rows].std(0)
    z = ((x-mean)/np.where(std > 1e-6, std, np.inf)).clip(-6, 6).astype(np.float64)
    centre = z[rows].mean(0); z -= centre
    values,basis = np.linalg.eigh(z[rows].T@z[rows]/len(rows))
    keep = np.flatnonzero(values > 1e-6)[-components:]
    z = z@(basis[:, keep]*values[keep]**(-whiten/2))
    return z/np.sqrt((z[rows]**2).sum(1).mean())


def kernel_ridge(vectors:dict[str, np.ndarray], y:np.ndarray, fit_rows:np.ndarray, test:np.ndarray)->np.ndarray:
    "Probabilities of the test rows by one-versus-rest ridge regression, with a Gaussian kernel over all parts."
    d = 0.
    for part,(width,whiten) in WIDTHS.items():
        z = principal(vectors[part], fit_rows, whiten); own = (z**2).sum(1)
        d = d+width*np.maximum(own[:, None]+own[fit_rows]-2*z@z[fit_rows].T, 0)
    k = np.exp(-d)
    a = linalg.solve(k[fit_rows]+RIDGE*np.eye(len(fit_rows)), np.eye(y.max()+1)[y[fit_rows]], assume_a='pos')
    p = np.maximum(k[test]@a, .01)
    return p/p.sum(1, keepdims=True)


def as_seen(fitted:Fitted, data:Dataset, rows:pd.DataFrame)->ProductDataset:
    "Listings as a trained network takes them, pictures through ONNX."
    net = fitted.net
    encode = frozen_runtime(net.image, net.cfg.encoders.image_size, graphs_dir())
    store = artifacts_dir()/'embeddings'
    return ProductDataset(rows, net, fitted.codes, data.images_dir, store, encode, progress=False)


def ours(data:Dataset, cfg, codes:list[int], seed:int, out_dir:Path)->tuple[dict, dict[str, np.ndarray]]:
    "Probabilities of the test rows by the preset, and F1 of its inputs and experts; its vectors of all listings."
    shutil.rmtree(out_dir, ignore_errors=True)
    fitted = fit(data, cfg, out_dir, seed, progress=False)
    df,net = data.products, fitted.net
    test,f1 = as_seen(fitted, data, df[df.split == 'test']), {}
    for s,names in dict(text=('linear', 'text'), image=('image',)).items():
        logits,rows = expert_logits(net, test, s)
        score = lambda z,y=test.targets[rows]: f1_score(y, z.argmax(1), average='weighted')
        f1[f'{s}_only'] = score(np.tensordot(net.stack.weights[STATES.index(s)].numpy(), logits, 1))
        f1[f'{s}_expert'] = max(score(z) for n,z in zip(net.stack.names, logits, strict=True) if n in names)
    probs = np.zeros((len(test), len(codes)))
    probs[:, [codes.index(c) for c in fitted.codes]] = out_of_fold_probs(net, test)
    everything = as_seen(fitted, data, df)
    text = everything.full.vectors(np.arange(len(df)))
    vectors = dict(image=everything.images.take(df.image.tolist()), ngrams=text[:, :-StaticEncoder.dim],
                   use=text[:, -StaticEncoder.dim:])
    return dict(probs=probs, seconds=fitted.seconds, **f1, **lanes_of(fitted.triage, probs, test.targets)), vectors


def lanes_of(triage:Triage, probs:np.ndarray, targets:np.ndarray)->dict:
    "What the lanes that were deployed did on the test rows: what is auto and right, and the lists for reviewers."
    lanes,top = triage.lanes(probs), probs.argmax(1)
    shown = np.array([t in s for t,s in zip(targets, triage.sets(probs), strict=True)])
    return dict(auto=lanes == 'auto', right=top == targets, listed=np.where(lanes == 'review', shown, np.nan))


def deployed(mine:list, target:float = .99, draws:int = 200)->dict:
    "How often what was deployed keeps its promise, in draws of test rows with their groups, and how much is auto."
    rng,kept,rows = np.random.default_rng(0), [], []
    for seed in sorted({m['seed'] for m in mine}):
        own = [m for m in mine if m['seed'] == seed]
        auto,right,groups = (np.concatenate([m[k] for m in own]) for k in ('auto', 'right', 'groups'))
        each = pd.DataFrame(dict(g=groups, n=auto, k=auto & right)).groupby('g')[['n', 'k']].sum().to_numpy()
        for _ in range(draws):
            n,k = each[rng.integers(len(each), size=len(each))].sum(0)
            kept.append(n == 0 or k/n >= target)
        rows.append((auto.sum(), (auto & right).sum(), len(auto)))
    n,k,total = np.array(rows).sum(0)
    listed = np.concatenate([m['listed'] for m in mine])
    return dict(promise_held=float(np.mean(kept)), auto_coverage=n/total, auto_accuracy=k/max(n, 1),
                review_list_coverage=float(np.nanmean(listed)), empty_auto=sum(1 for r in rows if not r[0]))


def bench(args, work:Path)->dict:
    "Ours and the baselines on every fold of every seed."
    warnings.filterwarnings('ignore'); torch.set_num_threads(n_threads())
    data = ingest(args.data, work/args.data.name, progress=False)
    cfg,name = preset(args.preset), f'rakuten-mm {args.preset}'
    if args.quick: args.folds,cfg = 1, replace(cfg, network=replace(cfg.network, members=2))
    e5 = args.e5 or next(iter(sorted((args.data.resolve().parents[1]/'models').glob('multilingual-e5-*'))), None)
    if not e5: say('no e5 model: its baselines are left out')
    codes = sorted(int(c) for c in data.products.prdtypecode.unique())
    y,groups = pd.Index(codes).get_indexer(data.products.prdtypecode), data.products.group.to_numpy()
    dense,rows,mine = baseline_features(data, e5), [], []
    for seed in range(args.seeds):
        chosen = {}
        for fold in range(args.folds):
            d,begin = deal(data, seed, fold), time.perf_counter()
            test = np.flatnonzero(d.products.split == 'test')
            found = {n: dict(probs=p) for n,p in baselines(d, dense, y, chosen).items()}
            took = time.perf_counter()-begin
            mine_now,vectors = ours(d, cfg, codes, seed, work/'run')
            found[KERNEL] = dict(probs=kernel_ridge(vectors, y, np.flatnonzero(d.products.split != 'test'), test))
            found[name] = mine_now
            lanes = {k: found[name].pop(k) for k in ('auto', 'right', 'listed')}
            mine.append(dict(seed=seed, probs=found[name]['probs'], targets=y[test], groups=groups[test]) | lanes)
            for n,r in found.items():
                preds = r.pop('probs').argmax(1)
                rows.append(dict(model=n, seed=seed, **{f: f1_score(y[test], preds, average=f) for f in F1}, **r))
            r = rows[-1]
            say(f"seed {seed} fold {fold}: weighted {r['weighted']:.4f}, macro {r['macro']:.4f}; "
                f"{r['seconds']:.0f} s, baselines {took:.0f} s")
    about = dict(data=args.data.name, listings=len(y), seeds=args.seeds, folds=args.folds, e5=bool(e5))
    return about | figures(pd.DataFrame(rows), name, mine)


def figures(df:pd.DataFrame, name:str, mine:list)->dict:
    "Means over seeds, margins over the best baseline, calibration, and how often the guarantee holds."
    by_seed = df.groupby(['model', 'seed'], sort=False)[[*F1]].mean().groupby('model', sort=False).agg(['mean', 'std'])
    print(by_seed.round(4).to_string())
    mean,ours = by_seed.xs('mean', axis=1, level=1), df[df.model == name]
    others = mean.drop([name, KERNEL])
    margin,over_kernel = mean.loc[name]-others.max(), mean.loc[name]-mean.loc[KERNEL]
    error = ece(*(np.concatenate([m[k] for m in mine]) for k in ('probs', 'targets')))
    table = {m: {f: by_seed.loc[m, f].to_dict() for f in F1} for m in by_seed.index}
    return {f'{f}_f1_margin': margin[f] for f in F1} | {f'{f}_f1': mean.loc[name, f] for f in F1} | dict(
        over_kernel=over_kernel.weighted, macro_over_kernel=over_kernel.macro, best_baseline=others.weighted.idxmax(),
        text_only_gap=(ours.text_only-ours.text_expert).mean(),
        image_only_gap=(ours.image_only-ours.image_expert).mean(), ece=error,
        **deployed(mine), fit_s=ours.seconds.median(), table=table)


if __name__ == '__main__':
    main(bench, __doc__, option('--data', type=Path, required=True), option('--preset', default='cpu'),
         option('--e5', type=Path, help='folder of a multilingual-e5 model'),
         option('--folds', type=int, default=5, help='test folds of each seed, of five; one with --quick'), seeds=3)
