"""The statements of sending, for both databases.

One legal transition is one statement with its guard in the WHERE. Rows to change travel as one
JSON parameter, so that a statement has the same text, and cost, for one message and for a hundred.
Times travel as seconds from now: the database's clock is the only one that decides.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    Connection,
    Float,
    Integer,
    Select,
    String,
    Text,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.elements import ColumnElement

from worker.model import State
from worker.policy import look_after
from worker.store.clock import after, now
from worker.store.given import given, is_among, is_given
from worker.store.schema import (
    Id,
    Json,
    attempts,
    batches,
    drafts,
    is_in,
    mailboxes,
    messages,
    queues,
    suppressions,
)


def running(batch_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether the batch may be sent from now: whole, not paused, not cancelled."""
    its = batches.alias("its_batch")
    return exists().where(
        its.c.id == batch_id,
        its.c.sealed_at.is_not(None),
        its.c.paused_at.is_(None),
        its.c.cancelled_at.is_(None),
    )


def taken_back(batch_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether the batch was cancelled: what would return to its queue ends instead."""
    its = batches.alias("cancelled_batch")
    return exists().where(its.c.id == batch_id, its.c.cancelled_at.is_not(None))


def rejections_of(batch_id: ColumnElement[Any]) -> ColumnElement[Any]:
    """How many messages of the batch were rejected in a row."""
    its = batches.alias("counted_batch")
    return select(its.c.rejections).where(its.c.id == batch_id).scalar_subquery()


def suppressed(dialect: str, addresses: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether one of the addresses, a JSON array, is not to be written to."""
    if dialect == "postgresql":
        each = func.jsonb_array_elements_text(addresses).table_valued("value", name="one")
    else:
        each = func.json_each(addresses).table_valued("value", name="one")
    return exists().where(suppressions.c.address == each.c.value)


def due_queues(dialect: str) -> Select[Any]:
    """The queues that `mailbox`, which is in these `pools`, may serve now, best priority first."""
    its = queues.c.target == bindparam("mailbox", type_=Text)
    mine = and_(queues.c.target_kind == "mailbox", its)
    ours = and_(queues.c.target_kind == "pool", is_among(dialect, queues.c.target, "pools"))
    return (
        select(
            queues.c.id,
            queues.c.priority,
            queues.c.revision,
            queues.c.target_kind,
            queues.c.target,
            batches.c.id.label("batch_id"),
            batches.c.template,
            batches.c.options,
        )
        .join(batches, batches.c.id == queues.c.batch_id)
        .where(or_(mine, ours), queues.c.next_due_at <= now(), running(queues.c.batch_id))
        .order_by(queues.c.priority, queues.c.next_due_at)
        .limit(64)
    )


#: A draft that did not go on for so many seconds holds its message to its mailbox no longer.
STUCK = 1800.0


def _drafted_elsewhere() -> ColumnElement[bool]:
    """Whether a message goes by a draft in another mailbox than `mailbox`."""
    return exists().where(
        drafts.c.message_id == messages.c.id,
        drafts.c.mailbox != bindparam("mailbox", type_=Text),
        drafts.c.at > after(literal(-STUCK, Float)),
    )


def peek_statement() -> Select[Any]:
    """The next due messages of `queue`, those of this mailbox's `share` of `shares` first.

    The lanes of a pool look at the same queue: by preferring different positions they seldom ask
    for the same message. `window` bounds what is read, whatever lies in the queue.
    """
    window = (
        select(messages)
        .where(
            messages.c.queue_id == bindparam("queue", type_=Id),
            is_in(State.QUEUED),
            messages.c.due_at <= now(),
            messages.c.deadline_at > now(),
            ~_drafted_elsewhere(),
        )
        .order_by(messages.c.due_at, messages.c.position)
        .limit(bindparam("window", type_=Integer))
        .subquery("front")
    )
    mine = window.c.position % bindparam("shares", type_=Integer) == bindparam(
        "share", type_=Integer
    )
    return (
        select(
            window.c.id,
            window.c.batch_id,
            window.c.queue_id,
            window.c.content,
            window.c.recipients,
            window.c.tries,
            window.c.doubt,
            window.c.fence,
        )
        .order_by(case((mine, 0), else_=1), window.c.due_at, window.c.position)
        .limit(bindparam("count", type_=Integer))
    )


def guarded(*guards: ColumnElement[bool]) -> ColumnElement[bool]:
    """All of these, in a form that no index can serve: the rows are found by their ids.

    After a large ingest PostgreSQL's statistics are a minute behind: it takes "queued" for rare,
    would read the whole backlog by another index, and look for the ids in it.
    """
    return case((and_(*guards), True), else_=False)


def claim_statement(dialect: str) -> Any:
    rows = given(
        dialect,
        id=Id,
        size=Integer(),
        external=Integer(),
        mailbox=Text(),
        worker=Text(),
        lease=Float(),
        token_left=Float(),
        addresses=Json if dialect == "postgresql" else Text(),
    )
    return (
        update(messages)
        .where(
            is_given(dialect, rows),
            guarded(
                is_in(State.QUEUED),
                messages.c.due_at <= now(),
                messages.c.deadline_at > now(),
                running(messages.c.batch_id),
                ~suppressed(dialect, rows.c.addresses),
            ),
        )
        .values(
            state=State.SENDING,
            fence=messages.c.fence + 1,
            attempts=messages.c.attempts + 1,
            size=rows.c.size,
            external=rows.c.external,
            mailbox=rows.c.mailbox,
            worker=rows.c.worker,
            lease_until=after(rows.c.lease),
            token_ends_at=after(rows.c.token_left),
        )
        .returning(messages.c.id, messages.c.fence)
    )


def first_look(doubtful: ColumnElement[bool]) -> dict[str, Any]:
    """The columns of its first look, for a message that becomes `unknown` if `doubtful`."""
    soon = after(literal(look_after(0).total_seconds(), Float))
    return {"look_at": case((doubtful, soon), else_=None), "looks": 0}


def _next_state(wanted: ColumnElement[Any], doubt: ColumnElement[bool]) -> ColumnElement[Any]:
    """The verdict's state, but for what SQL alone knows.

    A message that returns to its queue ends where its batch is: cancelled, if that was cancelled
    meanwhile; and what is in doubt ends as neither failed nor cancelled.
    """
    cancelled = taken_back(messages.c.batch_id)
    return case(
        (and_(wanted == State.QUEUED, cancelled, doubt), State.UNKNOWN),
        (and_(wanted == State.QUEUED, cancelled), State.CANCELLED),
        (and_(wanted == State.FAILED, doubt), State.UNKNOWN),
        else_=wanted,
    )


def record_statement(dialect: str) -> Any:
    """sending → what the verdict says, while the claim is ours."""
    rows = given(
        dialect,
        id=Id,
        fence=Integer(),
        state=String(),
        delay=Float(),
        tries=Integer(),
        doubt=Boolean(),
        code=Text(),
        request_id=Text(),
    )
    doubt = or_(messages.c.doubt, rows.c.doubt)
    rejections = rejections_of(messages.c.batch_id).label("rejections")
    sent = rows.c.state == State.SENT
    becomes = _next_state(rows.c.state, doubt)
    return (
        update(messages)
        .where(
            is_given(dialect, rows),
            guarded(messages.c.fence == rows.c.fence, is_in(State.SENDING)),
        )
        .values(
            state=becomes,
            lease_until=None,
            # Without a delay it keeps its place in the queue.
            due_at=case(
                (and_(rows.c.state == State.QUEUED, rows.c.delay > 0), after(rows.c.delay)),
                else_=messages.c.due_at,
            ),
            tries=messages.c.tries + rows.c.tries,
            doubt=and_(doubt, ~sent),
            error_code=case((sent, None), else_=rows.c.code),
            request_id=func.coalesce(rows.c.request_id, messages.c.request_id),
            sent_at=case((sent, now()), else_=None),
            **first_look(becomes == State.UNKNOWN),
        )
        .returning(messages.c.id, messages.c.fence, rejections)
    )


def evidence_statement(dialect: str) -> Any:
    """A late 202: any state → sent. Evidence only rises."""
    rows = given(dialect, id=Id, fence=Integer(), request_id=Text())
    return (
        update(messages)
        .where(is_given(dialect, rows), messages.c.state != State.SENT)
        .values(
            state=State.SENT,
            sent_at=now(),
            lease_until=None,
            look_at=None,
            doubt=False,
            error_code=None,
            request_id=rows.c.request_id,
        )
    )


def attempts_statement(dialect: str) -> Any:
    rows = given(
        dialect, id=Id, fence=Integer(), batch_id=Id, mailbox=Text(),
        worker=Text(), outcome=Text(), status=Integer(), code=Text(), detail=Text(),
        request_id=Text(), client_request_id=Text(), retry_after=Float(), duration=Float(),
        token_left=Float(), recipients=Integer(), size=Integer(), external=Integer(),
    )  # fmt: skip
    c = rows.c
    chosen = select(
        c.id,
        c.fence,
        bindparam("late", type_=Boolean),
        c.batch_id,
        c.mailbox,
        c.worker,
        c.outcome,
        c.status,
        c.code,
        c.detail,
        c.request_id,
        c.client_request_id,
        c.retry_after,
        c.duration,
        after(c.token_left),
        c.recipients,
        c.size,
        c.external,
        now(),
    ).where(literal(True))  # SQLite cannot parse INSERT ... SELECT ... ON CONFLICT without WHERE
    names = [
        "message_id", "fence", "late", "batch_id", "mailbox", "worker", "outcome", "status",
        "code", "detail", "request_id", "client_request_id", "retry_after", "duration",
        "token_ends_at", "recipients", "size", "external", "at",
    ]  # fmt: skip
    return insert_for(dialect)(attempts).from_select(names, chosen).on_conflict_do_nothing()


def insert_for(dialect: str) -> Any:
    """The INSERT that knows ON CONFLICT, for this database."""
    return postgresql.insert if dialect == "postgresql" else sqlite.insert


def wake_statement(dialect: str) -> Any:
    """Messages came back to these queues: due no later than the earliest of them."""
    rows = given(dialect, id=Id, delay=Float())
    sooner = after(rows.c.delay)
    return (
        update(queues)
        .where(queues.c.id == rows.c.id)
        .values(
            next_due_at=case(
                (or_(queues.c.next_due_at.is_(None), queues.c.next_due_at > sooner), sooner),
                else_=queues.c.next_due_at,
            ),
            revision=queues.c.revision + 1,
        )
    )


def cool_mailbox(connection: Connection, mailbox: str, until: ColumnElement[Any]) -> Any:
    there = mailboxes.c.cooldown_until
    longer = case((there > until, there), else_=until)
    return (
        insert_for(connection.dialect.name)(mailboxes)
        .values(address=mailbox, cooldown_until=until)
        .on_conflict_do_update(index_elements=["address"], set_={"cooldown_until": longer})
    )
