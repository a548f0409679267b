"""Does the drift alarm come in time, stay quiet when nothing moves, and name the right cause?

    python scripts/bench_drift.py [--quick] [--json out.json] [--seeds 3] [--listings 12000] [--size 32]

For each seed a small model is trained on the first three tenths of a synthetic catalogue's time axis, and is served each later decile
of another catalogue, whose sellers, titles and pictures it has not seen. A decile counts as drifted when the population stability
index of its class mix (as the generator defines it, over the classes that were there to learn) is at least 0.1, which is commonly called
a moderate shift. Two controls must stay quiet: time shuffled, and time standing still, where listings come in sellers' batches.
Then causes are made to order in traffic without drift, and the causes that are named are counted.
"""
import argparse
import io
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rakuten_mm.core.config import TrainConfig, load_environment, preset
from rakuten_mm.data.dataset import Dataset
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.models.predictor import Predictor
from rakuten_mm.monitoring.drift import CAUSES, detect
from rakuten_mm.monitoring.observations import SKETCH, RequestLog, assemble, listing_facts, observe, training_reference
from rakuten_mm.synthetic.catalogue import CODES, class_weights, make_plan, make_row, synthesize
from rakuten_mm.synthetic.images import encode_picture
from rakuten_mm.synthetic.texts import make_title
from rakuten_mm.training.export import export, fit

STILL = 10**6 # Rows of a time axis on which a few thousand see no time pass


def say(*args): print(*args, file=sys.stderr, flush=True)


def small(size:int)->TrainConfig:
    "The smoke preset for pictures of `size` pixels."
    cfg = preset('smoke')
    return replace(cfg, encoders=replace(cfg.encoders, image_size=size))


def train(
    folder:Path,
    n:int, # Listings
    total:int, # Rows of the time axis, of which these are the first
    seed:int,
    cfg:TrainConfig,
    size:int = 32, # Side of the pictures in pixels
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
    size:int = 0, # Side of the pictures in pixels; 0 draws none
):
    "Rows of a catalogue as a seller would send them: dictionaries of designation, description, image and code."
    plan = make_plan(int(max(rows))+1, seed, total)
    for i in map(int, rows):
        r = make_row(plan, i)
        image = encode_picture([3, seed, r['image_of']], int(plan.k[i]), size, r['image_copy'], [4, seed, i]) if size else None
        yield dict(designation=r['designation'], description=r['description'], image=image, code=r['true_code'])


def serve(
    model:Predictor,
    items, # From `listings`
    batch:int = 64,
)->RequestLog:
    "What the server would have recorded."
    facts,probs,sketches,lanes = [], [], [], []
    items = list(items)
    for i in range(0, len(items), batch):
        some = [model.prepare(x['designation'], x['description'], x['image']) for x in items[i:i+batch]]
        p,s = observe(model, some)
        facts += map(listing_facts, some); sketches += s; probs.append(p)
        lanes += map(str, model.triage.lanes(p) if model.triage else ['review']*len(p))
    empty = [np.nan]*SKETCH
    return assemble(facts, np.concatenate(probs), {m: np.array([s[m] or empty for s in sketches]) for m in model.modalities}, lanes, model.codes)


def stability(
    decile:int,
    early:float = .3, # End of the training part
)->float:
    "Population stability index of a decile's class mix against the training part's, as the generator has them."
    before,now = (class_weights(np.linspace(a, b, 200, endpoint=False)).mean(0) for a,b in ((0, early), (decile/10, decile/10+.1)))
    known = before > 0
    p,q = before[known], now[known]/now[known].sum()
    return float(((q-p)*np.log(q.clip(1e-6)/p)).sum())


def dark(data:bytes)->bytes:
    "The picture, darkened and in a frame."
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
        if cause == 'lost pictures' and hit < .5 and x['designation'].strip(): x['image'] = None
        if cause == 'other words' and hit < .5: x['designation'] = 'Offre pro : '+make_title(rng, x['code'], 'en', silent=True)
        if cause == 'other pictures' and hit < .6 and x['image']: x['image'] = dark(x['image'])
        out.append(x)
    return out


