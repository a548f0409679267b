"""Bring up the whole system on this machine: MLflow, fetch, scheduler and API under supervisord, with one log.

    scripts/up.sh [up]      start, go on until Ctrl+C or SIGTERM
    scripts/up.sh status    how the services are
    scripts/up.sh stop      end a system that runs elsewhere
    scripts/up.sh run ...   a command that talks to it: scripts/up.sh run rakuten-mm registry list

It reads .env, and makes one with passwords if there is none. Where RAKUTEN_MM_REMOTE is empty it writes a synthetic
delivery and fetches that.
"""
import argparse
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from dotenv import dotenv_values
from filelock import FileLock, Timeout

from deploy.health import Unwell, get, problem
from deploy.start import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ('mlflow', 'fetch', 'scheduler', 'api')
NEEDED = ('API_USERNAME', 'API_PASSWORD', 'MLFLOW_TRACKING_USERNAME', 'MLFLOW_TRACKING_PASSWORD',
          'MLFLOW_FLASK_SERVER_SECRET_KEY')
SUPERVISOR = [sys.executable, '-m', 'supervisor.supervisord', '-c', str(ROOT/'deploy'/'supervisord.conf')]
CONTROL = [SUPERVISOR[0], '-m', 'supervisor.supervisorctl', *SUPERVISOR[3:]]
LISTING = dict(designation='Robot électrique pour piscine',
               description='Nettoie le fond, les parois et la ligne d’eau.')


def say(text:str, who:str='up'): print(f'{who:9} | {text}', flush=True)


def make_env_file(path:Path):
    "`.env.example` with passwords of its own, for this user's eyes only."
    fill = lambda m: m[0]+secrets.token_urlsafe(32)
    text = re.sub(r'^\w*(?:PASSWORD|SECRET|SECRET_KEY)=$', fill, (ROOT/'.env.example').read_text(), flags=re.M)
    with os.fdopen(os.open(path, os.O_WRONLY|os.O_CREAT|os.O_EXCL, 0o600), 'w') as f: f.write(text)


def choose_port(
    asked:int|None, # By the user, who means it
    usual:int, # Another one will do
    option:str,
)->int:
    "A port of this machine to listen on; ends the program if the one that was asked for is taken."
    with suppress(OSError), socket.create_server(('127.0.0.1', asked or usual)): return asked or usual
    if asked: sys.exit(f'port {asked} is taken; {option} chooses another')
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    say(f'port {usual} is taken: {port} instead')
    return port


def environment(
    home:Path, # Has `.env`, `data/` and `artifacts/`
    chosen:dict, # port, mlflow_port, rows, socket: a path that may not be long
)->dict[str, str]:
    "Environment of every service; ends the program if `.env` lacks something."
    env = {k: v for k,v in dotenv_values(home/'.env').items() if v is not None} | os.environ
    if missing := [k for k in NEEDED if not env.get(k)]:
        sys.exit(f"{home/'.env'} has no {', '.join(missing)}; a good password: "
                 "python -c 'import secrets; print(secrets.token_urlsafe(32))'")
    artifacts,deliveries,port = home/'artifacts', home/'data'/'deliveries', chosen['mlflow_port']
    up,mlflow = artifacts/'up', f'127.0.0.1:{port}'
    own = dict(
        PYTHONPATH=ROOT, RAKUTEN_MM_CHECKOUT=ROOT, RAKUTEN_MM_UP=up, RAKUTEN_MM_SOCKET=chosen.get('socket', ''),
        RAKUTEN_MM_SYNTHETIC=chosen['rows'], RAKUTEN_MM_DELIVERIES=deliveries, RAKUTEN_MM_RAW=deliveries/'raw',
        RAKUTEN_MM_DATA=home/'data'/'catalogue', RAKUTEN_MM_ARTIFACTS=artifacts,
        RAKUTEN_MM_SCHEDULE=artifacts/'schedule'/'schedule.yaml', ZENML_CONFIG_PATH=up/'zenml',
        RAKUTEN_MM_API_PORT=chosen['port'], API_URL=f"http://127.0.0.1:{chosen['port']}",
        MLFLOW_TRACKING_URI=f'http://{mlflow}', MLFLOW_HOST='127.0.0.1', MLFLOW_PORT=port,
        MLFLOW_SERVER_ALLOWED_HOSTS=f'{mlflow},localhost:{port}', MLFLOW_SERVER_CORS_ALLOWED_ORIGINS=f'http://{mlflow}',
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false', MLFLOW_AUTH_CONFIG_PATH=ROOT/'deploy'/'mlflow.ini',
        MLFLOW_AUTH_ADMIN_USERNAME=env['MLFLOW_TRACKING_USERNAME'],
        MLFLOW_AUTH_ADMIN_PASSWORD=env['MLFLOW_TRACKING_PASSWORD'], OMP_WAIT_POLICY='passive', PYTHONUNBUFFERED='1')
    env.setdefault('RAKUTEN_MM_FETCH_EVERY', '3600')
    if not env.get('RAKUTEN_MM_REMOTE'): own |= dict(RAKUTEN_MM_REMOTE=deliveries/'synthetic')
    return env | {k: str(v) for k,v in own.items()}


