"""Run the services of deploy/compose.yaml as processes, as close to containers as a Linux machine without Docker gets.

    sudo .venv/bin/python scripts/try_compose.py --rows 300 --preset smoke

Commands, environments, health checks, order and volumes are read from compose.yaml. Each service has a mount namespace
with a read-only root, its own volumes and /tmp, runs as its user without capabilities and may not gain any; there is no
network but loopback. What Docker would add and this does not: the images themselves, networks between services (here
they share loopback), limits, and restarts. PostgreSQL is the one of this machine.
"""
import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT/'deploy'/'compose.yaml'


def interpolate(
    value, # Strings, and lists and mappings of them
    env:dict[str, str],
):
    "`value` with `${NAME}`, `${NAME:-default}` and `${NAME:?error}` filled in, as Compose does."
    if isinstance(value, dict): return {k: interpolate(v, env) for k,v in value.items()}
    if isinstance(value, list): return [interpolate(v, env) for v in value]
    if not isinstance(value, str): return value
    def fill(m):
        name,how,other = m.groups()
        if env.get(name): return env[name]
        if how == ':?': raise ValueError(f'{name}: {other}')
        return other or ''
    return re.sub(r'\$\{(\w+)(?:(:[-?])([^}]*))?\}', fill, value)


def read_compose(env:dict[str, str])->dict:
    "The file with variables filled in."
    return interpolate(yaml.safe_load(COMPOSE.read_text()), env)


class Machine:
    "Folders that stand for images and volumes."
    def __init__(self, base:Path, compose:dict):
        self.base,self.services = base, compose['services']
        for name in ('app', 'volumes', 'logs', 'python'): (base/name).mkdir()
        self.copy_app()
        names = ' '.join(self.services)
        (base/'hosts').write_text(f'127.0.0.1 localhost {names}\n')
        users = ''.join(f"u{uid}:x:{uid}:{uid}::/tmp:/bin/sh\n" for uid in {s['user'].split(':')[0]
                                                                            for s in self.services.values()})
        (base/'passwd').write_text('root:x:0:0::/root:/bin/sh\n'+users)
        for v in compose['volumes']: (base/'volumes'/v).mkdir()

    def copy_app(self):
        "What the Dockerfile copies, and the folders that it makes."
        keep = [l[1:] for l in (ROOT/'.dockerignore').read_text().split() if l.startswith('!')]
        for name in keep:
            src = ROOT/name
            if src.is_dir(): shutil.copytree(src, self.base/'app'/name,
                                             ignore=shutil.ignore_patterns('__pycache__', 'certs'))
            else: shutil.copy(src, self.base/'app'/name)
        for d in ('.zen', 'data/deliveries', 'data/catalogue', 'artifacts',
                  'mlflow'): (self.base/'app'/d).mkdir(parents=True)

    def reach_python(self)->list[str]:
        "Mounts that show this interpreter to other users, if it lies in a folder that they may not enter."
        prefix = Path(sys.base_prefix).resolve()
        shut = next((p for p in [*reversed(prefix.parents), prefix] if not p.stat().st_mode & 1), None)
        if shut is None: return []
        there = f'{self.base}/python'
        return [f'mount --bind {prefix} {there}', f'mount -t tmpfs -o mode=755 tmpfs {shut}', f'mkdir -p {prefix}',
                f'mount --bind {there} {prefix}']

    def command(self, name:str, argv:list[str])->list[str]:
        "A command in the surroundings of a service."
        s = self.services[name]
        uid,gid = s['user'].split(':')
        mounts = [*self.reach_python(), *([f'mount --bind {self.base}/app /app'] if 'build' in s else [])]
        for v in s.get('volumes', []):
            volume,target = v.split(':')[:2]
            if volume.startswith('.'): continue
            where = self.base/'volumes'/volume
            os.chown(where, int(uid), int(gid))
            where.chmod(0o700)
            mounts.append(f'mkdir -p {target} && mount --bind {where} {target}')
        mounts += [*(f'mount --bind {self.base}/{f} /etc/{f}' for f in ('hosts', 'passwd')),
                   'mount -o remount,bind,ro /']
        if 'build' in s: mounts.append('mount -o remount,bind,ro /app')
        for target,options in (t.split(':', 1)
                               for t in s['tmpfs']): mounts.append(f'mount -t tmpfs -o {options} tmpfs {target}')
        postgres = map(str, Path('/usr/lib/postgresql').glob('*/bin'))
        path = [str(Path(sys.executable).parent), *postgres, '/usr/local/bin', '/usr/bin',
                '/bin']
        env = dict(PATH=':'.join(path), HOME='/tmp', PYTHONPATH='/app', PYTHONUNBUFFERED='1',
                   PYTHONDONTWRITEBYTECODE='1', OMP_WAIT_POLICY='passive', HF_HUB_OFFLINE='1',
                   ZENML_ANALYTICS_OPT_IN='false',
                   MLFLOW_DISABLE_TELEMETRY='true') | {k: str(v) for k,v in s.get('environment', {}).items()}
        drop = ['setpriv', '--reuid', uid, '--regid', gid, '--clear-groups', '--no-new-privs', '--bounding-set=-all',
                '--inh-caps=-all']
        inner = shlex.join([*drop, 'env', '-i', *[f'{k}={v}' for k,v in env.items()], *argv])
        folder = s.get('working_dir', '/app' if 'build' in s else '/')
        return ['unshare', '--mount', 'sh', '-ec', ' && '.join([*mounts, f'cd {folder}', f'exec {inner}'])]

    def argv(self, name:str)->list[str]:
        "A service's command; for PostgreSQL what its image would do."
        if 'build' in self.services[name]: return self.services[name]['command']
        e,data = self.services[name]['environment'], '/var/lib/postgresql/data'
        steps = ['printf %s "$POSTGRES_PASSWORD" > /tmp/pw',
                 f"initdb -D {data}/db -U {e['POSTGRES_USER']} --pwfile /tmp/pw {e['POSTGRES_INITDB_ARGS']} >/dev/null",
                 f"echo 'CREATE DATABASE {e['POSTGRES_DB']}' | postgres --single -D {data}/db postgres > /dev/null",
                 f'exec postgres -D {data}/db -k /tmp -h 127.0.0.1']
        return ['sh', '-ec', '; '.join(steps)]

    def well(self, name:str)->bool:
        "The real health check."
        return subprocess.run(self.command(name, self.services[name]['healthcheck']['test'][1:]),
                              capture_output=True).returncode == 0


