"Routes of the API: each page, and what they have in common."
import asyncio
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cachetools import LRUCache
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from rakuten_mm.data.image import InvalidImage
from rakuten_mm.data.taxonomy import CATEGORIES
from rakuten_mm.models.manifest import parts_read
from serving import metrics, schema
from serving.admission import AdmissionControl, ConcurrencyLimit
from serving.auth import CHALLENGE, Authenticator, Principal
from serving.budgets import BEHIND_S
from serving.config import ServeConfig
from serving.errors import Refused, of_validation
from serving.forms import FORM, LOGIN, listing_of_form, login_of_form, small_jpeg
from serving.registry_watcher import RegistryWatcher
from serving.store import NO_CATEGORY, Feedback, Prediction, Store, verdict, votes
from serving.worker_client import WorkerClient

STATIC = Path(__file__).parent/'static'


class Service:
    "Answers listings and records the answers, for all pages."
    def __init__(self,
        worker:WorkerClient, watcher:RegistryWatcher, store:Store, admission:AdmissionControl, cfg:ServeConfig
    ):
        self.worker,self.watcher,self.store,self.admission,self.cfg = worker,watcher,store,admission,cfg
        self.answers:LRUCache|None = LRUCache(cfg.cache) if cfg.cache else None
        self.explaining,self.config = ConcurrencyLimit(2), dict[str, dict]()

    async def database(self, f:Callable, *args)->Any:
        "Call what waits for the database in a thread of its own few, so that nothing else does."
        return await asyncio.get_running_loop().run_in_executor(self.store.pool, f, *args)

    def bundle(self)->dict[str, Any]:
        "config.json of the model that answers."
        path = self.watcher.api.bundle
        if path not in self.config:
            self.config = {path: json.loads(Path(path, 'config.json').read_text(encoding='utf-8'))}
        return self.config[path]

    def triage(self)->dict[str, Any]:
        "The lanes of the model that answers; empty where it has none."
        path = Path(self.watcher.api.bundle, 'triage.json')
        return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}

    def categories(self)->list[schema.CategoryName]:
        "Every category that may be the right one: the model's, and all of Rakuten's if the model's are among them."
        names = {int(c): n for c,n in self.bundle()['names'].items()}
        codes = names.keys() | CATEGORIES.keys() if names.keys() <= CATEGORIES.keys() else names.keys()
        def name(c):
            fr,en = (CATEGORIES[c].fr, CATEGORIES[c].en) if c in CATEGORIES else (names[c], names[c])
            return schema.CategoryName(prdtypecode=c, fr=fr, en=en)
        return [name(c) for c in sorted(codes)]

    async def predict(self,
        r:schema.PredictRequest,
        who:Principal,
        probe:bool = False, # Ask the model itself, and leave no trace for reviewers and for drift detection
        behind_s:float = 0., # What comes so much later may be answered before
    )->schema.PredictResponse:
        "Answer a listing, and record the answer."
        text = hashlib.sha256(f'{r.designation}\0{r.description or ""}'.encode()).hexdigest()
        image = hashlib.sha256(r.image).hexdigest() if r.image else ''
        key = self.worker.version, text, image
        found = self.answers.get(key) if self.answers is not None and not probe else None
        if found: metrics.CACHED.inc()
        else:
            listing = dict(designation=r.designation, description=r.description, image=r.image)
            found = await self.worker.ask('predict', listing, behind_s)
            if self.answers is not None: self.answers[found[0], text, image] = found
        version,answer = found
        best = dict(top_k=answer['top_k'][:r.top_k])
        out = schema.PredictResponse(**answer | best, prediction_id=str(uuid.uuid4()), model_version=version)
        if probe: return out
        metrics.LANES.labels(out.lane, version).inc()
        self.record(r, out, answer, who, text, image)
        return out

    def record(self,
        r:schema.PredictRequest, out:schema.PredictResponse, answer:dict, who:Principal, text:str, image:str
    ):
        "Have the store write down an answer, and the listing if it may be kept."
        ranked = answer['top_k']  # of all categories
        keep = self.cfg.keep_inputs in ('all', out.lane)
        close = ranked[1]['probability'] if len(ranked) > 1 else 0.
        probs = [round(t['probability'], 4) for t in sorted(ranked, key=lambda t: t['prdtypecode'])]
        row = dict(
            id=out.prediction_id, created_at=datetime.now(UTC), user=who.name, model_version=out.model_version,
            prdtypecode=out.prdtypecode, probability=out.probability, lane=out.lane,
            usefulness=1-(out.probability-close), top_k=ranked[:10], candidates=out.candidates,
            modalities=out.modalities, text_sha256=text, image_sha256=image, has_inputs=int(keep),
            designation=r.designation if keep else None, description=r.description if keep else None,
            facts=answer['facts'], sketch=answer['sketch'], probs=probs)
        self.store.add(row, r.image if keep else None)
        metrics.DROPPED.set(self.store.dropped)

    async def explain(self, listing:dict[str, Any], prdtypecode:int|None)->schema.ExplainResponse:
        "Words and parts of the image behind a category, or the predicted one."
        until = time.monotonic()+self.cfg.timeout_s  # the worker's clock too
        asked = listing | dict(prdtypecode=prdtypecode, until=until)
        with self.explaining: version,out = await self.worker.ask('explain', asked)
        return schema.ExplainResponse(**out, model_version=version)

    async def predict_one_of_many(self, product, who:Principal, i:int)->schema.BatchItem:
        "The answer to a listing of a batch, or its error."
        try:
            listing = schema.PredictRequest.model_validate(product)
            return schema.BatchItem(status=200, prediction=await self.predict(listing, who, behind_s=i*BEHIND_S))
        except ValidationError as e: return schema.BatchItem(status=422, error=of_validation(e))
        except Refused as e: return schema.BatchItem(status=e.status_code, error=e.error)