def watch(
    name:str,
    well:set[str], # Services that are healthy: changed here
    asked:Event, # To end
):
    "Say when the health of a service changes."
    since,why = time.monotonic(), 'it has only been started'
    while not asked.wait((4 if name == 'scheduler' else 1)*(1 if why else 3)):
        why,now = problem(name), time.monotonic()
        if bool(why) == (name in well) and not asked.is_set():
            say(f'{name} is not healthy: {why}' if why else f'{name} is healthy after {now-since:.0f} s')
            since = now; well ^= {name}


def follow(name:str, path:Path):
    "Pass on the lines that a service adds to its log from now on; supervisord now and then renames that."
    file,rest = path.open('a+', encoding='utf-8', errors='replace'), ''
    while True:
        text = rest+file.read()
        if path.exists() and os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            file = path.open(encoding='utf-8', errors='replace')
            text += file.read()
        *lines,rest = text.replace('\r', '\n').split('\n')
        for line in filter(str.strip, lines): say(line, name)
        time.sleep(.1)


def greet(home:Path)->dict|None:
    "The first answer, and how to get the next; None if there is none yet."
    env,title = os.environ, LISTING['designation']
    url,login = env['API_URL'], (env['API_USERNAME'], env['API_PASSWORD'])
    try: a = json.loads(get(f'{url}/predict', *login, LISTING, timeout_s=30))
    except (OSError, ValueError, Unwell) as e:
        say(f'no answer yet: {e}'+('; does another server have this port?' if '401' in str(e) else ''))
        time.sleep(2); return None
    say(f"{title!r} is answered: {a['prdtypecode']} {a['label']}, {a['probability']:.0%}")
    secret = f"$(sed -n 's/^API_PASSWORD=//p' {home/'.env'})"
    say(f'curl -u "{env["API_USERNAME"]}:{secret}" {url}/predict/upload -F designation="{title}"')
    say(f"the page for people: {url}   MLflow: {env['MLFLOW_TRACKING_URI']} (user {env['MLFLOW_TRACKING_USERNAME']})")
    return a


def supervise(home:Path, once:bool)->dict|None: # The answer
    "Run supervisord until it is asked to end, or with `once` until there is an answer; started again if it is killed."
    up,answer,asked,well = Path(os.environ['RAKUTEN_MM_UP']), None, Event(), set[str]()
    def end(sig, _): asked.set(); signal.signal(sig, signal.SIG_DFL)  # the second one is not waited for
    for sig in (signal.SIGTERM, signal.SIGINT): signal.signal(sig, end)
    for name in SERVICES:
        Thread(target=follow, args=(name, up/f'{name}.log'), daemon=True).start()
        Thread(target=watch, args=(name, well, asked), daemon=True).start()
    while not asked.is_set():
        # In a session of its own: a Ctrl+C is for us, and we end it in order.
        process = subprocess.Popen(SUPERVISOR, cwd=ROOT, start_new_session=True, preexec_fn=end_with_parent)
        while process.poll() is None and not asked.wait(.2):
            if not answer and 'api' in well: answer = greet(home)
            if answer and once: asked.set()
        if process.poll() == 0: asked.set()  # by supervisorctl
        elif process.poll(): say(f'supervisord ended with {process.returncode}; starting it again')
    say('ending')
    process.terminate(); process.wait()
    time.sleep(.5)  # for the last lines
    say('ended')
    return answer


