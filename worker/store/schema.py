"""The tables. The database refuses the impossible: every CHECK is named and says what it holds."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    literal,
    literal_column,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.elements import ColumnElement

from worker.meanings.bounces import Kind
from worker.model import State
from worker.store.clock import Instant

#: A UUID in text form in Python; `uuid` in PostgreSQL, 36 characters in SQLite.
Id = String(36).with_variant(postgresql.UUID(as_uuid=False), "postgresql")
Json = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
Serial = BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


def _one_of(column: str, *values: str) -> str:
    return f"{column} IN ({', '.join(repr(str(v)) for v in values)})"


def _partial(name: str, where: str, *columns: str) -> Index:
    return Index(name, *columns, postgresql_where=text(where), sqlite_where=text(where))


#: The states of messages that came to another end than sent.
ENDED = "state IN ('failed', 'unknown', 'cancelled', 'expired', 'suppressed')"

batches = Table(
    "batches",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", Text),
    Column("digest", String(64), nullable=False),  # of header and messages: the same call or not
    Column("target_kind", String(7), nullable=False),
    Column("target", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("template", Json),
    Column("options", Json, nullable=False),  # on_finished and the like
    Column("chunks", Integer, nullable=False),  # how many chunks make it whole
    Column("total", Integer, nullable=False),  # how many messages
    Column("created_at", Instant, nullable=False),
    Column("sealed_at", Instant),
    Column("paused_at", Instant),
    Column("cancelled_at", Instant),
    Column("finished_at", Instant),
    Column("told_at", Instant),  # when the application was told of this finish
    Column("rejections", Integer, nullable=False, server_default="0"),  # in a row, for content
    Column("purged_at", Instant),  # when contents and addresses of its messages were forgotten
    CheckConstraint(_one_of("target_kind", "mailbox", "pool"), name="target_kind"),
    CheckConstraint(
        "finished_at IS NULL OR sealed_at IS NOT NULL OR cancelled_at IS NOT NULL",
        name="finished_when_sealed",
    ),
    Index("ix_batches_created", "created_at"),
    _partial("ix_batches_unfinished", "finished_at IS NULL", "id"),
    _partial("ix_batches_unpurged", "finished_at IS NOT NULL AND purged_at IS NULL", "finished_at"),
    _partial("ix_batches_untold", "finished_at IS NOT NULL AND told_at IS NULL", "id"),
)

chunks = Table(
    "chunks",
    metadata,
    Column("batch_id", Id, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("count", Integer, nullable=False),
    Column("arrived_at", Instant, nullable=False),
)

queues = Table(
    "queues",
    metadata,
    Column("id", Id, primary_key=True),
    Column("batch_id", Id, ForeignKey("batches.id", ondelete="CASCADE"), nullable=False),
    Column("target_kind", String(7), nullable=False),
    Column("target", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    # Never later than the earliest `due_at` of its queued messages; NULL: none is queued.
    Column("next_due_at", Instant),
    # Never later than the earliest deadline of its queued messages.
    Column("deadline_at", Instant),
    # Raised by whoever makes a message due: a lane that found nothing may only correct
    # `next_due_at` if nobody did so since it looked.
    Column("revision", Integer, nullable=False, server_default="0"),
    UniqueConstraint("batch_id", "target", "priority"),
    Index(
        "ix_queues_next",
        "target",
        "priority",
        "next_due_at",
        postgresql_where=text("next_due_at IS NOT NULL"),
        sqlite_where=text("next_due_at IS NOT NULL"),
    ),
)


messages = Table(
    "messages",
    metadata,
    Column("id", Id, primary_key=True),
    Column("batch_id", Id, ForeignKey("batches.id", ondelete="CASCADE"), nullable=False),
    Column("queue_id", Id, nullable=False),
    Column("position", Integer, nullable=False),  # the input row, from 1
    Column("recipient", Text),  # the first address of `to`; NULL once erased
    Column("content", Json),  # recipients, variables, bodies; immutable; NULL once purged
    Column("recipients", SmallInteger, nullable=False),  # cost: addresses
    Column("size", Integer),  # cost: bytes of the request, known at the claim
    Column("external", SmallInteger),  # cost: addresses outside the organisation, likewise
    Column("state", String(10), nullable=False),
    Column("due_at", Instant, nullable=False),
    Column("deadline_at", Instant, nullable=False),
    Column("doubt", Boolean, nullable=False, server_default=text("false")),
    Column("tries", SmallInteger, nullable=False, server_default="0"),
    Column("attempts", SmallInteger, nullable=False, server_default="0"),
    Column("crashes", SmallInteger, nullable=False, server_default="0"),  # leases that ran out
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("mailbox", Text),  # bound at the claim; kept as the mailbox of the last attempt
    Column("worker", Text),
    Column("lease_until", Instant),
    Column("token_ends_at", Instant),  # of the bearer token that the claim is sent with
    Column("look_at", Instant),  # when to look into the mailbox next
    Column("looks", SmallInteger, nullable=False, server_default="0"),
    Column("error_code", Text),
    Column("request_id", Text),
    Column("sent_at", Instant),
    CheckConstraint(_one_of("state", *State), name="state"),
    CheckConstraint("(state = 'sending') = (lease_until IS NOT NULL)", name="lease_with_sending"),
    CheckConstraint(
        "state <> 'sending' OR (mailbox IS NOT NULL AND token_ends_at IS NOT NULL)",
        name="claim_is_whole",
    ),
    CheckConstraint("(state = 'sent') = (sent_at IS NOT NULL)", name="sent_at_with_sent"),
    CheckConstraint(
        "NOT doubt OR state NOT IN ('failed', 'cancelled', 'expired', 'suppressed')",
        name="doubt_never_ends_as_not_sent",
    ),
    CheckConstraint("state <> 'unknown' OR doubt", name="unknown_is_doubt"),
    Index("ix_messages_batch_position", "batch_id", "position"),
    _partial("ix_messages_due", "state = 'queued'", "queue_id", "due_at", "position"),
    _partial("ix_messages_leases", "state = 'sending'", "lease_until"),
    _partial("ix_messages_looks", "state = 'unknown'", "look_at"),
    Index("ix_messages_batch_state", "batch_id", "state", "sent_at"),  # counts, and the rate
    # For `message find`: by address, by what seldom happens, by code, and else the newest first.
    Index("ix_messages_recipient", func.lower(text("recipient"))),
    Index("ix_messages_when", "due_at", "id"),
    _partial("ix_messages_ended", ENDED, "state", "due_at", "id"),
    _partial("ix_messages_code", "error_code IS NOT NULL", "error_code", "due_at", "id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("message_id", Id, primary_key=True),
    Column("fence", Integer, primary_key=True),
    # A word that came after the claim was given up: evidence, beside the first row, never over it.
    Column("late", Boolean, primary_key=True, server_default=text("false")),
    Column("batch_id", Id, nullable=False),
    Column("mailbox", Text, nullable=False),
    Column("worker", Text),
    Column("outcome", String(10), nullable=False),
    Column("status", SmallInteger),
    Column("code", Text),
    Column("detail", Text),
    Column("request_id", Text),
    Column("client_request_id", Text),
    Column("retry_after", Float),  # seconds
    Column("duration", Float),  # seconds
    Column("token_ends_at", Instant),
    Column("recipients", SmallInteger, nullable=False),
    Column("size", Integer),
    Column("external", SmallInteger),
    Column("at", Instant, nullable=False),
    CheckConstraint(
        _one_of("outcome", "accepted", "throttled", "rejected", "blocked", "notsent", "unknown"),
        name="outcome",
    ),
    Index("ix_attempts_mailbox_at", "mailbox", "at"),
    _partial("ix_attempts_external", "external > 0", "at"),
)

#: Non-delivery reports that came back for a message, long after it was sent; append-only as well.
bounces = Table(
    "bounces",
    metadata,
    Column("message_id", Id, primary_key=True),
    Column("report_id", Text, primary_key=True),  # Graph's id of the report, in the mailbox
    Column("batch_id", Id, nullable=False),
    Column("mailbox", Text, nullable=False),
    Column("kind", String(5), nullable=False),
    Column("code", Text),  # as 5.1.1; NULL: the report names none
    Column("at", Instant, nullable=False),  # when it was read
    CheckConstraint(_one_of("kind", *Kind), name="kind"),
    Index("ix_bounces_batch", "batch_id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", Instant, nullable=False),
    Column("kind", Text, nullable=False),
    Column("batch_id", Id),
    Column("message_id", Id),
    Column("mailbox", Text),
    Column("by", Text, nullable=False),
    Column("why", Text),
    Column("detail", Json),
    Index("ix_events_batch", "batch_id", "id"),
    _partial("ix_events_message", "message_id IS NOT NULL", "message_id", "id"),
)

mailboxes = Table(
    "mailboxes",
    metadata,
    Column("address", Text, primary_key=True),
    Column("cooldown_until", Instant),
    Column("limits", Json),  # what differs from the settings, by limit
    Column("suspended_at", Instant),
    Column("suspended_code", Text),
    Column("suspended_reason", Text),
    Column("probe_at", Instant),
    Column("probes", SmallInteger, nullable=False, server_default="0"),
    Column("refusals", SmallInteger, nullable=False, server_default="0"),  # in a row
    CheckConstraint("(suspended_at IS NULL) = (suspended_reason IS NULL)", name="suspended_whole"),
)

pools = Table(
    "pools",
    metadata,
    Column("name", Text, primary_key=True),
    Column("mailbox", Text, primary_key=True),
)

suppressions = Table(
    "suppressions",
    metadata,
    Column("address", Text, primary_key=True),
    Column("reason", Text),
    Column("by", Text, nullable=False),
    Column("at", Instant, nullable=False),
)

#: Attachments, once per content however many messages share it; whole when all parts are there.
contents = Table(
    "contents",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("size", BigInteger, nullable=False),  # bytes
    Column("parts", Integer, nullable=False),
    Column("used_at", Instant, nullable=False),  # when something last arrived that refers to it
)

content_parts = Table(
    "content_parts",
    metadata,
    Column("sha256", String(64), ForeignKey("contents.sha256", ondelete="CASCADE"),
           primary_key=True),
    Column("number", Integer, primary_key=True),  # from 0; all but the last are PART bytes long
    Column("content", LargeBinary, nullable=False),
)  # fmt: skip

#: Messages too large for one request go by a draft in the mailbox: which, and how far it is.
drafts = Table(
    "drafts",
    metadata,
    Column("message_id", Id, ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True),
    Column("mailbox", Text, nullable=False),  # where the draft lies: it goes on there
    Column("at", Instant, nullable=False),  # when it last went on
    Column("draft_id", Text),  # NULL: none is known
    Column("upload_url", Text),  # of the attachment that is being uploaded
    # Whether the claim at work may have asked Graph to send the draft. While it has not, a claim
    # that ends without a word leaves no doubt.
    Column("released", Boolean, nullable=False),
)


def is_in(state: State) -> ColumnElement[bool]:
    """Whether a message is in this state. Written out in the SQL, never bound as a parameter:
    only then can a plan that is kept for all values use the partial indexes.
    """
    return messages.c.state == literal(str(state), String(), literal_execute=True)


def is_ended() -> ColumnElement[Any]:
    """Whether a message came to another end than sent, in the very words of its partial index:
    SQLite takes the index for no others.
    """
    return literal_column(f"({ENDED})")  # as a Boolean it would be compared with 1


def table_names() -> list[str]:
    """The names of all tables, sorted."""
    return sorted(metadata.tables)
