"""Is the retraining loop worth leaving alone? Synthetic deliveries whose truth is known; everything in one run.

    python -m benchmarks.retraining --json [--quick] [--only loop|sabotage|power|active]

loop      Ten deliveries, a large one and nine monthly ones, along the generator's time axis: the class mix drifts,
          10 % of the labels are wrong, a category appears that was not there. A sixth of a month's listings is
          delivered with labels; of the server's review lane, as many as 5 % of the month's listings are corrected, the
          most useful first. Each month: ingest, take corrections in, train from the champion on, gate, promote.
          Beside it a model trained from scratch on everything so far. Both are asked about all listings of the NEXT
          month, against their true categories.
          compute_ratio     CPU seconds of the loop's trainings over those of the trainings from scratch. Both
                            trainings read stored vectors; the cost of embedding is measured where it arises, once a
                            listing, and charged to the loop once and to every training from scratch for all its
                            listings. The first training, which has an empty store, checks that account.
          largest_lag       of macro F1 on a next month, champion behind the model from scratch
sabotage  A better challenger is spoilt in five ways; each must be refused for its reason, and so must an equal one.
          sabotaged_refused share refused with the right reason
power     A challenger that is 1.5 points better on a large population of listings is judged on 20 test sets drawn
          from it.
          better_promoted   share of the 20 that promote it; equal_promoted the same for an equal model
active    The 5 % most useful listings of a month's traffic are corrected, or as many random ones, or none; each is
          judged by its gain on other listings.
          active_over_random gain of the one over gain of the other
Scores are on listings that no model was trained on and no choice was made with.
"""
import os

os.environ['OMP_WAIT_POLICY'] = 'passive'  # before OpenMP is loaded: threads that wait busily would count as compute

import base64
import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

from benchmarks.harness import main, option, say
from rakuten_mm.core.config import FitConfig, preset, single_modality
from rakuten_mm.core.environment import artifacts_dir, graphs_dir
from rakuten_mm.core.files import sha256_file
from rakuten_mm.core.process import n_threads
from rakuten_mm.core.tracking import tracked_run
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.feedback import Correction, text_hash, write_delivery
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.data.schema import image_name
from rakuten_mm.data.text import clean_text
from rakuten_mm.models.bundle import load_bundle, save_bundle
from rakuten_mm.models.embeddings import EmbeddingStore
from rakuten_mm.models.manifest import read_golden, write_manifest
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.models.runtime import frozen_runtime
from rakuten_mm.registry.champion import model_versions
from rakuten_mm.registry.comparison import compare
from rakuten_mm.registry.gate import GateConfig, ModelOutputs, aligned, check_scores, paired_scores
from rakuten_mm.registry.promotion import promote
from rakuten_mm.registry.versions import MODEL, alias_version, register_bundle, resolve_model, resolve_training
from rakuten_mm.synthetic.catalogue import make_plan, make_row, synthesize
from rakuten_mm.training.export import export
from rakuten_mm.training.fit import fit

PARTS = 'loop', 'sabotage', 'power', 'active'
BARS = dict(compute_ratio='<= 0.15', largest_lag='<= 0.02', sabotaged_refused='>= 1', equal_refused='>= 1',
            better_promoted='>= 0.9', active_over_random='>= 2')
CATEGORY_COMES = 2905 # appears when a third of the time axis has passed


class Meter:
    "CPU seconds of this process, and those spent on embedding apart."
    def __init__(self):
        self.embedding,fill = 0., EmbeddingStore.fill
        def timed(store, *a, **kw):
            t0 = time.process_time()
            try: return fill(store, *a, **kw)
            finally: self.embedding += time.process_time()-t0
        EmbeddingStore.fill = timed

    @contextmanager
    def measure(self):
        "Yields a dictionary that has `embedding` and `rest` (CPU seconds) afterwards."
        out,e,t = {}, self.embedding, time.process_time()
        yield out
        out['embedding'] = self.embedding-e
        out['rest'] = time.process_time()-t-out['embedding']


