"Admission: how much the server works on at one time. What finds no room is turned away at once."
import math
import time

from serving import metrics
from serving.errors import Refused


class AdmissionControl:
    "Counts listings that are worked on or wait, and turns away those beyond a limit."
    def __init__(self, limit:int):
        self.limit,self.taken,self.done = limit, 0, 0
        self.rate,self.since = 20., time.monotonic() # Listings that leave in a second, of late

    def take(self, n:int=1):
        "Let `n` listings in; raises 503 if there is no room."
        if self.taken+n > self.limit:
            raise Refused(503, f'{self.taken} listings are being worked on, the limit is {self.limit}; try again',
                          headers={'Retry-After': str(self.wait())})
        self.taken += n; metrics.IN_FLIGHT.set(self.taken)

    def leave(self, n:int=1):
        "Give the room of `n` listings back."
        self.taken -= n; metrics.IN_FLIGHT.set(self.taken)
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
