"""The deployment: promises of compose.yaml, the same commands in up.sh, a system that starts from nothing and survives.

There is no container engine here. The file is read, its commands and health checks run as processes.
"""
import configparser
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import jsonschema
import psutil
import pytest
import yaml
from conftest import ROOT

from rakuten_mm.api import basic_auth
from rakuten_mm.data.ingestion import ingest
from rakuten_mm.sources.fetch import STATE, WHOLE
from serving.budgets import MAX_BODY
from serving.config import ServeConfig
from serving.testing import free_port

DEPLOY = ROOT/'deploy'
COMPOSE = DEPLOY/'compose.yaml'
SECRETS = ('API_PASSWORD', 'API_SECRET', 'MLFLOW_TRACKING_PASSWORD', 'MLFLOW_FLASK_SERVER_SECRET_KEY',
           'POSTGRES_PASSWORD')
FILLED = {k: f'{k.lower()}-of-the-tests' for k in SECRETS}
OURS = ('mlflow', 'fetch', 'scheduler', 'api')
needs_rclone = pytest.mark.skipif(not shutil.which('rclone'), reason='rclone is not installed')


def interpolate(
    value, # Strings, and lists and mappings of them
    env:dict[str, str],
):
    "`value` with `${NAME}`, `${NAME-default}`, `${NAME:-default}` and `${NAME:?error}` filled in, as Compose does."
    if isinstance(value, dict): return {k: interpolate(v, env) for k,v in value.items()}
    if isinstance(value, list): return [interpolate(v, env) for v in value]
    if not isinstance(value, str): return value
    def fill(m):
        name,how,other = m.groups()
        if env.get(name): return env[name]
        if how == ':?': raise ValueError(f'{name}: {other}')
        return other or ''
    while (filled := re.sub(r'\$\{(\w+)(?:(:?[-?])([^{}]*))?\}', fill, value)) != value: value = filled
    return value  # from inside out


def read_compose(env:dict[str, str])->dict:
    "The file with variables filled in."
    return interpolate(yaml.safe_load(COMPOSE.read_text()), env)


@pytest.fixture(scope='module')
def compose():
    "compose.yaml as Docker would read it with a filled .env."
    return read_compose(FILLED)


@pytest.fixture(scope='module')
def programs():
    "Command lines of supervisord.conf, with the folder and the figures of the containers."
    conf = configparser.RawConfigParser(inline_comment_prefixes=(';',))
    conf.read(DEPLOY/'supervisord.conf')
    values = dict(RAKUTEN_MM_DELIVERIES='/app/data/deliveries', RAKUTEN_MM_SYNTHETIC='2000',
                  RAKUTEN_MM_FETCH_EVERY='3600',
                  RAKUTEN_MM_API_PORT='8080')
    fill = lambda text: re.sub(r'%\(ENV_(\w+)\)s', lambda m: values[m[1]], text)
    return {s.removeprefix('program:'): shlex.split(fill(conf[s]['command'])) for s in conf.sections()
            if s.startswith('program:')}


def text_of(*names): return '\n'.join((DEPLOY/n).read_text() for n in names)


def until(true, timeout_s=60, what='it'):
    "Wait for something."
    end = time.monotonic()+timeout_s
    while not (got := true()):
        assert time.monotonic() < end, f'{what} did not happen in {timeout_s} s'
        time.sleep(.1)
    return got


# The file ------------------------------------------------------------------------------------------------------------

def test_compose_follows_the_published_schema():
    "That of compose-spec (Apache-2.0), as check-jsonschema brings it."
    vendor = importlib.resources.files('check_jsonschema')/'builtin_schemas'/'vendor'
    schema = json.loads((vendor/'compose-spec.json').read_text())
    valid,raw = jsonschema.validators.validator_for(schema)(schema), yaml.safe_load(COMPOSE.read_text())
    assert 'Compose' in schema['title'] and not [e.message for e in valid.iter_errors(raw)]
    cards = yaml.safe_load((DEPLOY/'compose.gpu.yaml').read_text())
    assert not [e.message for e in valid.iter_errors(cards)] and cards['services'].keys() <= raw['services'].keys()
    assert raw['services']['scheduler']['shm_size'] == '2g', 'decoded pictures do not fit into the 64 MB of Docker'
    raw['services']['api']['helthcheck'] = {}
    assert list(valid.iter_errors(raw))


def test_every_service_waits_for_the_health_of_what_it_needs(compose):
    needs = lambda s: set(s['command'][3:s['command'].index('--')])-{'champion'}
    for name in OURS:
        s = compose['services'][name]
        # start.py waits for a delivery, which may take hours; `up -d` does not.
        assert all(d['condition'] == ('service_started' if need == 'fetch' else 'service_healthy')
                   for need,d in s.get('depends_on', {}).items()), name
        assert {n.replace('database', 'postgres') for n in needs(s)} <= s.get('depends_on', {}).keys(), name
    assert {'mlflow', 'fetch', 'postgres'} == compose['services']['scheduler']['depends_on'].keys()
    assert 'champion' in compose['services']['api']['command'], 'the API waits for a model'


