"Users, answers, and corrections that can only be added."
import sqlalchemy as sa
from alembic import op

revision,down_revision = '0001', None
when = lambda name: sa.Column(name, sa.DateTime(timezone=True), nullable=False)
text = lambda name, n, **kw: sa.Column(name, sa.String(n), nullable=False, **kw)
number = lambda name: sa.Column(name, sa.Integer, nullable=False)
real = lambda name: sa.Column(name, sa.Float, nullable=False)
FORBID = ("CREATE TRIGGER feedback_no_{0} BEFORE {0} ON feedback "
          "BEGIN SELECT RAISE(ABORT, 'corrections are only added'); END")
FUNCTION = ("CREATE FUNCTION feedback_append_only() RETURNS trigger AS $$ "
            "BEGIN RAISE EXCEPTION 'corrections are only added'; END $$ LANGUAGE plpgsql")
TRIGGER = ('CREATE TRIGGER feedback_append_only BEFORE UPDATE OR DELETE ON feedback '
           'FOR EACH ROW EXECUTE FUNCTION feedback_append_only()')


def upgrade():
    op.create_table('users', text('name', 64, primary_key=True), text('password_hash', 255), text('role', 16),
                    when('created_at'))
    op.create_table('predictions', text('id', 36, primary_key=True), when('created_at'), text('user', 64),
                    text('model_version', 128), number('prdtypecode'), real('probability'), text('lane', 16),
                    real('usefulness'), sa.Column('top_k', sa.JSON, nullable=False), sa.Column('candidates', sa.JSON),
                    sa.Column('modalities', sa.JSON, nullable=False), text('text_sha256', 64), text('image_sha256', 64),
                    sa.Column('designation', sa.Text), sa.Column('description', sa.Text), number('has_inputs'))
    op.create_index('ix_predictions_queue', 'predictions', ['lane', 'has_inputs', 'usefulness'])
    op.create_index('ix_predictions_created_at', 'predictions', ['created_at'])
    op.create_table('feedback', sa.Column('id', sa.Integer, primary_key=True, autoincrement=True),
                    sa.Column('prediction_id', sa.String(36), sa.ForeignKey('predictions.id'), nullable=False),
                    number('prdtypecode'), text('reviewer', 64), when('created_at'))
    op.create_index('ix_feedback_prediction_id', 'feedback', ['prediction_id'])
    append_only()


def append_only():
    "Have the database itself refuse to change or forget a correction."
    lite = op.get_bind().dialect.name == 'sqlite'
    for sql in [FORBID.format('UPDATE'), FORBID.format('DELETE')] if lite else [FUNCTION, TRIGGER]: op.execute(sql)
