"Listings that nobody can label: a correction has a category, or a reason why there is none."
import sqlalchemy as sa
from alembic import op

revision,down_revision = '0004', '0003'
FORBID = ("CREATE TRIGGER feedback_no_{0} BEFORE {0} ON feedback "
          "BEGIN SELECT RAISE(ABORT, 'corrections are only added'); END")


def upgrade():
    there = {c['name'] for c in sa.inspect(op.get_bind()).get_columns('feedback')}
    lite = op.get_bind().dialect.name == 'sqlite'
    if lite and 'unusable' in there: return
    with op.batch_alter_table('feedback', recreate='auto') as table:  # SQLite makes it anew, without its triggers
        table.alter_column('prdtypecode', existing_type=sa.BigInteger, nullable=True)
        if 'unusable' not in there: table.add_column(sa.Column('unusable', sa.String(32)))
    if lite:
        for what in ('UPDATE', 'DELETE'): op.execute(FORBID.format(what))