def test_up_runs_what_compose_runs(compose, programs):
    assert programs.keys() == set(OURS)
    local = lambda command: [a.replace('0.0.0.0', '127.0.0.1') for a in command]
    for name in OURS:
        assert local(compose['services'][name]['command']) == programs[name], name
        assert compose['services'][name]['healthcheck']['test'] == ['CMD', 'python', '-m', 'deploy.health', name]


def test_up_sets_what_compose_sets(compose, tmp_path):
    from deploy import up
    up.make_env_file(tmp_path/'.env')
    env = up.environment(tmp_path, dict(port=1, mlflow_port=2, rows=3, pid=4))
    known = env.keys() | {f'API_{f.upper()}' for f in ServeConfig.model_fields} | {'RAKUTEN_MM_PRESET',
                                                                                   'RAKUTEN_MM_JOBS'}
    for name in OURS: assert compose['services'][name]['environment'].keys() <= known, name
    settings = {f'API_{f.upper()}' for f in ServeConfig.model_fields}
    assert settings <= compose['services']['api']['environment'].keys(), 'a setting that the container cannot be told'


def test_env_example_names_every_secret(tmp_path):
    from deploy import up
    path = tmp_path/'.env'
    up.make_env_file(path)
    made = dict(l.split('=', 1) for l in path.read_text().splitlines() if re.match(r'\w+=', l))
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(len(made[k]) > 40 for k in SECRETS) and len({made[k] for k in SECRETS}) == len(SECRETS)
    with pytest.raises(FileExistsError): up.make_env_file(path)
    asked = set(re.findall(r'\$\{(\w+):\?', COMPOSE.read_text()))
    assert asked <= set(SECRETS)
    for k in asked:
        with pytest.raises(ValueError, match=k): read_compose(FILLED | {k: ''})
    example = (ROOT/'.env.example').read_text()
    assert not [k for k in SECRETS if not re.search(rf'^{k}=$', example, re.M)], 'no password in the example'


def test_up_says_what_env_lacks(tmp_path):
    from deploy import up
    (tmp_path/'.env').write_text('API_USERNAME=x\n')
    with pytest.raises(SystemExit, match='API_PASSWORD, MLFLOW_TRACKING_USERNAME'):
        up.environment(tmp_path, dict(port=1, mlflow_port=2, rows=3))


def test_ports(tmp_path):
    "One that was asked for is an error if it is taken; the usual one gives way."
    from deploy import up
    with socket.create_server(('127.0.0.1', 0)) as s:
        taken = s.getsockname()[1]
        with pytest.raises(SystemExit, match=f'port {taken} is taken; --port chooses'):
            up.choose_port(taken, 8080, '--port')
        assert up.choose_port(None, taken, '--port') != taken


# 29: what is open ----------------------------------------------------------------------------------------------------

def test_f29_nothing_is_published_beyond_this_machine(compose):
    published = {n: s.get('ports', []) for n,s in compose['services'].items()}
    assert all(p.startswith('127.0.0.1:') for ports in published.values() for p in ports)
    assert {n for n,p in published.items() if p} == {'api', 'mlflow', 'proxy'}
    for name in ('scheduler', 'postgres'): assert compose['services'][name]['networks'] == ['inside']
    assert compose['networks']['inside']['internal'] is True
    assert not any(s.get('network_mode') or s.get('privileged') for s in compose['services'].values())
    conf = (DEPLOY/'supervisord.conf').read_text()
    assert 'inet_http_server' not in conf and '0.0.0.0' not in conf, 'supervisord by socket only'


@contextmanager
def mlflow_server(compose, home):
    "A tracking server as in compose.yaml, at another address. Gives the environment of its clients."
    s,port = compose['services']['mlflow'], free_port(0)
    own = dict(PYTHONPATH=str(ROOT), MLFLOW_HOST='127.0.0.1', MLFLOW_PORT=str(port),
               MLFLOW_AUTH_CONFIG_PATH=str(DEPLOY/'mlflow.ini'), MLFLOW_TRACKING_URI=f'http://127.0.0.1:{port}')
    hosts = s['environment']['MLFLOW_SERVER_ALLOWED_HOSTS'].replace(':5000', f':{port}')
    env = os.environ | s['environment'] | own | dict(MLFLOW_SERVER_ALLOWED_HOSTS=hosts)
    command = [sys.executable, *s['command'][1:]]
    with (home/'log').open('wb') as log:
        process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    try:
        until(lambda: check('mlflow', env)[0] == 0 or process.poll() is not None, 120, 'MLflow')
        yield env
        assert process.poll() is None, (home/'log').read_text()[-2000:]
    finally:
        process.terminate()
        assert process.wait(30) == 0


def check(name, env):
    "A health check as Compose runs it: exit code and what it says."
    r = subprocess.run([sys.executable, '-m', 'deploy.health', name], cwd=ROOT, env=env, capture_output=True, text=True)
    return r.returncode, r.stdout+r.stderr


