"""The non-delivery reports that came back for messages.

Revision: 0004
"""

import sqlalchemy as sa
from alembic import op

from worker.store.clock import Instant
from worker.store.schema import Id

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "bounces",
        sa.Column("message_id", Id, nullable=False),
        sa.Column("report_id", sa.Text(), nullable=False),
        sa.Column("batch_id", Id, nullable=False),
        sa.Column("mailbox", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(5), nullable=False),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("at", Instant, nullable=False),
        sa.CheckConstraint("kind IN ('hard', 'soft', 'quota')", name=op.f("ck_bounces_kind")),
        sa.PrimaryKeyConstraint("message_id", "report_id", name=op.f("pk_bounces")),
    )
    op.create_index("ix_bounces_batch", "bounces", ["batch_id"])


def downgrade() -> None:
    op.drop_table("bounces")
