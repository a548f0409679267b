"The pages of the API."
import asyncio
import hashlib
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cachetools import LRUCache
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from rakuten_mm.data.image import InvalidImage
from rakuten_mm.data.taxonomy import CATEGORIES
from serving import metrics
from serving.auth import Access, Who
from serving.config import ServeConfig
from serving.engine import Engine
from serving.errors import Refused, of_validation
from serving.follow import Follower
from serving.forms import FORM, LOGIN, listing_of_form, login_of_form, small_jpeg
from serving.gate import Places
from serving.schema import (
    MAX_BATCH,
    BatchItem,
    BatchRequest,
    BatchResponse,
    CategoryName,
    Correction,
    ExplainRequest,
    ExplainResponse,
    FeedbackRequest,
    FeedbackResponse,
    PredictRequest,
    PredictResponse,
    ReviewItem,
    ReviewResponse,
    Token,
    Version,
)
from serving.store import Store, verdict, votes

STATIC = Path(__file__).parent/'static'


class Few:
    "Room for a few at one time, for what takes seconds; raises 503 beyond."
    def __init__(self, n:int): self.free = n

    def __enter__(self):
        if not self.free: raise Refused(503, 'too many explanations at one time; try again', headers={'Retry-After': '2'})
        self.free -= 1

    def __exit__(self, *_): self.free += 1


class Service:
    "What the pages have in common: one listing in, one recorded answer out."
    def __init__(self, engine:Engine, follower:Follower, store:Store, places:Places, cfg:ServeConfig):
        self.engine,self.follower,self.store,self.places,self.cfg = engine,follower,store,places,cfg
        self.answers,self.explaining = LRUCache(cfg.cache) if cfg.cache else None, Few(2)
        self.config = {}

    def bundle(self)->dict:
        "config.json of the model that answers."
        path = self.follower.api.bundle
        if path not in self.config: self.config = {path: json.loads(Path(path, 'config.json').read_text(encoding='utf-8'))}
        return self.config[path]

    def categories(self)->list[CategoryName]:
        "Every category that may be the right one: the model's, and all of Rakuten's where its are."
        names = {int(c): n for c,n in self.bundle()['names'].items()}
        codes = names.keys() | CATEGORIES.keys() if names.keys() <= CATEGORIES.keys() else names.keys()
        both = lambda c: dict(fr=CATEGORIES[c].fr, en=CATEGORIES[c].en) if c in CATEGORIES else dict(fr=names[c], en=names[c])
        return [CategoryName(prdtypecode=c, **both(c)) for c in sorted(codes)]

    async def predict(self, r:PredictRequest, who:Who, probe:bool=False)->PredictResponse:
        "A ranked answer, recorded; to a `probe` it is the model's own, and leaves no trace in what people review and drift is told from."
        text = hashlib.sha256(f'{r.designation}\0{r.description or ""}'.encode()).hexdigest()
        image = hashlib.sha256(r.image).hexdigest() if r.image else ''
        key = self.engine.version, text, image
        found = self.answers.get(key) if self.answers is not None and not probe else None
        if found: metrics.CACHED.inc()
        else:
            found = await self.engine.ask('predict', dict(designation=r.designation, description=r.description, image=r.image))
            if self.answers is not None: self.answers[found[0], text, image] = found
        version,answer = found
        out = PredictResponse(**answer | dict(top_k=answer['top_k'][:r.top_k]), prediction_id=str(uuid.uuid4()), model_version=version)
        if probe: return out
        metrics.LANES.labels(out.lane, version).inc()
        self.record(r, out, answer, who, text, image)
        return out

    def record(self, r:PredictRequest, out:PredictResponse, answer:dict, who:Who, text:str, image:str):
        ranked = answer['top_k']  # of all categories
        keep = self.cfg.keep_inputs == 'all' or self.cfg.keep_inputs == 'review' and out.lane == 'review'
        close = ranked[1]['probability'] if len(ranked) > 1 else 0.
        row = dict(id=out.prediction_id, created_at=datetime.now(UTC), user=who.name, model_version=out.model_version, prdtypecode=out.prdtypecode,
                   probability=out.probability, lane=out.lane, usefulness=1-(out.probability-close), top_k=ranked[:10],
                   candidates=out.candidates, modalities=out.modalities, text_sha256=text, image_sha256=image, has_inputs=int(keep),
                   designation=r.designation if keep else None, description=r.description if keep else None, facts=answer['facts'],
                   sketch=answer['sketch'], probs=[round(t['probability'], 4) for t in sorted(ranked, key=lambda t: t['prdtypecode'])])
        self.store.add(row, r.image if keep else None)
        metrics.DROPPED.set(self.store.dropped)

    async def one_of_many(self, product, who:Who)->BatchItem:
        "A listing of a batch, whatever becomes of it."
        try: return BatchItem(status=200, prediction=await self.predict(PredictRequest.model_validate(product), who))
        except ValidationError as e: return BatchItem(status=422, error=of_validation(e))
        except Refused as e: return BatchItem(status=e.status_code, error=e.error)


