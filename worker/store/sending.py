"""The store's part in sending: peek, claim, record, and the end of leases.

One legal transition is one statement with its guard in the WHERE. Rows to change travel as one
JSON parameter, so that a statement has the same text, and cost, for one message and for a hundred.
Times travel as seconds from now: the database's clock is the only one that decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
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
    cast,
    column,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import FromClause

from worker.model import Due, Outcome, State, Verdict
from worker.store.clock import after, now
from worker.store.schema import Id, attempts, batches, mailboxes, messages, queues

#: A message whose claims ended without a word this many times is set aside: it may be the message.
POISON = 3


@dataclass(frozen=True, slots=True)
class ToClaim:
    """A request to claim message `id`, whose request will be `size` bytes long."""

    id: str
    size: int
    mailbox: str
    worker: str
    lease: float  #: seconds
    token_left: float  #: seconds until the bearer token that will be used ends


@dataclass(frozen=True, slots=True)
class ToRecord:
    """What came of claim (id, fence), to be written: the attempt and the message's next state."""

    id: str
    fence: int
    batch_id: str
    queue_id: str
    mailbox: str
    worker: str
    recipients: int
    size: int
    outcome: Outcome
    verdict: Verdict
    token_left: float


def given(dialect: str, **columns: Any) -> FromClause:
    """The rows of the JSON parameter `rows` as a table, the same for both databases."""
    if dialect == "postgresql":
        names = [column(name, kind) for name, kind in columns.items()]
        call = func.jsonb_to_recordset(cast(bindparam("rows", type_=Text), JSONB))
        return call.table_valued(*names, name="given").render_derived(with_types=True)
    each = func.json_each(bindparam("rows", type_=Text)).table_valued("value", name="each")
    picked = [
        cast(func.json_extract(each.c.value, f"$.{name}"), kind).label(name)
        if not isinstance(kind, Boolean)
        else (func.json_extract(each.c.value, f"$.{name}") == 1).label(name)
        for name, kind in columns.items()
    ]
    return select(*picked).select_from(each).subquery("given")