def test_f29_mlflow_is_closed_to_strangers(compose, tmp_path):
    "Other hosts and origins get 403, no or wrong credentials 401; logs and health checks tell no password."
    with mlflow_server(compose, tmp_path) as env:
        url,login = env['MLFLOW_TRACKING_URI'], (env['MLFLOW_TRACKING_USERNAME'], env['MLFLOW_TRACKING_PASSWORD'])
        api = f'{url}/api/2.0/mlflow/experiments'
        with httpx.Client(trust_env=False, timeout=30) as c:
            get = lambda auth=login, **h: c.get(f'{api}/get-by-name', params=dict(experiment_name='Default'), headers=h,
                                                auth=auth).status_code
            post = lambda **h: c.post(f'{api}/create', json=dict(name=f'x{time.time()}'), headers=h,
                                      auth=login).status_code
            assert get() == 200 and post() == 200 and get(host='mlflow:'+url.rpartition(':')[2]) == 200
            assert [get(host=h) for h in ('evil.example', 'evil.example:5000', '169.254.169.254',
                                          'mlflow.evil.example')] == [403]*4
            assert [post(origin=o) for o in ('https://evil.example', 'null', 'https://mlflow.evil.example')] == [403]*3
            assert get(auth=None, host='evil.example') == 403 and get(auth=None) == 401
            assert get(auth=(login[0], 'wrong')) == 401
            assert c.get(url).status_code == c.get(f'{url}/api/2.0/mlflow-artifacts/artifacts').status_code == 401
            read = c.get(f'{api}/get-by-name', params=dict(experiment_name='Default'),
                         headers=dict(origin='https://evil.example'), auth=login)
            assert 'access-control-allow-origin' not in read.headers, 'what a page of another origin may not read'
        code,said = check('champion', env)
        assert code == 1 and 'no model was promoted yet' in said
        code,said = check('mlflow', env | dict(MLFLOW_TRACKING_PASSWORD='another-one'))
        assert code == 1 and '401' in said and 'another-one' not in said
        uses_the_login(env, tmp_path)
    assert not [v for v in FILLED.values() if v in (tmp_path/'log').read_text()]
    assert check('mlflow', env) == (1, 'mlflow: no answer ([Errno 111] Connection refused)\n')


def uses_the_login(env, tmp_path):
    "The library and the registered stack work with a server that asks who is there, and say no password."
    code = """if 1:
        import runpy, sys
        from rakuten_mm.core.tracking import mlflow_client, tracked_run
        from rakuten_mm.registry.versions import alias_version
        with tracked_run(name='x') as run: mlflow_client().log_text(run, 'hello', 'a.txt')
        assert mlflow_client().get_run(run).info.artifact_uri.startswith('mlflow-artifacts:')
        assert alias_version('champion') is None
        runpy.run_path('scripts/setup_stack.py', run_name='__main__')"""
    more = dict(RAKUTEN_MM_ARTIFACTS=str(tmp_path/'artifacts'), ZENML_CONFIG_PATH=str(tmp_path/'zenml'))
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=env | more, capture_output=True, text=True)
    assert r.returncode == 0 and 'stack rakuten_local tracks to http://127.0.0.1' in r.stdout, r.stdout+r.stderr
    assert env['MLFLOW_TRACKING_PASSWORD'] not in r.stdout+r.stderr


# 30: what a container may ---------------------------------------------------------------------------------------------

def test_f30_every_container_is_confined(compose):
    for name,s in compose['services'].items():
        uid,gid = map(int, s['user'].split(':'))
        assert uid > 0 and gid > 0, name
        assert s['read_only'] is True and any(t.startswith('/tmp:') for t in s['tmpfs']), name
        assert s['cap_drop'] == ['ALL'] and 'cap_add' not in s and s['security_opt'] == ['no-new-privileges:true'], name
        assert s['mem_limit'] and 0 <= float(s['cpus']) <= 1 and int(s['pids_limit']) > 0, name
        assert s['healthcheck']['test'][0] == 'CMD' and s['healthcheck']['retries'], name
        assert not s['healthcheck'].get('disable'), name
        assert s['restart'] == 'unless-stopped' and s['logging']['options'].keys() == {'max-size', 'max-file'}, name
        assert s['stop_grace_period'], name
        assert all('size=' in t or t.startswith('/var/run/') for t in s['tmpfs']), name
        for v in s['volumes']:
            source,_,*mode = v.split(':')
            assert source in compose['volumes'] or (source.startswith('./') and mode == ['ro']), f'{name}: {v}'
            assert 'docker.sock' not in v
    used = {v.split(':')[0] for s in compose['services'].values() for v in s['volumes']}
    assert used >= compose['volumes'].keys()


