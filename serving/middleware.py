"""Middleware that gives every request a name, credentials, limits, room and a deadline before the application sees it.

It is plain ASGI because the order matters: a stranger's body is never read, a body over the limit is never kept, a
request that finds no room is turned away at once, and one that dawdles loses its place.
"""
import asyncio
import logging
import re
import secrets
import time
import traceback

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rakuten_mm.api import page_of
from serving import metrics
from serving.admission import AdmissionControl
from serving.auth import Authenticator, Principal
from serving.budgets import MAX_BODY, SMALL_BODY
from serving.config import ServeConfig
from serving.errors import Refused, respond

log = structlog.stdlib.get_logger('rakuten_mm.requests')
SAFE = {b'x-content-type-options': b'nosniff', b'referrer-policy': b'no-referrer', b'cache-control': b'no-store',
        b'x-frame-options': b'DENY', b'content-security-policy': b"frame-ancestors 'none'"}
STRICT = {b'content-security-policy':
          b"default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
          b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"}
QUIET = ('/health', '/ready', '/metrics') # Not logged: they are asked for every few seconds


def from_another_site(headers:dict[bytes, bytes])->bool:
    "True if a browser sends this for a page that is not ours, with the credentials of a user who knows nothing of it."
    site = headers.get(b'sec-fetch-site')
    if site is not None: return site not in (b'same-origin', b'none')
    origin = headers.get(b'origin')
    return origin is not None and origin.partition(b'://')[2].lower() != headers.get(b'host', b'').lower()


def check_framing(scope:Scope):
    "Raises 400 for what the server and a proxy before it could take for different requests."
    sent = lambda name: [v for k,v in scope['headers'] if k == name]
    coded,hosts = [v.strip().lower() for v in sent(b'transfer-encoding')], sent(b'host')
    if coded not in ([], [b'chunked']): raise Refused(400, 'unknown transfer encoding', headers={'Connection': 'close'})
    if len(hosts) > 1 or (not hosts and scope.get('http_version') == '1.1'):
        raise Refused(400, 'a request names one host', headers={'Connection': 'close'})


def note(path:str, status:int, took:float, **about):
    "Count a request, and write its line in the log; `took` is in seconds."
    metrics.REQUESTS.labels(path, str(status)).inc(); metrics.LATENCY.labels(path).observe(took)
    if path not in QUIET or status >= 400: log.info('request', path=path, status=status, ms=round(1e3*took, 1), **about)


def under(path:str, root:str)->bool: return path == root or path.startswith(root+'/')


def trace(e:BaseException|None)->str:
    "The lines of code that an exception and its causes come from; no messages, because they quote what was sent."
    out:list[str] = []
    while e is not None:
        out = [*traceback.format_tb(e.__traceback__), type(e).__name__+'\n', *out]
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return ''.join(out)


class RequestMiddleware:
    "ASGI middleware that names, checks, limits and logs each request."
    def __init__(self, app:ASGIApp, authenticator:Authenticator, admission:AdmissionControl, cfg:ServeConfig):
        self.app,self.authenticator,self.admission,self.cfg = app,authenticator,admission,cfg
        self.opened = cfg.open_pages.split(',')

    async def __call__(self, scope:Scope, receive:Receive, send:Send):
        if scope['type'] != 'http': await self.app(scope, receive, send); return
        headers = dict(scope['headers'])
        given = headers.get(b'x-request-id', b'').decode('latin-1')
        id = given if re.fullmatch(r'[\w.-]{1,64}', given) else secrets.token_hex(8)
        request = TrackedRequest(scope, receive, send, id)
        try: await self.pass_on(request, headers)
        except ClientDisconnect: request.status = 499
        except Refused as e: await request.refuse(e)
        except Exception as e:
            log.error('unexpected', request_id=request.id, path=request.path, trace=trace(e),
                      exc_info=logging.getLogger().isEnabledFor(logging.DEBUG))
            await request.refuse(Refused(500, 'something went wrong here; the request id finds it in the log'))
        finally: request.note()

    async def pass_on(self, request:'TrackedRequest', headers:dict[bytes, bytes]):
        "Check a request and let the application answer it; raises `Refused`."
        path,page = request.path, page_of(request.path)
        check_framing(request.scope)
        if request.scope['method'] not in ('GET', 'OPTIONS') and from_another_site(headers):
            raise Refused(403, 'a page of another site may not do this')
        state = request.scope['state'] = {**request.scope.get('state', {}), 'client': request.client}
        if not page or (page.role and page.switch not in self.opened):
            sent = headers.get(b'authorization', b'').decode('latin-1')
            state['principal'] = request.principal = who = await self.authenticator.identify(sent, request.client)
            needs = page.role if page else 'predict'
            if not who.may(needs): raise Refused(403, f'{path} needs the role {needs}; {who.name} has {who.role}')
        admitted = page is not None and page.listings and page.path == path
        request.limit = MAX_BODY if admitted else SMALL_BODY
        length = headers.get(b'content-length', b'0')
        declared = int(length) if length.isdigit() else 0
        if declared > request.limit: raise request.too_large()
        request.body_done = not declared and b'transfer-encoding' not in headers
        if admitted:
            request.admission = self.admission
            self.admission.take()
        try:
            if admitted: request.charge(declared)
            async with asyncio.timeout(self.cfg.timeout_s):
                await self.app(request.scope, request.receive, request.send)
        except TimeoutError:
            limit = f'{self.cfg.timeout_s:g} seconds'
            if request.body_done: raise Refused(504, f'no answer after {limit}') from None
            raise Refused(408, f'the body did not arrive within {limit}', headers={'Connection': 'close'}) from None
        finally:
            if admitted: self.admission.leave(1, request.charged)


class TrackedRequest:
    "A request on its way, and what will be logged about it."
    def __init__(self, scope:Scope, receive:Receive, send:Send, id:str):
        self.scope,self._receive,self._send,self.id,self.path = dict(scope),receive,send,id,scope['path']
        self.method,self.client = scope['method'], (scope.get('client') or ('unknown',))[0]
        if self.method == 'HEAD': self.scope['method'] = 'GET'  # uvicorn sends no body to whoever asked for none
        self.status,self.began,self.size,self.limit = 0, time.perf_counter(), 0, SMALL_BODY
        self.principal,self.body_done,self.over = Principal('', 'predict'), False, False
        self.admission:AdmissionControl|None = None # Of the bytes, if they are counted
        self.charged = 0

    def charge(self, size:int):
        "Have `size` bytes counted; raises 503 if there is no room."
        if self.admission and size > self.charged:
            self.admission.take_bytes(size-self.charged); self.charged = size

    async def receive(self)->Message:
        message = await self._receive()
        if message['type'] == 'http.request':
            self.size += len(message.get('body', b''))
            self.body_done = not message.get('more_body', False)
            if self.size > self.limit: self.over = True; raise self.too_large()
            self.charge(self.size)
        return message

    def too_large(self)->Refused: return Refused(413, f'the body is larger than {self.limit:,} bytes')

    async def send(self, message:Message):
        if self.over: await self.refuse(self.too_large())  # whoever read the body made something else of it
        else: await self.forward(message)

    async def forward(self, message:Message):
        if message['type'] == 'http.response.start':
            self.status = message['status']
            strict = self.path == '/' or under(self.path, '/static')
            extra = SAFE | (STRICT if strict else {}) | {b'x-request-id': self.id.encode()}
            present = {k.lower() for k,_ in message['headers']}
            message['headers'] = [*message['headers'], *((k, v) for k,v in extra.items() if k not in present)]
        await self._send(message)

    async def refuse(self, e:Refused):
        "Answer with an error, unless an answer has begun."
        if not self.status: await respond(e.status_code, e.error, e.headers)(self.scope, self._receive, self.forward)

    def note(self):
        "Write a line in the log, and count."
        path = getattr(self.scope.get('route'), 'path', None) or ('/static' if under(self.path, '/static') else 'other')
        note(path, self.status, time.perf_counter()-self.began, request_id=self.id, method=self.method,
             client=self.client, bytes=self.size, user=self.principal.name)
