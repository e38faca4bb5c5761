"""A person's word on messages in doubt."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, and_, func, insert, null, select, update
from sqlalchemy.sql.elements import ColumnElement

from worker.model import State, WrongState
from worker.store.clock import now
from worker.store.doubt.values import Settled, go_on, may_come, seconds_on
from worker.store.schema import attempts, batches, events, is_in, messages


@dataclass(frozen=True, slots=True)
class Hand:
    """A person's word."""

    to: State
    its: ColumnElement[bool]  #: the messages it is about
    force: bool
    wait: float
    age: float
    by: str
    why: str | None


def settle(
    connection: Connection, hand: Hand, batch_id: str | None, message_id: str | None
) -> Settled | None:
    if batch_id is None:
        its = select(messages.c.batch_id).where(messages.c.id == message_id)
        batch_id = connection.execute(its).scalar()
    batch = connection.execute(
        select(batches.c.id, batches.c.cancelled_at)
        .where(batches.c.id == batch_id)
        .with_for_update()
    ).one_or_none()
    if batch is None:
        return None
    if hand.to is State.QUEUED and batch.cancelled_at is not None:
        raise WrongState(f"batch {batch.id} is cancelled: nothing of it is sent again")
    done = _say(connection, hand)
    if hand.to is State.QUEUED and done:
        soonest: dict[str, Any] = {}
        for row in done:
            soonest[row.queue_id] = min(soonest.get(row.queue_id, row.deadline_at), row.deadline_at)
        go_on(connection, batch.id, soonest)
    _tell_word(connection, hand, batch.id, message_id, [row.id for row in done])
    return _result(connection, hand, len(done))


def _say(connection: Connection, hand: Hand) -> list[Any]:
    m = messages.c
    early = may_come(hand.wait)
    values: dict[State, dict[str, Any]] = {
        State.SENT: {"doubt": False, "sent_at": now(), "error_code": None},
        State.FAILED: {"doubt": False},
        State.QUEUED: {
            "doubt": early, "tries": 0, "crashes": 0, "due_at": now(), "error_code": None,
            "deadline_at": seconds_on(hand.age),
        },
    }  # fmt: skip
    guard = and_(hand.its, is_in(State.UNKNOWN))
    if hand.to is State.QUEUED:  # what has no content any more cannot be sent
        guard = and_(guard, m.content.is_not(null()), *([] if hand.force else [~early]))
    done = connection.execute(
        update(messages)
        .where(guard)
        .values(state=hand.to, look_at=None, **values[hand.to])
        .returning(m.id, m.queue_id, m.deadline_at)
    )
    return list(done)


def _result(connection: Connection, hand: Hand, settled: int) -> Settled:
    """What is where now, without what this call settled."""
    m = messages.c
    counted = connection.execute(select(m.state, func.count()).where(hand.its).group_by(m.state))
    left: dict[str, int] = {row[0]: row[1] for row in counted}
    if settled:
        left[hand.to] -= settled
    early = select(func.count(m.id.distinct()), func.max(attempts.c.token_ends_at)).join(
        attempts, and_(attempts.c.message_id == m.id, attempts.c.outcome == "unknown")
    ).where(hand.its, is_in(State.UNKNOWN), may_come(hand.wait))  # fmt: skip
    count, ends = connection.execute(early).one()
    until = ends + timedelta(seconds=hand.wait) if ends is not None else None
    return Settled(settled, {state: n for state, n in left.items() if n}, count, until)


def _tell_word(
    connection: Connection, hand: Hand, batch_id: str, message_id: str | None, ids: list[str]
) -> None:
    """An event for each message, and one for the batch where the word was about a batch."""
    if not ids:
        return
    said = {"kind": "settle", "batch_id": batch_id, "by": hand.by, "why": hand.why}
    word = {"as": hand.to, "force": hand.force}
    rows = [{**said, "message_id": one, "detail": word} for one in sorted(ids)]
    if message_id is None:
        rows.append({**said, "message_id": None, "detail": word | {"settled": len(ids)}})
    connection.execute(insert(events).values(at=now()), rows)
