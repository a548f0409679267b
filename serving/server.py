"Build and run the server."
import logging
import os
import signal
import sys

import litserve as ls

from rakuten_mm.bundle import BundleError
from rakuten_mm.config import load_environment
from serving import docs, errors
from serving.api import ProductAPI
from serving.auth import BasicAuth, MissingPassword
from serving.schema import MAX_BODY

CHAMPION = 'models:/rakuten-mm@champion'


def make_server(
    model:str = CHAMPION, # Bundle folder, `models:/rakuten-mm@alias` or `models:/rakuten-mm/version`
    timeout_s:float = 30, # A request that waited longer for a worker gets 504
)->ls.LitServer:
    "A server for a verified bundle; raises `MissingPassword`, `FileNotFoundError` or `BundleError`."
    auth = BasicAuth.from_environment()
    from rakuten_mm.tracking import resolve_model  # MLflow is needed here only, not in the workers
    bundle,version = resolve_model(model)
    api = ProductAPI(str(bundle.resolve()), version, auth)
    # A list leaves /health open and guards /predict; a bare api would do the opposite.
    server = ls.LitServer([api], accelerator='cpu', devices=1, workers_per_device=1, timeout=timeout_s, max_payload_size=MAX_BODY)
    server.app.title,server.app.version = 'rakuten-mm', version
    server.app.description = 'File a listing under a category, from its title, its description and its picture.'
    docs.install(server.app)
    errors.install(server.app)
    return server


def serve(
    model:str = CHAMPION,
    host:str = '127.0.0.1',
    port:int = 8080,
):
    "Serve until SIGTERM or Ctrl+C; a server that cannot start exits with 1 and one line."
    load_environment()
    try: server = make_server(model)
    except (MissingPassword, FileNotFoundError, BundleError) as e: sys.exit(f'rakuten-mm: {e}')
    main = os.getpid()
    def stop(*_):
        if os.getpid() == main: raise KeyboardInterrupt  # children inherit the handler, and are stopped by LitServe
    signal.signal(signal.SIGTERM, stop)  # LitServe drains on Ctrl+C only; SIGTERM would leave its processes behind
    logging.getLogger('litserve').setLevel(logging.WARNING)
    print(f'serving {server.app.version} on http://{host}:{port}, documentation at /docs', flush=True)
    server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level='warning')
