"""Manifests of deploy/kubernetes: the API's own schemas, a policy, and that they run what Compose runs.

No cluster is asked. `kustomize` or `kubectl` renders each overlay where one is installed; a small renderer, which they
are compared with, does it everywhere.
"""
import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT
from test_deploy import FILLED, read_compose

from deploy.start import split
from rakuten_mm.cli.main import cli
from rakuten_mm.core.config import PRESETS
from serving.config import ServeConfig
from zenml_pipelines.schedule import read_schedule

HOME = ROOT/'deploy'/'kubernetes'
OVERLAYS = 'cpu', 'gpu'
SCHEMAS = json.loads((ROOT/'tests'/'kubernetes-1.37.json').read_text())
KUSTOMIZE = ['kustomize', 'build'] if shutil.which('kustomize') else ['kubectl', 'kustomize']
SECRET = re.compile(r'PASSWORD|SECRET|TOKEN|_KEY|DATABASE_URL|RCLONE_CONFIG')


# Rendering -----------------------------------------------------------------------------------------------------------

def change(thing, op:str, path:str, value):
    "A JSON patch (RFC 6902), applied to `thing`; raises `KeyError` or `IndexError` where it finds nothing."
    *way,last = [p.replace('~1', '/').replace('~0', '~') for p in path[1:].split('/')]
    step = lambda at, key: at[int(key) if isinstance(at, list) else key]
    for key in way: thing = step(thing, key)
    if op == 'add' and isinstance(thing, list): thing.insert(len(thing) if last == '-' else int(last), value)
    elif op == 'add': thing[last] = value
    else: assert op == 'replace'; step(thing, last); thing[int(last) if isinstance(thing, list) else last] = value


def render(folder:Path)->list[dict]:
    "Objects of a kustomization, of what is used of kustomize's language here."
    k = yaml.safe_load((folder/'kustomization.yaml').read_text())
    assert k.keys() <= {'apiVersion', 'kind', 'namespace', 'resources', 'images', 'patches'}
    objects = []
    for name in k['resources']:
        path = folder/name
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in k.get('patches', []):
        kind,name = patch['target']['kind'], patch['target']['name']
        target, = [o for o in objects if (o['kind'], o['metadata']['name']) == (kind, name)]
        for one in yaml.safe_load(patch['patch']): change(target, **one)
    for image in k.get('images', []):
        for c in containers(objects):
            if c['image'] == image['name']: c['image'] = f"{image['newName']}:{image['newTag']}"
    for o in objects:
        if 'namespace' in k and o['kind'] != 'Namespace': o['metadata']['namespace'] = k['namespace']
    return objects


def pod_of(o:dict)->dict|None:
    "The specification of the pods that an object makes."
    if o['kind'] == 'CronJob': o = o['spec']['jobTemplate']
    return o['spec']['template']['spec'] if 'template' in o.get('spec', {}) else None


def containers(objects:list[dict])->list[dict]:
    pods = [p for p in map(pod_of, objects) if p]
    return [c for p in pods for c in [*p.get('initContainers', []), *p['containers']]]


@pytest.fixture(scope='module', params=OVERLAYS)
def objects(request): return render(HOME/request.param)


def named(objects, kind, name): return next(o for o in objects if (o['kind'], o['metadata']['name']) == (kind, name))


@pytest.mark.parametrize('overlay', OVERLAYS)
def test_kustomize_renders_the_same(overlay):
    if not shutil.which(KUSTOMIZE[0]): pytest.skip('neither kustomize nor kubectl is installed')
    r = subprocess.run([*KUSTOMIZE, HOME/overlay], capture_output=True, text=True)
    assert r.returncode == 0 and not r.stderr, r.stderr
    order = lambda found: sorted(found, key=lambda o: (o['kind'], o['metadata']['name']))
    assert order(yaml.safe_load_all(r.stdout)) == order(render(HOME/overlay))