def test_f30_bases_are_pinned(compose):
    pinned = re.compile(r'[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}')
    for name,s in compose['services'].items(): assert 'build' in s or pinned.fullmatch(s['image']), name
    docker = (DEPLOY/'Dockerfile').read_text()
    assert pinned.fullmatch(re.search(r'^ARG PYTHON=(.+)$', docker, re.M)[1])
    assert set(re.findall(r'^FROM (\S+)', docker, re.M)) == {'${PYTHON}'}
    assert 'latest' not in docker+COMPOSE.read_text()
    assert re.findall(r'^USER (.+)$', docker,
                      re.M)[-1] == compose['services']['api']['user'], 'the image itself does not run as root either'
    assert not re.search(r'^(ADD|COPY) .*(\.env|https?:)|^COPY \. ', docker, re.M)
    assert (ROOT/'.dockerignore').read_text().split('\n')[1] == '*', 'nothing is copied that is not named'


def test_an_edit_of_code_installs_nothing():
    "Packages are a stage that sees the list and the lock only, and are copied before any code."
    stages = re.split(r'^FROM .*$', (DEPLOY/'Dockerfile').read_text(), flags=re.M)[1:]
    copied = [re.findall(r'^COPY (.+) \S+$', s, re.M) for s in stages]
    assert copied[1] == ['requirements.txt', 'scripts/pip_locked.sh deploy/install.sh', '--from=list /extras.txt']
    assert copied[0] == ['settings.ini', 'scripts/extras.py'] and copied[2][0] == '--from=packages /opt/venv'
    code = [n for line in copied[2][1:] for n in line.split()]
    assert {'rakuten_mm', 'serving', 'zenml_pipelines', 'deploy', 'scripts', 'nbs', 'LICENSE'} <= {*code}
    assert all((ROOT/n).exists() for n in code)
    allowed = {l[1:] for l in (ROOT/'.dockerignore').read_text().splitlines() if l.startswith('!')}
    assert {*code, 'requirements.txt'} <= allowed
    last = stages[2][stages[2].index('COPY rakuten_mm'):]
    assert '--no-compile' in last and 'apt-get' not in last and 'requirement' not in last


@contextmanager
def index_of(folder:Path, **versions):
    "Wheels of these versions with nothing in them, in an index; gives its URL."
    for name,v in versions.items():
        home = folder/name.lower(); home.mkdir(parents=True)
        with zipfile.ZipFile(home/f'{name}-{v}-py3-none-any.whl', 'w') as z:
            about = f'{name}-{v}.dist-info'
            z.writestr(f'{about}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {v}\n')
            z.writestr(f'{about}/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            z.writestr(f'{about}/RECORD', '')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{server.server_port}'
        finally: server.shutdown()


def test_the_image_has_pytorch_for_cpus(tmp_path):
    "Of the lock's version, from its own index; all others are installed by their hashes only."
    lock,build,bin = (ROOT/'requirements.txt').read_text(), tmp_path/'build', tmp_path/'venv'/'bin'
    versions = {n: re.search(rf'^{n}==([^ ;]+)', lock, re.M)[1]+'+cpu' for n in ('torch', 'torchvision')}
    before = importlib.metadata.version('torch')
    (build/'scripts').mkdir(parents=True)
    for n in ('deploy/install.sh', 'scripts/pip_locked.sh'): shutil.copy(ROOT/n, build/'scripts')
    (build/'extras.txt').write_text('torch>=2,<3\ntorchvision<1\n')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path/'venv'], check=True)
    for part in Path(sysconfig.get_path('purelib')).glob('pip*'):  # the one of the lock
        if re.fullmatch(r'pip(-.*\.dist-info)?', part.name):
            shutil.copytree(part, next(tmp_path.glob('venv/lib/*/site-packages'))/part.name)
    with index_of(tmp_path/'theirs', **versions) as url, index_of(tmp_path/'pypi', setuptools='1') as others:
        digest = hashlib.sha256(next((tmp_path/'pypi'/'setuptools').iterdir()).read_bytes()).hexdigest()
        own = ''.join(re.findall(r'^(?:torch|torchvision)==(?:.*\\\n)*.*\n', lock, re.M))
        # Nothing but this environment's own programs and the system's: what runs the tests must stay as it is.
        env = os.environ | dict(PATH=f'{bin}:/usr/bin:/bin', VIRTUAL_ENV=str(bin.parent), TORCH='cpu',
                                TORCH_INDEX=url, PIP_INDEX_URL=others, PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS='',
                                PYTHONPATH='')
        where = subprocess.run([bin/'python', '-m', 'pip', '--version'], env=env, capture_output=True, text=True).stdout
        assert str(tmp_path) in where
        def install(digest):
            (build/'requirements.txt').write_text(own+f'setuptools==1 --hash=sha256:{digest}\n')
            return subprocess.run(['scripts/install.sh'], cwd=build, env=env, capture_output=True, text=True)
        assert 'DO NOT MATCH THE HASHES' in install('0'*64).stderr
        done = install(digest)
    assert done.returncode == 0, done.stdout+done.stderr
    assert importlib.metadata.version('torch') == before
    there = subprocess.run([bin/'python', '-m', 'pip', 'freeze', '--all'], capture_output=True, text=True).stdout
    assert {f'{n}=={v}' for n,v in versions.items()} | {'setuptools==1'} <= {*there.splitlines()}


