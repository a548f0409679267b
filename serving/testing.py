"""Servers for tests, benchmarks and the quickstart: run one, ask it, stop it.

    python -m serving.testing --data DIR [--port PORT] [--stay]

serves the champion, sends it listings of the test split with text and image, says in words what it answers, and prints
the first answer as the only line on standard output. With --stay it serves on until Ctrl+C.
"""
import argparse
import base64
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import psutil

from rakuten_mm.api import basic_auth
from rakuten_mm.core.environment import artifacts_dir, load_environment

USER,PASSWORD = 'anna', 'langes pässword: ü'
SERVE = sys.executable, '-m', 'rakuten_mm', 'serve', '--model', '{model}', '--port', '{port}'


def free_port(
    wanted:int = 0, # Tried first; 0 takes any
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
    "Wait until /ready says 200; raises `RuntimeError` if the server ends or takes too long."
    end = time.monotonic()+timeout_s
    while time.monotonic() < end:
        if server.poll() is not None: raise RuntimeError(f'the server ended with exit code {server.returncode}')
        try:
            if httpx.get(f'{url}/ready', timeout=2).status_code == 200: return
        except httpx.TransportError: pass
        time.sleep(.1)
    raise RuntimeError(f'the server was not ready after {timeout_s:.0f} s')


@dataclass
class RunningServer:
    "A server process, and how to ask it."
    port:int
    process:subprocess.Popen
    log:Path # File with its output
    database:str # URL
    user:str
    password:str
    start_s:float = 0. # Seconds that it took to become ready

    @property
    def url(self)->str: return f'http://127.0.0.1:{self.port}'

    @property
    def auth(self)->dict[str, str]:
        "Headers with the right credentials."
        return {'Authorization': basic_auth(self.user, self.password)}

    @cached_property
    def client(self)->httpx.Client:
        "A client with the right credentials, kept as long as the server."
        return self.http()

    def http(self, timeout:float=60, **kw)->httpx.Client:
        "A client of its own with the right credentials."
        return httpx.Client(base_url=self.url, headers=self.auth, timeout=timeout, **kw)

    def ask(self, designation:str='Piscine ronde', timeout:float=30., **listing)->httpx.Response:
        "Ask for a prediction, over a connection of its own."
        body = dict(designation=designation) | listing
        return httpx.post(f'{self.url}/predict', json=body, headers=self.auth, timeout=timeout)

    def ready(self)->dict:
        "The body of /ready, if it says 200; otherwise empty."
        r = httpx.get(f'{self.url}/ready', timeout=5)
        return r.json() if r.status_code == 200 else {}

    def metric(self, name:str)->float:
        "The sum of a figure of /metrics."
        lines = httpx.get(f'{self.url}/metrics', headers=self.auth, timeout=30).raise_for_status().text.splitlines()
        return sum(float(l.rsplit(' ', 1)[1]) for l in lines if l.split('{')[0].split(' ')[0] == name)

    def family(self)->list[psutil.Process]:
        "The process and all below it."
        p = psutil.Process(self.process.pid)
        return [p, *p.children(recursive=True)]

    def worker(self)->psutil.Process:
        "The process that runs the model."
        return next(p for p in self.family() if 'spawn_main' in ' '.join(p.cmdline()))


@contextmanager
def running_server(
    model:str|Path = 'models:/rakuten-mm@champion', # Folder of a bundle, or a registered version
    command:Sequence[str] = SERVE, # May name `{model}` and `{port}`
    port:int = 0, # If it is free; 0 takes any
    exit_code:int|None = 0, # Expected at the end; None: any
    home:Path|None = None, # For its log and its database; a new temporary folder if left out
    **env:str, # Variables of its environment; by default it has a user, a database and no limits of its own
)->Iterator[RunningServer]:
    "Run a server process until the end of the `with` block; raises `RuntimeError` if it does not become ready."
    port,home = free_port(port), home or Path(tempfile.mkdtemp(prefix='served-'))
    env = dict(API_USERNAME=USER, API_PASSWORD=PASSWORD, API_DATABASE_URL=f"sqlite:///{home/'feedback.db'}",
               API_RATE='1000000/minute', API_FAILED_LOGINS='1000000/minute', API_RESTART_S='180') | env
    log,begin = home/'server.log', time.monotonic()
    with log.open('w') as f:
        args = [c.format(model=model, port=port) for c in command]
        process = subprocess.Popen(args, env=os.environ | env, stdout=f, stderr=subprocess.STDOUT)
    server = RunningServer(port, process, log, env['API_DATABASE_URL'], env['API_USERNAME'], env['API_PASSWORD'])
    try:
        try: wait_ready(server.url, process)
        except RuntimeError as e: raise RuntimeError(f'{e}; its log: {log}\n{log.read_text()[-3000:]}') from None
        server.start_s = time.monotonic()-begin
        yield server
    finally: end(process)
    if exit_code not in (None, process.returncode):
        raise AssertionError(f'exit code {process.returncode}, not {exit_code}\n{log.read_text()[-3000:]}')


def end(process:subprocess.Popen):
    "Stop a server, and whatever it leaves behind if it does not stop by itself."
    process.terminate()
    try: process.wait(40)
    except subprocess.TimeoutExpired:
        for p in [*psutil.Process(process.pid).children(recursive=True), process]: p.kill()
        process.wait(10)


def some_listings(data:Path, n:int)->list[dict[str, str]]:
    "Listings of the test split that have an image, as requests."
    from rakuten_mm.data.dataset import Dataset
    ds = Dataset.open(data)  # type: ignore[attr-defined]  # patched in
    test = ds.products[(ds.products.split == 'test') & (ds.products.image != '')]
    if not len(test): sys.exit(f'{data}: no test listing has an image')
    image = lambda r: base64.b64encode((ds.images_dir/r.image).read_bytes()).decode()
    return [dict(designation=r.designation, description=r.description, image=image(r))
            for r in test.sort_values('id').head(n).itertuples()]


def in_words(listing:dict[str, str], answer:dict, version:dict)->str:
    "What became of a listing."
    title = listing['designation'] if len(listing['designation']) < 70 else listing['designation'][:69]+'…'
    names = {c['prdtypecode']: c['label'] for c in answer['top_k']}
    found = f"{answer['label']} ({answer['prdtypecode']}), {answer['probability']:.1%} sure"
    said = f'  “{title}”, with its photo\n    {found}: '
    if answer['lane'] == 'auto': return said+'filed automatically'
    if answer['lane'] == 'reject': return said+'no category stands out; a better title or photo is needed'
    choice = ' or '.join(names.get(c, str(c)) for c in (answer['candidates'] or [])[:3])
    needs = version['auto_needs']
    why = f'yet: about {needs:,} more checked listings are needed' if needs else 'by this model'
    end = '' if version['auto_share'] else f'\n    nothing is filed automatically {why}'
    return f"{said}somebody chooses, {choice or 'from all categories'}{end}"


def telling(answers:list[dict])->list[int]:
    "Positions of an answer of each lane, those that were filed first."
    lanes = [a['lane'] for a in answers]
    return [lanes.index(lane) for lane in ('auto', 'review', 'reject') if lane in lanes]


def tell(text:str): print(text, file=sys.stderr, flush=True)


def main():
    "Serve, ask, tell, stop."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='dataset that the listing is taken from')
    parser.add_argument('--port', type=int, default=8080)
    parser.add_argument('--stay', action='store_true', help='serve on until Ctrl+C')
    args = parser.parse_args()
    load_environment()
    home = artifacts_dir()/'quickstart'
    home.mkdir(parents=True, exist_ok=True)
    own = {k: os.environ.get(k, '') for k in ('API_DATABASE_URL', 'API_RATE', 'API_FAILED_LOGINS')}
    own['API_USERNAME'] = os.environ.get('API_USERNAME') or 'quickstart'
    own['API_PASSWORD'] = os.environ.get('API_PASSWORD') or secrets.token_urlsafe(16)  # that nobody else knows
    try:
        with running_server(port=args.port, home=home, exit_code=None, **own) as server:
            listings = some_listings(args.data, 30)
            replies = [server.ask(timeout=60, **x) for x in listings]
            if bad := next((r for r in replies if r.status_code != 200), None):
                sys.exit(f'status {bad.status_code}: {bad.text}')
            answers,version = [r.json() for r in replies], server.client.get('/version').json()
            shown = telling(answers)
            tell(f'\n{len(answers)} listings that it never saw, '
                 f"{sum(a['lane'] == 'auto' for a in answers)} of them filed automatically; for example\n")
            for i in shown: tell(in_words(listings[i], answers[i], version))
            print(json.dumps(answers[shown[0]], ensure_ascii=False), flush=True)
            if args.stay:
                tell(f'\nThe page: {server.url}/  user {server.user}, password {server.password}; Ctrl+C ends it.')
                with suppress(KeyboardInterrupt): server.process.wait()
    except RuntimeError as e: sys.exit(str(e))


if __name__ == '__main__': main()
