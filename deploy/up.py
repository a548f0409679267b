"""Bring up the whole system on this machine: MLflow, fetch, scheduler and API under supervisord, with one log.

    scripts/up.sh [up]      start, go on until Ctrl+C or SIGTERM
    scripts/up.sh status    how the services are
    scripts/up.sh stop      end a system that runs elsewhere
    scripts/up.sh run ...   a command that talks to it: scripts/up.sh run rakuten-mm registry list

It reads .env, and makes one with passwords if there is none. Where RAKUTEN_MM_REMOTE is empty it writes a synthetic
delivery and fetches that.
"""
import argparse
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

import psutil
from dotenv import dotenv_values
from filelock import FileLock, Timeout

from deploy.health import Unwell, get, problem
from deploy.start import end_with_parent, marked

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ('mlflow', 'fetch', 'scheduler', 'api')
NEEDED = ('API_USERNAME', 'API_PASSWORD', 'MLFLOW_TRACKING_USERNAME', 'MLFLOW_TRACKING_PASSWORD',
          'MLFLOW_FLASK_SERVER_SECRET_KEY')
SUPERVISOR = ('-c', str(ROOT/'deploy'/'supervisord.conf'))
LISTING = dict(designation='Robot électrique pour piscine',
               description='Nettoie le fond, les parois et la ligne d’eau.')
log = logging.getLogger('up')


# Settings ------------------------------------------------------------------------------------------------------------

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
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]


def socket_path(up:Path)->Path:
    "Socket of supervisord: in a folder of this user's own, because its path may not be long."
    folder = Path(tempfile.gettempdir())/f'rakuten-mm-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink(): sys.exit(f'{folder} belongs to somebody else')
    folder.chmod(0o700)
    return folder/f'{hashlib.sha256(str(up).encode()).hexdigest()[:12]}.sock'


