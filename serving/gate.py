"""What every request passes before the application sees it: a name, credentials, limits, a place and a deadline.

It is plain ASGI because the order matters: a stranger's body is never read, a body over the limit is never kept, a request that finds
no place is turned away at once, and one that dawdles loses its place.
"""
import asyncio
import logging
import math
import re
import secrets
import time
import traceback

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import metrics
from serving.auth import Access, Who
from serving.config import ServeConfig
from serving.errors import Refused, respond
from serving.schema import MAX_BODY

log = structlog.stdlib.get_logger('rakuten_mm.requests')
ALWAYS_OPEN = ('/health', '/ready', '/static', '/token')
NEEDED = {'/feedback': 'review', '/review': 'review', '/metrics': 'admin'} # Roles beyond `predict`
PLACED = ('/predict', '/predict/upload', '/predict/batch', '/explain') # Paths that take a place
SMALL = 100_000 # Bytes of a body on any other path
SAFE = {b'x-content-type-options': b'nosniff', b'referrer-policy': b'no-referrer', b'cache-control': b'no-store'}
PAGE = {b'content-security-policy': b"default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
                                    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"}


class Places:
    "Listings that may be worked on or wait at one time."
    def __init__(self, n:int): self.n,self.taken,self.rate,self.since,self.done = n, 0, 20., time.monotonic(), 0

    def take(self, n:int=1):
        "Raises 503 if there is no room for `n` more."
        if self.taken+n > self.n:
            raise Refused(503, f'{self.taken} listings are being worked on, the limit is {self.n}; try again', headers={'Retry-After': str(self.wait())})
        self.taken += n; metrics.IN_FLIGHT.set(self.taken)

    def leave(self, n:int=1):
        self.taken -= n; metrics.IN_FLIGHT.set(self.taken)
        self.done += n; now = time.monotonic()
        if now-self.since > 1: self.rate,self.since,self.done = max(self.done/(now-self.since), 1.), now, 0

    def wait(self)->int:
        "Seconds until those that are here should be gone."
        return max(1, math.ceil(self.taken/self.rate))


def under(path:str, roots)->bool: return any(path == r or path.startswith(r+'/') for r in roots)


def trace(e:BaseException|None)->str:
    "Where an exception and its causes come from: types and lines of code. Messages are left out, because they quote what was sent."
    out = []
    while e is not None:
        out = [*traceback.format_tb(e.__traceback__), type(e).__name__+'\n', *out]
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return ''.join(out)


class Gate:
    "ASGI middleware."
    def __init__(self, app:ASGIApp, access:Access, places:Places, cfg:ServeConfig):
        self.app,self.access,self.places,self.cfg = app,access,places,cfg
        self.open = (*ALWAYS_OPEN, *cfg.open_paths)

    async def __call__(self, scope:Scope, receive:Receive, send:Send):
        if scope['type'] != 'http': await self.app(scope, receive, send); return
        headers = dict(scope['headers'])
        given = headers.get(b'x-request-id', b'').decode('latin-1')
        request = Request(scope, receive, send, given if re.fullmatch(r'[\w.-]{1,64}', given) else secrets.token_hex(8))
        try: await self.pass_on(request, headers)
        except ClientDisconnect: request.status = 499
        except Refused as e: await request.refuse(e)
        except Exception as e:
            log.error('unexpected', request_id=request.id, path=request.scope['path'], trace=trace(e), exc_info=logging.getLogger().isEnabledFor(logging.DEBUG))
            await request.refuse(Refused(500, 'something went wrong here; the request id finds it in the log'))
        finally: request.note()

    async def pass_on(self, request:'Request', headers:dict):
        path = request.scope['path']
        client = (request.scope.get('client') or ('unknown',))[0]
        request.scope['state'] = {**request.scope.get('state', {}), 'client': client}
        if path != '/' and not under(path, self.open):
            who = await self.access.identify(headers.get(b'authorization', b'').decode('latin-1'), client)
            request.who = request.scope['state']['who'] = who
            needs = next((role for root,role in NEEDED.items() if under(path, [root])), 'predict')
            if not who.may(needs): raise Refused(403, f'{path} needs the role {needs}; {who.name} has {who.role}')
        placed = path in PLACED
        request.limit = MAX_BODY if placed else SMALL
        length = headers.get(b'content-length', b'0')
        if length.isdigit() and int(length) > request.limit: raise Refused(413, f'the body is larger than {request.limit:,} bytes')
        if placed: self.places.take()
        try:
            async with asyncio.timeout(self.cfg.timeout_s): await self.app(request.scope, request.receive, request.send)
        except TimeoutError:
            if request.body_done: raise Refused(504, f'no answer after {self.cfg.timeout_s:g} seconds') from None
            raise Refused(408, f'the body did not arrive within {self.cfg.timeout_s:g} seconds', headers={'Connection': 'close'}) from None
        finally:
            if placed: self.places.leave()


class Request:
    "A request on its way, and what will be logged about it."
    def __init__(self, scope:Scope, receive:Receive, send:Send, id:str):
        self.scope,self._receive,self._send,self.id = dict(scope),receive,send,id
        self.status,self.began,self.size,self.limit,self.who = 0, time.perf_counter(), 0, SMALL, Who('', 'predict')
        self.body_done,self.over = False, False

    async def receive(self)->Message:
        message = await self._receive()
        if message['type'] == 'http.request':
            self.size += len(message.get('body', b''))
            self.body_done = not message.get('more_body', False)
            if self.size > self.limit: self.over = True; raise self.too_large()
        return message

    def too_large(self)->Refused: return Refused(413, f'the body is larger than {self.limit:,} bytes')

    async def send(self, message:Message):
        if self.over: await self.refuse(self.too_large())  # whoever read the body made something else of it
        else: await self.forward(message)

    async def forward(self, message:Message):
        if message['type'] == 'http.response.start':
            self.status = message['status']
            extra = SAFE | (PAGE if under(self.scope['path'], ('/', '/static')) else {}) | {b'x-request-id': self.id.encode()}
            present = {k.lower() for k,_ in message['headers']}
            message['headers'] = [*message['headers'], *((k, v) for k,v in extra.items() if k not in present)]
        await self._send(message)

    async def refuse(self, e:Refused):
        "Answer with an error, unless an answer has begun."
        if not self.status: await respond(e.status_code, e.error, e.headers)(self.scope, self._receive, self.forward)

    def note(self):
        "One line in the log, and the figures."
        took,route = time.perf_counter()-self.began, self.scope.get('route')
        path = getattr(route, 'path', None) or ('/static' if under(self.scope['path'], ('/static',)) else 'other')
        metrics.REQUESTS.labels(path, str(self.status)).inc(); metrics.LATENCY.labels(path).observe(took)
        if self.scope['path'] not in ('/health', '/ready', '/metrics') or self.status >= 400:
            log.info('request', request_id=self.id, method=self.scope['method'], path=path, status=self.status, ms=round(1e3*took, 1), bytes=self.size,
                     user=self.who.name)
