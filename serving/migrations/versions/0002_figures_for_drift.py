"Figures of every listing; answers from before have none."
import sqlalchemy as sa
from alembic import op

revision,down_revision = '0002', '0001'


def upgrade():
    for name in ('facts', 'probs', 'sketch'): op.add_column('predictions', sa.Column(name, sa.JSON))
