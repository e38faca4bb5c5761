"""The store's part for operators: pause, resume, cancel and retry of batches.

Each call is idempotent and leaves one event for what it changed. It locks the batch before its
messages, as arrival does; a claim sees what is said here in its own WHERE.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import (
    Connection,
    and_,
    case,
    exists,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from worker.model import BatchState, State, WrongState
from worker.store.batches import counts, state_of
from worker.store.clock import after, now
from worker.store.schema import attempts, batches, events, is_in, messages, queues
from worker.store.statements import first_look
from worker.store.transactions import Transactions

#: How many messages one step takes: enough to be quick, few enough to be short.
STEP = 5_000


class Control(Transactions):
    """What an operator does to a whole batch. None: the batch is not in SQL (yet)."""

    def pause(self, batch_id: str, *, by: str, why: str | None) -> dict[str, Any] | None:
        """Nothing more of it is claimed: {"batch_id", "state", "queued", "in_flight"}.

        Raises WrongState where it has ended.
        """
        if not self._do(partial(_pause, batch_id=batch_id, by=by, why=why)):
            return None
        return self._how_far(batch_id)

    def resume(self, batch_id: str, *, by: str, why: str | None) -> dict[str, Any] | None:
        """Ends a pause; the answer is that of `pause`. Raises WrongState where it is cancelled."""
        if not self._do(partial(_resume, batch_id=batch_id, by=by, why=why)):
            return None
        return self._how_far(batch_id)

    def cancel(self, batch_id: str, *, by: str, why: str | None) -> dict[str, Any] | None:
        """Takes back what is queued; what is in flight ends, and so does what arrives later.

        {"batch_id", "state", "cancelled", "in_flight", "unknown"}: how many messages of the batch
        are in each of these. Raises WrongState where it is finished.
        """
        if not self._do(partial(_call_off, batch_id=batch_id, by=by, why=why)):
            return None
        while self._do(partial(_take_back, batch_id=batch_id)) == STEP:
            pass
        with self._reading() as connection:
            found = counts(connection, batch_id)
            return _stands(connection, batch_id) | {
                "cancelled": found[State.CANCELLED], "in_flight": found[State.SENDING],
                "unknown": found[State.UNKNOWN],
            }  # fmt: skip

    def retry(
        self, batch_id: str, *, code: str | None = None, since: datetime | None = None,
        include_unknown: bool = False, dry_run: bool = False, by: str, why: str | None, age: float,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Queues the failed messages again with fresh tries: {"requeued", "left": {state: n}}.

        Only those with this error code, and last tried at or after `since`, where given. Those
        whose content is not kept stay. `age` in seconds. Raises WrongState where it is cancelled.
        """
        which = wanted(batch_id, code=code, since=since, include_unknown=include_unknown)
        if dry_run:
            return self._do(partial(_would_retry, batch_id=batch_id, which=which))
        detail = {"include_unknown": include_unknown} | ({"code": code} if code else {})
        detail |= {"since": since.isoformat()} if since else {}
        return self._do(partial(requeue, batch_id=batch_id, which=which, by=by, why=why, age=age,
                                detail=detail))  # fmt: skip

    def end_cancelled(self) -> int:
        """Takes back what came to a cancelled batch's queue in a race, or what a `cancel` that was
        killed has left; how many.
        """
        b = batches.c
        with self._reading() as connection:
            found = connection.execute(
                select(b.id).where(b.finished_at.is_(None), b.cancelled_at.is_not(None)).limit(16)
            ).scalars().all()  # fmt: skip
        return sum(self._do(partial(_take_back, batch_id=one)) for one in found)

    def _how_far(self, batch_id: str) -> dict[str, Any]:
        """Counted after the commit: until then lanes go on claiming."""
        with self._reading() as connection:
            found = counts(connection, batch_id)
            return _stands(connection, batch_id) | {
                "queued": found[State.QUEUED], "in_flight": found[State.SENDING],
            }  # fmt: skip


# ---- pause and resume ---------------------------------------------------------------------------


def _pause(connection: Connection, *, batch_id: str, by: str, why: str | None) -> bool:
    """False: no such batch."""
    row = _locked(connection, batch_id)
    if row is None:
        return False
    if (state := state_of(row)) in {BatchState.CANCELLED, BatchState.FINISHED}:
        raise WrongState(f"batch {batch_id} is {state}: there is nothing to pause")
    if row["paused_at"] is None:
        _set(connection, batch_id, paused_at=now())
        _tell(connection, "pause", batch_id, by, why)
    return True


def _resume(connection: Connection, *, batch_id: str, by: str, why: str | None) -> bool:
    """False: no such batch."""
    row = _locked(connection, batch_id)
    if row is None:
        return False
    if (state := state_of(row)) is BatchState.CANCELLED:
        raise WrongState(f"batch {batch_id} is {state}: it cannot be resumed")
    if row["paused_at"] is not None:
        # Whoever resumes has seen why it was paused: failures in a row count anew.
        _set(connection, batch_id, paused_at=None, rejections=0)
        _tell(connection, "resume", batch_id, by, why)
    return True


# ---- cancel -------------------------------------------------------------------------------------


def _call_off(connection: Connection, *, batch_id: str, by: str, why: str | None) -> bool:
    """From the commit on nothing more is claimed; False: no such batch."""
    row = _locked(connection, batch_id)
    if row is None:
        return False
    if (state := state_of(row)) is BatchState.FINISHED:
        raise WrongState(f"batch {batch_id} is {state}: nothing of it is left to cancel")
    if row["cancelled_at"] is None:
        _set(connection, batch_id, cancelled_at=now())
        _tell(connection, "cancel", batch_id, by, why)
    return True


