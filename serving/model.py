"What the worker answers with. Only the worker imports this, and with it PyTorch."
import base64
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rakuten_mm.core.config import n_threads
from rakuten_mm.core.files import read_golden
from rakuten_mm.data.image import InvalidImage
from rakuten_mm.models.explanation import explain
from rakuten_mm.models.predictor import Prediction, Predictor, Prepared
from rakuten_mm.monitoring.observations import listing_facts, observe
from serving.worker import Problem


@dataclass
class Answer(Prediction):
    "A prediction, and what is recorded of the listing."
    facts:dict = field(default_factory=dict) # `traffic.listing_facts`
    sketch:dict = field(default_factory=dict) # Numbers by part, from `traffic.observe`


@dataclass
class Listing(Prepared):
    "A listing that can be answered."
    facts:dict = field(default_factory=dict) # `traffic.listing_facts`


class Model:
    "A predictor that gives its bundle's golden answers, and for which one bad listing is one problem."
    def __init__(self,
        bundle:str|Path, # Sealed
        version:str, # What answers call it
        threads:int = 0, # 0 takes every core
    ):
        torch.set_num_threads(n_threads(threads))
        self.predictor,self.version = Predictor.load(bundle), version
        if 'text' in self.predictor.modalities: self.predictor.predict([Prepared('warm up')])
        for g in read_golden(bundle):
            got = self.answer([self.prepare(g)])[0]
            if isinstance(got, Problem) or got.prdtypecode != g['prdtypecode'] or abs(got.probability-g['probability']) > .02:
                raise ValueError(f"it answers a golden product differently here ({g['designation'][:40]!r}: {getattr(got, 'prdtypecode', got)})")

    def prepare(self, p:dict)->Listing|Problem:
        "A listing cleaned and decoded, or what is wrong with it."
        image = base64.b64decode(p['image']) if isinstance(p['image'], str) else p['image']
        try: q = self.predictor.prepare(p['designation'], p['description'] or '', image)
        except InvalidImage as e: return Problem(422, 'invalid_image', str(e), 'image')
        except ValueError as e: return Problem(422, 'nothing_to_classify', str(e), 'designation')
        return Listing(**vars(q), facts=listing_facts(q))

    def rank(self, items:list[Listing])->list[Answer]:
        "Predictions, and what to record."
        if not items: return []
        probs,sketches = observe(self.predictor, items)
        ranked = self.predictor.rank(items, probs, len(self.predictor.codes))
        return [Answer(**vars(p), facts=x.facts, sketch=s) for x,p,s in zip(items, ranked, sketches, strict=True)]

    def answer(self, items:list[Listing|Problem])->list[Answer|Problem]:
        "Predictions of those that can be predicted."
        some,out = [i for i,x in enumerate(items) if isinstance(x, Listing)], list(items)
        try: found = self.rank([items[i] for i in some])
        except Exception as e:
            if len(some) > 1: return [self.answer([x])[0] for x in items]  # one of them cannot be answered; the others can
            found = [Problem(500, 'internal_error', f'{type(e).__name__} in the model')]*len(some)
        for i,p in zip(some, found, strict=True):
            fine = isinstance(p, Problem) or math.isfinite(p.probability)
            out[i] = p if fine else Problem(500, 'internal_error', 'the model gave no number')
        return out

    def explain(self, request:dict)->dict|Problem:
        "What an answer rests on."
        prepared = self.prepare(request)
        if isinstance(prepared, Problem): return prepared
        try: return explain(self.predictor, prepared, request['prdtypecode']).to_dict()
        except ValueError as e: return Problem(422, 'invalid_request', str(e), 'prdtypecode')

    def agreement(self, items:list[Listing|Problem], given:list[dict|Problem])->tuple[int, int]: # How many it answered, and how many alike
        "Answer as a shadow."
        pairs = [(x, y) for x,y in zip(items, given, strict=True) if not isinstance(x, Problem) and not isinstance(y, Problem)]
        mine = self.answer([x for x,_ in pairs])
        return len(pairs), sum(getattr(m, 'prdtypecode', None) == y['prdtypecode'] for m,(_,y) in zip(mine, pairs, strict=True))
