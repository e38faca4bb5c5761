"""The store's part for searches: batches by what is known of them, messages by what is asked for.

Each reads a page through an index, however many rows there are: tests/test_query_plans.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, literal, or_, select, tuple_

from worker.model import BatchState, InvalidMessages, Problem, State
from worker.store.batches import state_of
from worker.store.clock import Instant
from worker.store.clock import after as ago
from worker.store.schema import Id, batches, is_ended, is_in, messages
from worker.store.transactions import Transactions

_BUSY = (State.QUEUED, State.SENDING, State.SENT)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What messages are looked for; None: any."""

    to: str | None = None  #: the first recipient, in any case
    pseudonym: str | None = None  #: what a purge has left of that address
    state: State | None = None
    code: str | None = None
    batch_id: str | None = None


class Finding(Transactions):
    """Pages of batches and of messages."""

    def batches(
        self, limit: int, *, state: BatchState | None = None, name: str | None = None,
        since: datetime | timedelta | None = None, sender: str | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The newest first, with their counts. `name`: a part of it; `sender`: mailbox or pool."""
        b = batches.c
        asked = [] if state is None else [_is(state)]
        asked += (
            [] if name is None else [func.lower(b.name).contains(name.lower(), autoescape=True)]
        )
        asked += [] if since is None else [b.created_at >= _start(since)]
        asked += [] if sender is None else [or_(b.target == sender, b.target == sender.lower())]
        with self._reading() as connection:
            rows = connection.execute(
                select(batches).where(*asked).order_by(b.created_at.desc(), b.id).limit(limit)
            ).mappings().all()  # fmt: skip
            counted = connection.execute(
                select(messages.c.batch_id, messages.c.state, func.count())
                .where(messages.c.batch_id.in_([row["id"] for row in rows]))
                .group_by(messages.c.batch_id, messages.c.state)
            ).all()
        return [_batch(row, {c[1]: c[2] for c in counted if c[0] == row["id"]}) for row in rows]

    def messages(
        self, wanted: Wanted, limit: int, after: str | None = None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """A page, and the word with which the next one is asked for; None: there is none.

        Of one batch in the order of its input, else what was due last comes first. Raises
        InvalidMessages where `after` is no such word.
        """
        m = messages.c
        asked = _asked(wanted)
        order: list[ColumnElement[Any]]
        if wanted.batch_id is not None:
            order = [m.position]
            asked += [m.position > _position(after)] if after else []
        else:
            order = [m.due_at.desc(), m.id.desc()]
            asked += [_before(after)] if after else []
        with self._reading() as connection:
            rows = connection.execute(
                select(
                    m.id, m.batch_id, m.position, m.recipient.label("to"), m.mailbox, m.state,
                    m.attempts, m.error_code, m.request_id, m.due_at, m.sent_at,
                )
                .where(*asked).order_by(*order).limit(limit + 1)
            ).mappings().all()  # fmt: skip
        found = [dict(row) for row in rows[:limit]]
        more = len(rows) > limit
        return found, _word(found[-1], wanted) if more else None


def _start(since: datetime | timedelta) -> ColumnElement[Any]:
    if isinstance(since, timedelta):
        return ago(literal(-since.total_seconds()))
    return literal(since, Instant)


def _asked(wanted: Wanted) -> list[ColumnElement[bool]]:
    m = messages.c
    asked: list[ColumnElement[bool]] = []
    if wanted.batch_id is not None:
        asked.append(m.batch_id == wanted.batch_id)
    if wanted.to is not None:
        left = [wanted.to.lower(), *([wanted.pseudonym] if wanted.pseudonym else [])]
        asked.append(func.lower(m.recipient).in_(left))
    if wanted.state is not None:
        asked.append(is_in(wanted.state))
        if wanted.state not in _BUSY:
            asked.append(is_ended())
    if wanted.code is not None:
        asked.append(m.error_code == wanted.code)
    return asked


def _before(after: str) -> ColumnElement[bool]:
    at, _, last = after.partition("/")
    try:
        due = datetime.fromisoformat(at).astimezone(UTC)
    except ValueError:
        raise _no_word() from None
    m = messages.c
    return tuple_(m.due_at, m.id) < tuple_(literal(due, Instant), literal(last, Id))


def _position(after: str) -> int:
    if not after.isascii() or not after.isdigit() or len(after) > 9:
        raise _no_word()
    return int(after)


def _no_word() -> InvalidMessages:
    return InvalidMessages(
        [Problem(0, "AFTER", "after", "give what the page before named as `next`")]
    )


def _word(last: Mapping[str, Any], wanted: Wanted) -> str:
    if wanted.batch_id is not None:
        return str(last["position"])
    due = last["due_at"].astimezone(UTC).isoformat()
    return f"{due}/{last['id']}"


def _is(state: BatchState) -> ColumnElement[bool]:
    """As `state_of`, in SQL."""
    b = batches.c
    alive, whole = b.cancelled_at.is_(None), b.sealed_at.is_not(None)
    match state:
        case BatchState.CANCELLED:
            return b.cancelled_at.is_not(None)
        case BatchState.OPEN:
            return and_(alive, b.sealed_at.is_(None))
        case BatchState.FINISHED:
            return and_(alive, whole, b.finished_at.is_not(None))
        case BatchState.PAUSED:
            return and_(alive, whole, b.finished_at.is_(None), b.paused_at.is_not(None))
        case BatchState.RUNNING:
            return and_(alive, whole, b.finished_at.is_(None), b.paused_at.is_(None))


def _batch(row: Any, counted: Mapping[str, int]) -> dict[str, Any]:
    return {
        "batch_id": row["id"], "name": row["name"], "state": str(state_of(row)),
        "total": row["total"], "counts": {str(s): 0 for s in State} | dict(counted),
        "target": row["target"], "target_kind": row["target_kind"],
        "created_at": row["created_at"], "finished_at": row["finished_at"],
    }  # fmt: skip