# The API's schemas ---------------------------------------------------------------------------------------------------

def wrong(o:dict)->list[str]:
    "What the API would refuse in an object, unknown fields too."
    kind = f"{o['apiVersion']} {o['kind']}"
    if kind not in SCHEMAS['kinds']: return [f'{kind} is unknown']
    valid = jsonschema.Draft202012Validator(SCHEMAS['kinds'][kind] | {'$defs': SCHEMAS['$defs']})
    return [f'{e.json_path}: {e.message}' for e in valid.iter_errors(o)]


def test_objects_follow_the_schemas_of_kubernetes(objects):
    assert not [(o['kind'], o['metadata']['name'], w) for o in objects for w in wrong(o)]
    names = [(o['kind'], o['metadata']['name']) for o in objects]
    assert len({*names}) == len(names) > 15


@pytest.mark.parametrize(('path', 'value', 'said'), [
    ('/spec/replica', 2, "'replica' was unexpected"),
    ('/spec/template/spec/containers/0/livenessProb', {}, "'livenessProb' was unexpected"),
    ('/spec/template/spec/containers/0/resources/limits/cpu', [], 'is not valid|is not of type'),
    ('/spec/template/spec/containers/0/ports/0/containerPort', 'http', "'http' is not of type"),
    ('/spec/template/spec/containers/0/env/-', {'value': 'x'}, "'name' is a required property"),
    ('/kind', 'Deploymend', 'is unknown'),
])
def test_schemas_refuse(path, value, said):
    o = copy.deepcopy(named(render(HOME/'cpu'), 'Deployment', 'api'))
    change(o, 'add', path, value)
    assert re.search(said, '\n'.join(wrong(o)))


# The policy ----------------------------------------------------------------------------------------------------------

def confinement(c:dict)->dict[str, bool]:
    "Rules for a container: those of `restricted` (Pod Security Standards), a read-only root, limits, a pinned image."
    s,r = c.get('securityContext', {}), c.get('resources', {})
    caps = s.get('capabilities', {})
    return {
        'may gain privileges': s.get('allowPrivilegeEscalation') is not False or bool(s.get('privileged')),
        'has capabilities': caps.get('drop') != ['ALL'] or bool(caps.get('add')),
        'can write to its root': s.get('readOnlyRootFilesystem') is not True,
        'has no limits': not {'cpu', 'memory'} <= r.get('limits', {}).keys() & r.get('requests', {}).keys(),
        'has an image that moves': ':' not in c['image'] or c['image'].endswith(':latest'),
        'has a port of the host': any('hostPort' in p for p in c.get('ports', [])),
        'is told a secret in clear text': any(SECRET.search(e['name']) and 'value' in e for e in c.get('env', [])),
    }


def of_pod(o:dict, p:dict)->dict[str, bool]:
    "Rules for a pod."
    s = p.get('securityContext', {})
    free = {'configMap', 'emptyDir', 'persistentVolumeClaim', 'projected', 'secret'}
    probes = {'startupProbe', 'readinessProbe', 'livenessProbe'}
    return {
        'may run as root': s.get('runAsNonRoot') is not True or not s.get('runAsUser'),
        'has no seccomp profile': s.get('seccompProfile') != {'type': 'RuntimeDefault'},
        'shares namespaces of the host': any(p.get(k) for k in ('hostNetwork', 'hostPID', 'hostIPC')),
        'has a token of the cluster': p.get('automountServiceAccountToken') is not False,
        'is told the addresses of services': p.get('enableServiceLinks') is not False,
        'mounts the host': any(v.keys()-{'name'}-free for v in p.get('volumes', [])),
        'may fill the disk': any('sizeLimit' not in v.get('emptyDir', {'sizeLimit': 0}) for v in p.get('volumes', [])),
        'has no probes': o['kind'] == 'Deployment' and not probes <= p['containers'][0].keys(),
        'never ends': o['kind'] == 'CronJob' and not o['spec']['jobTemplate']['spec'].get('activeDeadlineSeconds'),
        'may run twice': o['kind'] == 'CronJob' and o['spec'].get('concurrencyPolicy') != 'Forbid',
    }


