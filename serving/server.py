"The server: its parts put together, and run."
import asyncio
import logging
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from typing import Any

import litserve as ls
import structlog
import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from rakuten_mm.core.environment import artifacts_dir, load_environment
from rakuten_mm.models.manifest import BundleError
from serving import errors, metrics, openapi, routes
from serving.admission import AdmissionControl
from serving.auth import Authenticator, MissingPassword
from serving.budgets import DATABASE_S, IDLE_S
from serving.config import ServeConfig, kept_images
from serving.connections import BoundedProtocol, room_for_connections
from serving.messages import PipeTransport
from serving.middleware import RequestMiddleware
from serving.registry_watcher import RegistryWatcher, resolve_at_start
from serving.store import Store, cause_of
from serving.worker import ProductAPI, settle
from serving.worker_client import WorkerClient

log = logging.getLogger('rakuten_mm.server')
CHAMPION = 'models:/rakuten-mm@champion'


class Server(ls.LitServer):
    """LitServe with our own pages, and one worker that `WorkerClient` watches.

    LitServe starts the worker and runs the loop in it. Its queues go through a third process and lose what a worker
    that dies had taken, so the two ends talk through pipes; its pages are replaced by those of `serving.routes`.
    tests/test_litserve_contract.py names what is used of it beyond its documentation.
    """
    def __init__(self,
        api:ProductAPI, cfg:ServeConfig, store:Store, authenticator:Authenticator,
        model:str, # Name that the watcher follows
        problem:str = '', # Why the registry was not asked
    ):
        super().__init__(api, accelerator='cpu', devices=1, workers_per_device=1, timeout=False)
        self.api,self.cfg,self.store = api,cfg,store
        self.worker = WorkerClient(self.launch, cfg.hang_s, cfg.restart_s, cfg.give_up_s)
        self.watcher = RegistryWatcher(self.worker, api, model, cfg, problem)
        self.authenticator = authenticator
        self.admission = admission = AdmissionControl(cfg.max_in_flight, cfg.max_bytes)
        app = self.app
        app.title,app.version = 'rakuten-mm', api.version
        app.description = 'File a listing under a category, from its title, its description and its image.'
        routes.install(app, routes.Service(self.worker, self.watcher, store, admission, cfg), authenticator)
        openapi.install(app); errors.install(app)
        app.add_middleware(RequestMiddleware, authenticator=authenticator, admission=admission, cfg=cfg)

    def register_endpoints(self): pass

    def launch(self, jobs:Connection, transport:PipeTransport):
        "A new worker at the other end of two pipes."
        self.litapi_request_queues[self.api.api_path],self._transport = jobs,transport
        self.workers_setup_status:dict[str, str] = {}
        return self.launch_single_inference_worker(self.api, 0)

    @asynccontextmanager
    async def lifespan(self, app:FastAPI):
        if not self.worker.ready: await self.worker.start()
        log.info('serving %s, documentation at /docs', self.api.version)
        settle()
        tasks = self.watcher.run(), self.authenticator.keep_reading(), self.forget(), self.look_at_disk()
        running = [asyncio.create_task(t) for t in tasks]
        try: yield
        finally:
            for t in running: t.cancel()
            self.worker.stop()  # nobody is left to wait for
            self.store.close()

    async def forget(self):
        "Remove answers that are older than API_KEEP_DAYS, every hour."
        while self.cfg.keep_days:
            before = datetime.now(UTC)-timedelta(days=self.cfg.keep_days)
            try: out = await asyncio.get_running_loop().run_in_executor(self.store.pool, self.store.erase, before)
            except (SQLAlchemyError, OSError) as e: log.error('old answers stay: %s', cause_of(e))
            else:
                metrics.ERASED.inc(out['answers']+out['corrected'])
                if any(out.values()): log.info('removed what is older than API_KEEP_DAYS', extra=out)
            await asyncio.sleep(3600)

    async def look_at_disk(self):
        "Report the disk of the artifacts every few seconds, in a thread: one of the network may not answer."
        while True:
            with suppress(OSError):
                disk = await asyncio.to_thread(shutil.disk_usage, artifacts_dir())
                metrics.DISK.set(disk.total); metrics.DISK_FREE.set(disk.free)
            await asyncio.sleep(15)


