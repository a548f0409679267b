"""Reference pages made from code: commands from click, HTTP from OpenAPI, settings and formats from what reads them.

`references()` gives them to scripts/build_docs.py; nothing of them is written by hand or kept.
"""
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from inspect import cleandoc
from pathlib import Path
from unittest.mock import MagicMock

import click
from fastapi import FastAPI
from fastcore.docments import docments

from rakuten_mm.api import STATUSES, page_of
from rakuten_mm.cli.main import cli

ROOT = Path(__file__).parents[1]
READS = re.compile(r'''(?:environ(?:\.get\(|\[)|envvar=)\s*f?['"]((?:RAKUTEN_MM|API|MLFLOW)_[A-Z_]+)['"]''')
NAME = re.compile(r'^#? ?((?:RAKUTEN_MM|API|MLFLOW)_[A-Z_]+)=(.*)$')
MEANINGS = { # Variables that .env.example leaves out, since hardly anybody sets them by hand
    'API_NEW_PASSWORD': 'The password of `rakuten-mm users add` where nobody can type one',
    'API_URL': 'Where health checks ask the server; default: http://127.0.0.1:8080',
    'RAKUTEN_MM_RAW': 'The folder that `rakuten-mm fetch` brings up to date, where none is given',
    'RAKUTEN_MM_SCHEDULE': 'What `rakuten-mm scheduler` reads; default: zenml_pipelines/configs/schedule.yaml',
    'RAKUTEN_MM_PRESET': 'The preset that the whole system trains, in place of the one in its configuration',
    'RAKUTEN_MM_UP': 'Where `scripts/up.sh` keeps the state of the services that it runs',
    'RAKUTEN_MM_STORE_OUTPUTS': '1 lets JupyterLab store all outputs, as `scripts/lab.sh --outputs` does',
}


def table(head:str, rows:Iterable[Iterable[object]])->str: # Markdown
    "A table; what would end a cell is escaped."
    one = lambda cells: '| '+' | '.join(str(c).replace('|', r'\|').replace('\n', ' ') for c in cells)+' |'
    names = head.split(', ')
    return '\n'.join([one(names), one('---' for _ in names), *map(one, rows)])+'\n'


def front(title:str, text:str)->str: # Markdown
    "The start of a page."
    return f'---\ntitle: {title}\ndescription: "{text}"\n---\n\n'


def commands(command:click.Command, ctx:click.Context)->Iterator[tuple[click.Command, click.Context]]:
    "A command and all below it."
    yield command, ctx
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            if below and not below.hidden: yield from commands(below, click.Context(below, info_name=name, parent=ctx))


def option_rows(command:click.Command, ctx:click.Context)->Iterator[tuple[str, str, str]]:
    "Name, default and meaning of each option."
    for p in command.params:
        if not isinstance(p, click.Option): continue
        default,shown = p.get_default(ctx, call=False), p.show_default if isinstance(p.show_default, str) else ''
        has = shown or (default not in (None, '', False) and isinstance(default, str|int|float|bool))
        names = ' '.join(f'`{o}`' for o in [*p.opts, *p.secondary_opts])
        kind = '' if p.is_flag else f' `{p.make_metavar(ctx)}`'
        yield names+kind, f'`{shown or default}`' if has else '', p.help or ''


def cli_page()->str:
    "Every command with its arguments and options."
    out = [front('Command line', 'Every command of rakuten-mm, as the program itself describes it.')]
    root = click.Context(cli, info_name='rakuten-mm')
    for command,ctx in commands(cli, root):
        depth = len(ctx.command_path.split())
        out.append(f"{'#'*depth} {ctx.command_path}\n" if depth > 1 else '')
        out.append(f"```sh\n{' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)])}\n```\n")
        out.append(cleandoc(command.help or '')+'\n')
        if rows := [*option_rows(command, ctx)]: out.append(table('option, default, meaning', rows))
    return '\n'.join(out)


def openapi()->dict:
    "The description that a running server gives at /openapi.json."
    from serving import openapi, routes
    app = FastAPI(title='rakuten-mm')
    routes.install(app, MagicMock(), MagicMock())
    openapi.install(app)
    return app.openapi()