def violations(objects:list[dict])->list[str]:
    "What is against the policy."
    said = []
    for o in objects:
        name = f"{o['kind']} {o['metadata']['name']}"
        if o['kind'] == 'Secret': said.append(f'{name} is a secret')
        if o['kind'] == 'ConfigMap' and any(map(SECRET.search, o['data'])): said.append(f'{name} holds a secret')
        if pod := pod_of(o):
            rules = [of_pod(o, pod), *map(confinement, containers([o]))]
            said += [f'{name} {why}' for r in rules for why,broken in r.items() if broken]
    spaces = [o['metadata']['labels'] for o in objects if o['kind'] == 'Namespace']
    if not all(l.get('pod-security.kubernetes.io/enforce') == 'restricted' for l in spaces): said.append('not enforced')
    closed = [o['spec'] for o in objects if o['kind'] == 'NetworkPolicy' and not o['spec']['podSelector']]
    if dict(podSelector={}, policyTypes=['Ingress', 'Egress']) not in closed: said.append('the network is open')
    return said


def test_the_policy_holds(objects): assert violations(objects) == []


API,POD = ('Deployment', 'api'), '/spec/template/spec'


@pytest.mark.parametrize(('which', 'op', 'path', 'value', 'said'), [
    (API, 'replace', POD+'/securityContext/runAsNonRoot', False, 'may run as root'),
    (API, 'replace', POD+'/securityContext/seccompProfile', {'type': 'Unconfined'}, 'has no seccomp profile'),
    (API, 'add', POD+'/hostNetwork', True, 'shares namespaces of the host'),
    (API, 'replace', POD+'/automountServiceAccountToken', True, 'has a token of the cluster'),
    (API, 'add', POD+'/volumes/-', {'name': 'x', 'hostPath': {'path': '/'}}, 'mounts the host'),
    (API, 'replace', POD+'/volumes/0/emptyDir', {}, 'may fill the disk'),
    (API, 'replace', POD+'/initContainers/0/securityContext/allowPrivilegeEscalation', True, 'may gain privileges'),
    (API, 'add', POD+'/containers/0/securityContext/capabilities/add', ['SYS_ADMIN'], 'has capabilities'),
    (API, 'replace', POD+'/containers/0/securityContext/readOnlyRootFilesystem', False, 'can write to its root'),
    (API, 'replace', POD+'/containers/0/resources/limits', {'cpu': '1'}, 'has no limits'),
    (API, 'replace', POD+'/containers/0/image', 'rakuten-mm:latest', 'has an image that moves'),
    (API, 'add', POD+'/containers/0/ports/0/hostPort', 80, 'has a port of the host'),
    (API, 'add', POD+'/containers/0/env/-', {'name': 'API_PASSWORD', 'value': 'x'}, 'is told a secret in clear text'),
    (API, 'add', POD+'/containers/0', {'image': 'a:1', 'name': 'a'}, 'has no probes'),
    (('CronJob', 'drift'), 'replace', '/spec/concurrencyPolicy', 'Allow', 'may run twice'),
    (('CronJob', 'drift'), 'replace', '/spec/jobTemplate/spec/activeDeadlineSeconds', None, 'never ends'),
    (('ConfigMap', 'api'), 'add', '/data/API_PASSWORD', 'x', 'holds a secret'),
    (('ConfigMap', 'api'), 'replace', '/kind', 'Secret', 'is a secret'),
    (('Namespace', 'rakuten-mm'), 'replace', '/metadata/labels', {}, 'not enforced'),
    (('NetworkPolicy', 'nothing'), 'replace', '/spec/policyTypes', ['Ingress'], 'the network is open'),
])
def test_the_policy_refuses(which, op, path, value, said):
    objects = render(HOME/'cpu')
    change(named(objects, *which), op, path, value)
    assert any(said in v for v in violations(objects))