def test_f30_what_is_not_ones_business_is_not_ones_environment(compose):
    env = {n: s['environment'] for n,s in compose['services'].items() if 'environment' in s}
    secret = lambda n: {k for k,v in FILLED.items() if any(v in str(x) for x in env[n].values())}
    assert secret('postgres') == {'POSTGRES_PASSWORD'} and secret('fetch') == set()
    assert secret('mlflow') == {'MLFLOW_TRACKING_PASSWORD', 'MLFLOW_FLASK_SERVER_SECRET_KEY'}
    assert all(env['fetch'][k] == '' for k in SECRETS), 'its .env brings them, and they are blanked'
    assert [n for n,s in compose['services'].items() if 'env_file' in s] == ['fetch']
    literal = [l for l in COMPOSE.read_text().splitlines()
               if re.match(r'\s*\w*(PASSWORD|SECRET|KEY):(?! *(?:\$\{|""$))', l)]
    assert not literal


def test_f30_only_the_proxy_is_believed(compose):
    "The address whose X-Forwarded-For counts is the proxy's alone, and the proxy replaces what clients send."
    s = compose['services']
    proxy = s['proxy']['networks']['edge']['ipv4_address']
    other = read_compose(FILLED | dict(RAKUTEN_MM_EDGE='10.9.8'))
    assert other['services']['proxy']['networks']['edge']['ipv4_address'] == '10.9.8.2'
    assert other['services']['api']['environment']['API_FORWARDED'] == '10.9.8.2'
    assert other['networks']['edge']['ipam']['config'][0]['subnet'] == '10.9.8.0/24'
    assert s['api']['environment']['API_FORWARDED'] == proxy != s['api']['networks']['edge']['ipv4_address']
    conf = (DEPLOY/'nginx.conf').read_text()
    assert 'proxy_set_header X-Forwarded-For $remote_addr;' in conf and '$proxy_add_x_forwarded_for' not in conf
    assert 'listen 8443 ssl;' in conf and not re.search(r'listen \d+;', conf)


needs_nginx = pytest.mark.skipif(not shutil.which('nginx') or not shutil.which('openssl'),
                                 reason='nginx or openssl is not installed')


@contextmanager
def nginx_before(
    upstream:int, # Port of what it stands before
    home:Path, # Folder of its own
):
    "nginx with the shipped file, at another port and with `home` for /tmp. Gives its port."
    port,certs = free_port(0), home/'certs'
    certs.mkdir()
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost',
                    '-keyout', certs/'key.pem', '-out', certs/'cert.pem'], check=True, capture_output=True)
    conf = (DEPLOY/'nginx.conf').read_text()
    for ours,here in {'http://api:8080': f'http://127.0.0.1:{upstream}', 'listen 8443': f'listen 127.0.0.1:{port}',
                      '/tmp/': f'{home}/'}.items():
        assert ours in conf
        conf = conf.replace(ours, here)
    (home/'nginx.conf').write_text(conf)
    # Started by root its workers would be another user, to whom the folder is closed.
    user = 'user root;' if os.geteuid() == 0 else ''
    with (home/'log').open('w') as log:
        nginx = subprocess.Popen(['nginx', '-c', home/'nginx.conf', '-g', f'daemon off; {user}'], stdout=log)
    try:
        until(lambda: nginx.poll() or not socket.socket().connect_ex(('127.0.0.1', port)), 10, 'nginx')
        assert nginx.poll() is None
        yield port
    finally: nginx.terminate(); nginx.wait(10)


@needs_nginx
def test_f30_nginx_example(tmp_path):
    "TLS ends here, and a forged X-Forwarded-For with it. What it refuses itself is logged, the rest by the API."
    upstream,seen = socket.create_server(('127.0.0.1', 0)), []
    def answer():
        connection = upstream.accept()[0]
        seen.append(connection.recv(65536).decode())
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok'); connection.close()
    threading.Thread(target=answer, daemon=True).start()
    with upstream, nginx_before(upstream.getsockname()[1], tmp_path) as port:
        r = httpx.get(f'https://127.0.0.1:{port}/', verify=False, headers={'x-forwarded-for': '6.6.6.6'},
                      trust_env=False)
        with half_a_body(port, '/predict', {}, 20_000_000) as s: assert s.recv(100)[:12] == b'HTTP/1.1 413'
    said, = map(json.loads, (tmp_path/'log').read_text().splitlines())
    assert said == dict(client='127.0.0.1', method='POST', path='/predict', status=413, by='proxy')
    assert r.text == 'ok' and 'max-age' in r.headers['strict-transport-security']
    assert 'X-Forwarded-For: 127.0.0.1\r\n' in seen[0] and '6.6.6.6' not in seen[0]