def type_of(schema:dict)->str:
    "A JSON schema in a few words; a model of ours is a link."
    if '$ref' in schema:
        name = schema['$ref'].rsplit('/', 1)[1]
        return f'[{name}](#{name.lower()})'
    if 'anyOf' in schema: return ' or '.join(type_of(s) for s in schema['anyOf'])
    if schema.get('type') == 'array': return f"list of {type_of(schema.get('items', {}))}"
    if 'const' in schema: return f"`{schema['const']}`"
    if 'enum' in schema: return ' or '.join(f'`{v}`' for v in schema['enum'])
    return schema.get('format') or schema.get('contentEncoding') or schema.get('type', 'any')


def model_rows(schema:dict)->Iterator[tuple[str, str, str, str]]:
    "Name, type, default and meaning of each field of a model."
    for name,f in schema.get('properties', {}).items():
        default = 'required' if name in schema.get('required', []) else f"`{f['default']!r}`" if 'default' in f else ''
        yield f'`{name}`', type_of(f), default, f.get('description', '')


def body_of(content:dict)->str:
    "The type of a request or an answer."
    return ', '.join(f"{type_of(c.get('schema', {}))} as `{kind}`" for kind,c in content.items())


def operation(path:str, method:str, o:dict)->Iterator[str]: # Markdown
    "A page of the server: who may ask for it, with what, and what it answers."
    page = page_of(path)
    who = 'everybody' if not page or not page.role else f'role `{page.role}`'
    opened = f', or everybody where `API_OPEN_PAGES` has `{page.switch}`' if page and page.switch else ''
    yield f"## {method.upper()} {path}\n\n{o.get('summary', '')}. For {who}{opened}.\n"
    asked = o.get('parameters', [])
    rows = [(f"`{p['name']}`", p['in'], type_of(p['schema']), p.get('description', '')) for p in asked]
    if rows: yield table('parameter, where, type, meaning', rows)
    if 'requestBody' in o: yield f"Body: {body_of(o['requestBody']['content'])}.\n"
    for status,r in o['responses'].items():
        if status.startswith('2') and r.get('content'): yield f"Answer {status}: {body_of(r['content'])}.\n"


def http_page()->str:
    "Every page of the server, the models that go over the wire, and every error."
    api = openapi()
    out = [front('HTTP', "Every page of the server, from its own OpenAPI description, which it also shows at /docs.")]
    for path,operations in api['paths'].items():
        for method,o in operations.items(): out += operation(path, method, o)
    out += ['## Errors\n\nEvery error has the body [ErrorBody](#errorbody).\n',
            table('status, code, meaning', ((k, f'`{s.code}`', s.meaning) for k,s in STATUSES.items())), '## Models\n']
    for name,schema in sorted(api['components']['schemas'].items()):
        out.append(f"### {name}\n\n{schema.get('description', '')}\n")
        if rows := [*model_rows(schema)]: out.append(table('field, type, default, meaning', rows))
        elif 'enum' in schema or 'type' in schema: out.append(type_of(schema)+'\n')
    return '\n'.join(out)


def read_variables()->set[str]:
    "Environment variables that the code of this repository reads by name."
    folders = 'rakuten_mm', 'serving', 'zenml_pipelines', 'deploy', 'scripts'
    return {n for f in folders for p in (ROOT/f).rglob('*.py') for n in READS.findall(p.read_text(encoding='utf-8'))}


def env_example()->dict[str, tuple[str, str]]: # Value there and comment, by name
    "The variables of .env.example."
    found:dict[str, tuple[str, str]] = {}
    comment:list[str] = []
    after = False
    for line in (ROOT/'.env.example').read_text(encoding='utf-8').splitlines():
        if m := NAME.match(line): found[m[1]] = m[2], ' '.join(comment); after = True
        elif line.startswith('# '): comment = [line[2:]] if after else [*comment, line[2:]]; after = False
        elif not line: comment,after = [], False
    return found


def dataclass_rows(cls)->list[tuple[str, str, str]]:
    "Name, default and meaning of each field, from the comments beside them."
    told = docments(cls, full=True)
    default = lambda f: '' if f.default is MISSING else f'`{f.default!r}`'
    return [(f'`{f.name}`', default(f), told[f.name].docment or '') for f in fields(cls) if f.default is not MISSING]


