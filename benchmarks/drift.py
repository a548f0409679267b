"""Does the drift alarm come in time, stay quiet when nothing moves, and name the right cause?

    python -m benchmarks.drift --json [--quick] [--seeds 3] [--listings 12000] [--size 32]

For each seed a small model is trained on the first three tenths of a synthetic catalogue's time axis, and is served
each later decile of another catalogue, whose sellers, titles and images it has not seen. A decile counts as drifted
when the population stability index of its class mix (as the generator defines it, over the classes that were there to
learn) is at least 0.1, which is commonly called a moderate shift. Two controls must stay quiet: time shuffled, and
time standing still, where listings come in sellers' batches. Then causes are made to order in traffic without drift,
and the causes that are named are counted.
"""
import io
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks.harness import main, option, say
from rakuten_mm.core.config import TrainConfig, preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.monitoring.drift import CAUSES, detect
from rakuten_mm.monitoring.observations import (
    PROJECTION_DIM,
    RequestLog,
    assemble,
    listing_features,
    probs_and_projections,
    training_reference,
)
from rakuten_mm.synthetic.catalogue import CODES, class_weights, make_plan, make_row, synthesize
from rakuten_mm.synthetic.images import encode_image
from rakuten_mm.synthetic.texts import make_title
from rakuten_mm.training.export import export
from rakuten_mm.training.fit import fit

STILL = 10**6 # Rows of a time axis on which a few thousand see no time pass
LABELS,PARTS,CONTENT = CAUSES
MADE = {'nothing': [], 'label mix': [LABELS], 'lost descriptions': [PARTS], 'lost images': [PARTS],
        'other words': [CONTENT], 'other images': [CONTENT]}
DECILES = range(3, 10)


def train(
    folder:Path,
    n:int, # Listings
    total:int, # Rows of the time axis, of which these are the first
    seed:int,
    cfg:TrainConfig,
    size:int = 32, # Side of the images in pixels
)->tuple[Predictor, RequestLog]: # Champion, and its reference
    "A model of the first listings of a catalogue."
    synthesize(folder/'raw', n, 0, seed, size, progress=False, total=total, workers=1)
    ingest(folder/'raw', folder/'data', progress=False)
    data = Dataset.open(folder/'data')
    model = Predictor.load(export(fit(data, cfg, folder/'fit', seed, progress=False), data, folder/'fit', seed))
    return model, training_reference(model, data, progress=False)


def listings(
    seed:int,
    rows:np.ndarray, # Row numbers, in the order in which they are served
    total:int, # Rows of the time axis
    size:int = 0, # Side of the images in pixels; 0 draws none
):
    "Rows of a catalogue as a seller would send them: dictionaries of designation, description, image and code."
    plan = make_plan(int(max(rows))+1, seed, total)
    for i in map(int, rows):
        r = make_row(plan, i)
        out = dict(designation=r['designation'], description=r['description'], image=None, code=r['true_code'])
        keys = [3, seed, r['image_of']], int(plan.k[i])
        if size: out['image'] = encode_image(*keys, size, r['image_copy'], [4, seed, i])
        yield out


def serve(
    model:Predictor,
    items, # From `listings`
    batch:int = 64,
)->RequestLog:
    "The figures that the server would have recorded."
    features,probs,projections,lanes,items = [], [], [], [], list(items)
    for i in range(0, len(items), batch):
        some = [model.prepare(x['designation'], x['description'], x['image']) for x in items[i:i+batch]]
        p,s = probs_and_projections(model, some)
        features += map(listing_features, some); projections += s; probs.append(p)
        lanes += map(str, model.triage.lanes(p) if model.triage else ['review']*len(p))
    empty = [np.nan]*PROJECTION_DIM
    vectors = {m: np.array([s[m] or empty for s in projections]) for m in model.modalities}
    return assemble(features, np.concatenate(probs), vectors, lanes, model.codes)


