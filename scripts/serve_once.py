"""Start the server, send it one real listing with text and picture, print the answer as the last line, stop the server."""
import argparse
import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from rakuten_mm.core.config import artifacts_dir, load_environment
from rakuten_mm.data.dataset import Dataset


def free_port(
    wanted:int, # Tried first
)->int:
    "`wanted` if nobody listens there, otherwise a free port."
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try: s.bind(('127.0.0.1', port))
            except OSError: continue
            return s.getsockname()[1]
    raise OSError('no free port')


def wait_ready(url:str, server:subprocess.Popen, timeout_s:float=180):
    "Until /ready says 200; raises `RuntimeError` if the server ends or takes too long."
    end = time.monotonic()+timeout_s
    while time.monotonic() < end:
        if server.poll() is not None: raise RuntimeError(f'the server ended with exit code {server.returncode}')
        try:
            if httpx.get(f'{url}/ready', timeout=2).status_code == 200: return
        except httpx.TransportError: pass
        time.sleep(.3)
    raise RuntimeError(f'the server was not ready after {timeout_s:.0f} s')


def one_listing(raw:Path, data:Path)->dict:
    "A listing of the test split that has a picture, as a request."
    ds = Dataset.open(data)
    test = ds.products[(ds.products.split == 'test') & (ds.products.image != '')]
    if not len(test): sys.exit(f'{raw}: no test listing has a picture')
    r = test.sort_values('id').iloc[0]
    return dict(designation=r.designation, description=r.description, image=base64.b64encode((ds.images_dir/r.image).read_bytes()).decode())


def main():
    "Serve, ask, print, stop."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--raw', type=Path, required=True, help='where the listings came from, for messages')
    parser.add_argument('--data', type=Path, required=True, help='dataset that the listing is taken from')
    parser.add_argument('--port', type=int, default=8080)
    args = parser.parse_args()
    load_environment()
    # Without credentials of the user's own, ones that nobody else knows.
    os.environ.setdefault('API_USERNAME', 'quickstart')
    if not os.environ.get('API_PASSWORD'): os.environ['API_PASSWORD'] = secrets.token_urlsafe(16)
    port = free_port(args.port)
    url = f'http://127.0.0.1:{port}'
    log = artifacts_dir()/'quickstart'/'server.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as f:
        server = subprocess.Popen([sys.executable, '-m', 'rakuten_mm', 'serve', '--port', str(port)], stdout=f, stderr=f)
        try:
            wait_ready(url, server)
            r = httpx.post(f'{url}/predict', json=one_listing(args.raw, args.data), auth=(os.environ['API_USERNAME'], os.environ['API_PASSWORD']), timeout=60)
        except RuntimeError as e: sys.exit(f'{e}; its log: {log}\n{log.read_text()[-2000:]}')
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    if r.status_code != 200: sys.exit(f'status {r.status_code}: {r.text}')
    print(json.dumps(r.json(), ensure_ascii=False))


if __name__ == '__main__': main()