def environment(
    home:Path, # Has `.env`, `data/` and `artifacts/`
    chosen:dict, # port, mlflow_port, every, rows, preset
)->dict[str, str]:
    "Environment of every service; ends the program if `.env` lacks something."
    env = {k: v for k,v in dotenv_values(home/'.env').items() if v is not None} | os.environ
    if missing := [k for k in NEEDED if not env.get(k)]:
        sys.exit(f"{home/'.env'} has no {', '.join(missing)}; a good password: "
                 "python -c 'import secrets; print(secrets.token_urlsafe(32))'")
    artifacts,deliveries,port = home/'artifacts', home/'data'/'deliveries', chosen['mlflow_port']
    up,mlflow = artifacts/'up', f'127.0.0.1:{port}'
    own = dict(
        PYTHONPATH=ROOT, RAKUTEN_MM_CHECKOUT=ROOT, RAKUTEN_MM_UP=up, RAKUTEN_MM_SOCKET=socket_path(up),
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


# The log -------------------------------------------------------------------------------------------------------------

def open_log(up:Path):
    "Lines go to standard output and to `up.log`."
    log.setLevel(logging.INFO)
    file = RotatingFileHandler(up/'up.log', maxBytes=20_000_000, backupCount=3, encoding='utf-8')
    for handler in (logging.StreamHandler(sys.stdout), file):
        handler.setFormatter(logging.Formatter('%(message)s')); log.addHandler(handler)


def say(text:str, who:str='up'):
    "One line, with the service's name before it."
    log.info('%-9s | %s', who, text)


class Tail:
    "New lines of a file that another process appends to, and now and then renames."
    def __init__(self, path:Path):
        self.path,self.file,self.rest = path, None, ''
        self.lines()  # what was there was told by an earlier start

    def lines(self)->list[str]:
        "Lines that came since the last call."
        text = self.rest+(self.file.read() if self.file else '')
        if self.path.exists() and (not self.file or os.fstat(self.file.fileno()).st_ino != self.path.stat().st_ino):
            self.file = self.path.open(encoding='utf-8', errors='replace')
            text += self.file.read()
        *whole,self.rest = text.replace('\r', '\n').split('\n')
        return [l for l in whole if l.strip()]


# The services --------------------------------------------------------------------------------------------------------

class Watch(threading.Thread):
    "Asks one service how it is, and says when that changes."
    ending = False  # Nobody wonders any more
    def __init__(self, name:str, pause_s:float):
        super().__init__(daemon=True)
        self.name,self.pause_s,self.well,self.said,self.since = name, pause_s, False, '', time.monotonic()

    def run(self):
        while True:
            why,now = problem(self.name), time.monotonic()
            if self.ending: return
            if not why and not self.well: say(f'{self.name} is healthy after {now-self.since:.0f} s'); self.since = now
            elif why and self.well: say(f'{self.name} is not healthy: {why}'); self.since = now
            self.well = not why
            time.sleep(self.pause_s*(3 if self.well else 1))


class System:
    "supervisord with the services, their logs and their health."
    def __init__(self, home:Path, once:bool):
        self.home,self.once,self.url = home, once, os.environ['API_URL']
        self.up = Path(os.environ['RAKUTEN_MM_UP'])
        self.tails = {n: Tail(self.up/f'{n}.log') for n in SERVICES}
        self.watches = {n: Watch(n, 4 if n == 'scheduler' else 1) for n in SERVICES}
        self.asked_to_end,self.answer,self.process,self.trouble = 0, None, None, ''
        for sig in (signal.SIGTERM, signal.SIGINT): signal.signal(sig, self.end)

    def end(self, *_):
        "The first time services may finish what they are at; the second time all ends at once."
        self.asked_to_end += 1
        if self.asked_to_end > 1: self.kill()

    def kill(self):
        for p in marked('RAKUTEN_MM_UP'):
            with suppress(psutil.NoSuchProcess): p.kill()

    def launch(self):
        "supervisord, in a session of its own: a Ctrl+C is for us, and we end it in order."
        command = [sys.executable, '-m', 'supervisor.supervisord', *SUPERVISOR]
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL,
                                        preexec_fn=end_with_parent)

    def tell(self):
        "Pass on the lines of the services."
        for name,tail in self.tails.items():
            for line in tail.lines(): say(line, name)

    def greet(self):
        "The first answer, and how to get the next."
        env = os.environ
        login = env['API_USERNAME'], env['API_PASSWORD']
        try: self.answer = a = json.loads(get(f'{self.url}/predict', *login, LISTING, timeout_s=30))
        except (OSError, ValueError, Unwell) as e:
            hint = '; does another server have this port?' if '401' in str(e) else ''
            if str(e) != self.trouble: say(f'no answer yet: {e}{hint}'); self.trouble = str(e)
            time.sleep(1); return
        title = LISTING['designation']
        say(f"{title!r} is answered: {a['prdtypecode']} {a['label']}, {a['probability']:.0%}")
        secret = f"$(sed -n 's/^API_PASSWORD=//p' {self.home/'.env'})"
        say(f'curl -u "{env["API_USERNAME"]}:{secret}" {self.url}/predict/upload -F designation="{title}"')
        say(f"the page for people: {self.url}   "
            f"MLflow: {env['MLFLOW_TRACKING_URI']} (user {env['MLFLOW_TRACKING_USERNAME']})")

    def run(self)->int:
        "Until we are asked to end, or with `--once` until there is an answer. The exit code."
        self.launch()
        for w in self.watches.values(): w.start()
        while not self.asked_to_end and not (self.once and self.answer):
            self.tell()
            if self.process.poll() is not None:
                say(f'supervisord ended with {self.process.returncode}; starting it again')
                time.sleep(1); self.launch()
            if not self.answer and self.watches['api'].well: self.greet()
            time.sleep(.2)
        return self.stop()

    def stop(self)->int:
        "End the services, last the ones that others need."
        Watch.ending = True
        say('ending')
        self.process.terminate()
        while self.process.poll() is None: self.tell(); time.sleep(.1)
        self.tell()
        until = time.monotonic()+10  # a process that its parent has just left may be about to end by itself
        while (left := marked('RAKUTEN_MM_UP')) and time.monotonic() < until: time.sleep(.2)
        if left: say(f'{len(left)} processes had to be killed'); self.kill()
        say('ended')
        return 0


