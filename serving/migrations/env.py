"Alembic's entry: the schema is brought up to date on the connection that `serving.store` opened."
from alembic import context

context.configure(connection=context.config.attributes['connection'], render_as_batch=True)
context.run_migrations()
