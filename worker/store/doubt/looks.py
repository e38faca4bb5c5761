"""Looks that are due, and what they showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, case, exists, insert, null, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from worker.model import State
from worker.store.clock import now
from worker.store.doubt.values import (
    FORBIDDEN,
    FOUND,
    NO_COPY,
    SYSTEM,
    InDoubt,
    Looked,
    go_on,
    may_come,
    seconds_on,
)
from worker.store.schema import attempts, batches, drafts, events, is_in, messages
from worker.store.sending import POISON, plain
from worker.store.statements import insert_for


def due_looks(count: int) -> Any:
    m = messages.c
    due = select(m.id).where(is_in(State.UNKNOWN), m.look_at <= now())
    return due.order_by(m.look_at, m.id).limit(count)


def take(connection: Connection, count: int, lease: float, wait: float) -> list[InDoubt]:
    m = messages.c
    taken = connection.execute(
        update(messages)
        .where(
            m.id.in_(due_looks(count).with_for_update(skip_locked=True)),
            is_in(State.UNKNOWN),
            m.look_at <= now(),
        )
        .values(look_at=seconds_on(lease))
        .returning(
            m.id, m.fence, m.batch_id, m.queue_id, m.looks, m.mailbox, m.crashes,
            m.content["save_to_sent_items"].as_boolean().label("keeps_copy"),
            exists().where(drafts.c.message_id == m.id).label("by_draft"),
        )
    ).all()  # fmt: skip
    if not taken:
        return []
    tried: dict[str, list[Any]] = {row.id: [] for row in taken}
    a = attempts.c
    rows = connection.execute(
        select(a.message_id, a.mailbox, a.token_ends_at, now().label("now"))
        .where(a.message_id.in_(sorted(tried)), a.outcome == "unknown")
        .order_by(a.fence.desc(), a.late)
    )
    for row in rows:
        tried[row.message_id].append(row)
    return [_in_doubt(row, tried[row.id], wait) for row in taken]


def _in_doubt(row: Any, tried: Sequence[Any], wait: float) -> InDoubt:
    ends = [(a.token_ends_at - a.now).total_seconds() for a in tried if a.token_ends_at]
    known = len(ends) == len(tried)
    return InDoubt(
        id=row.id, fence=row.fence, batch_id=row.batch_id, queue_id=row.queue_id,
        looks=row.looks, keeps_copy=row.keeps_copy is not False, by_draft=row.by_draft,
        quarantined=row.crashes >= POISON,
        mailboxes=tuple(dict.fromkeys([a.mailbox for a in tried] or [row.mailbox])),
        left=max(ends, default=-wait) + wait if known else float("inf"),
    )  # fmt: skip


def _still(one: InDoubt) -> tuple[ColumnElement[bool], ...]:
    """The guard: it is in the same doubt as when the look was taken."""
    return (messages.c.id == one.id, messages.c.fence == one.fence, is_in(State.UNKNOWN))


def found(connection: Connection, looked: Looked) -> bool:
    one = looked.one
    done = connection.execute(
        update(messages)
        .where(*_still(one))
        .values(
            state=State.SENT, sent_at=now(), doubt=False, look_at=None, error_code=None,
            looks=messages.c.looks + 1,
        )
    )  # fmt: skip
    if not done.rowcount:
        return False
    # Evidence beside the doubtful attempt. It is no exchange of its own, so it costs nothing.
    evidence = insert_for(connection.dialect.name)(attempts).values(
        message_id=one.id, fence=one.fence, late=True, batch_id=one.batch_id,
        mailbox=looked.mailbox, outcome="accepted", code=FOUND, detail=looked.why, recipients=0,
        at=now(),
    )  # fmt: skip
    connection.execute(evidence.on_conflict_do_nothing())
    _tell(connection, looked)
    _tell_settled(connection, looked, State.SENT)
    return True


def stays(connection: Connection, looked: Looked) -> bool:
    m = messages.c
    code = {"forbidden": FORBIDDEN, "no_copy": NO_COPY}.get(looked.result)
    again = None if looked.again is None else seconds_on(looked.again)
    known = connection.execute(select(m.error_code).where(*_still(looked.one))).scalar()
    done = connection.execute(
        update(messages)
        .where(*_still(looked.one))
        .values(look_at=again, looks=m.looks + 1, error_code=code or m.error_code)
    )
    # That a mailbox may not be read is asked every hour, and said once.
    if done.rowcount and (code is None or code != known):
        _tell(connection, looked)
    return bool(done.rowcount)


def nothing_came(
    connection: Connection, looked: Looked, wait: float, max_attempts: int
) -> State | None:
    """Locks the batch first, as all do who queue again: it may be finishing just now."""
    m, one = messages.c, looked.one
    its = select(batches.c.cancelled_at).where(batches.c.id == one.batch_id).with_for_update()
    cancelled = connection.execute(its).scalar() is not None
    spent = State.FAILED if not cancelled else State.CANCELLED
    again = State.CANCELLED if cancelled else State.QUEUED
    row = connection.execute(
        update(messages)
        .where(*_still(one), ~may_come(wait), m.crashes < POISON)
        .values(
            state=case((or_(m.tries >= max_attempts, m.content.is_(null())), spent), else_=again),
            doubt=False, look_at=None, looks=m.looks + 1, due_at=now(),
        )
        .returning(m.state, m.queue_id, m.deadline_at)
    ).one_or_none()  # fmt: skip
    if row is None:
        return None
    state = State(row.state)
    if state is State.QUEUED:
        go_on(connection, one.batch_id, {row.queue_id: row.deadline_at})
    _tell(connection, looked)
    _tell_settled(connection, looked, state)
    return state


def _tell(connection: Connection, looked: Looked) -> None:
    """The event of a look."""
    one = looked.one
    detail = {"result": looked.result, "look": one.looks + 1, **(looked.detail or {})}
    if looked.again is not None:
        detail["again_after"] = round(looked.again, 1)
    _event(connection, one, "look", looked, detail)


def _tell_settled(connection: Connection, looked: Looked, state: State) -> None:
    _event(connection, looked.one, "settle", looked, {"as": state, "look": looked.result})


def _event(
    connection: Connection, one: InDoubt, kind: str, looked: Looked, detail: Mapping[str, Any]
) -> None:
    clean = {k: plain(v) if isinstance(v, str) else v for k, v in detail.items()}
    connection.execute(
        insert(events).values(
            at=now(), kind=kind, batch_id=one.batch_id, message_id=one.id, mailbox=looked.mailbox,
            by=SYSTEM, why=looked.why, detail=clean,
        )
    )  # fmt: skip