# What runs -----------------------------------------------------------------------------------------------------------

def test_pods_run_what_compose_runs(objects):
    compose = read_compose(FILLED)['services']
    command = lambda kind, name, n=0: pod_of(named(objects, kind, name))['containers'][n]['command']
    assert command('Deployment', 'mlflow') == compose['mlflow']['command']
    waits,serves = split(compose['api']['command'][3:])
    wait = pod_of(named(objects, 'Deployment', 'api'))['initContainers'][0]['command']
    assert split(wait[3:]) == (waits, [['true']]) and split(command('Deployment', 'api')[3:]) == ([], serves)
    _,prepare = split(compose['scheduler']['command'][3:])
    for job in read_schedule(ROOT/'zenml_pipelines'/'configs'/'schedule.yaml').jobs:
        _,mine = split(command('CronJob', job.name.replace('_', '-'))[3:])
        assert mine == [*prepare[:-1], ['rakuten-mm', 'scheduler', 'trigger', job.name, '--wait']]


def test_commands_exist(objects, monkeypatch):
    "Each is read as the command line reads it, and not run."
    for k,v in dict(RAKUTEN_MM_REMOTE='partner:', RAKUTEN_MM_RAW='raw').items(): monkeypatch.setenv(k, v)
    seen = set()
    for c in containers(objects):
        waits = c['command'][:3] == ['python', '-m', 'deploy.start']
        for name,*args in split(c['command'][3:])[1] if waits else [c['command']]:
            if name == 'rakuten-mm':
                at = cli
                while hasattr(at, 'get_command'): word,*args = args; seen.add(word); at = at.get_command(None, word)
                at.make_context(at.name, args)
            elif args[:1] == ['-m']: assert (ROOT/args[1].replace('.', '/')).with_suffix('.py').exists()
            elif name == 'python': assert (ROOT/args[0]).exists()
            else: assert name in ('mlflow', 'true')
    assert seen == {'serve', 'fetch', 'scheduler', 'trigger'}


def test_jobs_are_those_of_the_schedule(objects):
    jobs = {j.name.replace('_', '-'): j for j in read_schedule(ROOT/'zenml_pipelines'/'configs'/'schedule.yaml').jobs}
    crons = {o['metadata']['name']: o['spec'] for o in objects if o['kind'] == 'CronJob'}
    assert crons.keys() == jobs.keys()
    longest = max(j.timeout_s for j in jobs.values() if j.alone)
    for name,job in jobs.items():
        assert crons[name]['schedule'] == job.cron and crons[name]['timeZone'] == f'Etc/{job.timezone}'
        waits = longest if job.alone and job.timeout_s < longest else 0  # for the volume, which another job may have
        assert crons[name]['jobTemplate']['spec']['activeDeadlineSeconds'] > job.timeout_s+waits