def start(args, home:Path, note:Path)->int:
    "Bring it up; the exit code."
    if not shutil.which('rclone'):
        sys.exit('rclone is not installed: `apt install rclone`, `brew install rclone` or https://rclone.org/install/')
    if not (home/'.env').exists():
        make_env_file(home/'.env')
        say(f"{home/'.env'} is new: .env.example with passwords, readable by you only")
    with tempfile.TemporaryDirectory(prefix='rakuten-mm-') as own:  # a path that is short and nobody else's
        chosen = dict(port=choose_port(args.port, 8080, '--port'), rows=args.rows, pid=os.getpid(),
                      mlflow_port=choose_port(args.mlflow_port, 5000, '--mlflow-port'), socket=f'{own}/socket')
        os.environ.update(environment(home, chosen))
        if args.preset: os.environ['RAKUTEN_MM_PRESET'] = args.preset
        for d in ('artifacts/mlflow', 'data/catalogue'): (home/d).mkdir(parents=True, exist_ok=True, mode=0o700)
        note.write_text(json.dumps(chosen))
        answer = supervise(home, args.once)
    if args.once and answer: print(json.dumps(answer, ensure_ascii=False), flush=True)
    return int(args.once and not answer)


def main()->int:
    "Parse and dispatch."
    parser = argparse.ArgumentParser(prog='scripts/up.sh', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('what', nargs='?', choices=['up', 'status', 'stop', 'run'], default='up')
    add('--port', type=int, help='of the API (8080, or a free one if that is taken)')
    add('--mlflow-port', type=int, help='of MLflow (5000, or a free one if that is taken)')
    add('--rows', type=int, default=2000, help='synthetic listings, where no partner is configured (2000)')
    add('--preset', help='what is trained (cpu)')
    add('--once', action='store_true', help='stop after the first answered prediction; the answer is the last line')
    add('--home', type=Path, default=ROOT, help='folder with .env, data/ and artifacts/ (the checkout)')
    own,command = sys.argv[1:], []
    if 'run' in own: n = own.index('run')+1; own,command = own[:n], own[n:]  # what follows is not ours to parse
    args = parser.parse_args(own)
    home = args.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    note = home/'artifacts'/'up'/'up.json'
    note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(note.with_name('lock'))
    with suppress(Timeout):
        lock.acquire(timeout=0)
        if args.what == 'up': return start(args, home, note)
        if args.what != 'run': print('it is not up'); return 3*(args.what == 'status')
    if args.what == 'up': sys.exit('it is up already; scripts/up.sh status, or scripts/up.sh stop')
    if not note.exists(): sys.exit('it was never up here')
    lock.release()
    chosen = json.loads(note.read_text())
    os.environ.update(environment(home, chosen))
    # What runs here is none of the services, and does not end with them: its mark is another spelling of their folder.
    os.environ['RAKUTEN_MM_UP'] += '/.'
    if args.what == 'run': return subprocess.run(command).returncode
    if args.what == 'status':
        print(f'{os.environ["API_URL"]}, {os.environ["MLFLOW_TRACKING_URI"]}', flush=True)
        subprocess.run([*CONTROL, 'status'])
        return subprocess.run([sys.executable, '-m', 'deploy.health', *SERVICES], cwd=ROOT).returncode
    os.kill(chosen['pid'], signal.SIGTERM)
    try: lock.acquire(timeout=90)
    except Timeout: print('it has not ended after 90 s; kill it, and the services end with it'); return 1
    print('ended')
    return 0


if __name__ == '__main__': sys.exit(main())
