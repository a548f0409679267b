"""The parts of LitServe that `serving` uses beyond its documentation, each by a name.

An upgrade that changes one of them fails here first.
"""
import inspect
import multiprocessing as mp

import litserve as ls
import pytest
from litserve.loops.base import LitLoop
from litserve.loops.loops import inference_worker
from litserve.transport.base import MessageTransport

from serving.messages import PipeTransport
from serving.worker import MicroBatches, ProductAPI

WORKER = ['lit_api', 'device', 'worker_id', 'request_queue', 'transport', 'workers_setup_status', 'callback_runner']


def parameters(f)->list[str]: return [p for p in inspect.signature(f).parameters if p != 'self']


class Bare(ls.LitServer):
    "A server as ours is, without pages."
    registered = False

    def register_endpoints(self): self.registered = True


@pytest.fixture
def server(): return Bare(ProductAPI('bundle', 'v1'), accelerator='cpu', devices=1, workers_per_device=1, timeout=False)


def test_register_endpoints_can_be_replaced(server):
    "The constructor calls it, and adds no page of its own that would be in the way of ours."
    ours = {'/predict', '/health', '/ready', '/metrics', '/version'}
    assert server.registered and not ours & {getattr(r, 'path', '') for r in server.app.routes}


def test_app_has_the_lifespan_of_the_server(server):
    "`Server.lifespan` takes the place of LitServe's, which expects its own queues."
    assert parameters(ls.LitServer.lifespan) == ['app']
    assert server.app.router.lifespan_context.__func__ is ls.LitServer.lifespan


def test_launch_single_inference_worker_starts_a_process(server, monkeypatch):
    "It reads `litapi_request_queues`, `_transport` and `workers_setup_status`, and returns the process it started."
    assert parameters(ls.LitServer.launch_single_inference_worker) == ['lit_api', 'worker_id']
    started = []
    class Process:
        def __init__(self, target, args, name): self.target,self.args = target,args
        def start(self): started.append(self)
    monkeypatch.setattr(type(mp.get_context('spawn')), 'Process', Process)
    api = server.litapi_connector.lit_apis[0]
    server.litapi_request_queues[api.api_path],server._transport,server.workers_setup_status = 'jobs', 'transport', {}
    process = server.launch_single_inference_worker(api, 0)
    assert started == [process] and process.target is inference_worker
    assert process.args[:1] == (api,) and process.args[2:5] == (0, 'jobs', 'transport')
    assert api.api_path == '/predict' and isinstance(server.workers_setup_status, dict)


def test_inference_worker_sets_up_and_runs_the_loop():
    "In the worker: `setup`, then the loop that the API was made with, which `run` takes over for good."
    assert parameters(inference_worker)[:7] == parameters(LitLoop.__call__)[:7] == WORKER
    assert parameters(MicroBatches.run) == parameters(LitLoop.run) == WORKER
    class Ended(Exception): pass
    class Loop(LitLoop):
        def run(self, lit_api, device, *rest): seen.append((device, lit_api.prepared, *rest)); raise Ended
    class API(ls.LitAPI):
        def setup(self, device): self.prepared = True
        def predict(self, x): return x
    class Runner:
        def trigger_event(self, *args, **kw): pass
    seen,status,api = [], {}, API(loop=Loop())
    with pytest.raises(Ended): inference_worker(api, 'cpu', 0, 'jobs', 'transport', status, Runner(), False)
    assert [s[:5] for s in seen] == [('cpu', True, 0, 'jobs', 'transport')]


def test_api_takes_a_loop_and_keeps_its_settings():
    api = ProductAPI('bundle', 'v1', batch_size=4, wait_s=.5)
    assert isinstance(api.loop, MicroBatches) and api.max_batch_size == 4 and api.batch_timeout == .5
    assert {'loop', 'max_batch_size', 'batch_timeout', 'api_path'} <= {*parameters(ls.LitAPI.__init__)}
    ours = {'bundle', 'version', 'threads', 'coming', 'shadow', 'busy', 'failed', 'model', *vars(ProductAPI)}
    ours -= {'setup', 'decode_request', 'predict', 'encode_response'}
    taken = [n for n in ours if not n.startswith('_') and hasattr(ls.LitAPI, n)]
    assert not taken, 'LitAPI has attributes by names that ours uses'


def test_transport_is_what_a_worker_may_be_given():
    "An abstract class of three methods, so that a pipe can be one; it is sent to the worker by `spawn`."
    abstract = {n for n,f in vars(MessageTransport).items() if getattr(f, '__isabstractmethod__', False)}
    assert abstract == {'send', 'areceive'} and parameters(MessageTransport.send) == ['item', 'consumer_id']
    read,write = mp.Pipe(False)
    transport = PipeTransport(write)
    transport.send(('ready', 'v1'))
    assert read.recv() == ('ready', 'v1')
    transport.close()
    assert write.closed


def test_the_first_batch_of_a_slow_model_is_small(bundle):
    "A worker would be taken to hang over a whole one; golden products say how long a listing takes."
    from serving.budgets import BATCH_S
    from serving.model import ServedModel
    model,loop = ServedModel(bundle, 'v1'), MicroBatches(64, .001)
    assert 0 < model.listing_s < 1 and loop.most(model) > 2
    model.listing_s = BATCH_S/2.5
    assert MicroBatches(16, .001).most(model) == 2
