"The command line as a whole: its help, what it answers at once, what programs read, what shells complete."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rakuten_mm.cli.main import ELSEWHERE, SECTIONS, cli

LISTING = ['data list', 'data diff', 'data quarantine', 'registry list', 'registry history', 'users list', 'runs',
           'scheduler list', 'answers unusable']
DECIDING = ['data verify', 'data repair', 'registry promote', 'registry rollback', 'answers erase', 'runs abandon',
            'scheduler health', 'fetch', 'fetch-images', 'ingest', 'train', 'tune', 'ensemble', 'distill', 'predict']


def run(*args, **kw): return CliRunner(**kw).invoke(cli, [*map(str, args)])


def commands(command=cli, name=()):
    "Every command with its words."
    yield name, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for n in command.list_commands(ctx): yield from commands(command.get_command(ctx, n), (*name, n))


ALL = dict(commands())


def test_help_follows_the_straight_line():
    "Each command stands in one section; no line of help is cut off on a terminal of 80 columns."
    placed = [name for names in SECTIONS.values() for name in names]
    assert len(placed) == len({*placed}) and {*placed} == {*cli.commands, *ELSEWHERE}
    for name,command in ALL.items():
        out = CliRunner().invoke(cli, [*name, '--help'], terminal_width=80).output
        assert '...\n' not in out.partition('\n')[2], out
        assert command.help and command.help.splitlines()[0].endswith('.'), name


@pytest.mark.parametrize('name', LISTING+DECIDING)
def test_programs_can_read_it(name):
    assert '--json' in [o for p in ALL[(*name.split(),)].params for o in p.opts]


def test_one_document(tmp_path, data_dir, monkeypatch):
    "Nothing but JSON is on standard output, and the exit code is the one of the sentence."
    monkeypatch.setenv('API_DATABASE_URL', f'sqlite:///{tmp_path}/answers.db')
    monkeypatch.setenv('RAKUTEN_MM_ARTIFACTS', str(tmp_path))
    one = json.loads(run('data', 'list', data_dir, '--json').stdout)
    assert [v['rows'] for v in one] == [v['added'] for v in one] and one[-1]['current']
    assert json.loads(run('data', 'quarantine', data_dir, '--json').stdout)['reasons'] == []
    sound = run('data', 'verify', data_dir, '--json')
    assert json.loads(sound.stdout)['damage'] == [] and sound.exit_code == 0
    assert json.loads(run('registry', 'list', '--json').stdout) == []
    assert run('users', 'add', 'anna', '--role', 'review', '--password', 'a long password').exit_code == 0
    users = json.loads(run('users', 'list', '--json').stdout)
    assert [(u['name'], u['role']) for u in users] == [('anna', 'review')]
    shown = run('users', 'list').stdout.splitlines()
    assert shown[0].split() == ['NAME', 'ROLE', 'SINCE'] and shown[1].startswith('anna  review  20')
    assert json.loads(run('answers', 'erase', '--older-than', 1, '--json').stdout)['answers'] == 0
    down = run('scheduler', 'health', '--json')
    assert json.loads(down.stdout)['well'] is False and down.exit_code == 1
    assert json.loads(run('runs', '--json').stdout) == []


WRONG = [['train', '.'], ['train', '/nowhere'], ['tune', '.'], ['ensemble', '.', '.'],
         ['distill', 'x', '.', '--products', 'here'],
         ['predict', '--products', 'here', '--out', 'x', '--bundle', 'nowhere'],
         ['predict', '--products', 'here', '--out', 'x', '--json'], ['predict', '--products', 'nowhere', '--out', 'x'],
         ['registry', 'promote', '1', '.'], ['serve', '--model', 'nowhere'], ['serve', '--port', '99999'],
         ['data', 'list', '.'], ['ingest', '/nowhere', 'data'], ['train', '.', '--preset', 'huge'], ['fly']]


def test_a_mistake_is_told_at_once(tmp_path):
    "Whatever is cheap to check is checked before anything slow is imported."
    (tmp_path/'here').touch()
    code = f'''
import json, os, sys
from click.testing import CliRunner
from rakuten_mm.cli.main import cli
os.environ['RAKUTEN_MM_ARTIFACTS'] = 'artifacts'
for args in {WRONG!r}:
    r = CliRunner().invoke(cli, args)
    slow = [m for m in ('torch', 'mlflow', 'litserve') if m in sys.modules]
    print(json.dumps([args, r.exit_code, r.stderr.strip().splitlines()[-1], slow]))
'''
    python = [sys.executable, '-c', code]
    out = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for line in out.splitlines():
        _,exit_code,said,loaded = json.loads(line)
        assert exit_code in (1, 2) and said.startswith('Error: ') and loaded == [], line
    assert len(out.splitlines()) == len(WRONG)


def test_port_that_is_taken():
    "The port is tried before the model is loaded."
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        r = run('serve', '--model', Path(__file__).parent, '--port', port)
    assert r.exit_code == 1 and r.stderr == (f'Error: port {port} of 127.0.0.1 is in use; stop what listens there, '
                                             'or choose another --port\n')


def test_completion():
    for shell in ('bash', 'zsh', 'fish'):
        r = run('completion', shell)
        assert r.exit_code == 0 and f'_RAKUTEN_MM_COMPLETE={shell}_complete' in r.stdout.replace('env ', '')
    asked = dict(_RAKUTEN_MM_COMPLETE='bash_complete', COMP_WORDS='rakuten-mm registry pro', COMP_CWORD='2')
    done = subprocess.run([sys.executable, '-m', 'rakuten_mm'], env={**os.environ, **asked},
                          capture_output=True, text=True, check=True)
    assert done.stdout == 'plain,promote\n'
