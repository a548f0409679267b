"Workers that do what a test wants, or cannot be started. They import nothing large, and so are there at once."
import multiprocessing as mp
import os
import time

import psutil

from serving.messages import Job


class Launcher:
    "Starts workers that do what a test wants, or cannot be started."
    def __init__(self): self.refusals,self.started = 0, []

    def __call__(self, jobs, transport):
        if self.refusals: self.refusals -= 1; raise OSError(24, 'Too many open files')
        p = mp.get_context('spawn').Process(target=small_worker, args=(jobs, transport)); p.start()
        self.started.append(psutil.Process(p.pid))
        return p


def small_worker(jobs, transport):
    "Answers, dies or stops as it is told."
    transport.send(('ready', 'v1'))
    while True:
        try: job:Job = jobs.recv()
        except EOFError: return
        match job.op, job.payload.get('do'):
            case 'ping', _: transport.send(('progress',))
            case _, 'die': transport.send(('start', [job.uid])); os._exit(9)
            case _, 'slow':
                transport.send(('start', [job.uid]))
                for _ in range(8): time.sleep(.25); transport.send(('progress',))
                transport.send(('done', [(job.uid, 'v1', {})], 2.))
            case _, _: transport.send(('start', [job.uid])); transport.send(('done', [(job.uid, 'v1', {})], .1))
