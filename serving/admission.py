"Admission: how much the server works on at one time. What finds no room is turned away at once."
import math
import time
from contextlib import contextmanager

from rakuten_mm.api import MAX_BATCH
from serving import metrics
from serving.errors import Refused


class AdmissionControl:
    "Counts listings that are worked on or wait, and the bytes they came in, and turns away those beyond a limit."
    def __init__(self,
        limit:int, # Listings
        max_bytes:int, # Of bodies
    ):
        self.limit,self.taken,self.done = limit, 0, 0
        self.batched = 0 # Of those taken, the ones that came in batches
        self.max_bytes,self.bytes = max_bytes, 0
        self.rate,self.since = 20., time.monotonic() # Listings that leave in a second, of late

    def take(self, n:int=1):
        "Let `n` listings in; raises 503 if there is no room."
        if self.taken+n > self.limit: raise self.no_place()
        self.taken += n; metrics.IN_FLIGHT.set(self.taken)

    @contextmanager
    def batch(self,
        n:int # Listings, of which one is in already
    ):
        "Context with the rest of a batch let in; batches leave half of the room to single listings. Raises 503."
        room = max(self.limit//2, min(self.limit, MAX_BATCH))
        if self.batched+n > room:
            raise self.full(f'{self.batched} listings of batches are being worked on, the limit is {room}')
        self.take(n-1); self.batched += n
        try: yield
        finally: self.batched -= n; self.leave(n-1)

    def take_bytes(self, n:int):
        "Let `n` bytes of a body in; raises 503 if there is no room."
        if self.bytes+n > self.max_bytes: raise self.full(f'{self.max_bytes:,} bytes are held already')
        self.bytes += n; metrics.BYTES.set(self.bytes)

    def no_place(self)->Refused:
        return self.full(f'{self.taken} listings are being worked on, the limit is {self.limit}')

    def full(self, why:str)->Refused:
        return Refused(503, f'{why}; try again', headers={'Retry-After': str(self.wait())})

    @property
    def is_full(self)->bool: return self.taken >= self.limit

    def leave(self,
        n:int = 1, # Listings
        size:int = 0, # Bytes
    ):
        "Give the room of `n` listings and of their bytes back."
        self.taken -= n; metrics.IN_FLIGHT.set(self.taken)
        self.bytes -= size; metrics.BYTES.set(self.bytes)
        self.done += n; now = time.monotonic()
        if now-self.since > 1: self.rate,self.since,self.done = max(self.done/(now-self.since), 1.), now, 0

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