def test_settings_are_known(objects):
    settings = {f'API_{f.upper()}' for f in ServeConfig.model_fields}
    assert named(objects, 'ConfigMap', 'api')['data'].keys() <= settings
    compose = read_compose(FILLED)['services']
    known = {k for s in compose.values() for k in s.get('environment', {})}
    assert named(objects, 'ConfigMap', 'rakuten-mm')['data'].keys() <= known
    told = {e['name']: e.get('value') for c in containers(objects) for e in c.get('env', [])}
    own = {'OMP_NUM_THREADS', 'RAKUTEN_MM_DEVICE', 'RAKUTEN_MM_USE_HUB', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE'}
    assert told.keys() <= known | settings | own
    assert told.get('RAKUTEN_MM_PRESET', 'cpu') in PRESETS


def test_what_is_referred_to_exists(objects):
    "Volumes, settings, accounts and services are there; secrets are those that the page tells to make, key by key."
    there = {(o['kind'], o['metadata']['name']) for o in objects}
    page,used = (HOME/'README.md').read_text(), set()
    told = {m[1]: set(re.findall(r'`(\w+)`', m[2])) for m in re.finditer(r'^\| `([\w-]+)` \| (.+?) \|', page, re.M)}
    for p in filter(None, map(pod_of, objects)):
        assert ('ServiceAccount', p['serviceAccountName']) in there
        volumes = {v['name'] for v in p['volumes']}
        claims = {v['persistentVolumeClaim']['claimName'] for v in p['volumes'] if 'persistentVolumeClaim' in v}
        assert all(('PersistentVolumeClaim', c) in there for c in claims)
        for c in [*p.get('initContainers', []), *p['containers']]:
            assert {m['name'] for m in c['volumeMounts']} <= volumes
            for f in c.get('envFrom', []):
                if 'configMapRef' in f: assert ('ConfigMap', f['configMapRef']['name']) in there
                else: used.add(f['secretRef']['name'])
            given = [e.get('valueFrom', {}) for e in c.get('env', [])]
            keys = [v['secretKeyRef'] for v in given if 'secretKeyRef' in v]
            assert all(k['key'] in told[k['name']] for k in keys)
            used |= {k['name'] for k in keys}
    assert used == told.keys()
    services = {o['metadata']['name']: o['spec'] for o in objects if o['kind'] == 'Service'}
    labels = [o['spec']['template']['metadata']['labels'] for o in objects if o['kind'] == 'Deployment']
    assert all(s['selector'] in labels for s in services.values())
    data = named(objects, 'ConfigMap', 'rakuten-mm')['data']
    for url in (data['MLFLOW_TRACKING_URI'], data['API_URL']):
        name,port = url.removeprefix('http://').split(':')
        assert services[name]['ports'][0]['port'] == int(port)


def test_the_network_lets_through_what_is_asked_for(objects):
    "Each port that a pod of ours asks another one for is open on both sides; DNS for all."
    rules = {o['metadata']['name']: o['spec'] for o in objects if o['kind'] == 'NetworkPolicy'}
    ports = lambda r: {p['port'] for p in r['ports']}
    pods = lambda app: {'podSelector': {'matchLabels': {'app': app}}}
    to = lambda who, app, port: any(port in ports(r) and pods(app) in r.get('to', [pods(app)])
                                    for r in rules[who]['egress'])
    into = lambda app, who, port: any(port in ports(r) and pods(who) in r['from'] for r in rules[app]['ingress'])
    assert all(to(a, b, p) for a,b,p in [('api', 'mlflow', 5000), ('pipelines', 'mlflow', 5000),
                                         ('pipelines', 'api', 8080), ('api', '', 5432), ('pipelines', '', 5432)])
    assert into('mlflow', 'api', 5000) and into('mlflow', 'pipelines', 5000) and into('api', 'pipelines', 8080)
    assert not into('mlflow', 'mlflow', 5000) and not to('api', '', 443)
    assert rules['names']['podSelector'] == {} and 53 in ports(rules['names']['egress'][0])


def test_the_card_is_asked_for_where_it_is_used():
    gpu,cpu = ({c['name']: c for c in containers(render(HOME/o))} for o in ('gpu', 'cpu'))
    limits = lambda c: c['resources']['limits'].get('nvidia.com/gpu')
    assert limits(gpu.pop('retraining')) == '1' and not any(map(limits, [*gpu.values(), *cpu.values()]))
    assert {c['image'] for c in gpu.values()} == {c['image']+'-cuda' for c in cpu.values()}
    settings = (ROOT/'settings.ini').read_text()
    assert {c['image'].rpartition(':')[2] for c in cpu.values()} == set(re.findall(r'^version = (.+)$', settings, re.M))