def with_products(data:Dataset, products:pd.DataFrame)->Dataset:
    "A dataset with other rows, in memory."
    d = replace(data); d.__dict__['products'] = products.reset_index(drop=True)
    return d


def truth_of(raw:Path)->pd.Series:
    "True category by productid."
    return pd.read_csv(raw/'truth.csv').set_index('productid').true_code


def clean_rows(raw:Path)->pd.DataFrame:
    "The listings of a delivery as the server would read them: productid, title, text, image, and their true category."
    x = pd.read_csv(raw/'X_train_update.csv', index_col=0, keep_default_na=False)
    images = [image_name(r.imageid, r.productid) for r in x.itertuples()]
    return x.assign(title=x.designation.map(clean_text), text=x.description.map(clean_text), image=images,
                    prdtypecode=x.productid.map(truth_of(raw))).reset_index(drop=True)


def macro_f1(probs:np.ndarray, codes:list[int], truth:pd.Series)->float:
    preds = np.array(codes)[probs.argmax(1)]
    return float(f1_score(truth, preds, labels=sorted(truth.unique()), average='macro', zero_division=0))


def in_memory(fitted)->Predictor:
    "A fitted network as a predictor, without exporting it; images are read by the graph that training uses."
    names = {str(c): n for c,n in fitted.names.items()}
    p = Predictor(fitted.net, dict(codes=fitted.codes, names=names, train={}, info={}), fitted.triage)
    if fitted.net.image: p.encode = frozen_runtime(fitted.net.image, p.size, graphs_dir())
    return p


def asked(model:Predictor, rows:pd.DataFrame, raw:Path)->np.ndarray: # (N, K)
    "Answers to listings of a delivery, with a store apart: serving must not embed for training."
    return model.probs_of(rows, raw/'images'/'image_train', raw/'asked', progress=False)


def most_useful(probs:np.ndarray, n:int)->np.ndarray: # (n,) positions
    "As the review queue: smallest margin between the first two categories first."
    top = np.sort(probs, axis=1)[:, -2:]
    return np.argsort(top[:, 1]-top[:, 0], kind='stable')[:n]


def reviewed(model:Predictor, rows:pd.DataFrame, probs:np.ndarray, raw:Path, share:float, when:datetime)->list:
    "The reviewers' words on the most useful listings of the review lane."
    lane = model.triage.lanes(probs) if model.triage else np.full(len(rows), 'review')
    waiting,out = np.flatnonzero(lane == 'review'), []
    for k,i in enumerate(waiting[most_useful(probs[waiting], round(share*len(rows)))] if len(waiting) else []):
        r,at,code = rows.iloc[i], when+timedelta(seconds=k), model.codes[int(probs[i].argmax())]
        text,path = (r.designation, r.description), raw/'images'/'image_train'/r.image
        keys,said = (text_hash(*text), sha256_file(path)), (at, at+timedelta(hours=1), code, int(r.prdtypecode))
        out.append(Correction(*keys, *said, *text, path))
    return out


# The loop ----------------------------------------------------------------------------------------------------------

