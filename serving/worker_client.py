"""The front's side of the worker: every listing that was sent is answered, also when the worker dies.

The front keeps what the worker has not answered. If the worker dies, another one is started and gets it again; what was
in the batch that died is sent one by one, and what dies a second time is given up. A worker that hangs is killed, and
so becomes a dead one.
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
        hang_s:float, # A batch that takes longer has hung
        restart_s:float, # Time that a worker has to become ready
    ):
        self.launch,self.hang_s,self.restart_s = launch,hang_s,restart_s
        self.pending:dict[int, PendingRequest] = {}
        self.ids,self.ready,self.version,self.why = count(1), False, '', ''
        self.closing,self.failures,self.born,self.epoch = False, 0, 0., 0
        self.busy:float|None = None  # since when, if it is
        self.watch:asyncio.Task|None = None
        self.sender = ThreadPoolExecutor(1, 'sender')

    async def start(self):
        "Start the worker; raises `RuntimeError` if it cannot load its model."
        self.loop,self.came = asyncio.get_running_loop(), asyncio.Event()
        self._spawn()
        with suppress(TimeoutError): await asyncio.wait_for(self.came.wait(), self.restart_s)
        if not self.ready: self.stop(); raise RuntimeError(self.why or 'the worker did not become ready')
        self.watch = asyncio.create_task(self._watch())

    def _spawn(self):
        ctx = mp.get_context('spawn')
        jobs,self.pipe = ctx.Pipe(False)
        results,outbox = ctx.Pipe(False)
        self.epoch += 1; self.born,self.busy = time.monotonic(), None
        self.process = self.launch(jobs, PipeTransport(outbox))
        jobs.close(); outbox.close()  # only the worker holds them now, so its end is the pipe's end
        metrics.watch_process(self.process.pid)
        threading.Thread(target=self._read, args=(results, self.epoch), name='results', daemon=True).start()

    def _read(self, results:Connection, epoch:int):
        while True:
            try: message = results.recv()
            except Exception: break  # the end, or half a message of a worker that was killed
            self.loop.call_soon_threadsafe(self._got, message, epoch)
        with suppress(RuntimeError): self.loop.call_soon_threadsafe(self._died, epoch)  # unless the loop ended first

    def _got(self, message:tuple, epoch:int):
        if epoch == self.epoch: getattr(self, f'_on_{message[0]}')(*message[1:])

    def _on_ready(self, version:str):
        self.ready,self.failures = True, 0
        self._on_serving(version)
        self.came.set()
        for p in list(self.pending.values()): self._send(p)

    def _on_failed(self, why:str): self.why = why; log.error(why)

    def _on_serving(self, version:str):
        self.version = version
        metrics.MODEL_INFO.clear(); metrics.MODEL_INFO.labels(version).set(1)

    def _on_start(self, uids:list[int]):
        now = self.busy = time.monotonic()
        for p in filter(None, map(self.pending.get, uids)): p.started = now; metrics.QUEUE.observe(now-p.sent)

    def _on_done(self, answers:list[tuple], seconds:float):
        if seconds: self.busy = None; metrics.BATCH.observe(len(answers)); metrics.MODEL.observe(seconds)
        for u,version,answer in answers:
            if (p := self.pending.get(u)) and not p.future.done(): p.future.set_result((version, answer))

    def _on_shadow(self, version:str, n:int, same:int):
        metrics.SHADOW.labels(version, 'same').inc(same); metrics.SHADOW.labels(version, 'other').inc(n-same)

    def _died(self, epoch:int):
        if epoch != self.epoch or self.closing: return
        self.ready = False
        self.process.join(1)
        if not self.came.is_set(): self.came.set(); return  # at the first start nobody waits for a second try
        self.failures += 1; metrics.RESTARTS.inc()
        log.error('the worker ended with exit code %s; starting another', self.process.exitcode)
        for p in list(self.pending.values()):
            if p.started is None or p.future.done(): continue
            p.started,p.tries,p.job = None, p.tries+1, p.job._replace(alone=True)
            if p.tries > 1: p.future.set_exception(
                Refused(500, 'this listing cannot be answered: the model ended on it twice', 'worker_crashed'))
        self.loop.call_later(min(.1*2**self.failures, 10) if self.failures > 1 else 0, self._respawn, epoch)

    def _respawn(self, epoch:int):
        if not self.closing and epoch == self.epoch: self._spawn()

    async def _watch(self):
        "Kill a worker that hangs, or that does not become ready."
        while True:
            await asyncio.sleep(.25)
            now = time.monotonic()
            hung = (self.busy and now-self.busy > self.hang_s) if self.ready else now-self.born > self.restart_s
            if hung and self.process.is_alive():
                log.error('the worker hangs; it is ended'); self.ready = False; self.process.kill()

    def _send(self, p:PendingRequest):
        pipe,job = self.pipe,p.job
        def send():
            with suppress(OSError, ValueError): pipe.send(job)  # if the worker is gone, the next one gets it
        self.sender.submit(send)

    async def ask(self, op:str, payload:dict)->tuple[str, dict]: # Version that answered, and its answer
        "Have the worker do something; raises `Refused`."
        p = PendingRequest(Job(next(self.ids), op, payload, False), self.loop.create_future())
        self.pending[p.job.uid] = p
        try:
            if self.ready: self._send(p)
            version,answer = await p.future
        finally: del self.pending[p.job.uid]
        if isinstance(answer, Problem): raise Refused(answer.status, answer.message, answer.code, answer.field)
        return version, answer

    def stop(self):
        "End the worker."
        self.closing = True
        if self.watch: self.watch.cancel()
        if self.epoch: self.process.kill(); self.process.join(3)  # its work is done; it ignores gentler signals
        self.sender.shutdown(wait=False, cancel_futures=True)
