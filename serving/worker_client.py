"""The front's side of the worker: every listing that was sent is answered, also when the worker dies.

The front keeps what the worker has not answered. A worker is `starting`, `ready` or `gone`; `closed` is the end:

    gone -> starting    a new one is started; if the system lets none start, that is tried again
    starting -> ready   it has loaded its model
    starting -> gone    it died, or took too long and was killed
    ready -> gone       it died, or nothing was heard from it and it was killed

Listings that were in the batch that died are sent one by one to the next worker, and what dies a second time is given
up; so is, at once, anything else that the worker was doing. Without a worker for `give_up_s` the server ends.
"""
import asyncio
import logging
import multiprocessing as mp
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from serving import metrics
from serving.errors import Refused
from serving.messages import Job, PipeTransport, Problem

log = logging.getLogger('rakuten_mm.worker_client')
LONGEST_PAUSE_S = 5. # Between two tries to start a worker
PING = Job(0, 'ping', {}, False)


@dataclass(eq=False)
class PendingRequest:
    "A job that has not been answered, and the future of its answer."
    job:Job
    future:asyncio.Future
    sent:float = field(default_factory=time.monotonic)
    started:float|None = None
    tries:int = 0


class WorkerClient:
    "Starts, watches and feeds one worker."
    process:SpawnProcess
    pipe:Connection

    def __init__(self,
        launch:Callable[[Connection, PipeTransport], SpawnProcess],
        hang_s:float, # A worker that says nothing for longer has hung
        restart_s:float, # Time that a worker has to become ready
        give_up_s:float, # Time without a worker after which the server ends
    ):
        self.launch,self.hang_s,self.restart_s,self.give_up_s = launch,hang_s,restart_s,give_up_s
        self.pending:dict[int, PendingRequest] = {}
        self.ids,self.state,self.version,self.why = count(1), 'gone', '', ''
        self.failures,self.born,self.epoch = 0, 0., 0
        self.heard,self.asked,self.missed = 0., 0., 0. # When: any message, a ping that is not answered, the last worker
        self.proven,self.comparing = '', False # Version that has answered a batch; the shadow is at work
        self.on_guilty:Callable[[str], None] = lambda who: None # Told that `model` or `shadow` ended the worker
        self.watch:asyncio.Task|None = None
        self.sender = ThreadPoolExecutor(1, 'sender')

    @property
    def ready(self)->bool: return self.state == 'ready'

    async def start(self):
        "Start the worker; raises `RuntimeError` if it cannot load its model."
        self.loop,self.came = asyncio.get_running_loop(), asyncio.Event()
        self.given_up:asyncio.Future[str] = self.loop.create_future()
        self.missed = time.monotonic()
        try: self._spawn()
        except Exception as e: raise RuntimeError(f'no worker can be started: {e}') from None
        with suppress(TimeoutError): await asyncio.wait_for(self.came.wait(), self.restart_s)
        if not self.ready:
            self.epoch += 1; self.process.kill(); self.process.join(3)
            raise RuntimeError(self.why or 'the worker did not become ready')
        self.watch = asyncio.create_task(self._watch())

    def _spawn(self):
        "Start a process; what was opened for it is closed if that fails."
        ctx,ends = mp.get_context('spawn'), list[Connection]()
        try:
            jobs,pipe = ctx.Pipe(False); ends += [jobs, pipe]
            results,outbox = ctx.Pipe(False); ends += [results, outbox]
            self.epoch += 1
            process = self.launch(jobs, PipeTransport(outbox))
            reader = threading.Thread(target=self._read, args=(results, self.epoch), name='results', daemon=True)
            try: reader.start()
            except RuntimeError: process.kill(); raise
        except Exception:
            for end in ends: end.close()
            raise
        jobs.close(); outbox.close()  # only the worker holds them now, so its end is the pipe's end
        self.process,self.pipe,self.state,self.why = process,pipe,'starting',''
        self.born,self.comparing = time.monotonic(), False
        metrics.watch_process(process.pid)

    def _read(self, results:Connection, epoch:int):
        while True:
            try: message = results.recv()
            except Exception: break  # the end, or half a message of a worker that was killed
            self.loop.call_soon_threadsafe(self._got, message, epoch)
        results.close()
        with suppress(RuntimeError): self.loop.call_soon_threadsafe(self._died, epoch)  # unless the loop ended first

    def _got(self, message:tuple, epoch:int):
        if epoch != self.epoch: return
        self.heard,self.asked = time.monotonic(), 0.
        getattr(self, f'_on_{message[0]}')(*message[1:])

    def _on_ready(self, version:str):
        self.state,self.failures = 'ready', 0
        self._on_serving(version)
        self.came.set()
        for p in list(self.pending.values()): self._send(p)

    def _on_failed(self, why:str): self.why = why; log.error(why)

    def _on_serving(self, version:str):
        self.version = version
        metrics.MODEL_INFO.clear(); metrics.MODEL_INFO.labels(version).set(1)

    def _on_progress(self): pass # That something was heard is all

    def _on_start(self, uids:list[int]):
        now = time.monotonic()
        for p in filter(None, map(self.pending.get, uids)): p.started = now; metrics.QUEUE.observe(now-p.sent)

    def _on_done(self, answers:list[tuple], seconds:float):
        if seconds:
            self.proven = self.version
            metrics.BATCH.observe(len(answers)); metrics.MODEL.observe(seconds)
        for u,version,answer in answers:
            if (p := self.pending.get(u)) and not p.future.done(): p.future.set_result((version, answer))

    def _on_comparing(self, begins:bool): self.comparing = begins

    def _on_shadow(self, version:str, n:int, same:int):
        metrics.SHADOW.labels(version, 'same').inc(same); metrics.SHADOW.labels(version, 'other').inc(n-same)

    def _died(self, epoch:int):
        if epoch != self.epoch or self.state in ('gone', 'closed'): return
        was,self.state = self.state, 'gone'
        if was == 'ready': self.missed = time.monotonic()
        self.process.kill(); self.process.join(1)  # it has closed its pipe, and so is of no use in any case
        self.sender.submit(self.pipe.close)  # after what is being sent there
        if not self.came.is_set(): self.came.set(); return  # at the first start nobody waits for a second try
        self.failures += 1; metrics.RESTARTS.inc()
        log.error('the worker ended with exit code %s; starting another', self.process.exitcode)
        self._blame()
        self._later()

    def _blame(self):
        "Give up what ended the worker, and have the rest done again."
        begun = [p for p in self.pending.values() if p.started is not None and not p.future.done()]
        for p in begun:
            p.started,p.tries,p.job = None, p.tries+1, p.job._replace(alone=True)
            if p.job.op not in ('predict', 'explain'):
                p.future.set_exception(Refused(500, 'the worker ended while it did this', 'worker_crashed'))
            elif p.tries > 1: p.future.set_exception(
                Refused(500, 'this listing cannot be answered: the model ended on it twice', 'worker_crashed'))
        if self.comparing: self.on_guilty('shadow')
        elif self.proven != self.version and any(p.job.op == 'predict' for p in begun): self.on_guilty('model')

    def _later(self):
        pause = min(.1*2**self.failures, LONGEST_PAUSE_S) if self.failures > 1 else 0
        self.loop.call_later(pause, self._respawn, self.epoch)

    def _respawn(self, epoch:int):
        if self.state != 'gone' or epoch != self.epoch: return
        try: self._spawn()
        except Exception as e:  # no descriptors, no memory, no process ids: others may give theirs back
            self.failures += 1; log.error('no worker can be started: %s; trying again', e)
            self._later()

    async def _watch(self):
        "Kill a worker that hangs, or that does not become ready; give up when there is none for too long."
        before = time.monotonic()
        while True:
            await asyncio.sleep(.25)
            now = time.monotonic()
            if now-before > 2: self.asked = 0.  # it was we who were held up: answers may lie here unread
            before = now
            if self.ready:
                if not self.asked and now-self.heard > min(1, self.hang_s/4):
                    self.asked = now; self._to_worker(PING)
                late = self.asked and now-self.asked > self.hang_s
            else: late = self.state == 'starting' and now-self.born > self.restart_s
            if late:
                log.error('the worker %s; it is ended', 'hangs' if self.ready else 'does not become ready')
                self.process.kill()
                self._died(self.epoch)
            if not self.ready and now-self.missed > self.give_up_s and not self.given_up.done():
                why = self.why or 'it ends again and again, or cannot be started'
                self.given_up.set_result(f'there was no worker for {self.give_up_s:g} seconds: {why}')

    def _to_worker(self, job:Job):
        pipe = self.pipe
        def send():
            with suppress(OSError, ValueError): pipe.send(job)  # if the worker is gone, the next one gets it
        self.sender.submit(send)

    def _send(self, p:PendingRequest):
        if p.job.op != 'predict': p.started = time.monotonic()  # whatever else a worker was given, it is doing
        self._to_worker(p.job)

    async def ask(self,
        op:str, # Of `Job`
        payload:dict,
        behind_s:float = 0., # What comes so much later may be done before
    )->tuple[str, dict]: # Version that answered, and its answer
        "Have the worker do something; raises `Refused`."
        job = Job(next(self.ids), op, payload, False, time.monotonic()+behind_s)
        p = PendingRequest(job, self.loop.create_future())
        self.pending[p.job.uid] = p
        try:
            if self.ready: self._send(p)
            version,answer = await p.future
        finally: del self.pending[p.job.uid]
        if isinstance(answer, Problem): raise Refused(answer.status, answer.message, answer.code, answer.field)
        return version, answer

    def stop(self):
        "End the worker."
        alive = self.state in ('starting', 'ready')
        self.state = 'closed'
        if self.watch: self.watch.cancel()
        if alive: self.process.kill(); self.process.join(3)  # its work is done; it ignores gentler signals
        self.sender.shutdown(wait=False, cancel_futures=True)