class Loop:
    "A marketplace of some months, and two ways to keep up with it."
    def __init__(self, home:Path, cfg, first:int, traffic:int, monthly:int, months:int, seed:int = 42):
        self.home,self.cfg,self.meter,self.seed,self.months,self.monthly = home, cfg, Meter(), seed, months, monthly
        self.sizes = [first]+[traffic]*(months+1)
        self.starts = np.cumsum([0, *self.sizes])
        self.corrections,self.rows,self.charged = [], [], 0.

    def raw(self, m:int)->Path:
        "All listings of a month; month 0 is before the system began."
        folder,span = self.home/f'raw{m}', dict(start=int(self.starts[m]), total=int(self.starts[-1]))
        return folder if folder.exists() else synthesize(folder, self.sizes[m], 0, self.seed, progress=False, **span)

    def delivery(self, m:int)->Path:
        "The part of a month's listings that comes back with labels."
        raw,folder = self.raw(m), self.home/f'delivery{m}'
        if m == 0: return raw
        (folder/'images').mkdir(parents=True)
        (folder/'images'/'image_train').symlink_to(raw/'images'/'image_train')
        for name in ('X_train_update.csv', 'Y_train_CVw08PX.csv'):
            pd.read_csv(raw/name, index_col=0, keep_default_na=False).head(self.monthly).to_csv(folder/name)
        return folder

    def take_in(self, m:int)->Dataset: return ingest(self.delivery(m), self.home/'data', progress=False)

    def train(self, data:Dataset, name:str, init:Path|None):
        with self.meter.measure() as cost:
            fitted = fit(data, self.cfg, self.home/name, self.seed, progress=False, init=str(init or ''))
        return fitted, cost

    def month(self, m:int):
        "Take a month in, retrain, promote; and the same from scratch."
        data,used = self.take_in(m), 0
        if self.corrections: used = write_delivery(self.corrections, data, self.home/'feedback').used
        if used: data = ingest(self.home/'feedback', self.home/'data', max_quarantine=1., progress=False)
        before = alias_version('champion')
        fitted,cost = self.train(data, f'loop{m}', resolve_training(before) if before else None)
        out = self.home/f'loop{m}'; bundle = export(fitted, data, out, self.seed)
        with tracked_run(name=f'month {m}') as run: version = register_bundle(run, bundle, out/'oof.parquet')
        t0 = time.perf_counter()
        decision,trial = promote(version, data, progress=False); gate_s = time.perf_counter()-t0
        assert len(model_versions()) == m+1
        self.charged += cost['embedding']
        scratch,full = self.train(data, f'scratch{m}', None)
        shutil.rmtree(self.home/f'scratch{m}')
        embedding = self.charged+full['embedding']
        self.data = data
        return scratch, trial, dict(
            month=m, listings=len(data.index), corrections=used, promoted=decision.promoted, reason=decision.reason,
            categories=len(fitted.codes), gate_s=gate_s, loop_embedding_s=cost['embedding'],
            loop_cpu_s=cost['embedding']+cost['rest'], scratch_embedding_s=embedding,
            scratch_cpu_s=embedding+full['rest'])

    def run(self)->pd.DataFrame:
        for m in range(self.months+1):
            scratch,trial,row = self.month(m)
            champion,raw = Predictor.load(resolve_model(f'models:/{MODEL}@champion')[0]), self.raw(m+1)
            rows = clean_rows(raw)
            probs,truth = asked(champion, rows, raw), rows.prdtypecode
            other = asked(in_memory(scratch), rows, raw)
            row['champion_f1'] = macro_f1(probs, champion.codes, truth)
            row['scratch_f1'] = macro_f1(other, scratch.codes, truth)
            row['new'] = [c for c in trial.challenger.codes if trial.champion and c not in trial.champion.names]
            when = datetime(2026, 1, 1, tzinfo=UTC)+timedelta(days=30*m)
            self.corrections += reviewed(champion, rows, probs, raw, .05, when)
            self.rows.append(row)
            say('month {month}: {listings:,} listings, {corrections} corrections, {}; next month: {champion_f1:.4f}, '
                'scratch {scratch_f1:.4f}; CPU {loop_cpu_s:.0f} s against {scratch_cpu_s:.0f} s; {reason:.150}'.format(
                    'promoted' if row['promoted'] else 'refused', **row))
        return pd.DataFrame(self.rows)


def bench_loop(loop:Loop)->dict:
    t = loop.run()
    later = t[t.month > 0]
    lag = later.scratch_f1-later.champion_f1
    arrived = later[later.new.map(lambda codes: CATEGORY_COMES in codes) & later.promoted]
    return dict(compute_ratio=later.loop_cpu_s.sum()/later.scratch_cpu_s.sum(),
                largest_lag=lag.max(), mean_lag=lag.mean(), promoted_months=later.promoted.sum(), months=len(later),
                new_category_promoted=arrived.month.tolist(),
                account=dict(accounted_s=t.scratch_cpu_s[0], measured_s=t.loop_cpu_s[0]), gate_s=later.gate_s.mean(),
                by_month=t.to_dict('records'))