def principal(request:Request)->Principal: return request.state.principal


class BoundedRequest(Request):
    "A request whose JSON is looked at before it is parsed."
    async def json(self)->Any:
        body = await self.body()
        try: return schema.parse_json(body)
        except json.JSONDecodeError: raise
        except (ValueError, RecursionError) as e: raise Refused(422, str(e)) from None


class BoundedRoute(APIRoute):
    "A route whose requests are `BoundedRequest`s."
    def get_route_handler(self):
        handle = super().get_route_handler()
        async def bounded(request:Request)->Response:
            return await handle(BoundedRequest(request.scope, request.receive))
        return bounded


def install(app:FastAPI, service:Service, authenticator:Authenticator):
    "Give `app` its pages."
    app.router.route_class,app.router.redirect_slashes = BoundedRoute, False
    add_prediction(app, service)
    add_access(app, authenticator)
    add_feedback(app, service)
    add_review(app, service)
    add_about(app, service)
    app.mount('/static', StaticFiles(directory=STATIC), name='static')

    @app.get('/', include_in_schema=False)
    async def page(): return FileResponse(STATIC/'index.html')


def add_prediction(app:FastAPI, service:Service):
    "Pages that ask the model."
    @app.post('/predict', tags=['prediction'], summary='File a listing under a category')
    async def predict(listing:schema.PredictRequest, request:Request)->schema.PredictResponse:
        who = principal(request)
        probe = request.headers.get('x-probe') == '1' and who.may('admin')  # it leaves no record
        return await service.predict(listing, who, probe)

    @app.post('/predict/upload', tags=['prediction'], summary='The same, from a form with a file', openapi_extra=FORM)
    async def upload(request:Request)->schema.PredictResponse:
        return await service.predict(await listing_of_form(request), principal(request))

    @app.post('/predict/batch', tags=['prediction'],
              summary=f'File up to {schema.MAX_BATCH} listings; each has an answer or an error of its own')
    async def batch(listings:schema.BatchRequest, request:Request)->schema.BatchResponse:
        n,who = len(listings.products), principal(request)
        if n > schema.MAX_BATCH: raise Refused(413, f'{n} listings; a batch has at most {schema.MAX_BATCH}')
        with service.admission.batch(n):
            asked = (service.predict_one_of_many(p, who, i) for i,p in enumerate(listings.products))
            results = await asyncio.gather(*asked)
            return schema.BatchResponse(results=results)

    @app.post('/explain', tags=['prediction'], summary='Words and parts of the image behind a category')
    async def explain(listing:schema.ExplainRequest)->schema.ExplainResponse:
        asked = {k: getattr(listing, k) for k in ('designation', 'description', 'image')}
        return await service.explain(asked, listing.prdtypecode)


def add_access(app:FastAPI, authenticator:Authenticator):
    "The page that gives tokens."
    @app.post('/token', tags=['access'], openapi_extra=LOGIN,
              summary='A short-lived bearer token for a user and password (OAuth 2)')
    async def token(request:Request)->schema.Token:
        who = await authenticator.check(await login_of_form(request), request.state.client)
        if who is None: raise Refused(401, 'wrong credentials', headers=CHALLENGE)
        return schema.Token(**authenticator.token(who))


def correction(f:Feedback)->schema.Correction:
    told = dict(reviewer=f.reviewer, prdtypecode=f.prdtypecode, unusable=f.unusable, created_at=f.created_at)
    return schema.Correction.model_validate(told)


def add_feedback(app:FastAPI, service:Service):
    "The page that takes corrections, and the answer of all pages while the database cannot be reached."
    @app.post('/feedback', tags=['review'], summary='Say what the right category of a listing is, or why it has none')
    async def feedback(f:schema.FeedbackRequest, request:Request)->schema.FeedbackResponse:
        who = principal(request)
        if f.reviewer not in (None, who.name) and not who.may('admin'):
            raise Refused(403, 'only an admin may speak for another reviewer')
        if f.prdtypecode is not None and f.prdtypecode not in {c.prdtypecode for c in service.categories()}:
            raise Refused(422, 'unknown category; see /categories', field='prdtypecode')
        said = f.prediction_id, f.prdtypecode, f.reviewer or who.name, f.unusable
        try: new,all_of_it = await service.database(service.store.correct, *said)
        except KeyError: raise Refused(404, 'no such prediction', field='prediction_id') from None
        if f.unusable: metrics.UNUSABLE.labels(f.unusable).inc()
        most = verdict(all_of_it)
        return schema.FeedbackResponse(
            feedback_id=new.id, prediction_id=f.prediction_id, **correction(new).model_dump(),
            verdict=None if most == NO_CATEGORY else most, is_unusable=most == NO_CATEGORY,
            conflict=len(votes(all_of_it)) > 1)

    @app.exception_handler(SQLAlchemyError)
    async def no_database(request, exc):
        message = 'the database cannot be reached; nothing was stored'
        raise Refused(503, message, 'no_database', headers={'Retry-After': '5'})


