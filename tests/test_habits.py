"Documents lead somewhere, what GitHub reads is valid, and the set-up's hooks change the clone alone."
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from contextlib import chdir
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from nbformat.v4 import new_code_cell, new_notebook, new_output
from traitlets.config.loader import PyFileConfigLoader

DOCUMENTS = [*ROOT.glob('*.md'), *(ROOT/'docs').rglob('*.md'), *(ROOT/'deploy').rglob('*.md')]
DECISIONS = ROOT/'docs'/'decisions'
SCHEMAS = {
    '.github/workflows/*.yml': 'vendor.github-workflows',
    '.github/workflows/*.y*ml': 'custom.github-workflows-require-timeout',
    '.github/dependabot.yml': 'vendor.dependabot',
    '.github/ISSUE_TEMPLATE/[!c]*.yml': 'vendor.github-issue-forms',
    '.github/ISSUE_TEMPLATE/config.yml': 'vendor.github-issue-config',
    'CITATION.cff': 'vendor.citation-file-format',
}


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    links = re.findall(r'\]\(([^)\s#]+)(?:#[^)]*)?\)', path.read_text(encoding='utf-8'))
    assert not [l for l in links if '://' not in l and not (path.parent/l).exists()]


def test_decisions_are_in_the_index():
    index = (DECISIONS/'README.md').read_text(encoding='utf-8')
    pages = {*DECISIONS.glob('*.md')}-{DECISIONS/'README.md'}
    assert sorted(re.findall(r'\]\((.+?\.md)\)', index)) == sorted(p.name for p in pages)
    for p in pages:
        title,_,dated,*_ = p.read_text(encoding='utf-8').splitlines()
        assert f'[{title[2:]}]({p.name}) | {dated[:10]} |' in index