MADE = {'nothing': [], 'label mix': [CAUSES[0]], 'lost descriptions': [CAUSES[1]], 'lost pictures': [CAUSES[1]], 'other words': [CAUSES[2]],
        'other pictures': [CAUSES[2]]}


def score(seed:int, n:int, size:int)->dict:
    "Everything, for one seed."
    cfg,early,tenth,other = small(size), int(.3*n), n//10, seed+1000
    out = dict(seed=seed, deciles={}, shuffled=[], still=[], made={})
    def trained(name, total):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as d: got = train(Path(d), early, total, seed, cfg, size)
        say(f'seed {seed}: {name} trained in {time.monotonic()-start:.0f} s')
        return got
    model,ref = trained('early', n)
    for k in range(3, 10):
        report = detect(ref, serve(model, listings(other, np.arange(k*tenth, (k+1)*tenth), n, size)))
        out['deciles'][k] = dict(alarm=report.alarm, causes=report.causes, advice=report.advice, psi=stability(k))
    model,ref = trained('still', STILL)
    for k in range(5): out['still'].append(detect(ref, serve(model, listings(other, np.arange(k*tenth, (k+1)*tenth), STILL, size))).causes)
    model,ref = trained('shuffled', early)
    order = np.random.default_rng(seed).permutation(n)
    for k in range(5): out['shuffled'].append(detect(ref, serve(model, listings(other, order[k*tenth:(k+1)*tenth], n, size))).causes)
    items = list(listings(other, order[-2*tenth:], n, size))
    for cause in MADE: out['made'][cause] = detect(ref, serve(model, change(items, cause, seed))).causes
    return out


def table(runs:list[dict])->str:
    "The scores, to read."
    lines = ['decile  PSI   alarms  causes named']
    for k in range(3, 10):
        d = [r['deciles'][k] for r in runs]
        causes = ', '.join(f'{c} {sum(c in x["causes"] for x in d)}' for c in CAUSES if any(c in x['causes'] for x in d))
        lines.append(f'{k/10:.1f}    {d[0]["psi"]:5.2f}   {sum(x["alarm"] for x in d)}/{len(d)}    {causes}{"" if d[0]["psi"] < .1 else " <- drifted"}')
    for name in ('shuffled', 'still'):
        quiet = [not c for r in runs for c in r[name]]
        lines.append(f'false alarms, time {name}: {len(quiet)-sum(quiet)} of {len(quiet)}')
    for cause,want in MADE.items():
        named = [r['made'][cause] for r in runs]
        others = ''.join(f' ({", ".join(c) or "nothing"})' for c in named if c != want)
        lines.append(f'{cause}: {sum(c == want for c in named)}/{len(named)} named rightly{others}')
    return '\n'.join(lines)


def figures(runs:list[dict])->dict:
    "The scores, to compare."
    first = min(k for k in range(3, 10) if stability(k) >= .1)
    quiet = [bool(c) for r in runs for name in ('shuffled', 'still') for c in r[name]]
    return dict(first_drifted_decile=first, alarm_in_first_drifted=np.mean([r['deciles'][first]['alarm'] for r in runs]),
                alarm_by_next=np.mean([r['deciles'][first]['alarm'] or r['deciles'][first+1]['alarm'] for r in runs]), false_alarms=np.mean(quiet),
                named_rightly=np.mean([r['made'][c] == want for r in runs for c,want in MADE.items()]))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='one seed')
    p.add_argument('--json', type=Path, help='write everything to this file')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--listings', type=int, default=12_000, help='on the time axis')
    p.add_argument('--size', type=int, default=32, help='side of the pictures in pixels')
    a = p.parse_args()
    load_environment()
    runs = [score(s, a.listings, a.size) for s in range(1 if a.quick else a.seeds)]
    print(table(runs)); print(json.dumps(figures(runs)))
    if a.json: a.json.write_text(json.dumps(dict(figures=figures(runs), runs=runs), indent=1))


if __name__ == '__main__': main()