def settings_page()->str:
    "Every environment variable and every setting of a training, the gate and the drift alarm; raises `ValueError`."
    from rakuten_mm.core.config import NEEDS, EncoderConfig, FitConfig, NetworkConfig
    from rakuten_mm.monitoring.drift import Thresholds
    from rakuten_mm.registry.gate import GateConfig
    from serving.config import ServeConfig
    server = {f'API_{n.upper()}': (f'`{f.default!r}`', f.description) for n,f in ServeConfig.model_fields.items()}
    example = {n: v for n,v in env_example().items() if n not in server}
    others = read_variables()-server.keys()-example.keys()
    wrong = ', '.join(sorted(others ^ MEANINGS.keys()))
    if wrong: raise ValueError(f'{wrong}: read from the environment and explained nowhere, or explained and never read')
    parts = [('encoders', EncoderConfig), ('network', NetworkConfig), ('fit', FitConfig)]
    said = lambda cls: table('field, default, meaning', dataclass_rows(cls))
    return '\n'.join([
        front('Settings', 'Every environment variable and every configuration, with default and meaning.'),
        'Variables come from the environment or from `.env` in the working directory; the environment wins.\n',
        '## The server\n', table('variable, default, meaning', ((f'`{n}`', *v) for n,v in server.items())),
        '## Where things are, and with what\n',
        table('variable, in .env.example, meaning', ((f'`{n}`', f'`{v}`'*bool(v), t) for n,(v,t) in example.items())),
        '## Set by scripts and images\n',
        table('variable, meaning', ((f'`{n}`', t) for n,t in sorted(MEANINGS.items()))),
        '## A training\n\nA JSON file of three parts, for `rakuten-mm train --config`; '
        '[`write_config`](../lib/core/config.html#write_config) writes one. What it leaves out has its default.\n',
        *(f'### `{n}`\n\n{c.__doc__}\n\n{said(c)}' for n,c in parts),
        '### Presets\n', table('preset, needs', ((f'`{n}`', t) for n,t in NEEDS.items())),
        '## The gate\n\n'+(GateConfig.__doc__ or ''), 'For `rakuten-mm registry promote --gate`, and `gate:` of the '
        'pipelines.\n', said(GateConfig),
        '## The drift alarm\n\n'+(Thresholds.__doc__ or ''), 'For `levels:` of the drift pipeline.\n',
        said(Thresholds)])


def files_page()->str:
    "Columns and folders of deliveries, dataset versions and bundles."
    from rakuten_mm.data.dataset import LISTING_COLUMNS, PART, SPLITS
    from rakuten_mm.data.schema import COLUMN_NAMES, QUARANTINE, REASONS, TABLE_ENDINGS
    from rakuten_mm.models.bundle import ANSWERED, ASKED, FORMAT
    types = lambda rows: table('column, type, required', ((f'`{n}`', t, 'yes'*r) for n,t,r in rows))
    codes = lambda names: ', '.join(f'`{n}`' for n in names)
    part = ((f'`{f.name}`', f.type, 'yes'*(f.name in LISTING_COLUMNS)) for f in PART)
    return '\n'.join([
        front('File formats', 'What goes in and what comes out, from the code that reads and writes it.'),
        '## A delivery\n\nA folder with a table of listings, labels in it or in a table of their own, and pictures; '
        f'or with corrections. Tables end with {codes(TABLE_ENDINGS)}. A column of another name is named by '
        '`--columns OURS=THEIRS`.\n',
        table('ours, in the challenge', ((f'`{k}`', f'`{v}`') for k,v in COLUMN_NAMES.items())),
        f'## Refused records\n\n`quarantine.parquet` of a version has the columns {codes(QUARANTINE)}.\n',
        table('reason, meaning', ((f'`{k}`', v) for k,v in REASONS.items())),
        '## A dataset version\n\n`versions/NAME/manifest.json` names the parts (Parquet), their checksums, and how '
        f'many listings each of the splits {codes(SPLITS)} has. The columns of a part:\n',
        table('column, type, of a listing', part),
        f'## A bundle\n\nFormat {FORMAT}: weights as safetensors, graphs as ONNX, vocabularies and settings as '
        'JSON, and `manifest.json` with the sha256 of each file; nothing in it is executed. To MLflow it is a model '
        'with this signature. It takes\n', types(ASKED), 'and gives\n', types(ANSWERED)])


def references()->list[str]: # Markdown
    "Pages of the command line, HTTP, settings and file formats."
    return [cli_page(), http_page(), settings_page(), files_page()]