# Sabotage ----------------------------------------------------------------------------------------------------------

def permuted(df:pd.DataFrame, column:str, splits:list[str], rng)->pd.DataFrame:
    "Every listing of some splits has the label or the image of another."
    hit,out = df.split.isin(splits), df.copy()
    out.loc[hit, column] = rng.permutation(df[column][hit])
    return out


def collapse(df:pd.DataFrame, code:int, into:int)->pd.DataFrame:
    "A category is learnt as another, but for two listings, so that it keeps its place."
    hit = df.index[(df.prdtypecode == code) & df.split.isin(['train', 'val'])][2:]
    out = df.copy(); out.loc[hit, 'prdtypecode'] = into
    return out


def overconfident(bundle:Path, dest:Path)->Path:
    "The same answers with logits three times as large, and golden products of its own."
    net,config = load_bundle(bundle)
    net.stack.weights *= 3
    triage,names = json.loads((bundle/'triage.json').read_text()), {int(c): n for c,n in config['names'].items()}
    graphs = {p.stem: p.read_bytes() for p in bundle.glob('*.onnx')}
    save_bundle(dest, net, config['codes'], names, config['info'], triage, graphs)
    shutil.copytree(bundle/'golden', dest/'golden')
    return answer_golden(dest, read_golden(bundle))


def slow(bundle:Path, dest:Path)->Path:
    "The same weights without the exported graph: the network runs in PyTorch."
    shutil.copytree(bundle, dest); (dest/'image.onnx').unlink()
    return answer_golden(dest, read_golden(bundle))


def answer_golden(bundle:Path, golden:list[dict])->Path:
    "Let the spoilt bundle itself answer its golden products, so that only the damage speaks against it."
    write_manifest(bundle)
    model = Predictor.load(bundle)
    for g in golden:
        image = base64.b64decode(g['image']) if g['image'] else None
        p = model.predict([model.prepare(g['designation'], g['description'], image)])[0]
        g |= dict(prdtypecode=p.prdtypecode, probability=p.probability)
    (bundle/'golden'/'golden.json').write_text(json.dumps(golden, ensure_ascii=False), encoding='utf-8')
    write_manifest(bundle)
    return bundle


def bench_sabotage(data:Dataset, cfg, home:Path, seed:int = 1)->dict:
    "The gate's decision on five spoilt challengers, an equal one, and an honest one."
    rng,df = np.random.default_rng(seed), data.products
    def trained(products, name, seed=seed):
        d = with_products(data, products)
        return export(fit(d, cfg, home/name, seed, progress=False), d, home/name, seed)
    order = rng.permutation(df.index[df.split == 'train'])
    some = lambda share: df.drop(index=order[round(share*len(order)):])
    small,df = some(.15), some(.6)  # the champion has seen a quarter of what challengers have
    champion,good = trained(small, 'champion'), trained(df, 'good')
    tested = df[df.split == 'test'].prdtypecode.value_counts()
    code = int(tested[tested >= max(8, .01*tested.sum())].index[-1])
    into = next(int(c) for c in df.prdtypecode.value_counts().index if c != code)
    mixed = lambda column,*splits: trained(permuted(df, column, splits, rng), column)
    makers = dict(honest=(lambda: good, set()),
                  shuffled_labels=(lambda: mixed('prdtypecode', 'train'), {'score', 'training'}),
                  class_collapsed=(lambda: trained(collapse(df, code, into), 'collapsed'), {'classes'}),
                  broken_image_branch=(lambda: mixed('image', 'train', 'val'), {'robustness'}),
                  overconfident=(lambda: overconfident(good, home/'overconfident'), {'calibration', 'promise'}),
                  twice_as_slow=(lambda: slow(good, home/'slow'), {'latency'}),
                  equal=(lambda: trained(small, 'equal', seed+1), {'score'}))
    rows = {}
    for name,(make,want) in makers.items():
        try: v = compare(make(), champion, data, progress=False).verdict
        except ValueError as e: ok,failed,reason = False, ['training'], str(e)  # training itself refuses
        else: ok,failed,reason = v.ok, [c.name for c in v.checks if not c.ok], v.reason
        right = ok if name == 'honest' else not ok and bool(want & {*failed})
        rows[name] = dict(challenger=name, ok=ok, failed=failed, right=right, reason=reason)
        said = 'promoted' if ok else f"refused by {', '.join(failed)}"
        say(f"{name:20} {said}{'' if right else '  <- WRONG'}: {reason[:160]}")
    spoilt = [r['right'] for n,r in rows.items() if n not in ('honest', 'equal')]
    return dict(sabotaged_refused=np.mean(spoilt), equal_refused=rows['equal']['right'],
                honest_promoted=rows['honest']['ok'], by_challenger=[*rows.values()])


