"""Health of a service: exit code 0 if it is well; otherwise 1, and one line that says what is wrong.

    python -m deploy.health mlflow|champion|fetch|database|scheduler|api ...

Compose runs this as health check, start.py waits with it, up.sh reports it. It needs no library, because it runs every
few seconds. Addresses, folders and credentials come from the environment, so that no command line shows them.
"""
import base64
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode, urlsplit

# A proxy for the internet does not know these addresses.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unwell(Exception):
    "A service is not well, and the reason."


def artifacts()->Path:
    "Folder that runs write to."
    return Path(os.environ.get('RAKUTEN_MM_ARTIFACTS', 'artifacts'))


def get(url:str, user:str='', password:str='', body:dict|None=None, timeout_s:float=5)->bytes:
    "The body of a 200, `body` sent as JSON; raises `HTTPError` for another answer, `Unwell` for none."
    login = base64.b64encode(f'{user}:{password}'.encode()).decode()
    headers = {'content-type': 'application/json'} | ({'authorization': f'Basic {login}'} if user else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with LOCAL.open(request, timeout=timeout_s) as r: return r.read()
    except urllib.error.HTTPError: raise
    except (OSError, ValueError) as e: raise Unwell(f'no answer ({getattr(e, "reason", e)})') from None


def ask_mlflow(path:str, **query)->dict:
    "A reply of the tracking server's API, with our login; raises `Unwell`."
    env = os.environ
    try:
        reply = get(f"{env['MLFLOW_TRACKING_URI'].rstrip('/')}/api/2.0/mlflow/{path}?{urlencode(query)}",
                    env.get('MLFLOW_TRACKING_USERNAME', ''), env.get('MLFLOW_TRACKING_PASSWORD', ''))
    except urllib.error.HTTPError as e:
        hint = '; is MLFLOW_TRACKING_PASSWORD the password of its first start?' if e.code == 401 else ''
        raise Unwell(f'answers {e.code}{hint}') from None
    return json.loads(reply)


def mlflow():
    "It answers, its database does, and our login is right."
    ask_mlflow('experiments/get-by-name', experiment_name='Default')


def champion():
    "There is a model to serve: in the registry, or kept from before while that cannot be asked. `serve` rules so too."
    try: ask_mlflow('registered-models/alias', name='rakuten-mm', alias='champion')
    except Unwell as e:
        if str(e) in ('answers 404', 'answers 400'): raise Unwell('no model was promoted yet') from None
        if not (artifacts()/'models'/'rakuten-mm-champion.json').exists(): raise Unwell(f'MLflow {e}') from None


def fetch():
    "A delivery has arrived complete, and the loop is alive."
    state = Path(os.environ['RAKUTEN_MM_RAW'])/'.fetch'
    note = state/'last.json'
    last = json.loads(note.read_text()) if note.exists() else dict(time=0, error='')
    if not (state/'whole').exists(): raise Unwell(last['error'] or 'the first delivery has not arrived yet')
    if time.time()-last['time'] < 2*float(os.environ.get('RAKUTEN_MM_FETCH_EVERY', 3600))+60: return
    with (state/'lock').open('a') as lock:
        try: fcntl.flock(lock, fcntl.LOCK_EX|fcntl.LOCK_NB)
        except BlockingIOError: return  # a long fetch, or an ingestion that it waits for
    raise Unwell(f'the last fetch was {(time.time()-last["time"])/60:.0f} minutes ago')


def database():
    "The server's database takes connections; SQLite needs nobody."
    url = urlsplit(os.environ.get('API_DATABASE_URL', ''))
    if not url.scheme.startswith('postgresql'): return
    try: socket.create_connection((url.hostname or '127.0.0.1', url.port or 5432), timeout=5).close()
    except OSError as e: raise Unwell(f'no answer ({e})') from None


def scheduler():
    "Its own word."
    r = subprocess.run(['rakuten-mm', 'scheduler', 'health'], capture_output=True, text=True, timeout=30)
    if r.returncode: raise Unwell((r.stdout+r.stderr).strip().split('\n')[-1])


def api():
    "It has a model and answers."
    url = os.environ.get('API_URL', 'http://127.0.0.1:8080')
    try: get(f'{url}/ready')
    except urllib.error.HTTPError as e: raise Unwell(f'answers {e.code}') from None


CHECKS = {f.__name__: f for f in (mlflow, champion, fetch, database, scheduler, api)}


def problem(name:str)->str:
    "Name what is wrong with one of `CHECKS`; empty if nothing is."
    try: CHECKS[name]()
    except Exception as e: return f'{name}: {e if isinstance(e, Unwell) else f"{type(e).__name__}: {e}"}'
    return ''


if __name__ == '__main__':
    if not sys.argv[1:] or not CHECKS.keys() >= set(sys.argv[1:]): sys.exit(__doc__)
    sys.exit('\n'.join(filter(None, map(problem, sys.argv[1:]))) or 0)