class Graceful(uvicorn.Server):
    "The first SIGTERM or Ctrl+C lets requests finish and ends with exit code 0; the second ends at once."
    def handle_exit(self, sig, frame):
        if self.should_exit: os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)
        self.should_exit = True


def make_server(
    model:str = CHAMPION, # Bundle folder, `models:/rakuten-mm@alias` or `models:/rakuten-mm/version`
    cfg:ServeConfig|None = None, # From the environment if left out
)->Server:
    "A server for a verified bundle; raises `MissingPassword`, `ValueError`, `OSError` or `BundleError`."
    cfg = cfg or ServeConfig()
    store = Store(cfg.url, kept_images(), deadline_s=DATABASE_S, patient=True)
    authenticator = Authenticator.from_environment(store, cfg)
    bundle,version,problem = resolve_at_start(model)
    api = ProductAPI(str(bundle), version, cfg.threads, cfg.batch_size, cfg.batch_wait_ms/1e3)
    return Server(api, cfg, store, authenticator, model, problem)


def log_as_json():
    "Log one JSON object a line on standard output; a line that cannot be written is lost, not the request."
    logging.raiseExceptions = False
    std,common = structlog.stdlib, structlog.processors
    shared:list[Any] = [std.add_log_level, std.add_logger_name, common.TimeStamper(fmt='iso', utc=True)]
    structlog.configure(processors=[*shared, std.ProcessorFormatter.wrap_for_formatter], wrapper_class=std.BoundLogger,
                        logger_factory=std.LoggerFactory(), cache_logger_on_first_use=True)
    last:list[Any] = [std.ProcessorFormatter.remove_processors_meta, common.format_exc_info,
                      common.JSONRenderer(ensure_ascii=False)]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(std.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger('rakuten_mm').setLevel(logging.INFO)


def leave_the_log():
    "Give up what a full disk would not take, so that the exit code says how the server ended."
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
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # waiting threads of the worker would take the front's core
    # glibc keeps what it was once asked for, and asks for more: pixels of large pictures go back at once instead
    os.environ.setdefault('MALLOC_MMAP_THRESHOLD_', str(2**22))
    log_as_json()
    os.umask(os.umask(0o077) | 0o077)  # what is written holds texts of customers
    try: server = make_server(model)
    except (MissingPassword, ValueError, OSError, BundleError) as e: sys.exit(f'Error: {e}')
    proxies = server.cfg.forwarded
    BoundedProtocol.room,BoundedProtocol.admission = room_for_connections(), server.admission
    config = uvicorn.Config(server.app, host=host, port=port, log_config=None, access_log=False, server_header=False,
                            http=BoundedProtocol, ws='none',
                            timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=25,
                            proxy_headers=bool(proxies), forwarded_allow_ips=proxies or None)
    uv = Graceful(config)
    log.info('starting on http://%s:%s', host, port)
    threads,loop = ThreadPoolExecutor(8, 'waiting'), config.get_loop_factory()()  # type: ignore[misc]
    loop.set_default_executor(threads)
    try: ended = loop.run_until_complete(run(server, uv))
    except RuntimeError as e: ended = str(e)
    finally:
        server.worker.stop()
        pools = threads,server.store.pool,server.authenticator.checks
        for pool in pools: pool.shutdown(False, cancel_futures=True)
    leave_the_log()
    if waits_for_ever(*pools):
        print(f'Error: {ended or "ended while something did not answer"}', file=sys.stderr, flush=True)
        os._exit(bool(ended))
    if ended: sys.exit(f'Error: {ended}')


def waits_for_ever(*pools:ThreadPoolExecutor)->bool:
    "True if a thread of one of them does not end: it would keep the process."
    threads = [t for p in pools for t in p._threads]
    for t in threads: t.join(1)
    return any(t.is_alive() for t in threads)


async def run(server:Server, uv:uvicorn.Server)->str: # Why it ended, if it was not asked to
    "Serve until the end; raises `RuntimeError` if no model can be loaded."
    try: await server.worker.start()  # the port opens when there is a model
    except RuntimeError as e:
        if not server.watcher.fall_back(str(e)): raise
        await server.worker.start()
    given_up = server.worker.given_up
    def end(_): uv.should_exit = True
    given_up.add_done_callback(end)
    await uv.serve()
    return given_up.result() if given_up.done() else ''
