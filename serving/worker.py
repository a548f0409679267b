"""What runs in the worker process: LitServe's verbs around `Predictor`, and the loop that forms batches.

LitServe's own loop fails a whole batch for one bad item, polls while it is idle, and cannot take another model. This one collects
what is there, prepares pictures in parallel, answers each listing on its own terms, and changes models between two batches.
"""
import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import litserve as ls
from litserve.loops.base import LitLoop
from litserve.transport.base import MessageTransport

from rakuten_mm.core.config import n_threads


def settle():
    "Let the garbage collector forget what stays for good: looking through all that libraries made at import takes a tenth of a second each time."
    gc.collect(); gc.freeze()


class Job(NamedTuple):
    "Something for the worker to do."
    uid:int
    op:str # `predict`, `explain`, `load`, or `shadow`
    payload:dict
    alone:bool # In a batch of its own: it may have killed a worker


@dataclass
class Problem:
    "Why a listing has no answer."
    status:int
    code:str
    message:str
    field:str = ''


class PipeTransport(MessageTransport):
    "Sends to the front, from any thread of the worker."
    def __init__(self, connection:Connection): self.connection,self.lock = connection,None

    def send(self, item:Any, consumer_id:int=0):
        if self.lock is None: self.lock = threading.Lock()
        with self.lock: self.connection.send(item)

    async def areceive(self, *args, **kwargs): raise NotImplementedError('the front reads the pipe itself')

    def close(self, send_sentinel:bool=True): self.connection.close()


class Inbox:
    "Jobs, read by a thread as they come, so that the front never waits for the model."
    def __init__(self, connection:Connection):
        self.jobs,self.held = queue.SimpleQueue(), None
        threading.Thread(target=self._read, args=(connection,), name='inbox', daemon=True).start()

    def _read(self, connection:Connection):
        while True:
            try: self.jobs.put(connection.recv())
            except (EOFError, OSError): os._exit(0)  # the front is gone, however it went

    def take(self, most:int, wait_s:float)->list[Job|None]:
        "At least one job, and those that follow at once or within `wait_s`."
        out = [self.held or self.jobs.get()]; self.held = None
        end = time.monotonic()+wait_s
        while len(out) < most and not (out[0] is None or out[0].alone):
            try: job = self.jobs.get(timeout=max(end-time.monotonic(), 0))
            except queue.Empty: break
            if job is None or job.alone: self.held = job; break
            out.append(job)
        return out


class MicroBatches(LitLoop):
    "The worker's main loop."
    def __init__(self, batch_size:int, wait_s:float):
        super().__init__()
        self.batch_size,self.wait_s = batch_size,wait_s

    def run(self, lit_api:'ProductAPI', device, worker_id, request_queue:Connection, transport:PipeTransport, workers_setup_status, callback_runner):
        if lit_api.failed: transport.send(('failed', lit_api.failed)); time.sleep(.1); os._exit(1)
        inbox,pool,side = Inbox(request_queue), ThreadPoolExecutor(n_threads(lit_api.threads)), ThreadPoolExecutor(1)
        transport.send(('ready', lit_api.version))
        while True:
            jobs = [j for j in inbox.take(self.batch_size, self.wait_s) if j]
            lit_api.change_model(transport.send)
            for j in jobs:
                if j.op == 'explain': side.submit(self.apart, transport, j, lit_api.model)
                if j.op in ('load', 'shadow'): threading.Thread(target=self.load, args=(lit_api, transport, j, inbox.jobs.put), daemon=True).start()
            jobs = [j for j in jobs if j.op == 'predict']
            if not jobs: continue
            transport.send(('start', [j.uid for j in jobs]))
            start,version = time.monotonic(), lit_api.version
            x = list(pool.map(partial(self.careful, lit_api.decode_request), [j.payload for j in jobs]))
            out = [lit_api.encode_response(y) for y in lit_api.predict(x)]
            transport.send(('done', [(j.uid, version, y) for j,y in zip(jobs, out, strict=True)], time.monotonic()-start))
            lit_api.compare(x, out, side, transport.send)

    @staticmethod
    def careful(f:Callable, *args):
        "What `f` gives, or that it failed."
        try: return f(*args)
        except Exception as e: return Problem(500, 'internal_error', f'{type(e).__name__} in the worker')

    def apart(self, transport, job:Job, model):
        "Explain beside the batches."
        transport.send(('done', [(job.uid, model.version, self.careful(model.explain, job.payload))], 0.))

    @staticmethod
    def load(lit_api, transport, job:Job, wake:Callable):
        "Load another model beside the batches; it takes over between two of them."
        try: lit_api.coming.put((job, lit_api.open(job.payload['bundle'], job.payload['version'])))
        except Exception as e: transport.send(('done', [(job.uid, lit_api.version, Problem(500, 'model_refused', f'{type(e).__name__}: {e}'))], 0.))
        wake(None)


class ProductAPI(ls.LitAPI):
    "Files listings under categories."
    def __init__(self,
        bundle:str, # Sealed bundle
        version:str, # What answers call it
        threads:int = 0, # For the model; 0 takes every core
        batch_size:int = 16,
        wait_s:float = .002,
    ):
        super().__init__(max_batch_size=batch_size, batch_timeout=wait_s, api_path='/predict', loop=MicroBatches(batch_size, wait_s))
        self.bundle,self.version,self.threads = bundle,version,threads

    def setup(self, device):
        "Load the bundle, in the worker. Whoever stops the server stops the front, which lets the worker finish; so it ignores signals."
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)
        os.nice(5)  # refusing what finds no room must not wait for the model
        self.coming,self.shadow,self.busy,self.failed = queue.SimpleQueue(), None, threading.Semaphore(2), ''
        try: self.model = self.open(self.bundle, self.version)
        except Exception as e: self.failed = f'{self.version} could not be loaded: {e}'
        settle()

    def open(self, bundle:str, version:str):
        "A `serving.model.Model`."
        from serving.model import Model  # with PyTorch, which the front does without
        return Model(bundle, version, self.threads)

    def change_model(self, send:Callable):
        "Let a loaded model take over; called between batches."
        while not self.coming.empty():
            job,model = self.coming.get()
            if time.time() > job.payload['until']: send(('done', [(job.uid, self.version, Problem(504, 'model_refused', 'loaded too late'))], 0.)); continue
            if job.op == 'shadow': self.shadow = model
            else: self.model,self.version = model,model.version; send(('serving', self.version))
            send(('done', [(job.uid, model.version, None)], 0.))

    def decode_request(self, request:dict): return self.model.prepare(request)

    def predict(self, x:list): return self.model.answer(x)

    def encode_response(self, output)->dict|Problem: return output if isinstance(output, Problem) else vars(output)

    def compare(self, x:list, out:list, side:ThreadPoolExecutor, send:Callable):
        "Let the shadow see what was answered, unless it is behind or reads pictures of another size."
        shadow = self.shadow
        if shadow is None or shadow.predictor.size != self.model.predictor.size or not self.busy.acquire(blocking=False): return
        def work():
            try: send(('shadow', shadow.version, *shadow.agreement(x, out)))
            finally: self.busy.release()
        side.submit(work)