def run(machine:Machine, names:list[str], timeout_s:float)->dict[str, float]: # Seconds until each was healthy
    "Start services in the order of their `depends_on`, until all are healthy; raises `RuntimeError`."
    t0,started,well,heard = time.monotonic(), {}, {}, {}
    while len(well) < len(names):
        if time.monotonic()-t0 > timeout_s:
            raise RuntimeError(f'not healthy after {timeout_s:.0f} s: {set(names)-well.keys()}')
        for n in names:
            if n not in started and all(d in well for d in machine.services[n].get('depends_on', {})):
                log = (machine.base/'logs'/n).open('wb')
                started[n] = subprocess.Popen(machine.command(n, machine.argv(n)), stdout=log, stderr=subprocess.STDOUT,
                                              start_new_session=True)
                print(f'{time.monotonic()-t0:6.1f} s  {n} is started', flush=True)
            if n in started and started[n].poll() is not None:
                said = (machine.base/'logs'/n).read_text()[-3000:]
                raise RuntimeError(f'{n} ended with {started[n].returncode}:\n{said}')
            if n in started and n not in well and time.monotonic()-heard.get(n, 0) > 3:
                heard[n] = time.monotonic()
                if machine.well(n): well[n] = round(time.monotonic()-t0, 1); print(f'{well[n]:6.1f} s  {n} is healthy',
                                                                                   flush=True)
        time.sleep(.5)
    return well


def ask(env:dict[str, str])->dict:
    "One prediction over HTTP."
    import base64
    login = base64.b64encode(f"{env['API_USERNAME']}:{env['API_PASSWORD']}".encode()).decode()
    body = json.dumps(dict(designation='Robot électrique pour piscine')).encode()
    request = urllib.request.Request('http://127.0.0.1:8080/predict', body,
                                     {'content-type': 'application/json', 'authorization': f'Basic {login}'})
    with urllib.request.urlopen(request, timeout=60) as r: return json.load(r)


def main():
    "Enter a process namespace, in which all ends with this program; then start, ask, report."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', default='300', help='synthetic listings (300)')
    parser.add_argument('--preset', default='smoke', help='what is trained (smoke)')
    parser.add_argument('--timeout', type=float, default=1800, help='seconds until all must be healthy (1800)')
    parser.add_argument('--keep', type=Path, help='copy the logs here')
    args = parser.parse_args()
    if os.getuid(): sys.exit('only root can mount; see --help')
    if os.getpid() != 1: os.execvp('unshare', ['unshare', '--mount', '--net', '--pid', '--fork', '--kill-child',
                                               '--mount-proc', sys.executable, *sys.argv])
    subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)  # of this program's own network namespace
    names = ('API_PASSWORD', 'API_SECRET', 'MLFLOW_TRACKING_PASSWORD', 'MLFLOW_FLASK_SERVER_SECRET_KEY',
             'POSTGRES_PASSWORD')
    env = {k: secrets.token_urlsafe(24) for k in names}
    env |= dict(API_USERNAME='catalogue', RAKUTEN_MM_SYNTHETIC=args.rows, RAKUTEN_MM_PRESET=args.preset)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    made = [d for d in map(Path, ('/app', '/var/lib/postgresql/data', '/var/run/postgresql')) if not d.exists()]
    for d in made: d.mkdir(parents=True)
    # Not below /tmp, which is each service's own.
    with tempfile.TemporaryDirectory(dir='/var/tmp', prefix='rakuten-mm-') as base:
        Path(base).chmod(0o755)
        machine = Machine(Path(base), read_compose(env))
        names = [n for n,s in machine.services.items() if not s.get('profiles')]
        try:
            run(machine, names, args.timeout)
            print(json.dumps(ask(env), ensure_ascii=False), flush=True)
            said = ''.join(p.read_text(errors='replace') for p in (Path(base)/'logs').iterdir())
            print('secrets in the logs:', [k for k,v in env.items() if len(v) > 20 and v in said] or 'none')
        finally:
            if args.keep: shutil.copytree(Path(base)/'logs', args.keep, dirs_exist_ok=True)
            os.kill(-1, signal.SIGKILL)  # all others in this process namespace
            for d in made: d.rmdir()


if __name__ == '__main__': main()
