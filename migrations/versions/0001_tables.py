"""All tables of the design.

Revision: 0001
"""

import sqlalchemy as sa
from alembic import op

from worker.store.clock import Instant
from worker.store.schema import Id, Json, Serial

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "attempts",
        sa.Column("message_id", Id, nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("late", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("batch_id", Id, nullable=False),
        sa.Column("mailbox", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("outcome", sa.String(length=10), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=True),
        sa.Column("code", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("client_request_id", sa.Text(), nullable=True),
        sa.Column("retry_after", sa.Float(), nullable=True),
        sa.Column("duration", sa.Float(), nullable=True),
        sa.Column("token_ends_at", Instant, nullable=True),
        sa.Column("recipients", sa.SmallInteger(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=True),
        sa.Column("at", Instant, nullable=False),
        sa.CheckConstraint(
            "outcome IN ('accepted', 'throttled', 'rejected', 'blocked', 'notsent', 'unknown')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.PrimaryKeyConstraint("message_id", "fence", "late", name=op.f("pk_attempts")),
    )
    op.create_index("ix_attempts_mailbox_at", "attempts", ["mailbox", "at"], unique=False)
    op.create_table(
        "batches",
        sa.Column("id", Id, nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("target_kind", sa.String(length=7), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("template", Json, nullable=True),
        sa.Column("options", Json, nullable=False),
        sa.Column("chunks", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("created_at", Instant, nullable=False),
        sa.Column("sealed_at", Instant, nullable=True),
        sa.Column("paused_at", Instant, nullable=True),
        sa.Column("cancelled_at", Instant, nullable=True),
        sa.Column("finished_at", Instant, nullable=True),
        sa.CheckConstraint(
            "target_kind IN ('mailbox', 'pool')", name=op.f("ck_batches_target_kind")
        ),
        sa.CheckConstraint(
            "finished_at IS NULL OR sealed_at IS NOT NULL OR cancelled_at IS NOT NULL",
            name=op.f("ck_batches_finished_when_sealed"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index("ix_batches_created", "batches", ["created_at"], unique=False)
    op.create_index(
        "ix_batches_unfinished",
        "batches",
        ["id"],
        unique=False,
        postgresql_where=sa.text("finished_at IS NULL"),
        sqlite_where=sa.text("finished_at IS NULL"),
    )
    op.create_table(
        "events",
        sa.Column("id", Serial, autoincrement=True, nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("batch_id", Id, nullable=True),
        sa.Column("message_id", Id, nullable=True),
        sa.Column("mailbox", sa.Text(), nullable=True),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=True),
        sa.Column("detail", Json, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
    )
    op.create_index("ix_events_batch", "events", ["batch_id", "id"], unique=False)
    op.create_index(
        "ix_events_message",
        "events",
        ["message_id", "id"],
        unique=False,
        postgresql_where=sa.text("message_id IS NOT NULL"),
        sqlite_where=sa.text("message_id IS NOT NULL"),
    )
    op.create_table(
        "mailboxes",
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("cooldown_until", Instant, nullable=True),
        sa.Column("limits", Json, nullable=True),
        sa.Column("suspended_at", Instant, nullable=True),
        sa.Column("suspended_code", sa.Text(), nullable=True),
        sa.Column("suspended_reason", sa.Text(), nullable=True),
        sa.Column("probe_at", Instant, nullable=True),
        sa.Column("probes", sa.SmallInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "(suspended_at IS NULL) = (suspended_reason IS NULL)",
            name=op.f("ck_mailboxes_suspended_whole"),
        ),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_mailboxes")),
    )
    op.create_table(
        "pools",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("mailbox", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", "mailbox", name=op.f("pk_pools")),
    )
    op.create_table(
        "suppressions",
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("at", Instant, nullable=False),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_suppressions")),
    )
    op.create_table(
        "chunks",
        sa.Column("batch_id", Id, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("arrived_at", Instant, nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_chunks_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", "number", name=op.f("pk_chunks")),
    )
    op.create_table(
        "messages",
        sa.Column("id", Id, nullable=False),
        sa.Column("batch_id", Id, nullable=False),
        sa.Column("queue_id", Id, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("recipient", sa.Text(), nullable=True),
        sa.Column("content", Json, nullable=True),
        sa.Column("recipients", sa.SmallInteger(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=True),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("due_at", Instant, nullable=False),
        sa.Column("deadline_at", Instant, nullable=False),
        sa.Column("doubt", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("tries", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("crashes", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("fence", sa.Integer(), server_default="0", nullable=False),
        sa.Column("mailbox", sa.Text(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_until", Instant, nullable=True),
        sa.Column("token_ends_at", Instant, nullable=True),
        sa.Column("look_at", Instant, nullable=True),
        sa.Column("looks", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("sent_at", Instant, nullable=True),
        sa.CheckConstraint(
            "(state = 'sending') = (lease_until IS NOT NULL)",
            name=op.f("ck_messages_lease_with_sending"),
        ),
        sa.CheckConstraint(
            "(state = 'sent') = (sent_at IS NOT NULL)", name=op.f("ck_messages_sent_at_with_sent")
        ),
        sa.CheckConstraint(
            "NOT doubt OR state NOT IN ('failed', 'cancelled', 'expired')",
            name=op.f("ck_messages_doubt_never_ends_as_not_sent"),
        ),
        sa.CheckConstraint(
            "state <> 'sending' OR (mailbox IS NOT NULL AND token_ends_at IS NOT NULL)",
            name=op.f("ck_messages_claim_is_whole"),
        ),
        sa.CheckConstraint(
            "state <> 'unknown' OR doubt", name=op.f("ck_messages_unknown_is_doubt")
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'sending', 'sent', 'failed', 'unknown', 'cancelled', 'expired',"
            " 'suppressed')",
            name=op.f("ck_messages_state"),
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_messages_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Room on each page for the states that a message goes through.
        op.execute("ALTER TABLE messages SET (fillfactor = 80)")
    op.create_index(
        "ix_messages_batch_position", "messages", ["batch_id", "position"], unique=False
    )
    op.create_index(
        "ix_messages_due",
        "messages",
        ["queue_id", "due_at", "position"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_messages_leases",
        "messages",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 'sending'"),
        sqlite_where=sa.text("state = 'sending'"),
    )
    op.create_index(
        "ix_messages_trouble",
        "messages",
        ["batch_id", "state"],
        unique=False,
        postgresql_where=sa.text("state IN ('failed', 'unknown')"),
        sqlite_where=sa.text("state IN ('failed', 'unknown')"),
    )
    op.create_table(
        "queues",
        sa.Column("id", Id, nullable=False),
        sa.Column("batch_id", Id, nullable=False),
        sa.Column("target_kind", sa.String(length=7), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("next_due_at", Instant, nullable=True),
        sa.Column("deadline_at", Instant, nullable=True),
        sa.Column("revision", sa.Integer(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batches.id"], name=op.f("fk_queues_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queues")),
        sa.UniqueConstraint(
            "batch_id", "target", "priority", name=op.f("uq_queues_batch_id_target_priority")
        ),
    )
    op.create_index(
        "ix_queues_next",
        "queues",
        ["target", "priority", "next_due_at"],
        unique=False,
        postgresql_where=sa.text("next_due_at IS NOT NULL"),
        sqlite_where=sa.text("next_due_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index(
        "ix_queues_next",
        table_name="queues",
        postgresql_where=sa.text("next_due_at IS NOT NULL"),
        sqlite_where=sa.text("next_due_at IS NOT NULL"),
    )
    op.drop_table("queues")
    op.drop_index(
        "ix_messages_trouble",
        table_name="messages",
        postgresql_where=sa.text("state IN ('failed', 'unknown')"),
        sqlite_where=sa.text("state IN ('failed', 'unknown')"),
    )
    op.drop_index(
        "ix_messages_leases",
        table_name="messages",
        postgresql_where=sa.text("state = 'sending'"),
        sqlite_where=sa.text("state = 'sending'"),
    )
    op.drop_index(
        "ix_messages_due",
        table_name="messages",
        postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    )
    op.drop_index("ix_messages_batch_position", table_name="messages")
    op.drop_table("messages")
    op.drop_table("chunks")
    op.drop_table("suppressions")
    op.drop_table("pools")
    op.drop_table("mailboxes")
    op.drop_index(
        "ix_events_message",
        table_name="events",
        postgresql_where=sa.text("message_id IS NOT NULL"),
        sqlite_where=sa.text("message_id IS NOT NULL"),
    )
    op.drop_index("ix_events_batch", table_name="events")
    op.drop_table("events")
    op.drop_index(
        "ix_batches_unfinished",
        table_name="batches",
        postgresql_where=sa.text("finished_at IS NULL"),
        sqlite_where=sa.text("finished_at IS NULL"),
    )
    op.drop_index("ix_batches_created", table_name="batches")
    op.drop_table("batches")
    op.drop_index("ix_attempts_mailbox_at", table_name="attempts")
    op.drop_table("attempts")
