"""Connections with bounds: what a stranger may send before the end of a header, for how long, and how many are open.

uvicorn's parser takes headers of any size for any time. It is kept, because it is quick; what it has taken without
getting any further is counted here.
"""
import asyncio
import resource
import secrets
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rakuten_mm.api import PAGES
from serving.admission import AdmissionControl
from serving.budgets import HEADER_S, KEPT_FILES, MAX_CONNECTIONS, MAX_FIELDS, MAX_HEADER
from serving.errors import Refused
from serving.middleware import SAFE, note
from serving.schema import ErrorBody

LISTINGS = frozenset(p.path for p in PAGES if p.listings)


def room_for_connections()->int:
    "How many connections may be open; what the system lets this process have is raised as far as it goes."
    soft,hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS+KEPT_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        with suppress(OSError, ValueError): resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard)); soft = most
    return max(16, min(MAX_CONNECTIONS, soft-KEPT_FILES))


async def ignore(scope, receive, send): "An application that does nothing."


@lru_cache(1)
def proxies(addresses:str)->Any: return ProxyHeadersMiddleware(ignore, addresses)


class HeaderTooLarge(Exception):
    "More than a header may have."


class BoundedProtocol(HttpToolsProtocol):
    """HTTP of which no part may grow, or be waited for, without end. A new connection takes the place of an idle one.

    What finds no room is told so here, before it costs a task, a check of credentials and an answer of its own: at
    many times the load, refusing is most of what the front does.
    """
    room:ClassVar[int] = MAX_CONNECTIONS
    admission:ClassVar[AdmissionControl|None] = None # Says whether there is room; None: always
    idle:ClassVar[dict['BoundedProtocol', None]] = {} # Those with no request at work, the oldest first
    due:asyncio.TimerHandle|None = None
    fruitless,oversized = 0, False # Bytes that brought no header's end, no body and no message's end
    refused = False # The rest of this request is thrown away

    def connection_made(self, transport):
        super().connection_made(transport)
        if len(self.connections) > self.room: next(iter(self.idle), self).transport.close()
        self.idle[self] = None
        self.expect_header()

    def connection_lost(self, exc):
        self.idle.pop(self, None); self.forget_timer()
        super().connection_lost(exc)

    def expect_header(self):
        if self.due is None: self.due = self.loop.call_later(HEADER_S, self.transport.close)

    def forget_timer(self):
        if self.due is not None: self.due.cancel(); self.due = None

    def data_received(self, data:bytes):
        self.fruitless += len(data)
        if self in self.idle: self.expect_header()
        super().data_received(data)
        if self.fruitless > MAX_HEADER and not self.transport.is_closing():
            self.oversized = True; self.send_400_response('')

    def on_header(self, name:bytes, value:bytes):
        super().on_header(name, value)
        if len(self.headers) > MAX_FIELDS: self.oversized = True; raise HeaderTooLarge

    def on_headers_complete(self):
        self.oversized = len(self.url)+sum(len(k)+len(v) for k,v in self.headers) > MAX_HEADER
        if self.oversized: raise HeaderTooLarge
        self.fruitless = 0
        self.idle.pop(self, None); self.forget_timer()
        alone = self.cycle is None or (self.cycle.response_complete and not self.pipeline)
        goes_on = self.parser.should_keep_alive() and not self.expect_100_continue  # and so the body comes in any case
        full = self.admission if self.admission and self.admission.is_full else None
        path = self.url.decode('latin-1')
        if full and alone and goes_on and path in LISTINGS: self.refuse(path, full.no_place())
        else: super().on_headers_complete()

    def refuse(self, path:str, e:Refused):
        "Answer, and throw the body away that follows."
        id,body = secrets.token_hex(8), ErrorBody(error=e.error).model_dump_json().encode()
        about = SAFE | {b'content-type': b'application/json', b'content-length': b'%d' % len(body)}
        about |= {b'x-request-id': id.encode()} | {k.lower().encode(): v.encode() for k,v in (e.headers or {}).items()}
        head = b''.join(b'%b: %b\r\n' % pair for pair in about.items())
        self.refused = True
        self.transport.write(b''.join([STATUS_LINE[e.status_code], head, b'\r\n', body]))
        note(path, e.status_code, 0., request_id=id, method=self.parser.get_method().decode(),
             client=self.asker(), bytes=0, user='')

    def asker(self)->str:
        "The address of the client, as a proxy says it if it is believed."
        scope:dict[str, Any] = dict(type='http', client=self.client, headers=self.headers)
        if self.config.proxy_headers:
            with suppress(StopIteration): proxies(str(self.config.forwarded_allow_ips))(scope, None, None).send(None)
        return scope['client'][0] if scope['client'] else 'unknown'

    def on_body(self, body:bytes):
        self.fruitless = 0
        if not self.refused: super().on_body(body)

    def on_message_complete(self):
        self.fruitless = 0
        if not self.refused: super().on_message_complete(); return
        self.refused = False; self.idle[self] = None
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def on_response_complete(self):
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete: return
        self.idle[self] = None
        if self.fruitless: self.expect_header()

    def send_400_response(self, msg:str):
        if not self.oversized: super().send_400_response(msg); return
        self.transport.write(STATUS_LINE[431]+b'content-length: 0\r\nconnection: close\r\n\r\n')
        self.transport.close()
