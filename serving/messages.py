"Messages between the front and its worker, and the pipe that the worker answers through."
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from litserve.transport.base import MessageTransport


class Job(NamedTuple):
    "Something for the worker to do."
    uid:int
    op:str # `predict`, `explain`, `load`, `shadow`, or `ping`
    payload:dict
    alone:bool # In a batch of its own: it may have killed a worker
    due:float = 0. # Those that are due first are done first; by the monotonic clock


@dataclass
class Problem:
    "The reason why a listing has no answer."
    status:int
    code:str
    message:str
    field:str = ''


class PipeTransport(MessageTransport):
    "Sends to the front, from any thread of the worker."
    def __init__(self, connection:Connection):
        self.connection = connection
        self.lock:threading.Lock|None = None  # made in the worker: a lock cannot be sent there

    def send(self, item:Any, consumer_id:int=0):
        if self.lock is None: self.lock = threading.Lock()
        with self.lock: self.connection.send(item)

    async def areceive(self, *args, **kwargs): raise NotImplementedError('the front reads the pipe itself')

    def close(self, send_sentinel:bool=True): self.connection.close()
