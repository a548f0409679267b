"The commands of README.md, from its own text."
import re
import shlex
from pathlib import Path

import click
import pytest

from rakuten_mm.cli.main import cli

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
OTHERS = {'git', 'cd', 'cp', 'curl', 'docker', 'export', 'mlflow', 'source', 'torchrun'} # Not ours
OURS = 'rakuten-mm ', 'zenml ', './scripts/', 'python ', 'mlflow ui', 'eval ' # Beginnings of commands within sentences


def shell_lines(text:str)->list[str]:
    "All lines of the shell blocks of a page, in order, without comments."
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.M | re.S)
    return [line for b in blocks for x in b.splitlines() if (line := re.sub(r'(^|\s)#.*', '', x).strip())]


def inline(text:str)->list[str]:
    "Commands within sentences."
    prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    return [c for c in re.findall(r'`([^`\n]+)`', prose) if c.startswith(OURS) and 'COMMAND' not in c]


def check_click(args:list[str], whole:bool):
    "Raise click's error unless commands, options and choices are there and, in a `whole` line, no argument is missing."
    command,name = cli, 'rakuten-mm'
    while isinstance(command, click.Group) and args and not args[0].startswith('-'):
        ctx = click.Context(command, info_name=name)
        name,command,args = command.resolve_command(ctx, args)
    ctx = click.Context(command, info_name=name)
    if '--help' in args: return
    given,rest,_ = command.make_parser(ctx).parse_args([*args])
    if whole and isinstance(command, click.Group): assert command.invoke_without_command, f'{name} needs a command'
    assert not rest, f'{name}: {rest}'
    for p in command.params:
        value = given.get(p.name)
        if not isinstance(value, str | bool | list | tuple): value = None  # click has a mark of its own for nothing
        assert value or not whole or not p.required or p.envvar, f'{name}: {p.name} is missing'
        if value and isinstance(p.type, click.Choice | click.types.IntParamType): p.type.convert(value, p, ctx)


def check(line:str, whole:bool = True):
    "Raise an error unless a command line could run in this checkout, or is the beginning of one that could."
    words = shlex.split(line.removesuffix(' &'))
    while re.match(r'\w+=', words[0]): words.pop(0)
    first,rest = words[0], words[1:]
    if '-m' in rest and 'rakuten_mm' in rest: check_click(rest[rest.index('rakuten_mm')+1:], whole)
    elif first == 'rakuten-mm': check_click(rest, whole)
    elif first == 'eval': check(rest[0].removeprefix('$(').removesuffix(')'))
    elif first == 'zenml' and (whole or len(rest) > 2):
        assert rest[:2] == ['pipeline', 'run'] and (ROOT/rest[rest.index('-c')+1]).is_file(), line
        assert (ROOT/'zenml_pipelines'/'pipelines'/f"{rest[2].rpartition('.')[2]}.py").is_file(), line
        assert rest[rest.index('-s')+1] in (ROOT/'scripts'/'setup_stack.py').read_text(), line
    elif first == 'python' and rest[0] == '-m': assert (ROOT/f"{rest[1].replace('.', '/')}.py").is_file(), line
    elif first in ('python', 'bash') or first.startswith('./'):
        script,options = (first, rest) if first.startswith('./') else (rest[0], rest[1:])
        assert (ROOT/script).is_file(), line
        for o in options:
            if o.startswith('--'): assert o in (ROOT/script).read_text(), f'{line}: no {o}'
    else: assert first in OTHERS or not whole, line


LINES = shell_lines(README)


def test_there_are_commands(): assert len(LINES) > 25 and len(inline(README)) > 20


@pytest.mark.parametrize('line', LINES)
def test_command_is_there(line):
    "Command, options and choices exist, as do the files of the checkout."
    check(line)


@pytest.mark.parametrize('line', dict.fromkeys(inline(README)))
def test_command_in_a_sentence(line): check(line, whole=False)


@pytest.mark.parametrize('line', [
    'rakuten-mm fly', 'rakuten-mm train data/ --presets cpu', 'rakuten-mm train data/ --preset huge', 'rakuten-mm data',
    'rakuten-mm train', 'rakuten-mm registry promote 7', 'rakuten-mm registry promote x data/', './scripts/gone.sh',
    'rakuten-mm data list data/ more stuff', 'python -m benchmarks.gone', './scripts/quickstart.sh --rawr x', 'brew x'])
def test_a_wrong_one_is_noticed(line):
    with pytest.raises((AssertionError, click.ClickException)): check(line)
