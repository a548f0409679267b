"Category codes above 2^31, which marketplaces have; SQLite's integers hold them anyway."
import sqlalchemy as sa
from alembic import op

revision,down_revision = '0003', '0002'


def upgrade():
    if op.get_bind().dialect.name == 'sqlite': return
    for table in ('predictions', 'feedback'): op.alter_column(table, 'prdtypecode', type_=sa.BigInteger)
