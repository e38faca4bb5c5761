"""A batch's counts and its rate are read from one index, however many messages it has.

Revision: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TROUBLE = "state IN ('failed', 'unknown')"


def upgrade() -> None:
    op.create_index("ix_messages_batch_state", "messages", ["batch_id", "state", "sent_at"])
    op.drop_index("ix_messages_trouble", table_name="messages")


def downgrade() -> None:
    op.create_index(
        "ix_messages_trouble", "messages", ["batch_id", "state"],
        postgresql_where=sa.text(TROUBLE), sqlite_where=sa.text(TROUBLE),
    )  # fmt: skip
    op.drop_index("ix_messages_batch_state", table_name="messages")
