"The model that the worker answers with. Only the worker imports this, and with it PyTorch."
import base64
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from rakuten_mm.core.process import n_threads
from rakuten_mm.data.image import InvalidImage
from rakuten_mm.models.explanation import explain
from rakuten_mm.models.manifest import read_golden
from rakuten_mm.models.predictor import Prediction, Predictor, Prepared
from rakuten_mm.monitoring.observations import listing_features, probs_and_projections
from serving.messages import Problem


@dataclass
class RecordedPrediction(Prediction):
    "A prediction, and what is recorded of the listing."
    facts:dict = field(default_factory=dict) # From `listing_features`
    sketch:dict = field(default_factory=dict) # Numbers by part, from `probs_and_projections`


@dataclass
class PreparedListing(Prepared):
    "A listing that can be answered."
    facts:dict = field(default_factory=dict) # From `listing_features`


class ServedModel:
    "A predictor that gives its bundle's golden answers, and for which one bad listing is one problem."
    listing_s = 0. # Seconds of a listing, which bound the first batch; 0: not known

    def __init__(self,
        bundle:str|Path, # Folder of a verified bundle
        version:str, # Its name in answers
        threads:int = 0, # 0 takes every core
    ):
        torch.set_num_threads(n_threads(threads))
        self.predictor = cast(Any, Predictor.load(bundle, light=True))  # type checkers do not see patched methods
        self.version = version
        if 'text' in self.predictor.modalities: self.predictor.predict([Prepared('warm up')])
        took = []
        for g in read_golden(bundle):
            start = time.monotonic(); got,want = self.answer([self.prepare(g)])[0], g['prdtypecode']
            took.append(time.monotonic()-start)
            if isinstance(got, Problem) or got.prdtypecode != want or abs(got.probability-g['probability']) > .02:
                said = getattr(got, 'prdtypecode', got)
                raise ValueError(f"it answers a golden product differently here ({g['designation'][:40]!r}: {said})")
        if took: self.listing_s = statistics.median(took)

    def prepare(self, p:dict)->PreparedListing|Problem:
        "A listing cleaned and decoded, or the problem with it."
        image = base64.b64decode(p['image']) if isinstance(p['image'], str) else p['image']
        try: q = self.predictor.prepare(p['designation'], p['description'] or '', image)
        except InvalidImage as e: return Problem(422, 'invalid_image', str(e), 'image')
        except ValueError as e: return Problem(422, 'nothing_to_classify', str(e), 'designation')
        return PreparedListing(**vars(q), facts=listing_features(q))

    def rank(self, items:list[PreparedListing])->list[RecordedPrediction]:
        "Predictions, and what to record."
        if not items: return []
        probs,projections = probs_and_projections(self.predictor, [*items])
        ranked = self.predictor.rank(items, probs, len(self.predictor.codes))
        return [RecordedPrediction(**vars(p), facts=x.facts, sketch=s)
                for x,p,s in zip(items, ranked, projections, strict=True)]

    def answer(self, items:list[PreparedListing|Problem])->list[RecordedPrediction|Problem]:
        "Predictions of those that can be predicted, in the order of `items`."
        good = [x for x in items if isinstance(x, PreparedListing)]
        try: found:list = list(self.rank(good))
        except Exception as e:
            if len(good) > 1: return [self.answer([x])[0] for x in items]  # one cannot be answered; the others can
            found = [Problem(500, 'internal_error', f'{type(e).__name__} in the model')]*len(good)
        number = lambda p: isinstance(p, Problem) or math.isfinite(p.probability)
        answers = (p if number(p) else Problem(500, 'internal_error', 'the model gave no number') for p in found)
        return [x if isinstance(x, Problem) else next(answers) for x in items]

    def explain(self, request:dict)->dict|Problem:
        "Explain an answer, or say what is wrong with the request."
        prepared = self.prepare(request)
        if isinstance(prepared, Problem): return prepared
        try: explanation = cast(Any, explain(self.predictor, prepared, request['prdtypecode'], batch_size=8,
                                             until=request['until']))
        except ValueError as e: return Problem(422, 'invalid_request', str(e), 'prdtypecode')
        except TimeoutError: return Problem(504, 'timeout', 'no explanation in time; a shorter text takes less')
        return explanation.to_dict()

    def agreement(self,
        items:list[PreparedListing|Problem],
        given:list[dict|Problem], # Answers to them
    )->tuple[int, int]: # How many it answered, and how many alike
        "Answer as a shadow."
        pairs = [(x, y) for x,y in zip(items, given, strict=True) if not isinstance(x, Problem) and isinstance(y, dict)]
        mine = self.answer([x for x,_ in pairs])
        return len(pairs), sum(getattr(m, 'prdtypecode', None) == y['prdtypecode']
                               for m,(_,y) in zip(mine, pairs, strict=True))
