"""The store's part in plans: what waits already, and what a message takes on average."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Float, func, literal, select, tuple_

from worker.model import State
from worker.store.clock import after
from worker.store.schema import attempts, is_in, messages, queues
from worker.store.transactions import Transactions

#: Averages are those of the last day.
_DAY = 86400.0


class Outlook(Transactions):
    """Reads only."""

    def waiting(self, targets: Sequence[tuple[str, str]]) -> int:
        """How many messages are queued for these targets, each (kind, name)."""
        its = tuple_(queues.c.target_kind, queues.c.target).in_(list(targets))
        which = select(queues.c.id).where(its, queues.c.next_due_at.is_not(None))
        with self._reading() as connection:
            found = select(func.count()).where(messages.c.queue_id.in_(which), is_in(State.QUEUED))
            return connection.execute(found).scalar_one()

    def typical(self, mailboxes: Sequence[str]) -> tuple[float | None, int | None]:
        """Seconds and bytes of the requests that were accepted in the last day, on average."""
        a = attempts.c
        lately = a.at > after(literal(-_DAY, Float))
        with self._reading() as connection:
            row = connection.execute(
                select(func.avg(a.duration), func.avg(a.size))
                .where(a.mailbox.in_(list(mailboxes)), lately, a.outcome == "accepted")
            ).one()  # fmt: skip
        seconds, size = row
        return (None if seconds is None else float(seconds), None if size is None else int(size))
