"Commands of the server: `rakuten-mm serve` and `rakuten-mm users`. Each imports what it needs when it runs."
import click

from rakuten_mm.api import ROLES


class ServeCommand(click.Command):
    "A command whose help ends with the server's settings."
    def format_epilog(self, ctx, formatter):
        from serving.config import ServeConfig
        formatter.write('\nSettings, from the environment or .env:\n')
        for name,f in ServeConfig.model_fields.items():
            formatter.write(f'  API_{name.upper():18} {f.description} ({f.default!r})\n')


@click.command(cls=ServeCommand)
@click.option('--model', default='models:/rakuten-mm@champion',
              help='Folder, models:/rakuten-mm@ALIAS or models:/rakuten-mm/VERSION.')
@click.option('--host', type=click.Choice(['127.0.0.1', '0.0.0.0', '::']), default='127.0.0.1')
@click.option('--port', default=8080)
def serve(model, host, port):
    "Serve predictions over HTTP, for the user API_USERNAME with API_PASSWORD, and those that `rakuten-mm users` knows."
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
@click.password_option(help='Asked for if left out; do not leave it in a shell history.')
def add_user(name, role, password):
    "Add a user, or give one another password or role."
    from serving import auth, store
    with store.Store.from_environment() as s: auth.add_user(s, name, password, role)
    click.echo(f'{name} may {role}')


@users.command('list')
def list_users():
    "List all users, with role and date."
    from serving.store import Store
    with Store.from_environment() as s:
        for u in s.users().values(): click.echo(f'{u.name:24} {u.role:8} since {u.created_at:%Y-%m-%d}')


@users.command('remove')
@click.argument('name')
def remove_user(name):
    "Remove a user; their corrections are kept."
    from serving.store import Store
    with Store.from_environment() as s:
        if not s.drop_user(name): raise ValueError(f'there is no user {name!r}')
    click.echo(f'{name} is removed')
