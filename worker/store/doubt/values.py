"""What the parts of settling share: a message in doubt, what a look showed, some SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Float, case, exists, literal, or_, update
from sqlalchemy.sql.elements import ColumnElement

from worker.store.clock import after, now
from worker.store.schema import attempts, batches, messages, queues

#: Who settles where no person does.
SYSTEM = "postroom"
#: The codes of messages that no look can settle, and of the evidence that a look gives.
NO_COPY, FORBIDDEN, FOUND = "NoSentCopy", "LookForbidden", "FoundInMailbox"


@dataclass(frozen=True, slots=True)
class InDoubt:
    """A message that is to be looked for, as it was when the look was taken."""

    id: str
    fence: int
    batch_id: str
    queue_id: str
    looks: int  #: how many there were before
    keeps_copy: bool  #: whether a copy is kept that could be found
    by_draft: bool  #: whether it lay in Drafts before it was sent
    quarantined: bool  #: its worker died of it too often: only a person may queue it again
    mailboxes: tuple[str, ...]  #: those of its doubtful attempts, the last one first
    left: float  #: seconds until nothing can come any more; at most 0: nothing can


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look showed, to be written. `again`: seconds until the next one; None: no more."""

    one: InDoubt
    result: str  #: found, absent, forbidden, trouble, or no_copy: there is nothing to look for
    why: str  #: for people
    mailbox: str | None = None  #: where it was found, or the last that was looked into
    again: float | None = None
    detail: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What settling by hand did. `early`: how many may still come, the last of them `until`."""

    settled: int
    left: dict[str, int]
    early: int
    until: datetime | None


def may_come(wait: float) -> ColumnElement[bool]:
    """Whether a doubtful attempt of the message may still be carried out by Graph."""
    a = attempts.alias("doubtful").c
    open_end = or_(a.token_ends_at.is_(None), a.token_ends_at > seconds_on(-wait))
    return exists().where(a.message_id == messages.c.id, a.outcome == "unknown", open_end)


def seconds_on(seconds: float) -> ColumnElement[Any]:
    return after(literal(seconds, Float))


def go_on(connection: Connection, batch_id: str, deadlines: Mapping[str, Any]) -> None:
    """Messages came back to these queues (id → their earliest deadline): the batch goes on."""
    q = queues.c
    for queue, deadline in sorted(deadlines.items()):
        nearer = literal(deadline, q.deadline_at.type)
        connection.execute(
            update(queues)
            .where(q.id == queue)
            .values(
                next_due_at=now(), revision=q.revision + 1,
                deadline_at=case((q.deadline_at < nearer, q.deadline_at), else_=nearer),
            )
        )  # fmt: skip
    reopened = update(batches).where(batches.c.id == batch_id)
    connection.execute(reopened.values(finished_at=None, told_at=None))
