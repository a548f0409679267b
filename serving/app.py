"The pages of the API."
import asyncio
import hashlib
import io
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
from starlette.datastructures import UploadFile

from rakuten_mm.image import InvalidImage, decode_image
from rakuten_mm.taxonomy import CATEGORIES
from serving import metrics
from serving.auth import Access, Who
from serving.config import ServeConfig
from serving.engine import Engine
from serving.errors import Refused, of_validation
from serving.follow import Follower
from serving.gate import Places
from serving.schema import (
    MAX_BATCH,
    MAX_TEXT,
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

    async def predict(self, r:PredictRequest, who:Who)->PredictResponse:
        "A ranked answer, recorded."
        text = hashlib.sha256(f'{r.designation}\0{r.description or ""}'.encode()).hexdigest()
        image = hashlib.sha256(r.image).hexdigest() if r.image else ''
        key = self.engine.version, text, image
        found = self.answers.get(key) if self.answers is not None else None
        if found: metrics.CACHED.inc()
        else:
            found = await self.engine.ask('predict', dict(designation=r.designation, description=r.description, image=r.image))
            if self.answers is not None: self.answers[found[0], text, image] = found
        version,answer = found
        out = PredictResponse(**answer | dict(top_k=answer['top_k'][:r.top_k]), prediction_id=str(uuid.uuid4()), model_version=version)
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


async def of_form(request:Request)->PredictRequest:
    "A listing from `multipart/form-data`; raises 422 for fields that are unknown, there twice, or of the wrong kind."
    if not request.headers.get('content-type', '').lower().startswith('multipart/form-data'): raise Refused(415, 'send multipart/form-data')
    values = {}
    async with request.form(max_files=4, max_fields=16, max_part_size=200_000) as form:
        for name,v in form.multi_items():
            if name not in ('designation', 'description', 'image', 'top_k'): raise Refused(422, 'is no field of a listing', field=name[:64])
            if name in values: raise Refused(422, 'is there twice', field=name)
            if isinstance(v, UploadFile) != (name == 'image'): raise Refused(422, 'must be a file' if name == 'image' else 'must be text', field=name)
            values[name] = await v.read() if name == 'image' else v
    image,top_k = values.pop('image', None), values.get('top_k', '3')
    if not (top_k.isascii() and top_k.isdigit() and len(top_k) < 5): raise Refused(422, 'must be a whole number', field='top_k')
    try: return PredictRequest(**values | dict(top_k=int(top_k), image=image))
    except ValidationError as e: raise Refused(422, (error := of_validation(e)).message, field=error.fields[0].field) from None


FORM = {'requestBody': {'required': True, 'content': {'multipart/form-data': {'schema': {'type': 'object', 'properties': {
    'designation': {'type': 'string', 'maxLength': MAX_TEXT}, 'description': {'type': 'string', 'maxLength': MAX_TEXT},
    'image': {'type': 'string', 'format': 'binary', 'description': 'JPEG, PNG, WEBP, GIF or BMP file'},
    'top_k': {'type': 'integer', 'minimum': 1, 'maximum': 100, 'default': 3}}, 'additionalProperties': False}}}}}
LOGIN = {'requestBody': {'required': True, 'content': {'application/x-www-form-urlencoded': {'schema': {
    'type': 'object', 'required': ['username', 'password'], 'properties': {
        'grant_type': {'type': 'string', 'const': 'password'}, 'username': {'type': 'string', 'minLength': 1},
        'password': {'type': 'string', 'format': 'password', 'minLength': 1}}}}}}}


def install(app:FastAPI, service:Service, access:Access):
    "Give `app` its pages."
    answers(app, service); people(app, service, access); state(app, service)
    app.mount('/static', StaticFiles(directory=STATIC), name='static')

    @app.get('/', include_in_schema=False)
    async def page(): return FileResponse(STATIC/'index.html')


def answers(app:FastAPI, service:Service):
    "Pages that ask the model."
    @app.post('/predict', tags=['prediction'], summary='File a listing under a category')
    async def predict(listing:PredictRequest, request:Request)->PredictResponse: return await service.predict(listing, who_asks(request))

    @app.post('/predict/upload', tags=['prediction'], summary='The same, from a form with a file', openapi_extra=FORM)
    async def upload(request:Request)->PredictResponse: return await service.predict(await of_form(request), who_asks(request))

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
        if not request.headers.get('content-type', '').lower().startswith('application/x-www-form-urlencoded'):
            raise Refused(415, 'send application/x-www-form-urlencoded')
        form = await request.form(max_fields=8)
        values = {k: v for k,v in form.multi_items() if isinstance(v, str)}
        if values.get('grant_type', 'password') != 'password': raise Refused(422, 'must be password', field='grant_type')
        for k in ('username', 'password'):
            if not values.get(k): raise Refused(422, 'is missing', field=k)
        pair = f"{values['username']}:{values['password']}".encode('utf-8', 'surrogatepass')
        who = await access.check(pair, request.state.client)
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


def small_jpeg(path:Path, size:int=640)->bytes:
    "A picture for the page, encoded here: what was uploaded is not sent back as it came."
    im = decode_image(path.read_bytes(), size)
    im.thumbnail((size, size))
    im.save(buf := io.BytesIO(), 'JPEG', quality=85)
    return buf.getvalue()


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
