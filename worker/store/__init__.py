"""The store: every outcome, every claim, every batch in SQL. SQLAlchemy Core, no ORM.

`Store` is the door for reads and for the chores; `Writer` is the door for the hot path. Each call
is one short transaction; nothing is held between calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Engine, RowMapping

from worker.model import Due
from worker.store import arrivals, batches, chores
from worker.store.arrivals import BatchSeen, Chunk, Head
from worker.store.bounces import Bounce, Bounces
from worker.store.contents import Contents
from worker.store.control import Control
from worker.store.doubt import Doubt
from worker.store.drafts import Drafts
from worker.store.engine import make_engine, newest_revision, revision, upgrade
from worker.store.finding import Finding
from worker.store.gauges import Gauges
from worker.store.history import History
from worker.store.mailboxes import Mailboxes
from worker.store.outlook import Outlook
from worker.store.retention import Retention
from worker.store.sending import Sending, ToClaim, ToRecord
from worker.store.statements import due_queues
from worker.store.summaries import Summaries
from worker.store.suppressions import Suppressions
from worker.store.transactions import Transactions
from worker.store.writer import Writer

__all__ = [
    "BatchSeen", "Bounce", "Chunk", "Head", "Seen", "Store", "ToClaim", "ToRecord", "Writer",
    "make_engine", "newest_revision", "revision", "upgrade",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """What a lane saw: due messages of one queue, not yet claimed, and their batch's template."""

    queue_id: str
    batch_id: str
    priority: int
    shared: bool  #: of a pool: what returns to its queue is free for any of the mailboxes
    template: Mapping[str, Any] | None
    due: list[Due]


def _rank(queue: RowMapping, turns: Mapping[str, int]) -> tuple[int, int, float]:
    """Chance decides between equals: turns do not survive the lane, and a lane may be short."""
    return queue["priority"], turns.get(queue["id"], 0), random.random()  # noqa: S311


class Store(Transactions):
    """All statements that are not on the hot path, and the look that starts it."""

    def __init__(self, engine: Engine, *, max_failures: int | None = None) -> None:
        """`max_failures`: so many rejections in a row pause a batch; None or 0: none do."""
        super().__init__(engine)
        self._queues = due_queues(engine.dialect.name)
        self.sending = Sending(engine.dialect.name, max_failures)
        self.contents = Contents(engine)
        self.drafts = Drafts(engine)
        self.control = Control(engine)
        self.mailboxes = Mailboxes(engine)
        self.outlook = Outlook(engine)
        self.history = History(engine)
        self.suppressions = Suppressions(engine)
        self.gauges = Gauges(engine)
        self.retention = Retention(engine)
        self.finding = Finding(engine)
        self.summaries = Summaries(engine)
        self.doubt = Doubt(engine)
        self.bounces = Bounces(engine)

    def look(
        self, mailbox: str, pools: Mapping[str, Sequence[str]], turns: Mapping[str, int], count: int
    ) -> Seen | None:
        """The next due messages that this mailbox may send; None if there are none.

        Of the queues with the best priority, the one with the fewest turns is served. A queue that
        turns out to be empty is corrected, so that nobody looks there in vain again. A message
        whose recipients are all suppressed ends here.
        """
        while (seen := self._look(mailbox, pools, turns, count)) is not None:
            if any(one.left_out for one in seen.due):
                self.suppressions.end([one for one in seen.due if one.left_out])
            if due := [one for one in seen.due if one.addresses or not one.left_out]:
                return replace(seen, due=due)
        return None

    def _look(
        self, mailbox: str, pools: Mapping[str, Sequence[str]], turns: Mapping[str, int], count: int
    ) -> Seen | None:
        with self._reading() as connection:
            asked = {"mailbox": mailbox, "pools": list(pools)}
            rows = connection.execute(self._queues, asked).mappings().all()
            empty = []
            for row in sorted(rows, key=lambda r: _rank(r, turns)):
                members = sorted(pools[row["target"]]) if row["target_kind"] == "pool" else []
                due = self.sending.peek(
                    connection, row["id"], count=count, shares=max(1, len(members)),
                    share=members.index(mailbox) if mailbox in members else 0, mailbox=mailbox,
                )  # fmt: skip
                if due:
                    if not row["options"].get("ignore_suppressions"):
                        due = self.suppressions.sift(connection, due)
                    return Seen(row["id"], row["batch_id"], row["priority"],
                                row["target_kind"] == "pool", row["template"], due)  # fmt: skip
                empty.append((row["id"], row["revision"]))
        for queue_id, seen in empty:
            self._do(partial(chores.correct_queue, queue_id=queue_id, revision=seen))
        return None

    # ---- ingest --------------------------------------------------------------------------------

    def arrive(self, heads: Iterable[Head], chunks: Sequence[Chunk]) -> list[Head]:
        """Writes what came through the inbox; gives the batches that became whole by it."""
        heads = list(heads)
        return self._do(lambda connection: arrivals.arrive(connection, heads, chunks))

    def tell_unreadable(self, why: str, batch_id: str | None, detail: Mapping[str, Any]) -> None:
        """Records that something in the inbox was no chunk of a batch."""
        self._do(lambda c: arrivals.tell_unreadable(c, why, batch_id=batch_id, detail=detail))

    def batch_digest(self, batch_id: str) -> BatchSeen | None:
        """What is known of a batch that is enqueued again; None where it never arrived."""
        with self._reading() as connection:
            return arrivals.seen(connection, batch_id)

    # ---- chores --------------------------------------------------------------------------------

    def end_leases(self, *, resend: bool, max_attempts: int) -> int:
        """Claims whose lease ran out become unknown; how many."""
        return self._do(lambda c: chores.end_leases(c, resend=resend, max_attempts=max_attempts))

    def end_deadlines(self) -> int:
        """What waited past its deadline becomes expired; how many."""
        return self._do(chores.end_deadlines)

    def finish_batches(self) -> list[Any]:
        """Finishes the batches of which nothing is queued or sending; gives them."""
        return self._do(chores.finish_batches)

    def untold(self) -> list[Any]:
        """Finished batches whose application is to be told: id and options."""
        with self._reading() as connection:
            return chores.untold(connection)

    def told(self, batch_id: str) -> None:
        """The application was told that this batch has finished."""
        self._do(lambda c: chores.told(c, batch_id))

    def due_targets(self) -> list[tuple[str, str]]:
        """(kind, target) of the queues with due work."""
        with self._reading() as connection:
            return chores.due_targets(connection)

    # ---- batches and messages ------------------------------------------------------------------

    def batch_status(self, batch_id: str) -> dict[str, Any] | None:
        """State, total and counts of a batch as far as it arrived; None where it did not."""
        with self._reading() as connection:
            return batches.status(connection, batch_id)

    def export(self, batch_id: str) -> Iterable[dict[str, Any]]:
        """Every message of a batch in the order of its input, in flat memory.

        No connection is held while the reader is busy with a page.
        """
        last = 0
        while True:
            with self._reading() as connection:
                rows = batches.page(connection, batch_id, last)
            yield from rows
            if len(rows) < batches.PAGE:
                return
            last = rows[-1]["position"]

    def message(self, message_id: str) -> dict[str, Any] | None:
        """One message with all its attempts and events; None where there is none."""
        with self._reading() as connection:
            return batches.message(connection, message_id)

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()