def _take_back(connection: Connection, *, batch_id: str) -> int:
    """queued → cancelled for a step of messages; unknown if in doubt. How many."""
    its_queues = select(queues.c.id).where(queues.c.batch_id == batch_id)
    step = (
        select(messages.c.id)
        .where(messages.c.queue_id.in_(its_queues), is_in(State.QUEUED))
        .limit(STEP)
        .with_for_update()
    )
    done = connection.execute(
        update(messages)
        .where(messages.c.id.in_(step), is_in(State.QUEUED))
        .values(
            state=case((messages.c.doubt, State.UNKNOWN), else_=State.CANCELLED),
            **first_look(messages.c.doubt),
        )
    )
    return done.rowcount


# ---- retry --------------------------------------------------------------------------------------


def wanted(
    batch_id: str, *, code: str | None, since: datetime | None, include_unknown: bool
) -> ColumnElement[bool]:
    """Which messages a retry means."""
    states = [is_in(State.FAILED), *([is_in(State.UNKNOWN)] if include_unknown else [])]
    # What has no content any more (unreadable when it arrived, or purged) cannot be sent.
    which = [messages.c.batch_id == batch_id, or_(*states), messages.c.content.is_not(null())]
    if code is not None:
        which.append(messages.c.error_code == code)
    if since is not None:
        tried = attempts.c.message_id == messages.c.id
        which.append(exists().where(tried, attempts.c.at >= since))
    return and_(*which)


def requeue(
    connection: Connection, *, batch_id: str, which: ColumnElement[bool], by: str,
    why: str | None, age: float, detail: dict[str, Any] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """failed (and unknown, if asked) → queued, with fresh tries; doubt stays, attempts stay.

    One transaction under the batch's lock: of two at once, the second finds nothing left to do.
    """
    row = _locked(connection, batch_id)
    if row is None:
        return None
    _not_cancelled(row)
    # By their ids: a search that is repeated passes all that this transaction has moved before.
    ids = connection.execute(select(messages.c.id).where(which)).scalars().all()
    requeued, touched = 0, set[str]()
    for start in range(0, len(ids), STEP):
        done = _requeue_step(connection, ids[start : start + STEP], which, age)
        requeued += len(done)
        touched.update(done)
    if requeued:
        _make_due(connection, touched, age)
        _set(connection, batch_id, finished_at=None, rejections=0)
        _tell(connection, "retry", batch_id, by, why, {"requeued": requeued, **(detail or {})})
    found = counts(connection, batch_id)
    found[State.QUEUED] -= requeued
    return {"requeued": requeued, "left": {state: n for state, n in found.items() if n}}


def _requeue_step(
    connection: Connection, ids: Sequence[str], which: ColumnElement[bool], age: float
) -> Sequence[str]:
    """The queues of those that were still to be had."""
    queued = connection.execute(
        update(messages)
        .where(messages.c.id.in_(ids), which)
        .values(
            state=State.QUEUED, tries=0, crashes=0, due_at=now(), look_at=None,
            deadline_at=after(literal(age)), error_code=None,
        )
        .returning(messages.c.queue_id)
    )  # fmt: skip
    return queued.scalars().all()


def _make_due(connection: Connection, touched: set[str], age: float) -> None:
    deadline, there = after(literal(age)), queues.c.deadline_at
    connection.execute(
        update(queues)
        .where(queues.c.id.in_(sorted(touched)))
        .values(
            next_due_at=now(), revision=queues.c.revision + 1,
            deadline_at=case((there < deadline, there), else_=deadline),
        )
    )  # fmt: skip


def _would_retry(
    connection: Connection, *, batch_id: str, which: ColumnElement[bool]
) -> dict[str, Any] | None:
    """What `requeue` would answer now."""
    row = _locked(connection, batch_id)
    if row is None:
        return None
    _not_cancelled(row)
    found = counts(connection, batch_id)
    meant = connection.execute(
        select(messages.c.state, func.count()).where(which).group_by(messages.c.state)
    )
    requeued = 0
    for state, n in meant.all():
        requeued, found[state] = requeued + n, found[state] - n
    return {"requeued": requeued, "left": {state: n for state, n in found.items() if n}}


# ---- what they share ----------------------------------------------------------------------------


def _locked(connection: Connection, batch_id: str) -> Any:
    return connection.execute(
        select(batches).where(batches.c.id == batch_id).with_for_update()
    ).mappings().first()  # fmt: skip


def _not_cancelled(row: Any) -> None:
    if row["cancelled_at"] is not None:
        raise WrongState(f"batch {row['id']} is cancelled: nothing of it is sent again")


def _stands(connection: Connection, batch_id: str) -> dict[str, Any]:
    row = connection.execute(select(batches).where(batches.c.id == batch_id)).mappings().one()
    return {"batch_id": batch_id, "state": str(state_of(row))}


def _set(connection: Connection, batch_id: str, **values: Any) -> None:
    connection.execute(update(batches).where(batches.c.id == batch_id).values(**values))


def _tell(
    connection: Connection, kind: str, batch_id: str, by: str, why: str | None,
    detail: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    connection.execute(
        insert(events).values(at=now(), kind=kind, batch_id=batch_id, by=by, why=why, detail=detail)
    )