def who_asks(request:Request)->Who: return request.state.who


def is_probe(request:Request)->bool: return request.headers.get('x-probe') == '1'


def install(app:FastAPI, service:Service, access:Access):
    "Give `app` its pages."
    answers(app, service); people(app, service, access); state(app, service)
    app.mount('/static', StaticFiles(directory=STATIC), name='static')

    @app.get('/', include_in_schema=False)
    async def page(): return FileResponse(STATIC/'index.html')


def answers(app:FastAPI, service:Service):
    "Pages that ask the model."
    @app.post('/predict', tags=['prediction'], summary='File a listing under a category')
    async def predict(listing:PredictRequest, request:Request)->PredictResponse:
        return await service.predict(listing, who_asks(request), is_probe(request))

    @app.post('/predict/upload', tags=['prediction'], summary='The same, from a form with a file', openapi_extra=FORM)
    async def upload(request:Request)->PredictResponse: return await service.predict(await listing_of_form(request), who_asks(request))

    @app.post('/predict/batch', tags=['prediction'], summary=f'File up to {MAX_BATCH} listings; each has an answer or an error of its own')
    async def batch(listings:BatchRequest, request:Request)->BatchResponse:
        n,who = len(listings.products), who_asks(request)
        if n > MAX_BATCH: raise Refused(413, f'{n} listings, at most {MAX_BATCH} go into a batch')
        service.places.take(n-1)
        try: return BatchResponse(results=await asyncio.gather(*(service.one_of_many(p, who) for p in listings.products)))
        finally: service.places.leave(n-1)

    @app.post('/explain', tags=['prediction'], summary='Words and parts of the picture behind a category')
    async def explain(listing:ExplainRequest)->ExplainResponse:
        with service.explaining:
            version,out = await service.engine.ask('explain', {k: getattr(listing, k) for k in ('designation', 'description', 'image', 'prdtypecode')})
        return ExplainResponse(**out, model_version=version)