def stability(
    decile:int,
    early:float = .3, # End of the training part
)->float:
    "Population stability index of a decile's class mix against the training part's, as the generator has them."
    mix = lambda a,b: class_weights(np.linspace(a, b, 200, endpoint=False)).mean(0)
    before,now = mix(0, early), mix(decile/10, decile/10+.1)
    known = before > 0
    p,q = before[known], now[known]/now[known].sum()
    return float(((q-p)*np.log(q.clip(1e-6)/p)).sum())


def dark(data:bytes)->bytes:
    "The image, darkened and in a frame."
    im = ImageOps.expand(Image.open(io.BytesIO(data)).convert('RGB').point(lambda v: v*.5), 3, 'navy')
    im.save(buf := io.BytesIO(), 'JPEG')
    return buf.getvalue()


def change(
    items:list[dict],
    cause:str, # A key of `MADE`
    seed:int,
)->list[dict]:
    "Listings in which a cause of drift was made to order."
    rng,out = random.Random(seed), []
    for x in items:
        hit,x = rng.random(), dict(x)
        if cause == 'label mix' and CODES.index(x['code'])%3 and hit < .6: continue
        if 'descriptions' in cause and hit < .6: x['description'] = ''
        if cause == 'lost images' and hit < .5 and x['designation'].strip(): x['image'] = None
        if cause == 'other words' and hit < .5:
            x['designation'] = 'Offre pro : '+make_title(rng, x['code'], 'en', silent=True)
        if cause == 'other images' and hit < .6 and x['image']: x['image'] = dark(x['image'])
        out.append(x)
    return out


def score(seed:int, n:int, size:int)->dict:
    "Everything, for one seed."
    cfg,early,tenth,other = preset('smoke'), int(.3*n), n//10, seed+1000
    cfg = replace(cfg, encoders=replace(cfg.encoders, image_size=size))
    def trained(name, total):
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as d: got = train(Path(d), early, total, seed, cfg, size)
        say(f'seed {seed}: {name} trained in {time.monotonic()-begin:.0f} s')
        return got
    span = lambda k: slice(k*tenth, (k+1)*tenth)
    def report(trained, rows, total=n): return detect(trained[1], serve(trained[0], listings(other, rows, total, size)))
    model,every,out = trained('early', n), np.arange(n), dict(seed=seed, deciles={})
    for k in DECILES:
        r = report(model, every[span(k)])
        out['deciles'][k] = dict(alarm=r.alarm, causes=r.causes, advice=r.advice, psi=stability(k))
    model = trained('still', STILL)
    out['still'] = [report(model, every[span(k)], STILL).causes for k in range(5)]
    model,order = trained('shuffled', early), np.random.default_rng(seed).permutation(n)
    out['shuffled'] = [report(model, order[span(k)]).causes for k in range(5)]
    items = list(listings(other, order[-2*tenth:], n, size))
    out['made'] = {cause: detect(model[1], serve(model[0], change(items, cause, seed))).causes for cause in MADE}
    return out


def bench(args, work:Path)->dict:
    runs = [score(s, args.listings, args.size) for s in range(args.seeds)]
    psi = {k: round(stability(k), 3) for k in DECILES}
    first = min(k for k in psi if psi[k] >= .1)
    alarms = {k: [r['deciles'][k]['alarm'] for r in runs] for k in DECILES}
    quiet = [bool(c) for r in runs for name in ('shuffled', 'still') for c in r[name]]
    named = {cause: np.mean([r['made'][cause] == want for r in runs]) for cause,want in MADE.items()}
    return dict(first_drifted_decile=first, alarm_in_first_drifted=np.mean(alarms[first]),
                alarm_by_next=np.mean([a or b for a,b in zip(alarms[first], alarms[first+1], strict=True)]),
                false_alarms=np.mean(quiet), named_rightly=np.mean([*named.values()]), stability_by_decile=psi,
                alarms_by_decile={k: np.mean(a) for k,a in alarms.items()}, named_rightly_by_cause=named, runs=runs)


if __name__ == '__main__':
    main(bench, __doc__, option('--listings', type=int, default=12_000, help='on the time axis'),
         option('--size', type=int, default=32, help='side of the images in pixels'), seeds=3)
