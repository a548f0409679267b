"""The front's side of the worker: every listing that was sent is answered, also when the worker dies.

The front keeps what the worker has not answered. If the worker dies, another one is started and gets it again; what was in the
batch that died is sent one by one, and what dies a second time is given up. A worker that hangs is killed, and so becomes a dead one.
"""
import asyncio
import logging
import multiprocessing as mp
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from serving import metrics
from serving.errors import Refused
from serving.worker import Job, PipeTransport, Problem

log = logging.getLogger('rakuten_mm.engine')


class Waiting:
    "A job and who waits for it."
    def __init__(self, job:Job, future:asyncio.Future): self.job,self.future,self.sent,self.started,self.tries = job,future,time.monotonic(),None,0


class Engine:
    "Starts, watches and feeds one worker."
    def __init__(self,
        launch:Callable, # (request end, transport) -> started process
        hang_s:float, # A batch that takes longer has hung
        restart_s:float, # So long may a worker take to become ready
    ):
        self.launch,self.hang_s,self.restart_s = launch,hang_s,restart_s
        self.waiting,self.ids,self.ready,self.version = {}, count(1), False, ''
        self.process = self.pipe = None
        self.closing,self.failures,self.born,self.busy,self.epoch,self.why = False, 0, 0., None, 0, ''  # `busy`: since when, if it is
        self.sender = ThreadPoolExecutor(1, 'sender')

    async def start(self):
        "Start the worker; raises `RuntimeError` if it cannot load its model."
        self.loop,self.came = asyncio.get_running_loop(), asyncio.Event()
        self._spawn()
        try: await asyncio.wait_for(self.came.wait(), self.restart_s)
        except TimeoutError: pass
        if not self.ready: self.stop(); raise RuntimeError(self.why or 'the worker did not become ready')
        self.watcher = asyncio.create_task(self._watch())

    def _spawn(self):
        ctx = mp.get_context('spawn')
        inbox,self.pipe = ctx.Pipe(False)
        results,outbox = ctx.Pipe(False)
        self.epoch += 1; self.born,self.busy = time.monotonic(), None
        self.process = self.launch(inbox, PipeTransport(outbox))
        inbox.close(); outbox.close()  # only the worker holds them now, so its end is the pipe's end
        metrics.watch_process(self.process.pid)
        threading.Thread(target=self._read, args=(results, self.epoch), name='results', daemon=True).start()

    def _read(self, results, epoch:int):
        while True:
            try: message = results.recv()
            except Exception: break  # the end, or half a message of a worker that was killed
            self.loop.call_soon_threadsafe(self._got, message, epoch)
        try: self.loop.call_soon_threadsafe(self._died, epoch)
        except RuntimeError: pass  # the loop ended first

    def _got(self, message:tuple, epoch:int):
        if epoch != self.epoch: return
        match message:
            case 'ready', version:
                self.ready,self.failures = True, 0
                self._serves(version)
                self.came.set()
                for w in list(self.waiting.values()): self._send(w)
            case 'start', uids:
                now = self.busy = time.monotonic()
                for u in uids:
                    if w := self.waiting.get(u): w.started = now; metrics.QUEUE.observe(now-w.sent)
            case 'done', answers, seconds:
                if seconds: self.busy = None; metrics.BATCH.observe(len(answers)); metrics.MODEL.observe(seconds)
                for u,version,answer in answers:
                    if (w := self.waiting.get(u)) and not w.future.done(): w.future.set_result((version, answer))
            case 'failed', why: self.why = why; log.error(why)
            case 'serving', version: self._serves(version)
            case 'shadow', version, n, same: metrics.SHADOW.labels(version, 'same').inc(same); metrics.SHADOW.labels(version, 'other').inc(n-same)

    def _serves(self, version:str):
        self.version = version
        metrics.SERVED.clear(); metrics.SERVED.labels(version).set(1)

    def _died(self, epoch:int):
        if epoch != self.epoch or self.closing: return
        self.ready = False
        self.process.join(1)
        if not self.came.is_set(): self.came.set(); return  # at the first start nobody waits for a second try
        self.failures += 1; metrics.RESTARTS.inc()
        log.error('the worker ended with exit code %s; starting another', self.process.exitcode)
        for w in list(self.waiting.values()):
            if w.started is None or w.future.done(): continue
            w.started,w.tries,w.job = None, w.tries+1, w.job._replace(alone=True)
            if w.tries > 1: w.future.set_exception(Refused(500, 'this listing cannot be answered: the model ended on it twice', 'worker_crashed'))
        self.loop.call_later(min(.1*2**self.failures, 10) if self.failures > 1 else 0, self._respawn, epoch)

    def _respawn(self, epoch:int):
        if not self.closing and epoch == self.epoch: self._spawn()

    async def _watch(self):
        "Kill a worker that hangs, or that does not become ready."
        while True:
            await asyncio.sleep(.25)
            now = time.monotonic()
            hung = (self.busy and now-self.busy > self.hang_s) if self.ready else now-self.born > self.restart_s
            if hung and self.process.is_alive(): log.error('the worker hangs; it is ended'); self.ready = False; self.process.kill()

    def _send(self, w:Waiting):
        pipe,job = self.pipe,w.job
        def send():
            try: pipe.send(job)
            except (OSError, ValueError): pass  # the worker is gone; the next one gets it
        self.sender.submit(send)

    async def ask(self, op:str, payload:dict)->tuple[str, dict|None]: # Version that answered, and its answer
        "Have the worker do something; raises `Refused`."
        w = Waiting(Job(next(self.ids), op, payload, False), self.loop.create_future())
        self.waiting[w.job.uid] = w
        try:
            if self.ready: self._send(w)
            version,answer = await w.future
        finally: del self.waiting[w.job.uid]
        if isinstance(answer, Problem): raise Refused(answer.status, answer.message, answer.code, answer.field)
        return version, answer

    def stop(self):
        "End the worker."
        self.closing = True
        if getattr(self, 'watcher', None): self.watcher.cancel()
        if self.process: self.process.kill(); self.process.join(3)  # what it was to do is done; it ignores gentler signals
        self.sender.shutdown(wait=False, cancel_futures=True)
