"""The worker process: LitServe's verbs around `ServedModel`, and the loop that forms batches.

LitServe's own loop fails a whole batch for one bad item, polls while it is idle, and cannot take another model. This
one collects what is there, prepares images in parallel, answers each listing on its own terms, and changes models
between two batches.
"""
import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import litserve as ls
from litserve.loops.base import LitLoop

from rakuten_mm.core.process import n_threads
from serving.budgets import BATCH_S, PROGRESS_S
from serving.messages import Job, PipeTransport, Problem

if TYPE_CHECKING:
    from serving.model import ServedModel  # with PyTorch, which the front does without


def settle():
    "Exempt what stays for good from garbage collection: going through all that imports made takes .1 s each time."
    gc.collect(); gc.freeze()


def careful(f:Callable, *args):
    "The value of `f(*args)`, or a `Problem` if it raises."
    try: return f(*args)
    except Exception as e: return Problem(500, 'internal_error', f'{type(e).__name__} in the worker')


class JobQueue:
    "Jobs by the time they are due, read by a thread as they come, so that the front never waits for the model."
    def __init__(self, connection:Connection):
        self.jobs:queue.PriorityQueue[tuple[float, int, Job|None]] = queue.PriorityQueue()  # None wakes the worker
        self.held:Job|None = None
        threading.Thread(target=self._read, args=(connection,), name='jobs', daemon=True).start()

    def _read(self, connection:Connection):
        while True:
            try: job = connection.recv(); self.jobs.put((job.due, job.uid, job))
            except (EOFError, OSError): os._exit(0)  # the front is gone, however it went

    def wake(self): self.jobs.put((0., -1, None))

    def take(self, most:int, wait_s:float)->list[Job]: # Empty if the worker was only woken
        "At least one job, and those that follow at once or within `wait_s`."
        first = self.held or self.jobs.get()[-1]; self.held = None
        if first is None: return []
        out,end = [first], time.monotonic()+wait_s
        while len(out) < most and not first.alone:
            try: job = self.jobs.get(timeout=max(end-time.monotonic(), 0))[-1]
            except queue.Empty: break
            if job is None: break
            if job.alone: self.held = job; break
            out.append(job)
        return out


class MicroBatches(LitLoop):
    "The worker's main loop. Batches are no larger than the model answers in about `BATCH_S`."
    def __init__(self, batch_size:int, wait_s:float):
        super().__init__()
        self.batch_size,self.wait_s,self.each_s = batch_size,wait_s,0. # Seconds of a listing in the last batch
        self.model:ServedModel|None = None # Whose `each_s` it is

    def most(self, model:'ServedModel')->int:
        "Listings in the next batch; of a model that is new here, by the time of its golden products."
        if self.model is not model: self.model,self.each_s = model,model.listing_s
        return max(1, min(self.batch_size, int(BATCH_S/self.each_s))) if self.each_s else self.batch_size

    def run(self, lit_api:'ProductAPI', device, worker_id, request_queue:Connection, # type: ignore[override]
            transport:PipeTransport, workers_setup_status, callback_runner):
        send = transport.send
        if lit_api.failed: send(('failed', lit_api.failed)); time.sleep(.1); os._exit(1)
        waiting,side,explaining = JobQueue(request_queue), ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        pool = ThreadPoolExecutor(n_threads(lit_api.threads))
        send(('ready', lit_api.version))
        while True:
            jobs = waiting.take(self.most(lit_api.model), self.wait_s)
            lit_api.change_model(send)
            for j in jobs:
                if j.op == 'ping': send(('progress',))
                if j.op == 'explain': explaining.submit(self.explain, send, j, lit_api.model)
                if j.op in ('load', 'shadow'):
                    threading.Thread(target=self.load, args=(lit_api, send, j, waiting.wake), daemon=True).start()
            jobs = [j for j in jobs if j.op == 'predict']
            if not jobs: continue
            send(('start', [j.uid for j in jobs]))
            start,version = time.monotonic(), lit_api.version
            x,said = [], start
            for prepared in pool.map(partial(careful, lit_api.decode_request), [j.payload for j in jobs]):
                x.append(prepared)
                if (now := time.monotonic())-said > PROGRESS_S: said = now; send(('progress',))
            out = [lit_api.encode_response(y) for y in lit_api.predict(x)]
            took = time.monotonic()-start
            self.each_s = took/len(jobs)
            send(('done', [(j.uid, version, y) for j,y in zip(jobs, out, strict=True)], took))
            lit_api.compare(x, out, side, send)

    @staticmethod
    def explain(send:Callable, job:Job, model:'ServedModel'):
        "Explain beside the batches."
        send(('done', [(job.uid, model.version, careful(model.explain, job.payload))], 0.))

    @staticmethod
    def load(lit_api:'ProductAPI', send:Callable, job:Job, wake:Callable):
        "Load another model beside the batches; it takes over between two of them."
        try: lit_api.coming.put((job, lit_api.open(job.payload['bundle'], job.payload['version'])))
        except Exception as e:
            why = Problem(500, 'model_refused', f'{type(e).__name__}: {e}')
            send(('done', [(job.uid, lit_api.version, why)], 0.))
        wake()


class ProductAPI(ls.LitAPI):
    "Files listings under categories."
    coming:'queue.SimpleQueue[tuple[Job, ServedModel]]'
    model:'ServedModel'
    shadow:'ServedModel|None'

    def __init__(self,
        bundle:str, # Folder of a verified bundle
        version:str, # Its name in answers
        threads:int = 0, # For the model; 0 takes every core
        batch_size:int = 16,
        wait_s:float = .002,
    ):
        super().__init__(max_batch_size=batch_size, batch_timeout=wait_s, api_path='/predict',
                         loop=MicroBatches(batch_size, wait_s))
        self.bundle,self.version,self.threads = bundle,version,threads

    def setup(self, device):
        "Load the bundle, in the worker. It ignores signals: whoever stops the server stops the front, which ends it."
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)
        os.nice(5)  # refusing what finds no room must not wait for the model
        self.coming,self.shadow,self.busy,self.failed = queue.SimpleQueue(), None, threading.Semaphore(2), ''
        try: self.model = self.open(self.bundle, self.version)
        except Exception as e: self.failed = f'{self.version} could not be loaded: {e}'
        settle()

    def open(self, bundle:str, version:str)->'ServedModel':
        from serving.model import ServedModel
        return ServedModel(bundle, version, self.threads)

    def change_model(self, send:Callable):
        "Let a loaded model take over; called between batches."
        while not self.coming.empty():
            job,model = self.coming.get()
            late = time.time() > job.payload['until']
            if late: pass
            elif job.op == 'shadow': self.shadow = model
            else: self.model,self.version = model,model.version; send(('serving', self.version))
            problem = Problem(504, 'model_refused', 'loaded too late') if late else None
            send(('done', [(job.uid, model.version, problem)], 0.))

    def decode_request(self, request:dict): return self.model.prepare(request)

    def predict(self, x:list): return self.model.answer(x)

    def encode_response(self, output)->dict|Problem: return output if isinstance(output, Problem) else vars(output)

    def compare(self, x:list, out:list, side:ThreadPoolExecutor, send:Callable):
        "Let the shadow see what was answered, unless it is behind or reads images of another size."
        shadow = self.shadow
        if shadow is None or shadow.predictor.size != self.model.predictor.size: return
        if not self.busy.acquire(blocking=False): return
        def work():
            send(('comparing', True))
            try: send(('shadow', shadow.version, *shadow.agreement(x, out)))
            finally: send(('comparing', False)); self.busy.release()
        side.submit(work)