@pytest.mark.parametrize('pattern', SCHEMAS)
def test_github_can_read_it(pattern):
    files = [str(p) for p in ROOT.glob(pattern)]
    assert files
    schema = '--builtin-schema', SCHEMAS[pattern], '--default-filetype', 'yaml'
    done = subprocess.run([sys.executable, '-m', 'check_jsonschema', *schema, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_actions_are_pinned_and_ask_for_little():
    for path in (ROOT/'.github'/'workflows').glob('*.yml'):
        text = path.read_text(encoding='utf-8')
        assert all(re.fullmatch(r'[\w/-]+@v\d+', used) for used in re.findall(r'uses: (\S+)', text)), path.name
        assert 'secrets.' not in text
        assert yaml.safe_load(text)['permissions'] == {'contents': 'read'}


def test_one_version():
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    version = settings['DEFAULT']['version']
    assert yaml.safe_load((ROOT/'CITATION.cff').read_text())['version'] == version
    assert f'\n## {version} (' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'RAKUTEN_MM_TAG:-{version}' in (ROOT/'deploy'/'compose.yaml').read_text(encoding='utf-8')


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository with a notebook in it, in which the set-up has installed its hooks, and an empty home."
    repo,home = tmp_path/'repo', tmp_path/'home'
    home.mkdir()
    for k,v in {'HOME': str(home), 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
                'GIT_AUTHOR_NAME': 'a', 'GIT_AUTHOR_EMAIL': 'a@example.org', 'GIT_COMMITTER_NAME': 'a',
                'GIT_COMMITTER_EMAIL': 'a@example.org', 'GIT_CONFIG_NOSYSTEM': '1'}.items(): monkeypatch.setenv(k, v)
    (repo/'scripts').mkdir(parents=True)
    for name in ('scripts/hooks.sh', '.gitattributes', '.gitconfig', 'settings.ini', '.gitignore'):
        shutil.copy(ROOT/name, repo/name)
    (repo/'nbs').mkdir()
    shutil.copy(ROOT/'nbs'/'lib'/'data'/'01_taxonomy.ipynb', repo/'nbs'/'a.ipynb')
    git(repo, 'init', '--quiet', '--initial-branch=main')
    git(repo, 'add', '.')
    git(repo, 'commit', '--quiet', '--message=start')
    subprocess.run(['scripts/hooks.sh'], cwd=repo, check=True)
    return repo


def git(repo, *args)->str:
    return subprocess.run(['git', *args], cwd=repo, check=True, capture_output=True, text=True).stdout


def test_hooks_leave_the_tree_and_the_home_alone(clone, tmp_path):
    assert git(clone, 'status', '--porcelain') == ''
    assert not list((tmp_path/'home').iterdir())
    assert 'nbdev_merge' in git(clone, 'config', 'merge.nbdev-merge.driver')
    hook = clone/'.git'/'hooks'/'post-merge'
    assert 'nbdev_trust' in hook.read_text()
    bare = subprocess.run([hook], cwd=clone, env={'PATH': '/usr/bin:/bin'}, capture_output=True, text=True)
    assert (bare.returncode, bare.stdout+bare.stderr) == (0, ''), 'a pull outside of the environment complains'
    assert 'clean_jupyter' in (Path(sys.prefix)/'etc'/'jupyter'/'jupyter_server_config.py').read_text()


def test_hooks_need_no_clone(clone, tmp_path):
    "A tarball has no .git, and may have been unpacked inside another repository."
    inside = clone/'unpacked'
    (inside/'scripts').mkdir(parents=True)
    shutil.copy(ROOT/'scripts'/'hooks.sh', inside/'scripts')
    before = git(clone, 'config', '--local', '--list')
    subprocess.run(['scripts/hooks.sh'], cwd=inside, check=True)
    assert git(clone, 'config', '--local', '--list') == before
    assert [p.name for p in inside.iterdir()] == ['scripts']


def test_notebooks_are_merged_by_cell(clone):
    "Two people ran the same notebook, and each changed a cell: no conflict is left."
    notebook = clone/'nbs'/'a.ipynb'
    text = notebook.read_text(encoding='utf-8')
    def edited(branch, old, new):
        git(clone, 'switch', '--quiet', '--create', branch, 'main')
        ran = text.replace('"execution_count": null', f'"execution_count": {len(branch)}')
        notebook.write_text(ran.replace(old, new))
        git(clone, 'commit', '--quiet', '--all', f'--message={branch}')
    edited('other', 'class Category', 'class Category2')
    edited('mine', 'from dataclasses', 'from  dataclasses')
    git(clone, 'merge', '--quiet', '--message=both', 'other')
    merged = notebook.read_text(encoding='utf-8')
    assert 'class Category2' in merged
    assert 'from  dataclasses' in merged
    assert '<<<<<<<' not in merged


def saved(repo, path, edit=lambda nb: None):
    "Open a notebook in JupyterLab as scripts/lab.sh sets it up, run it, and save it as its editor does."
    from execnb.shell import CaptureShell
    config = PyFileConfigLoader('jupyter_server_config.py', str(ROOT/'scripts'/'lab')).load_config()
    contents = LargeFileManager(root_dir=str(repo), config=config)
    nb = contents.get(path)['content']
    edit(nb)
    shell = CaptureShell(repo)
    for i,c in enumerate(nb.cells):
        if c.cell_type != 'code': continue
        c.outputs = [nbformat.from_dict(dict(o)) for o in shell.run(c.source)]
        c.execution_count = i
        c.metadata['execution'] = {'iopub.execute_input': '2026-01-01T00:00:00Z'}
        for o in c.outputs:
            if o.output_type == 'execute_result': o.execution_count = i
    nb.metadata = nbformat.from_dict(dict(kernelspec=dict(display_name='Python 3 (ipykernel)', language='python',
                                                          name='python3'), language_info=dict(name='python')))
    contents.save(dict(type='notebook', format='json', content=nb), path)


def test_opened_run_and_saved_changes_nothing(clone):
    "Outputs that differ from run to run (a time, a place in memory) stay as they are in git, edited cells follow."
    for name in ('core/00_config', 'core/05_display'):
        shutil.copy(ROOT/'nbs'/'lib'/f'{name}.ipynb', clone/'nbs')
    (clone/'nbs'/'runs').mkdir()
    cells = [new_code_cell('import time; time.time()', outputs=[new_output('stream', text='long ago')], id='0'),
             new_code_cell('1+1', id='1')]
    kernel = dict(kernelspec=dict(name='python3', language='python', display_name='python3'))
    for path in ('nbs/timed.ipynb', 'nbs/runs/timed.ipynb'):
        kept = [nbformat.from_dict(c | dict(outputs=[] if 'runs' in path else c.outputs)) for c in cells]
        nbformat.write(new_notebook(cells=kept, metadata=kernel), clone/path)
    subprocess.run(['nbdev_clean', '--fname', 'nbs'], cwd=clone, check=True)
    git(clone, 'add', '.'); git(clone, 'commit', '--quiet', '--message=notebooks')
    with chdir(clone):
        for path in ('nbs/a.ipynb', 'nbs/00_config.ipynb', 'nbs/05_display.ipynb', 'nbs/timed.ipynb',
                     'nbs/runs/timed.ipynb'): saved(clone, path)
        assert git(clone, 'diff') == git(clone, 'status', '--porcelain') == ''
        saved(clone, 'nbs/timed.ipynb', lambda nb: nb.cells[1].update(source='1+2'))
        saved(clone, 'nbs/runs/timed.ipynb', lambda nb: nb.cells[1].update(source='1+2'))
    changed = lambda path: [l for l in git(clone, 'diff', '--unified=0', path).splitlines()
                            if l[0] in '+-' and l[1] not in '+-']
    assert changed('nbs/runs/timed.ipynb') == ['-    "1+1"', '+    "1+2"']
    said = ''.join(changed('nbs/timed.ipynb'))
    assert '"1+2"' in said and '"3"' in said and 'long ago' not in said


@pytest.mark.parametrize('script', ['lab.sh', 'dashboard.sh'])
def test_script_tells_how_it_is_used(script):
    told = subprocess.run([ROOT/'scripts'/script, '--help'], capture_output=True, text=True)
    assert told.returncode == 0 and '--port' in told.stdout and told.stderr == ''
    assert subprocess.run([ROOT/'scripts'/script, '--nothing'], capture_output=True).returncode == 2
