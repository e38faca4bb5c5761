"""What the gate, the settling of doubt and the doors for messages add to the tables.

Revision: 0002
"""

import sqlalchemy as sa
from alembic import op

from worker.store.clock import Instant
from worker.store.schema import Id

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

DOUBT = "ck_messages_doubt_never_ends_as_not_sent"


def upgrade() -> None:
    # How many of its addresses lie outside the organisation: the tenant's limit counts them.
    op.add_column("messages", sa.Column("external", sa.SmallInteger(), nullable=True))
    op.add_column("attempts", sa.Column("external", sa.SmallInteger(), nullable=True))
    with op.batch_alter_table("messages") as messages:
        # What may have been sent is no more suppressed than it is cancelled.
        messages.drop_constraint(op.f(DOUBT), type_="check")
        messages.create_check_constraint(
            op.f(DOUBT),
            "NOT doubt OR state NOT IN ('failed', 'cancelled', 'expired', 'suppressed')",
        )
    _add_searches()
    # When the application was told that the batch had finished; anew at each finish.
    op.add_column("batches", sa.Column("told_at", Instant, nullable=True))
    batches = sa.table("batches", sa.column("finished_at", Instant), sa.column("told_at", Instant))
    op.execute(batches.update().values(told_at=batches.c.finished_at))
    _partial("ix_batches_untold", "batches", ["id"], UNTOLD)
    _add_contents()
    # In a row: refusals suspend a mailbox, rejections pause a batch.
    op.add_column(
        "mailboxes", sa.Column("refusals", sa.SmallInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "batches", sa.Column("rejections", sa.Integer(), server_default="0", nullable=False)
    )
    _partial("ix_attempts_external", "attempts", ["at"], "external > 0")
    op.add_column("batches", sa.Column("purged_at", Instant, nullable=True))
    _partial("ix_batches_unpurged", "batches", ["finished_at"], UNPURGED)


def downgrade() -> None:
    op.drop_index("ix_batches_unpurged", table_name="batches")
    op.drop_column("batches", "purged_at")
    op.drop_index("ix_attempts_external", table_name="attempts")
    op.drop_column("batches", "rejections")
    op.drop_column("mailboxes", "refusals")
    for table in ("drafts", "content_parts", "contents"):
        op.drop_table(table)
    op.drop_index("ix_batches_untold", table_name="batches")
    op.drop_column("batches", "told_at")
    for name in ("recipient", "looks", "when", "ended", "code"):
        op.drop_index(f"ix_messages_{name}", table_name="messages")
    with op.batch_alter_table("messages") as messages:
        messages.drop_constraint(op.f(DOUBT), type_="check")
        messages.create_check_constraint(
            op.f(DOUBT), "NOT doubt OR state NOT IN ('failed', 'cancelled', 'expired')"
        )
    op.drop_column("attempts", "external")
    op.drop_column("messages", "external")


def _add_contents() -> None:
    """Attachments, once per content; and drafts of messages too large for one request."""
    op.create_table(
        "contents",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("parts", sa.Integer(), nullable=False),
        sa.Column("used_at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_contents")),
    )
    op.create_table(
        "content_parts",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "number", name=op.f("pk_content_parts")),
        sa.ForeignKeyConstraint(["sha256"], ["contents.sha256"], ondelete="CASCADE",
                                name=op.f("fk_content_parts_sha256")),
    )  # fmt: skip
    op.create_table(
        "drafts",
        sa.Column("message_id", Id, nullable=False),
        sa.Column("mailbox", sa.Text(), nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.Column("draft_id", sa.Text(), nullable=True),
        sa.Column("upload_url", sa.Text(), nullable=True),
        sa.Column("released", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("message_id", name=op.f("pk_drafts")),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], ondelete="CASCADE",
                                name=op.f("fk_drafts_message_id")),
    )  # fmt: skip


UNPURGED = "finished_at IS NOT NULL AND purged_at IS NULL"
UNTOLD = "finished_at IS NOT NULL AND told_at IS NULL"
ENDED = "state IN ('failed', 'unknown', 'cancelled', 'expired', 'suppressed')"


def _add_searches() -> None:
    """After all that alters the table: SQLite makes it anew, and would lose the first of them."""
    op.create_index("ix_messages_recipient", "messages", [sa.text("lower(recipient)")])
    _partial("ix_messages_looks", "messages", ["look_at"], "state = 'unknown'")
    op.create_index("ix_messages_when", "messages", ["due_at", "id"])
    _partial("ix_messages_ended", "messages", ["state", "due_at", "id"], ENDED)
    _partial(
        "ix_messages_code", "messages", ["error_code", "due_at", "id"], "error_code IS NOT NULL"
    )


def _partial(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(
        name, table, columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where)
    )