# Power -------------------------------------------------------------------------------------------------------------

def bench_power(cfg, home:Path, n_train:int, n_pool:int, n_test:int, draws:int, gain:float = .015, seed:int = 3)->dict:
    "How often the gate promotes a model that is `gain` better in truth, and one that is not."
    total = n_train+n_pool
    raw = synthesize(home/'raw', n_train, 0, seed, image_size=32, progress=False, start=0, total=total)
    data,text,rng = ingest(raw, home/'data', progress=False), single_modality(cfg, 'text'), np.random.default_rng(seed)
    df = data.products; train = df.index[df.split == 'train']
    half,plan = df.drop(index=rng.permutation(train)[:int(.6*len(train))]), make_plan(total, seed, total)
    rows = pd.DataFrame([make_row(plan, i) for i in range(n_train, total)])
    rows = rows.assign(title=rows.designation.map(clean_text), text=rows.description.map(clean_text), image='',
                       prdtypecode=rows.true_code)
    def model(products, seed):
        f = fit(with_products(data, products), text, home/f'm{seed}', seed, progress=False)
        probs = in_memory(f).probs_of(rows, data.images_dir, home/'store', progress=False)
        return ModelOutputs(str(seed), {c: str(c) for c in f.codes}, probs, np.zeros(len(rows), bool), 0.)
    models = [model(p, s) for s,p in ((10, half), (11, half), (12, df))]
    codes = sorted({c for m in models for c in m.codes})
    old,twin,best = (aligned(m, codes) for m in models)
    targets,groups = pd.Index(codes).get_indexer(rows.prdtypecode), rows.group.to_numpy()
    score = lambda p: macro_f1(p, codes, rows.prdtypecode)
    # a share of the listings is answered by the better model, so that the truth is a gain of just so much
    order,lo,hi = rng.random(len(rows)), 0., 1.
    mixed = lambda s: np.where((order < s)[:, None], best, old)
    for _ in range(20):
        mid = (lo+hi)/2
        lo,hi = (mid, hi) if score(mixed(mid))-score(old) < gain else (lo, mid)
    better,gate = mixed(hi), GateConfig()
    def passes(new, s):
        some = np.random.default_rng([seed, s]).permutation(len(rows))[:n_test]
        a,b,t,g = old[some], new[some], targets[some], groups[some]
        return check_scores(a, b, t, paired_scores(a, b, t, g, gate), gate).ok
    often = lambda new: float(np.mean([passes(new, s) for s in range(draws)]))
    return dict(true_gain=score(better)-score(old), equal_gain=score(twin)-score(old), n_test=n_test,
                population=len(rows), disagree=(better.argmax(1) != old.argmax(1)).mean(),
                better_promoted=often(better), equal_promoted=often(twin))


# Active ------------------------------------------------------------------------------------------------------------

