"Figures of every listing; answers from before have none."
import sqlalchemy as sa
from alembic import op

revision,down_revision = '0002', '0001'


def upgrade():
    there = {c['name'] for c in sa.inspect(op.get_bind()).get_columns('predictions')}  # of one that was killed here
    for name in ('facts', 'probs', 'sketch'):
        if name not in there: op.add_column('predictions', sa.Column(name, sa.JSON))