# Commands ------------------------------------------------------------------------------------------------------------

class Note:
    "Figures of a system that is up, for `status`, `stop` and `run`."
    def __init__(self, up:Path): self.path,self.lock = up/'up.json', FileLock(up/'lock')

    def hold(self):
        "Be the only system of this folder, until this process ends."
        try: self.lock.acquire(timeout=0)
        except Timeout: sys.exit('it is up already; scripts/up.sh status, or scripts/up.sh stop')

    def pid(self)->int:
        "The process that is up, or 0."
        try:
            if self.path.exists(): self.lock.acquire(timeout=0).lock.release()
        except Timeout: return self.read()['pid']
        return 0

    def read(self)->dict: return json.loads(self.path.read_text())


def start(args, home:Path, note:Note)->int:
    "`up`"
    if not shutil.which('rclone'):
        sys.exit('rclone is not installed: `apt install rclone`, `brew install rclone` or https://rclone.org/install/')
    note.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    note.hold()
    made = not (home/'.env').exists()
    if made: make_env_file(home/'.env')
    chosen = dict(port=choose_port(args.port, 8080, '--port'), rows=args.rows, pid=os.getpid(),
                  mlflow_port=choose_port(args.mlflow_port, 5000, '--mlflow-port'))
    os.environ.update(environment(home, chosen))
    if args.preset: os.environ['RAKUTEN_MM_PRESET'] = args.preset
    for d in ('RAKUTEN_MM_ARTIFACTS', 'RAKUTEN_MM_DATA'): Path(os.environ[d]).mkdir(parents=True, exist_ok=True)
    (home/'artifacts'/'mlflow').mkdir(exist_ok=True, mode=0o700)
    note.path.write_text(json.dumps(chosen))
    open_log(Path(os.environ['RAKUTEN_MM_UP']))
    if made: say(f"{home/'.env'} is new: .env.example with passwords, readable by you only")
    for name,usual in (('port', 8080), ('mlflow_port', 5000)):
        if chosen[name] != (getattr(args, name) or usual): say(f'port {usual} is taken: {chosen[name]} instead')
    system = System(home, args.once)
    code = system.run()
    if args.once and system.answer: print(json.dumps(system.answer, ensure_ascii=False), flush=True)
    return code if system.answer or not args.once else 1


def status(args, home:Path, note:Note)->int:
    "`status`"
    if not (pid := note.pid()): print('it is not up'); return 3
    os.environ.update(environment(home, note.read()))
    print(f'up since process {pid}; {os.environ["API_URL"]}, {os.environ["MLFLOW_TRACKING_URI"]}')
    subprocess.run([sys.executable, '-m', 'supervisor.supervisorctl', *SUPERVISOR, 'status'])
    wrong = [p for p in map(problem, SERVICES) if p]
    print('\n'.join(wrong) or 'all services are healthy')
    return bool(wrong)


def stop(args, home:Path, note:Note)->int:
    "`stop`"
    if not (pid := note.pid()): print('it is not up'); return 0
    os.kill(pid, signal.SIGTERM)
    for _ in range(900):
        if note.pid() != pid: print('ended'); return 0
        time.sleep(.1)
    print(f'process {pid} has not ended after 90 s; kill it, and the services end with it')
    return 1


def run(args, home:Path, note:Note)->int:
    "`run`"
    if not note.path.exists(): sys.exit('it was never up here')
    os.environ.update(environment(home, note.read()))
    # It is none of the services, and does not end with them: its mark is another spelling of the same folder.
    os.environ['RAKUTEN_MM_UP'] += '/.'
    return subprocess.run(args.command).returncode


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
    args.command = command
    home = args.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    return dict(up=start, status=status, stop=stop, run=run)[args.what](args, home, Note(home/'artifacts'/'up'))


if __name__ == '__main__': sys.exit(main())