def add_review(app:FastAPI, service:Service):
    "Pages that show what waits for review."
    store = service.store

    def item(r:Prediction, told:list[Feedback])->schema.ReviewItem:
        has_image = bool(r.image_sha256) and store.image_path(r.image_sha256).exists()
        return schema.ReviewItem(
            prediction_id=r.id, created_at=r.created_at, designation=r.designation or '', has_image=has_image,
            description=r.description or '', prdtypecode=r.prdtypecode, probability=r.probability, top_k=r.top_k,
            candidates=r.candidates, model_version=r.model_version, corrections=[correction(f) for f in told])

    @app.get('/review', tags=['review'],
             summary='Listings that wait for a person, those that are most useful to correct first')
    async def review(
        request:Request,
        limit:Annotated[int, Query(ge=1, le=100)] = 20,
        prdtypecode:Annotated[schema.Code|None, Query(strict=False, description='Only those put here')] = None,
    )->schema.ReviewResponse:
        rows,waiting = await service.database(store.queue, limit, principal(request).name, prdtypecode)
        told = await service.database(store.corrections, [r.id for r in rows])
        n = sum(waiting.values()) if prdtypecode is None else waiting.get(prdtypecode, 0)
        categories = [schema.Waiting(prdtypecode=c, waiting=n) for c,n in waiting.items()]
        return schema.ReviewResponse(items=[item(r, told[r.id]) for r in rows], waiting=n, categories=categories)

    @app.get('/review/{prediction_id}/explanation', tags=['review'],
             summary='Words and parts of the image behind a category of a listing that waits')
    async def explanation(
        prediction_id:str, prdtypecode:Annotated[schema.Code|None, Query(strict=False)] = None
    )->schema.ExplainResponse:
        row = await service.database(store.get, prediction_id)
        if row is None or not row.has_inputs: raise Refused(404, 'no such listing')
        path = store.image_path(row.image_sha256) if row.image_sha256 else None
        image = await asyncio.to_thread(path.read_bytes) if path and path.exists() else None
        asked = dict(designation=row.designation or '', description=row.description, image=image)
        return await service.explain(asked, prdtypecode)

    @app.get('/review/{prediction_id}/image', tags=['review'], response_class=Response,
             summary='The image of a listing that waits, as a JPEG', responses={200: {'content': {'image/jpeg': {}}}})
    async def image(prediction_id:str)->Response:
        row = await service.database(store.get, prediction_id)
        if row is None or not row.image_sha256: raise Refused(404, 'no such image')
        try: jpeg = await asyncio.to_thread(small_jpeg, store.image_path(row.image_sha256))
        except (OSError, InvalidImage): raise Refused(404, 'no such image') from None
        return Response(jpeg, media_type='image/jpeg')


def add_about(app:FastAPI, service:Service):
    "Pages about the server itself."
    worker,watcher = service.worker,service.watcher

    @app.get('/categories', tags=['about'], summary='Codes and their names')
    async def categories()->list[schema.CategoryName]: return service.categories()

    @app.get('/version', tags=['about'], summary='The model that answers')
    async def version()->schema.Version:
        c,lanes = service.bundle(), service.triage()
        needs = re.search(r'([\d,]+) more calibration listings', ' '.join(lanes.get('reasons', [])))
        return schema.Version(
            model_version=worker.version, data_version=c['info'].get('data_version', ''), categories=len(c['codes']),
            modalities=parts_read(c), problem=watcher.problem or service.store.problem or None,
            following=watcher.model if watcher.follows else None, auto_share=lanes.get('coverage', 0.),
            auto_needs=int(needs[1].replace(',', '')) if needs else None)

    @app.get('/health', tags=['about'], summary='200 while the server is alive', response_class=PlainTextResponse)
    async def health(): return PlainTextResponse('ok')

    @app.get('/ready', tags=['about'], summary='200 while listings are answered',
             responses={503: {'description': 'The model is being started'}})
    async def ready():
        status = ('degraded' if watcher.problem or service.store.problem else 'ready') if worker.ready else 'starting'
        return JSONResponse(dict(status=status, model_version=worker.version), 200 if worker.ready else 503)

    @app.get('/metrics', tags=['about'], summary='Figures for Prometheus', response_class=PlainTextResponse)
    async def figures(): return Response(metrics.page(), media_type='text/plain; version=0.0.4; charset=utf-8')