def bench_active(cfg, home:Path, n_first:int, n_traffic:int, n_judge:int, seeds:int, seed:int = 5)->dict:
    "Gain of the most useful corrections, against that of random ones."
    sizes = dict(first=n_first, traffic=n_traffic, judge=n_judge)
    total,begin,raws,ids = sum(sizes.values()), 0, {}, {}
    for name,n in sizes.items():
        raws[name] = synthesize(home/name, n, 0, seed, progress=False, start=begin, total=total); begin += n
        both = ingest(raws[name], home/'data', progress=False)
        ids[name] = truth_of(raws[name]).index
    truth,df = pd.concat(map(truth_of, raws.values())), both.products
    first,pool,judge = (df[df.productid.isin(i)] for i in ids.values())
    judge = judge[~judge.group.isin(df.group[~df.productid.isin(ids['judge'])])]  # no copies of what was learnt
    labelled = lambda rows: rows.assign(prdtypecode=rows.productid.map(truth), split='train')
    ask = lambda f, rows: in_memory(f).probs_of(rows, both.images_dir, artifacts_dir()/'embeddings', progress=False)
    n,out = round(.05*len(pool)), []
    for s in range(seeds):
        data = with_products(both, first)
        base = fit(data, cfg, home/f'base{s}', s, progress=False)
        export(base, data, home/f'base{s}', s)
        rng = np.random.default_rng([seed, s])
        chosen = dict(none=[], useful=most_useful(ask(base, pool), n), random=rng.permutation(len(pool))[:n])
        row = dict(seed=s)
        for name,at in chosen.items():
            d = with_products(both, pd.concat([first, labelled(pool.iloc[at])]))
            f = fit(d, cfg, home/f'{name}{s}', s, progress=False, init=home/f'base{s}')
            row[name] = macro_f1(ask(f, judge), f.codes, judge.productid.map(truth))
        out.append(row)
        say(f"seed {s}: macro F1 {row['none']:.4f}; with {n} useful corrections {row['useful']-row['none']:+.4f}, "
            f"with {n} random ones {row['random']-row['none']:+.4f}")
    t = pd.DataFrame(out)
    useful,rand = (t.useful-t.none).mean(), (t.random-t.none).mean()
    ratio = useful/rand if rand > 0 else float('inf') if useful > 0 else 0.
    return dict(corrections=n, gain_useful=useful, gain_random=rand, active_over_random=ratio, judged_on=len(judge),
                by_seed=out)


def bench(args, work:Path)->dict:
    q,out = args.quick, {}
    os.environ |= dict(RAKUTEN_MM_GRAPHS=str(work/'graphs'), MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR='false')
    name = args.preset or ('smoke' if q else 'cpu'); cfg = preset(name)
    if q: cfg = replace(cfg, fit=replace(cfg.fit, hold_out=FitConfig().hold_out))
    # a bundle's graph is not what is measured here; other runtimes only take time
    cfg = replace(cfg, encoders=replace(cfg.encoders, runtimes='onnx'))
    loop = Loop(work/'loop', cfg, *((500, 80, 60, 1) if q else (4_500, 1_500, 250, 9)))
    loop.home.mkdir(parents=True)
    if 'loop' in args.only: out['loop'] = bench_loop(loop)
    elif 'sabotage' in args.only:
        for m in range(loop.months+1): loop.data = loop.take_in(m)
    if 'sabotage' in args.only: out['sabotage'] = bench_sabotage(loop.data, cfg, work/'sabotage')
    sizes = dict(power=(300, 600, 400, 2), active=(150, 150, 150, 1))
    if not q: sizes = dict(power=(3_000, 9_000, 3_000, 20), active=(1_200, 2_400, 1_500, 3))
    for part,f in dict(power=bench_power, active=bench_active).items():
        if part in args.only: out[part] = f(cfg, work/part, *sizes[part])
    headlines = {k: float(figures[k]) for figures in out.values() for k in BARS if k in figures}
    return headlines | out | dict(preset=name, threads=n_threads(), quick=q)


if __name__ == '__main__':
    main(bench, __doc__, option('--preset', default='', help='cpu; smoke with --quick'), parts=PARTS, bars=BARS)
