"""The store's part for people: what became of a batch, what happened to a message."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, literal, or_, select

from worker.model import BatchState, State
from worker.store.bounces import bounced, of_message, why_bounced
from worker.store.clock import after, now
from worker.store.mailboxes import POSTROOM
from worker.store.schema import attempts, batches, chunks, events, is_in, messages

#: How many rows an export reads in one go.
PAGE = 1000
#: A pace is measured over so many seconds at least: the first second says little.
SHORTEST = 10.0


def state_of(row: Any) -> BatchState:
    """The state of a batch, computed from its four times."""
    if row["cancelled_at"]:
        return BatchState.CANCELLED
    if not row["sealed_at"]:
        return BatchState.OPEN
    if row["finished_at"]:
        return BatchState.FINISHED
    return BatchState.PAUSED if row["paused_at"] else BatchState.RUNNING


def counts(connection: Connection, batch_id: str) -> dict[str, int]:
    """How many messages of a batch are in each state; every state is named."""
    rows = connection.execute(
        select(messages.c.state, func.count())
        .where(messages.c.batch_id == batch_id)
        .group_by(messages.c.state)
    )
    return {str(state): 0 for state in State} | {row[0]: row[1] for row in rows}


def status(connection: Connection, batch_id: str) -> dict[str, Any] | None:
    """State, total and counts; `arrived` says how many messages came so far."""
    row = connection.execute(select(batches).where(batches.c.id == batch_id)).mappings().first()
    if row is None:
        return None
    arrived = connection.execute(
        select(func.coalesce(func.sum(chunks.c["count"]), 0)).where(chunks.c.batch_id == batch_id)
    ).scalar_one()
    return {
        "batch_id": row["id"], "name": row["name"], "state": str(state_of(row)),
        "total": row["total"], "arrived": int(arrived), "counts": counts(connection, batch_id),
        "bounced": bounced(connection, batch_id),
        "target": row["target"], "target_kind": row["target_kind"],
        "created_at": row["created_at"], "finished_at": row["finished_at"],
        **_rate(connection, batch_id),
        "paused_reason": _paused_reason(connection, row),
    }  # fmt: skip


def _paused_reason(connection: Connection, row: Any) -> str | None:
    """Why it is paused, and by whom if not by ourselves; None where it is not."""
    if state_of(row) is not BatchState.PAUSED:
        return None
    event = connection.execute(
        select(events.c.by, events.c.why)
        .where(events.c.batch_id == row["id"], events.c.kind == "pause")
        .order_by(events.c.id.desc())
        .limit(1)
    ).one_or_none()
    if event is None or event.by == POSTROOM:
        return event.why if event else None
    return f"paused by {event.by}" + (f": {event.why}" if event.why else "")


def _rate(connection: Connection, batch_id: str) -> dict[str, Any]:
    """How many were sent in the last minute; and `pace`, a second, since the first of these."""
    row = connection.execute(
        select(func.count().label("sent"), func.min(messages.c.sent_at).label("first"),
               now().label("now"))
        .where(
            messages.c.batch_id == batch_id,
            is_in(State.SENT),
            messages.c.sent_at > after(literal(-60.0)),
        )
    ).one()  # fmt: skip
    seconds = max(SHORTEST, (row.now - row.first).total_seconds()) if row.sent else SHORTEST
    return {"rate_per_minute": row.sent, "pace": row.sent / seconds}


def page(connection: Connection, batch_id: str, last: int) -> list[dict[str, Any]]:
    """The next messages of a batch after position `last`, at most PAGE."""
    rows = connection.execute(
        select(
            messages.c.id, messages.c.position, messages.c.recipient.label("to"),
            messages.c.mailbox, messages.c.state, messages.c.attempts,
            messages.c.error_code, messages.c.request_id, messages.c.sent_at, why_bounced(),
        )
        .where(messages.c.batch_id == batch_id, messages.c.position > last)
        .order_by(messages.c.position)
        .limit(PAGE)
    ).mappings()  # fmt: skip
    return [dict(row) for row in rows]


def message(connection: Connection, message_id: str) -> dict[str, Any] | None:
    """One message, its attempts, its bounces and its events, each in order."""
    row = connection.execute(select(messages).where(messages.c.id == message_id)).mappings().first()
    if row is None:
        return None
    tried = connection.execute(
        select(attempts)
        .where(attempts.c.message_id == message_id)
        .order_by(attempts.c.fence, attempts.c.late)
    )
    happened = connection.execute(
        select(events)
        .where(
            or_(
                events.c.message_id == message_id,
                (events.c.batch_id == row["batch_id"]) & events.c.message_id.is_(None),
            )
        )
        .order_by(events.c.id)
    )
    hidden = {"content", "queue_id", "worker"}
    return {k: v for k, v in row.items() if k not in hidden} | {
        "to": row["recipient"],
        "attempts": [dict(one) for one in tried.mappings()],
        "bounces": of_message(connection, message_id),
        "events": [dict(one) for one in happened.mappings()],
    }