def people(app:FastAPI, service:Service, access:Access):
    "Pages about users and what they say."
    store = service.store

    @app.post('/token', tags=['access'], summary='A short-lived bearer token for a user and password (OAuth 2)', openapi_extra=LOGIN)
    async def token(request:Request)->Token:
        who = await access.check(await login_of_form(request), request.state.client)
        if who is None: access.wrong(request.state.client)
        return Token(**access.token(who))

    def said(fields:list)->list[Correction]: return [Correction(reviewer=f.reviewer, prdtypecode=f.prdtypecode, created_at=f.created_at) for f in fields]

    @app.post('/feedback', tags=['review'], summary='Say what the right category of a listing is')
    async def feedback(f:FeedbackRequest, request:Request)->FeedbackResponse:
        who = who_asks(request)
        if f.reviewer not in (None, who.name) and not who.may('admin'): raise Refused(403, 'only an admin may speak for another reviewer')
        if f.prdtypecode not in {c.prdtypecode for c in service.categories()}: raise Refused(422, 'is no category; see /categories', field='prdtypecode')
        try: new,all_of_it = await asyncio.to_thread(store.correct, f.prediction_id, f.prdtypecode, f.reviewer or who.name)
        except KeyError: raise Refused(404, 'no such prediction', field='prediction_id') from None
        final = verdict(all_of_it)
        return FeedbackResponse(feedback_id=new.id, prediction_id=f.prediction_id, **said([new])[0].model_dump(), verdict=final,
                                conflict=len(votes(all_of_it)) > 1)

    @app.get('/review', tags=['review'], summary='Listings that wait for a person, those that are most useful to correct first')
    async def review(request:Request, limit:Annotated[int, Query(ge=1, le=100)] = 20)->ReviewResponse:
        rows,waiting = await asyncio.to_thread(store.queue, limit, who_asks(request).name)
        told = await asyncio.to_thread(store.corrections, [r.id for r in rows])
        item = lambda r: ReviewItem(prediction_id=r.id, created_at=r.created_at, designation=r.designation or '', description=r.description or '',
            has_image=store.image_path(r.image_sha256).exists() if r.image_sha256 else False, prdtypecode=r.prdtypecode, probability=r.probability,
            top_k=r.top_k, candidates=r.candidates, model_version=r.model_version, corrections=said(told[r.id]))
        return ReviewResponse(items=[item(r) for r in rows], waiting=waiting)

    @app.get('/review/{prediction_id}/image', tags=['review'], summary='The picture of a listing that waits, as a JPEG', response_class=Response,
             responses={200: {'content': {'image/jpeg': {}}}})
    async def image(prediction_id:str)->Response:
        row = await asyncio.to_thread(store.get, prediction_id)
        if row is None or not row.image_sha256: raise Refused(404, 'no such picture')
        try: return Response(await asyncio.to_thread(small_jpeg, store.image_path(row.image_sha256)), media_type='image/jpeg')
        except (OSError, InvalidImage): raise Refused(404, 'no such picture') from None

    @app.exception_handler(SQLAlchemyError)
    async def no_database(request, exc): raise Refused(503, 'the database cannot be reached; nothing was stored', 'no_database', headers={'Retry-After': '5'})


def state(app:FastAPI, service:Service):
    "Pages about the server itself."
    engine,follower = service.engine,service.follower

    @app.get('/categories', tags=['about'], summary='Codes and their names')
    async def categories()->list[CategoryName]: return service.categories()

    @app.get('/version', tags=['about'], summary='What is being served')
    async def version()->Version:
        c = service.bundle(); e = c['train']['encoders']
        parts = [m for m,has in (('text', e['ngrams'] or e['text']), ('image', e['image'])) if has]
        return Version(model_version=engine.version, data_version=c['info'].get('data_version', ''), categories=len(c['codes']), modalities=parts,
                       following=follower.model if follower.follows else None, problem=follower.problem or None)

    @app.get('/health', tags=['about'], summary='200 while the server is alive', response_class=PlainTextResponse)
    async def health(): return PlainTextResponse('ok')

    @app.get('/ready', tags=['about'], summary='200 while listings are answered', responses={503: {'description': 'The model is being started'}})
    async def ready():
        status = ('degraded' if follower.problem else 'ready') if engine.ready else 'starting'
        return JSONResponse(dict(status=status, model_version=engine.version), 200 if engine.ready else 503)

    @app.get('/metrics', tags=['about'], summary='Figures for Prometheus', response_class=PlainTextResponse)
    async def figures(): return Response(metrics.page(), media_type='text/plain; version=0.0.4; charset=utf-8')
