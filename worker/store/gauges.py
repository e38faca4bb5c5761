"""The store's part of the metrics: what there is just now, never by a walk over the whole backlog.

Counts end at CAP. Each statement reads a partial index or a small table.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import Connection, Integer, func, select

from worker.model import State
from worker.store.batches import state_of
from worker.store.clock import now
from worker.store.schema import batches, is_ended, is_in, mailboxes, messages, queues
from worker.store.transactions import Transactions

#: So many messages of a state are counted at most.
CAP = 100_000


@dataclass(frozen=True, slots=True)
class Taken:
    """What there was at one moment; targets and priorities as (target, priority)."""

    messages: dict[str, int]  #: by state: queued, sending, failed, unknown
    depth: dict[tuple[str, int], int]
    oldest: dict[tuple[str, int], float] = field(default_factory=dict)  #: due for so many seconds
    batches: dict[str, int] = field(default_factory=dict)  #: by state, finished ones left out
    cooling: int = 0
    suspended: int = 0

    @property
    def capped(self) -> bool:
        """Whether there are more messages than were counted."""
        return max(self.messages.values(), default=0) >= CAP


class Gauges(Transactions):
    """Reads what there is."""

    def taken(self) -> Taken:
        """A look at queues, messages in trouble, batches and mailboxes."""
        with self._reading() as connection:
            depth = _depth(connection)
            counts = {
                str(State.QUEUED): sum(depth.values()),
                str(State.SENDING): _sending(connection),
                **_trouble(connection),
            }
            cooling, suspended = _mailboxes(connection)
            return Taken(
                counts, depth, _oldest(connection), _batches(connection), cooling, suspended
            )


def _depth(connection: Connection) -> dict[tuple[str, int], int]:
    some = select(messages.c.queue_id).where(is_in(State.QUEUED)).limit(CAP).subquery()
    rows = connection.execute(
        select(queues.c.target, queues.c.priority, func.count())
        .join_from(some, queues, queues.c.id == some.c.queue_id)
        .group_by(queues.c.target, queues.c.priority)
    )
    return {(row[0], row[1]): row[2] for row in rows}


def _sending(connection: Connection) -> int:
    some = select(messages.c.id).where(is_in(State.SENDING)).limit(CAP).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


def _trouble(connection: Connection) -> dict[str, int]:
    which = messages.c.state.in_([State.FAILED, State.UNKNOWN])
    some = select(messages.c.state).where(is_ended(), which).limit(CAP).subquery()
    rows = connection.execute(select(some.c.state, func.count()).group_by(some.c.state))
    return {str(State.FAILED): 0, str(State.UNKNOWN): 0} | {row[0]: row[1] for row in rows}


def _oldest(connection: Connection) -> dict[tuple[str, int], float]:
    due = func.min(queues.c.next_due_at, type_=queues.c.next_due_at.type)
    rows = connection.execute(
        select(queues.c.target, queues.c.priority, due.label("due"), now().label("now"))
        .where(queues.c.next_due_at <= now())
        .group_by(queues.c.target, queues.c.priority)
    )
    return {(row.target, row.priority): _seconds(row.now, row.due) for row in rows}


def _seconds(later: datetime, earlier: datetime) -> float:
    return max(0.0, (later - earlier).total_seconds())


def _batches(connection: Connection) -> dict[str, int]:
    columns = (batches.c.sealed_at, batches.c.paused_at, batches.c.cancelled_at,
               batches.c.finished_at)  # fmt: skip
    rows = connection.execute(select(*columns).where(batches.c.finished_at.is_(None)).limit(CAP))
    return dict(Counter(str(state_of(row)) for row in rows.mappings()))


def _mailboxes(connection: Connection) -> tuple[int, int]:
    count = func.count(type_=Integer)
    cooling = select(count).where(mailboxes.c.cooldown_until > now())
    suspended = select(count).where(mailboxes.c.suspended_at.is_not(None))
    return connection.execute(cooling).scalar_one(), connection.execute(suspended).scalar_one()