@pytest.fixture(scope='module')
def proxied(server, tmp_path_factory):
    "nginx before the API: a client that proves nothing, its address, and when nginx last made a file for a body."
    if not shutil.which('nginx') or not shutil.which('openssl'): pytest.skip('nginx or openssl is not installed')
    home = tmp_path_factory.mktemp('nginx')
    with nginx_before(server.port, home) as port:
        url = f'https://127.0.0.1:{port}'
        with httpx.Client(base_url=url, verify=False, trust_env=False, timeout=30) as c:
            # Its files have no name while they are open, but making them changes the folder.
            yield c, port, lambda: (home/'body').stat().st_mtime_ns


STRANGERS = {'nobody': {}, 'wrong password': {'authorization': basic_auth('x', 'y')},
             'wrong token': {'authorization': 'Bearer x.y.z'}}


@contextmanager
def half_a_body(port, path, headers, length:int):
    "A request of which a piece of the body was sent; gives the connection."
    head = ''.join(f'{k}: {v}\r\n' for k,v in (headers | {'Content-Type': 'application/json'}).items())
    plain = socket.create_connection(('127.0.0.1', port), timeout=10)
    with ssl._create_unverified_context().wrap_socket(plain) as s:
        s.sendall(f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{head}\r\n'.encode()+b'x'*300_000)
        yield s


@pytest.mark.parametrize('who', STRANGERS)
def test_f64_a_stranger_gets_401_before_the_body_is_there(proxied, who):
    "Nothing of it is stored, whether it is held open, sent whole or has no length."
    client,port,last_stored = proxied
    before = last_stored()
    for path in ('/predict', '/predict/upload', '/predict/batch', '/feedback', '/no-such-page'):
        with ExitStack() as held:
            open_ = [held.enter_context(half_a_body(port, path, STRANGERS[who], 13_000_000)) for _ in range(5)]
            assert {s.recv(100)[:12] for s in open_} == {b'HTTP/1.1 401'}, path
    for body in (b'x'*13_000_000, (b'x'*65_536 for _ in range(200))):
        assert client.post('/predict', content=body, headers=STRANGERS[who]).status_code == 401
    assert last_stored() == before


def test_f64_what_the_api_takes_passes_the_proxy(proxied, server):
    "The largest body that it allows is read, a little more is refused by the API, much more by the proxy at once."
    client,port,last_stored = proxied
    before,listing = last_stored(), b'{"designation": "Piscine"'
    post = lambda n, path='/predict': client.post(path, content=listing.ljust(n-1)+b'}',
                                                  headers=server.auth | {'content-type': 'application/json'})
    assert post(1_000).status_code == 200
    assert post(MAX_BODY).json()['error']['message'] == 'JSON with more structure than any request has'  # it was read
    assert post(MAX_BODY+1).json()['error']['code'] == 'too_large'
    with half_a_body(port, '/predict', server.auth, MAX_BODY*11//10) as s: assert s.recv(100)[:12] == b'HTTP/1.1 413'
    with half_a_body(port, '/token', {}, 200_000) as s: assert s.recv(100)[:12] == b'HTTP/1.1 413'
    assert last_stored() == before


def test_f64_logins_are_counted_by_the_proxy_too(proxied):
    "An address asks for a few tokens at once and then for one every two seconds; other pages are not slowed."
    client = proxied[0]
    got = [client.post('/token').status_code for _ in range(40)]
    assert got[0] != 429 and 15 <= got.count(429) <= 20
    assert client.get('/health').status_code == 200


# Starting ------------------------------------------------------------------------------------------------------------

def start(*args, **env):
    "deploy/start.py in a process."
    return subprocess.Popen([sys.executable, '-m', 'deploy.start', *map(str, args)], cwd=ROOT, text=True,
                            start_new_session=True,
                            env=os.environ | {k: str(v) for k,
                                              v in env.items()}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_start_waits_prepares_and_becomes_the_service(tmp_path):
    state = tmp_path/'raw'/STATE
    service = [sys.executable, '-c', 'import os; print(os.getpid())']
    p = start('fetch', '--', 'sh', '-c', f'echo prepared > {tmp_path}/note', '--', *service,
              RAKUTEN_MM_RAW=tmp_path/'raw')
    assert 'waiting: fetch: the first delivery has not arrived yet' in p.stdout.readline()
    assert not (tmp_path/'note').exists()
    state.mkdir(parents=True); (tmp_path/'raw'/WHOLE).touch()
    (state/'last.json').write_text(json.dumps(dict(time=time.time(), error='')))
    assert p.communicate(timeout=20)[0].split() == [str(p.pid)] and (tmp_path/'note').exists()
    failed = start('--', 'sh', '-c', 'exit 3', '--', 'touch', tmp_path/'never')
    assert 'sh ended with 3' in failed.communicate()[0] and failed.returncode == 1 and not (tmp_path/'never').exists()
    for wrong in ([], ['mlflow'], ['--'], ['nothing', '--', 'true'],
                  ['--', 'true', '--']):
        assert start(*wrong).wait(10) == 1, wrong


def test_start_ends_what_a_killed_service_left(tmp_path):
    "A child that holds the port of a killed parent would keep the new one from starting."
    mark = dict(RAKUTEN_MM_SERVICE='test', RAKUTEN_MM_UP=tmp_path)
    note = str(tmp_path/'child')
    child = ('import os, signal, time; signal.signal(15, signal.SIG_IGN); '
             f"open({note!r}, 'w').write(str(os.getpid())); time.sleep(99)")
    first = start('--', sys.executable, '-c',
                  f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])', **mark)
    pid = int(until(lambda: (tmp_path/'child').exists() and (tmp_path/'child').read_text(), 20, 'the child'))
    os.kill(first.pid, signal.SIGKILL); first.wait()
    assert psutil.pid_exists(pid)
    other = start('--', 'true', **mark | dict(RAKUTEN_MM_SERVICE='other'))
    assert other.wait(30) == 0 and psutil.pid_exists(pid), 'another service leaves it alone'
    said = start('--', 'echo', 'started', **mark).communicate(timeout=30)[0]
    assert 'ending 1 processes' in said and said.endswith('started\n')
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5, 'its end')


@pytest.mark.skipif(sys.platform != 'linux', reason='by a call of Linux')
def test_a_service_ends_with_what_supervises_it(tmp_path):
    code = '''import subprocess, sys, time
print(subprocess.Popen([sys.executable, '-m', 'deploy.start', '--', 'sleep', '99']).pid, flush=True); time.sleep(99)'''
    parent = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    until(lambda: child.name() == 'sleep', 20, 'the service')
    parent.kill(); parent.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10, 'its end')


