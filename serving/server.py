"Build and run the server."
import asyncio
import logging
import os
import signal
import sys
from contextlib import asynccontextmanager

import litserve as ls
import structlog
import uvicorn
from fastapi import FastAPI

from rakuten_mm.core.config import load_environment
from rakuten_mm.core.files import BundleError
from serving import app as pages
from serving import docs, errors, follow
from serving.auth import Access, MissingPassword
from serving.config import ServeConfig, kept_images
from serving.engine import Engine
from serving.gate import Gate, Places
from serving.store import Store
from serving.worker import PipeTransport, ProductAPI, settle

log = logging.getLogger('rakuten_mm.server')
CHAMPION = 'models:/rakuten-mm@champion'


class Server(ls.LitServer):
    """LitServe with our own pages, and one worker that `Engine` watches.

    LitServe starts the worker and runs the loop in it. Its queues go through a third process and lose what a worker that dies had taken,
    so the two ends talk through pipes; its pages are replaced by those of `serving.app`.
    """
    def __init__(self, api:ProductAPI, cfg:ServeConfig, store:Store, access:Access, model:str, problem:str=''):
        super().__init__(api, accelerator='cpu', devices=1, workers_per_device=1, timeout=False)
        self.api,self.cfg,self.store = api,cfg,store
        self.engine = Engine(self.launch, cfg.timeout_s, cfg.restart_s)
        self.follower = follow.Follower(self.engine, api, model, cfg, problem)
        self.places = Places(cfg.max_in_flight)
        app = self.app
        app.title,app.version = 'rakuten-mm', api.version
        app.description = 'File a listing under a category, from its title, its description and its picture.'
        pages.install(app, pages.Service(self.engine, self.follower, store, self.places, cfg), access)
        docs.install(app); errors.install(app)
        app.add_middleware(Gate, access=access, places=self.places, cfg=cfg)

    def register_endpoints(self): pass

    def launch(self, inbox, transport:PipeTransport):
        "A new worker at the other end of two pipes."
        self.litapi_request_queues[self.api.api_path],self._transport,self.workers_setup_status = inbox, transport, {}
        return self.launch_single_inference_worker(self.api, 0)

    @asynccontextmanager
    async def lifespan(self, app:FastAPI):
        if not self.engine.ready: await self.engine.start()
        log.info('serving %s, documentation at /docs', self.api.version)
        settle()
        following = asyncio.create_task(self.follower.run())
        try: yield
        finally:
            following.cancel()
            await asyncio.to_thread(self.engine.stop)
            await asyncio.to_thread(self.store.close)


class Graceful(uvicorn.Server):
    "The first SIGTERM or Ctrl+C lets requests finish and ends with exit code 0; the second ends at once."
    def handle_exit(self, sig, frame):
        if self.should_exit: os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)
        self.should_exit = True


def make_server(
    model:str = CHAMPION, # Bundle folder, `models:/rakuten-mm@alias` or `models:/rakuten-mm/version`
    cfg:ServeConfig|None = None,
)->Server:
    "A server for a verified bundle; raises `MissingPassword`, `ValueError`, `FileNotFoundError` or `BundleError`."
    cfg = cfg or ServeConfig.from_environment()
    store = Store(cfg.url, kept_images())
    access = Access.from_environment(store, cfg)
    bundle,version,problem = follow.first(model)
    return Server(ProductAPI(str(bundle), version, cfg.threads, cfg.batch_size, cfg.batch_wait_ms/1e3), cfg, store, access, model, problem)


def log_as_json():
    "One JSON object a line on standard output; a line that cannot be written is lost, not the request."
    logging.raiseExceptions = False
    shared = [structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, structlog.processors.TimeStamper(fmt='iso', utc=True)]
    structlog.configure(processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter], logger_factory=structlog.stdlib.LoggerFactory(),
                        wrapper_class=structlog.stdlib.BoundLogger, cache_logger_on_first_use=True)
    handler = logging.StreamHandler(sys.stdout)
    last = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False)]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger('rakuten_mm').setLevel(logging.INFO)


def leave_the_log():
    "What a full disk would not take is given up, so that the exit code says how the server ended."
    for stream in (sys.stdout, sys.stderr):
        try: stream.flush()
        except OSError: os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def serve(
    model:str = CHAMPION,
    host:str = '127.0.0.1',
    port:int = 8080,
):
    "Serve until SIGTERM or Ctrl+C; a server that cannot start exits with 1 and one line."
    load_environment()
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads of the worker that wait would spin on the core that the front needs
    log_as_json()
    try: server = make_server(model)
    except (MissingPassword, ValueError, OSError, BundleError) as e: sys.exit(f'rakuten-mm: {e}')
    cfg = server.cfg
    config = uvicorn.Config(server.app, host=host, port=port, log_config=None, access_log=False, timeout_keep_alive=30, timeout_graceful_shutdown=25,
                            proxy_headers=bool(cfg.forwarded), forwarded_allow_ips=cfg.forwarded or None, server_header=False)
    uv = Graceful(config)
    log.info('starting on http://%s:%s', host, port)
    async def run():
        await server.engine.start()  # the port opens when there is a model
        await uv.serve()
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner: runner.run(run())
    except RuntimeError as e: sys.exit(f'rakuten-mm: {e}')
    finally: server.engine.stop(); leave_the_log()
