"""The store's part in rejections in a row: one bad template must not fail fifty thousand messages.

Counted in the transaction that records outcomes, and only where something was rejected. A batch
that reaches the limit is paused; an operator looks, and resumes or cancels it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, insert, update

from worker.model import Accepted, Outcome, Rejected, State, Verdict
from worker.store.clock import now
from worker.store.mailboxes import POSTROOM
from worker.store.schema import batches, events

_b = batches.c


def counts(outcome: Outcome, verdict: Verdict) -> bool:
    """Whether an outcome is a rejection or ends a row of them; what is tried again is neither."""
    return isinstance(outcome, Accepted | Rejected) and verdict.state is not State.QUEUED


def note(
    connection: Connection, batch_id: str, outcomes: Sequence[Outcome], most: int | None
) -> None:
    """Counts outcomes of a batch, in their order, and pauses it where `most` are reached.

    The batch's own `max_failures` goes before `most`; 0 and None are no limit.
    """
    ends = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Accepted)]
    since = outcomes[ends[-1] + 1 :] if ends else outcomes
    row = connection.execute(
        update(batches)
        .where(_b.id == batch_id)
        .values(rejections=len(since) if ends else _b.rejections + len(since))
        .returning(_b.rejections, _b.options)
    ).one()
    own = row.options.get("max_failures")
    limit = most if own is None else own
    if since and limit and row.rejections >= limit:
        _pause(connection, batch_id, row.rejections, since[-1])


def _pause(connection: Connection, batch_id: str, count: int, last: Outcome) -> None:
    free = (_b.paused_at.is_(None), _b.cancelled_at.is_(None), _b.finished_at.is_(None))
    paused = connection.execute(
        update(batches).where(_b.id == batch_id, *free).values(paused_at=now())
    )
    if not paused.rowcount:
        return
    answer = last.answer
    said = ": ".join(part for part in (answer.code, answer.detail) if part)
    why = f"{count} messages in a row were rejected; the last: {said or answer.status}"
    detail = {"rejections": count, "code": answer.code, "detail": answer.detail}
    row = {"at": now(), "kind": "pause", "batch_id": batch_id, "by": POSTROOM, "why": why}
    connection.execute(insert(events).values(**row, detail=detail))