def test_health_of_fetch_and_database(tmp_path):
    raw = tmp_path/'raw'
    env = os.environ | dict(RAKUTEN_MM_RAW=str(raw), RAKUTEN_MM_FETCH_EVERY='10')
    assert check('fetch', env)[0] == 1
    (raw/STATE).mkdir(parents=True)
    note = lambda age, error='': (raw/STATE/'last.json').write_text(json.dumps(dict(time=time.time()-age, error=error)))
    note(0, 'rclone: the path is wrong')
    assert check('fetch', env) == (1, 'fetch: rclone: the path is wrong\n')
    (raw/WHOLE).touch()
    assert check('fetch', env)[0] == 0, 'a delivery is there; that the next one fails does not stop those who read it'
    note(600)
    assert check('fetch', env) == (1, 'fetch: the last fetch was 10 minutes ago\n')
    with (raw/STATE/'lock').open('a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check('fetch', env)[0] == 0, 'it is at work'
    with socket.create_server(('127.0.0.1', 0)) as s:
        url = f'postgresql+psycopg://u:secret-word@127.0.0.1:{s.getsockname()[1]}/d'
        assert check('database', os.environ | dict(API_DATABASE_URL=url))[0] == 0
    code,said = check('database', os.environ | dict(API_DATABASE_URL=url))
    assert code == 1 and 'refused' in said and 'secret-word' not in said
    assert check('database', os.environ | dict(API_DATABASE_URL=''))[0] == 0 and check('nonsense', os.environ)[0] == 1


class Registry(BaseHTTPRequestHandler):
    "One that knows no alias."
    def do_GET(self): self.send_error(404)
    def log_message(self, *_): pass


def test_a_kept_model_counts_while_the_registry_cannot_be_asked(tmp_path):
    "As for `rakuten-mm serve`: a registry that answers and has no champion is believed."
    note = tmp_path/'models'/'rakuten-mm-champion.json'
    with ThreadingHTTPServer(('127.0.0.1', 0), Registry) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{registry.server_port}'
        env = os.environ | dict(MLFLOW_TRACKING_URI=url, RAKUTEN_MM_ARTIFACTS=str(tmp_path))
        nobody = env | dict(MLFLOW_TRACKING_URI=f'http://127.0.0.1:{free_port(0)}')
        assert check('champion', nobody)[0] == 1
        note.parent.mkdir(); note.write_text('{}')
        assert check('champion', nobody)[0] == 0
        assert check('champion', env) == (1, 'champion: no model was promoted yet\n')
        registry.shutdown()


# Half a delivery -----------------------------------------------------------------------------------------------------

@needs_rclone
def test_half_a_delivery_is_not_ingested(raw, tmp_path):
    "A fetch killed between two files leaves a folder that reads without an error: refused until a fetch ends well."
    partner,mine,data = tmp_path/'partner', tmp_path/'raw', tmp_path/'data'
    shutil.copytree(raw, partner)
    code = f"""if 1:
        import os, sys
        from pathlib import Path
        from rakuten_mm.sources.fetch import fetch
        replace,left = Path.replace, [int(sys.argv[1])]
        def counted(self, target):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), 9)
            return replace(self, target)
        Path.replace = counted
        fetch({str(partner)!r}, {str(mine)!r}, progress=False)"""
    fetch = lambda n: subprocess.run([sys.executable, '-c', code, str(n)]).returncode
    assert fetch(40) == -9 and len(list(mine.rglob('*.jpg')))
    with pytest.raises(OSError, match='not whole'): ingest(mine, data, progress=False)
    assert fetch(0) == 0
    first = ingest(mine, data, progress=False).manifest['version']
    next(partner.glob('X_train*.csv')).touch(); (partner/'classes.csv').write_text('prdtypecode,name\n')
    next(partner.rglob('*.jpg')).write_bytes(b'new')
    assert fetch(2) == -9
    with pytest.raises(OSError, match='not whole'): ingest(mine, data, progress=False)
    assert (data/'CURRENT').read_text().strip() == first


def test_ingestion_waits_for_a_fetch(raw, tmp_path):
    mine = shutil.copytree(raw, tmp_path/'raw')
    (mine/STATE).mkdir(); (mine/WHOLE).touch()
    with (mine/STATE/'lock').open('a') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match='still running') as e:
            ingest(mine, tmp_path/'data', progress=False, wait_s=.2)
        assert e.value.exit_code == 75 and not (tmp_path/'data').exists()
        threading.Timer(1, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        t0 = time.monotonic()
        ingest(mine, tmp_path/'data', progress=False)
        assert time.monotonic()-t0 > .9


# The whole system ----------------------------------------------------------------------------------------------------

@pytest.mark.system
@needs_rclone
def test_f29_f30_from_nothing_to_an_answer(tmp_path):
    "One command from passwords to an answer; a killed service comes back; nothing is left behind."
    home,port,mlflow = tmp_path/'home', free_port(0), free_port(0)
    more = dict(RAKUTEN_MM_REMOTE='', API_FORWARDED='127.0.0.2', API_FAILED_LOGINS='5/minute')
    command = ['scripts/up.sh', '--home', str(home), '--rows', '300', '--preset', 'smoke', '--port', str(port),
               '--mlflow-port', str(mlflow)]
    call = lambda what: subprocess.run([*command[:3], what], cwd=ROOT, capture_output=True, text=True)
    with (tmp_path/'out').open('wb') as out:
        up = subprocess.Popen(command, cwd=ROOT, env=os.environ | more, stdout=out, stderr=subprocess.STDOUT)
    said = lambda: (tmp_path/'out').read_text(errors='replace')
    try:
        until(lambda: 'is answered' in said() or up.poll() is not None, 900, 'an answer')
        assert up.poll() is None, said()[-3000:]
        order = ['mlflow is healthy', 'scheduler is healthy', 'is now champion', 'api is healthy',
                 "'Robot électrique pour piscine' is answered"]
        assert sorted(order, key=said().index) == order
        assert said().index('fetch is healthy') < said().index('retraining has started')
        assert call('status').returncode == 0 and 'it is up already' in call('up').stderr
        believes_only_the_proxy(f'http://127.0.0.1:{port}', home)
        survives_a_kill(mlflow)
        until(lambda: said().count('mlflow is healthy') == 2, 240, 'MLflow again')
        assert call('status').returncode == 0
        family = psutil.Process(up.pid).children(recursive=True)
        assert call('stop').stdout == 'ended\n' and up.wait(30) == 0
        assert not psutil.wait_procs(family, 5)[1] and 'had to be killed' not in said()
    finally:
        up.terminate(); up.wait(100)
    with socket.create_server(('127.0.0.1', port)), socket.create_server(('127.0.0.1', mlflow)): pass
    secrets = [l.split('=', 1)[1] for l in (home/'.env').read_text().splitlines()
               if re.match(r'\w*(PASSWORD|SECRET|KEY)=.', l)]
    logs = said()+''.join(p.read_text(errors='replace') for d in ('up', 'scheduler')
                          for p in (home/'artifacts'/d).rglob('*.log*'))
    assert len(secrets) == 5 and not [s for s in secrets if s in logs]


def believes_only_the_proxy(url, home):
    "Wrong passwords are counted by address: by X-Forwarded-For if the proxy says so, else by the connection."
    wrong = lambda c, i: c.get(f'{url}/metrics', auth=('catalogue', f'wrong{i}'),
                               headers={'x-forwarded-for': f'10.0.0.{i}'}).status_code
    with httpx.Client(transport=httpx.HTTPTransport(local_address='127.0.0.2')) as proxy:
        assert [wrong(proxy, i) for i in range(1, 9)] == [401]*8
    with httpx.Client() as anybody: assert 429 in [wrong(anybody, i) for i in range(1, 9)]


def survives_a_kill(port):
    "SIGKILL for MLflow's command; the server below it is then an orphan that holds the port."
    mine = (p for p in psutil.process_iter(['cmdline']) if 'basic-auth' in (p.info['cmdline'] or [])
            and p.environ().get('MLFLOW_PORT') == str(port))
    next(mine).kill()
