"Admission: how much the server works on at one time. What finds no room is turned away at once."
import math
import secrets
import time

import structlog

from rakuten_mm.api import PAGES
from serving import metrics
from serving.errors import Refused
from serving.schema import ErrorBody

log = structlog.stdlib.get_logger('rakuten_mm.requests')
LISTINGS = frozenset(p.path for p in PAGES if p.listings)


class AdmissionControl:
    "Counts listings that are worked on or wait, and the bytes they came in, and turns away those beyond a limit."
    def __init__(self,
        limit:int, # Listings
        max_bytes:int, # Of bodies
    ):
        self.limit,self.taken,self.done = limit, 0, 0
        self.max_bytes,self.bytes = max_bytes, 0
        self.rate,self.since = 20., time.monotonic() # Listings that leave in a second, of late

    def take(self, n:int=1):
        "Let `n` listings in; raises 503 if there is no room."
        if self.taken+n > self.limit:
            raise self.full(f'{self.taken} listings are being worked on, the limit is {self.limit}')
        self.taken += n; metrics.IN_FLIGHT.set(self.taken)

    def take_bytes(self, n:int):
        "Let `n` bytes of a body in; raises 503 if there is no room."
        if self.bytes+n > self.max_bytes: raise self.full(f'{self.max_bytes:,} bytes are held already')
        self.bytes += n; metrics.BYTES.set(self.bytes)

    def full(self, why:str)->Refused:
        return Refused(503, f'{why}; try again', headers={'Retry-After': str(self.wait())})

    def leave(self,
        n:int = 1, # Listings
        size:int = 0, # Bytes
    ):
        "Give the room of `n` listings and of their bytes back."
        self.taken -= n; metrics.IN_FLIGHT.set(self.taken)
        self.bytes -= size; metrics.BYTES.set(self.bytes)
        self.done += n; now = time.monotonic()
        if now-self.since > 1: self.rate,self.since,self.done = max(self.done/(now-self.since), 1.), now, 0

    def refusal(self, path:str)->bytes|None:
        "The whole HTTP answer to a request for a page of listings while there is no room at all; None if there is."
        if self.taken < self.limit or path not in LISTINGS: return None
        e,id = self.full(f'{self.taken} listings are being worked on, the limit is {self.limit}'), secrets.token_hex(8)
        body = ErrorBody(error=e.error).model_dump_json().encode()
        metrics.REQUESTS.labels(path, '503').inc(); metrics.LATENCY.labels(path).observe(0)
        log.info('request', request_id=id, method='POST', path=path, status=503, ms=0., bytes=0, user='')
        return (f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: {self.wait()}\r\n"
                f'cache-control: no-store\r\nx-content-type-options: nosniff\r\nx-request-id: {id}\r\n'
                f'content-length: {len(body)}\r\n\r\n').encode()+body

    def wait(self)->int:
        "Seconds until those that are here should be gone."
        return max(1, math.ceil(self.taken/self.rate))


class ConcurrencyLimit:
    "A context for `n` at one time, for work that takes seconds; raises 503 beyond."
    def __init__(self, n:int): self.free = n

    def __enter__(self):
        if not self.free:
            raise Refused(503, 'too many explanations at one time; try again', headers={'Retry-After': '2'})
        self.free -= 1

    def __exit__(self, *_): self.free += 1