def running(batch_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether the batch may be sent from now: whole, not paused, not cancelled."""
    its = batches.alias("its_batch")
    return exists().where(
        its.c.id == batch_id,
        its.c.sealed_at.is_not(None),
        its.c.paused_at.is_(None),
        its.c.cancelled_at.is_(None),
    )


def due_queues(mailbox: str, pools: Sequence[str]) -> Select[Any]:
    """The queues that this mailbox may serve now, best priority first."""
    mine = and_(queues.c.target_kind == "mailbox", queues.c.target == mailbox)
    ours = and_(queues.c.target_kind == "pool", queues.c.target.in_(pools))
    return (
        select(
            queues.c.id,
            queues.c.priority,
            queues.c.revision,
            queues.c.target_kind,
            batches.c.id.label("batch_id"),
            batches.c.template,
        )
        .join(batches, batches.c.id == queues.c.batch_id)
        .where(or_(mine, ours), queues.c.next_due_at <= now(), running(queues.c.batch_id))
        .order_by(queues.c.priority, queues.c.next_due_at)
        .limit(64)
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
            messages.c.state == State.QUEUED,
            messages.c.due_at <= now(),
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


class Sending:
    """The statements of sending, compiled once for one database."""

    def __init__(self, dialect: str) -> None:
        self._peek = peek_statement()
        self._claim = _claim_statement(dialect)
        self._record = _record_statement(dialect)
        self._evidence = _evidence_statement(dialect)
        self._attempts = _attempts_statement(dialect)
        self._wake = _wake_statement(dialect)

    def peek(
        self, connection: Connection, queue: str, *, count: int, share: int, shares: int
    ) -> list[Due]:
        """The next due messages of a queue, at most `count`; none of them is claimed yet."""
        window = count * min(shares, 16)
        parameters = {
            "queue": queue,
            "count": count,
            "share": share,
            "shares": shares,
            "window": window,
        }
        return [Due(**row) for row in connection.execute(self._peek, parameters).mappings()]

    def claim(self, connection: Connection, wanted: Sequence[ToClaim]) -> dict[str, int]:
        """Claims what still may be sent: message id → fencing number. queued → sending."""
        rows = [
            {
                "id": c.id,
                "size": c.size,
                "mailbox": c.mailbox,
                "worker": c.worker,
                "lease": c.lease,
                "token_left": c.token_left,
            }
            for c in sorted(wanted, key=lambda c: c.id)
        ]
        found = connection.execute(self._claim, {"rows": json.dumps(rows)})
        return {row.id: row.fence for row in found}

    def record(self, connection: Connection, results: Sequence[ToRecord]) -> set[str]:
        """Writes attempts and next states; gives the ids whose claim was still ours.

        A second call with the same results changes nothing. A claim that was given up meanwhile
        is not touched, but a late 202 is proof: whatever the state, it becomes `sent`.
        """
        rows = json.dumps([_row(r) for r in sorted(results, key=lambda r: r.id)])
        ours = {row.id for row in connection.execute(self._record, {"rows": rows})}
        late = self._late(connection, [r for r in results if r.id not in ours])
        self._audit(connection, [r for r in results if r.id in ours], late=False)
        self._audit(connection, late, late=True)
        proofs = [_row(r) for r in late if r.verdict.state is State.SENT]
        if proofs:
            connection.execute(self._evidence, {"rows": json.dumps(proofs)})
        requeued = [r for r in results if r.id in ours and r.verdict.state is State.QUEUED]
        self._wake_queues(connection, requeued)
        self._cool(connection, results)
        return ours

    def _late(self, connection: Connection, results: Sequence[ToRecord]) -> list[ToRecord]:
        """Those that come after their claim was given up, not those that are merely repeated."""
        if not results:
            return []
        found = connection.execute(
            select(attempts.c.client_request_id).where(
                attempts.c.message_id.in_([r.id for r in results]),
                attempts.c.client_request_id.is_not(None),
            )
        )
        told = set(found.scalars())
        return [r for r in results if r.outcome.answer.client_request_id not in told]

    def _audit(self, connection: Connection, results: Sequence[ToRecord], *, late: bool) -> None:
        if results:
            rows = [_row(r) | {"late": late} for r in results]
            connection.execute(self._attempts, {"rows": json.dumps(rows)})

    def _wake_queues(self, connection: Connection, requeued: Sequence[ToRecord]) -> None:
        soonest: dict[str, float] = {}
        for r in requeued:
            delay = r.verdict.delay.total_seconds()
            soonest[r.queue_id] = min(delay, soonest.get(r.queue_id, delay))
        if soonest:
            rows = [{"id": q, "delay": d} for q, d in sorted(soonest.items())]
            connection.execute(self._wake, {"rows": json.dumps(rows)})

    def _cool(self, connection: Connection, results: Sequence[ToRecord]) -> None:
        """Keeps the longest cooldown of each mailbox, for the day that Redis forgets."""
        longest: dict[str, timedelta] = {}
        for r in results:
            if r.verdict.cooldown:
                longest[r.mailbox] = max(r.verdict.cooldown, longest.get(r.mailbox, timedelta(0)))
        for mailbox, rest in sorted(longest.items()):
            until = after(literal(rest.total_seconds(), Float))
            done = connection.execute(
                update(mailboxes).where(mailboxes.c.address == mailbox).values(cooldown_until=until)
            )
            if not done.rowcount:
                connection.execute(_insert_mailbox(connection, mailbox, until))


def _insert_mailbox(connection: Connection, mailbox: str, until: ColumnElement[Any]) -> Any:
    return (
        insert_for(connection.dialect.name)(mailboxes)
        .values(address=mailbox, cooldown_until=until)
        .on_conflict_do_update(index_elements=["address"], set_={"cooldown_until": until})
    )


def _row(r: ToRecord) -> dict[str, Any]:
    answer = r.outcome.answer
    return {
        "id": r.id, "fence": r.fence, "batch_id": r.batch_id, "mailbox": r.mailbox,
        "worker": r.worker, "recipients": r.recipients, "size": r.size,
        "outcome": type(r.outcome).__name__.lower(), "status": answer.status, "code": answer.code,
        "detail": answer.detail, "request_id": answer.request_id,
        "client_request_id": answer.client_request_id,
        "retry_after": answer.retry_after.total_seconds() if answer.retry_after else None,
        "duration": answer.duration.total_seconds(), "token_left": r.token_left,
        "state": r.verdict.state, "delay": r.verdict.delay.total_seconds(),
        "tries": int(r.verdict.spends_try), "doubt": r.verdict.doubt,
    }  # fmt: skip


def _claim_statement(dialect: str) -> Any:
    rows = given(
        dialect,
        id=Id,
        size=Integer(),
        mailbox=Text(),
        worker=Text(),
        lease=Float(),
        token_left=Float(),
    )
    return (
        update(messages)
        .where(
            messages.c.id == rows.c.id,
            messages.c.state == State.QUEUED,
            messages.c.due_at <= now(),
            messages.c.deadline_at > now(),
            running(messages.c.batch_id),
        )
        .values(
            state=State.SENDING,
            fence=messages.c.fence + 1,
            attempts=messages.c.attempts + 1,
            size=rows.c.size,
            mailbox=rows.c.mailbox,
            worker=rows.c.worker,
            lease_until=after(rows.c.lease),
            token_ends_at=after(rows.c.token_left),
        )
        .returning(messages.c.id, messages.c.fence)
    )


def _record_statement(dialect: str) -> Any:
    """sending → what the verdict says, while the claim is ours.

    A message that returns to its queue ends where its batch is: cancelled, if that was cancelled
    meanwhile, and unknown rather than cancelled if it is in doubt.
    """
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
    taken_back = exists().where(
        batches.c.id == messages.c.batch_id, batches.c.cancelled_at.is_not(None)
    )
    doubt = or_(messages.c.doubt, rows.c.doubt)
    state = case(
        (and_(rows.c.state == State.QUEUED, taken_back, doubt), State.UNKNOWN),
        (and_(rows.c.state == State.QUEUED, taken_back), State.CANCELLED),
        (and_(rows.c.state == State.FAILED, doubt), State.UNKNOWN),
        else_=rows.c.state,
    )
    sent = rows.c.state == State.SENT
    return (
        update(messages)
        .where(
            messages.c.id == rows.c.id,
            messages.c.fence == rows.c.fence,
            messages.c.state == State.SENDING,
        )
        .values(
            state=state,
            lease_until=None,
            due_at=case(
                (rows.c.state == State.QUEUED, after(rows.c.delay)), else_=messages.c.due_at
            ),
            tries=messages.c.tries + rows.c.tries,
            doubt=and_(doubt, ~sent),
            error_code=case((sent, None), else_=rows.c.code),
            request_id=func.coalesce(rows.c.request_id, messages.c.request_id),
            sent_at=case((sent, now()), else_=None),
        )
        .returning(messages.c.id)
    )


def _evidence_statement(dialect: str) -> Any:
    """A late 202: any state → sent. Evidence only rises."""
    rows = given(dialect, id=Id, fence=Integer(), request_id=Text())
    return (
        update(messages)
        .where(messages.c.id == rows.c.id, messages.c.state != State.SENT)
        .values(
            state=State.SENT,
            sent_at=now(),
            lease_until=None,
            doubt=False,
            error_code=None,
            request_id=rows.c.request_id,
        )
    )


def _attempts_statement(dialect: str) -> Any:
    rows = given(
        dialect, id=Id, fence=Integer(), late=Boolean(), batch_id=Id, mailbox=Text(),
        worker=Text(), outcome=Text(), status=Integer(), code=Text(), detail=Text(),
        request_id=Text(), client_request_id=Text(), retry_after=Float(), duration=Float(),
        token_left=Float(), recipients=Integer(), size=Integer(),
    )  # fmt: skip
    c = rows.c
    chosen = select(
        c.id,
        c.fence,
        c.late,
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
        now(),
    ).where(literal(True))  # SQLite cannot parse INSERT ... SELECT ... ON CONFLICT without WHERE
    names = [
        "message_id", "fence", "late", "batch_id", "mailbox", "worker", "outcome", "status",
        "code", "detail", "request_id", "client_request_id", "retry_after", "duration",
        "token_ends_at", "recipients", "size", "at",
    ]  # fmt: skip
    return insert_for(dialect)(attempts).from_select(names, chosen).on_conflict_do_nothing()


def insert_for(dialect: str) -> Any:
    """The INSERT that knows ON CONFLICT, for this database."""
    return postgresql.insert if dialect == "postgresql" else sqlite.insert


def _wake_statement(dialect: str) -> Any:
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
