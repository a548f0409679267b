"Commands of the server: `rakuten-mm serve` and `rakuten-mm users`. Each imports what it needs when it runs."
import errno
import socket

import click

from rakuten_mm.api import ROLES
from rakuten_mm.cli.output import check_folder, shown_by, table


class ServeCommand(click.Command):
    "A command whose help ends with the server's settings."
    def format_epilog(self, ctx, formatter):
        from serving.config import ServeConfig
        formatter.write('\nSettings, from the environment or .env:\n')
        for name,f in ServeConfig.model_fields.items():
            formatter.write(f'  API_{name.upper():18} {f.description} ({f.default!r})\n')


def check_port(host:str, port:int):
    "Raise `OSError` with a cure if a server cannot listen there, before it loads its model."
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET): pass
    except OSError as e:
        why = {errno.EADDRINUSE: 'is in use; stop what listens there, or choose another --port',
               errno.EACCES: 'may not be opened by this user; choose a --port above 1023'}.get(e.errno or 0)
        raise OSError(f'port {port} of {host} {why}' if why else f'{host}:{port}: {e.strerror}') from None


@click.command(cls=ServeCommand)
@click.option('--model', default='models:/rakuten-mm@champion',
              help='Folder, models:/rakuten-mm@ALIAS or models:/rakuten-mm/VERSION.')
@click.option('--host', type=click.Choice(['127.0.0.1', '0.0.0.0', '::']), default='127.0.0.1')
@click.option('--port', default=8080, type=click.IntRange(0, 65535))
def serve(model, host, port):
    """Serve predictions over HTTP.

    For the user API_USERNAME with API_PASSWORD, and those that `rakuten-mm users` knows."""
    check_folder(model)
    check_port(host, port)
    from serving.server import serve
    serve(model, host, port)


@click.group()
def users():
    "People and services that may use the server."
    from rakuten_mm.core.environment import load_environment
    load_environment()


@users.command('add')
@click.argument('name')
@click.option('--role', type=click.Choice(ROLES), default='predict', help='Each may do what those before it may.')
@click.password_option(envvar='API_NEW_PASSWORD',
                       help='Asked for if left out; do not leave it in a shell history, API_NEW_PASSWORD may have it.')
def add_user(name, role, password):
    "Add a user, or give one another password or role."
    from serving import auth, store
    with store.Store.from_environment() as s: auth.add_user(s, name, password, role)
    click.echo(f'{name} may {role}')


def show_users(found:list[dict]):
    "The list of users."
    if not found: click.echo('there are no users; `rakuten-mm users add NAME` adds one'); return
    click.echo(table('name role since', [(u['name'], u['role'], u['since']) for u in found]))


@users.command('list')
@shown_by(show_users)
def list_users():
    "List all users, with role and date."
    from serving.store import Store
    with Store.from_environment() as s:
        return [dict(name=u.name, role=u.role, since=u.created_at) for u in s.users().values()]


@users.command('remove')
@click.argument('name')
def remove_user(name):
    "Remove a user; their corrections are kept."
    from serving.store import Store
    with Store.from_environment() as s:
        if not s.drop_user(name): raise ValueError(f'there is no user {name!r}')
    click.echo(f'{name} is removed')


@click.group()
def answers():
    "Answers that the server keeps, with the texts and images of listings."
    from rakuten_mm.core.environment import load_environment
    load_environment()


def show_unusable(found:list[dict]):
    "The list of listings without a category."
    if not found: click.echo('no listing was called unusable'); return
    columns = 'created_at', 'reason', 'reviewer', 'prediction_id', 'designation'
    click.echo(table('time reason reviewer answer title', [[u[c] for c in columns] for u in found]))


@answers.command('unusable')
@shown_by(show_unusable)
def list_unusable():
    "Listings that reviewers could not label, and why."
    from serving.store import Store
    with Store.from_environment() as s: return s.unusable()


def show_erased(out:dict):
    "What was removed, in a sentence."
    done = 'would be removed' if out['dry_run'] else 'removed'
    click.echo(f"{out['answers']:,} answers and {out['images']:,} images {done}; "
               f"{out['corrected']:,} corrected ones lose their listing and keep their label")


@answers.command('erase')
@click.option('--older-than', type=click.FloatRange(min=0), metavar='DAYS', help='Answers given so many days ago.')
@click.option('--prediction', metavar='ID', default='', help='This answer, and every other one to the same listing.')
@click.option('--dry-run', is_flag=True, help='Count, and remove nothing.')
@shown_by(show_erased)
def erase_answers(older_than, prediction, dry_run):
    """Remove answers, texts and images.

    Of an answer that was corrected the label stays, without the listing."""
    from datetime import UTC, datetime, timedelta

    from serving.store import Store
    if (older_than is None) == (not prediction): raise ValueError('give --older-than or --prediction')
    before = datetime.now(UTC)-timedelta(days=older_than or 0)
    with Store.from_environment() as s:
        try: return s.erase(before, prediction, dry_run) | dict(dry_run=dry_run)
        except KeyError: raise ValueError(f'there is no answer {prediction!r}') from None
