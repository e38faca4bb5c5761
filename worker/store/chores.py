"""The store's part in the sweep: leases and deadlines that ran out, batches that ended."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Connection,
    Integer,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from worker.model import State
from worker.store.clock import now
from worker.store.schema import Id, attempts, batches, drafts, is_in, mailboxes, messages, queues
from worker.store.sending import POISON
from worker.store.statements import first_look, running, taken_back

#: How many rows one step of a chore takes: enough to be quick, few enough to be short.
STEP = 500


def end_leases(connection: Connection, *, resend: bool, max_attempts: int) -> int:
    """Claims whose lease ran out: their worker is dead or late, and nobody knows what it sent.

    sending → unknown; with `resend` queued again, until its tries are spent. What goes by a draft
    that nobody released was surely not sent: it goes on.
    """
    overdue = (
        select(messages.c.id)
        .where(is_in(State.SENDING), messages.c.lease_until < now())
        .order_by(messages.c.id)
        .limit(STEP)
        .with_for_update(skip_locked=True)
    )
    ended = connection.execute(
        update(messages)
        .where(messages.c.id.in_(overdue), is_in(State.SENDING))
        .values(**_end_of_claim(resend, max_attempts))
        .returning(
            messages.c.id, messages.c.fence, messages.c.batch_id, messages.c.queue_id,
            messages.c.mailbox, messages.c.worker, messages.c.token_ends_at,
            messages.c.recipients, messages.c.size, messages.c.external, messages.c.state,
            messages.c.doubt,
        )
    ).mappings().all()  # fmt: skip
    if ended:
        connection.execute(insert(attempts).values(at=now()), [_lost(row) for row in ended])
    for queue in sorted({row["queue_id"] for row in ended if row["state"] == State.QUEUED}):
        wake_queue(connection, queue)
    return len(ended)


def _end_of_claim(resend: bool, max_attempts: int) -> dict[str, Any]:
    """What becomes of a message whose claim ended without a word."""
    again = and_(
        literal(resend),
        messages.c.tries + 1 < max_attempts,
        messages.c.crashes + 1 < POISON,
        ~taken_back(messages.c.batch_id),
    )
    poisoned = messages.c.crashes + 1 >= POISON
    unreleased = exists().where(drafts.c.message_id == messages.c.id, ~drafts.c.released)
    safe = and_(unreleased, ~messages.c.doubt)
    cancelled = taken_back(messages.c.batch_id)
    becomes = case(
        (and_(safe, cancelled), State.CANCELLED),
        (and_(safe, poisoned), State.FAILED),
        (and_(unreleased, ~cancelled, ~poisoned), State.QUEUED),
        (again, State.QUEUED),
        else_=State.UNKNOWN,
    )
    return {
        "state": becomes,
        "doubt": ~safe,
        "lease_until": None,
        "due_at": now(),
        "tries": messages.c.tries + case((unreleased, 0), else_=1),
        "crashes": messages.c.crashes + 1,
        "error_code": case((poisoned, "Quarantined"), else_="LeaseExpired"),
        **first_look(becomes == State.UNKNOWN),
    }


def _lost(row: Any) -> dict[str, Any]:
    return {
        "message_id": row["id"], "fence": row["fence"], "late": False,
        "batch_id": row["batch_id"], "mailbox": row["mailbox"], "worker": row["worker"],
        "outcome": "unknown" if row["doubt"] else "notsent", "code": "LeaseExpired",
        "detail": "the worker that had claimed it was not heard of again",
        "token_ends_at": row["token_ends_at"], "recipients": row["recipients"],
        "size": row["size"], "external": row["external"],
    }  # fmt: skip


def wake_queue(connection: Connection, queue_id: str) -> None:
    """Some of this queue's messages became due now."""
    connection.execute(
        update(queues)
        .where(queues.c.id == queue_id)
        .values(next_due_at=now(), revision=queues.c.revision + 1)
    )


def end_deadlines(connection: Connection) -> int:
    """queued → expired for what waited too long; unknown if it is in doubt."""
    late = connection.execute(
        select(queues.c.id, queues.c.revision)
        .where(queues.c.deadline_at <= now())
        .order_by(queues.c.id)
        .limit(16)
    )
    ended = 0
    for queue, revision in late.all():
        overdue = (
            select(messages.c.id)
            .where(
                messages.c.queue_id == queue,
                is_in(State.QUEUED),
                messages.c.deadline_at <= now(),
            )
            .order_by(messages.c.id)
            .limit(STEP)
            .with_for_update(skip_locked=True)
        )
        done = connection.execute(
            update(messages)
            .where(messages.c.id.in_(overdue), is_in(State.QUEUED))
            .values(
                state=case((messages.c.doubt, State.UNKNOWN), else_=State.EXPIRED),
                error_code=func.coalesce(messages.c.error_code, "Expired"),
                **first_look(messages.c.doubt),
            )
        )
        ended += done.rowcount
        if done.rowcount < STEP:
            _next_deadline(connection, queue, revision)
            # No lane may look here for long: its mailbox may rest.
            correct_queue(connection, queue, revision)
    return ended


def _next_deadline(connection: Connection, queue: str, revision: int) -> None:
    """Says when the next deadline is, unless someone queued a message since `revision` was seen.

    What is being sent counts too: it may come back to its queue.
    """
    left = union_all(
        *(
            select(messages.c.deadline_at).where(messages.c.queue_id == queue, is_in(state))
            for state in (State.QUEUED, State.SENDING)
        )
    ).subquery("left")
    connection.execute(
        update(queues)
        .where(queues.c.id == queue, queues.c.revision == revision)
        .values(deadline_at=select(func.min(left.c.deadline_at)).scalar_subquery())
    )


def correct_queue(connection: Connection, queue_id: str, revision: int) -> None:
    """A lane found nothing due: says when the next is, unless someone made one due meanwhile."""
    soonest = (
        select(func.min(messages.c.due_at))
        .where(
            messages.c.queue_id == bindparam("queue", type_=Id),
            is_in(State.QUEUED),
        )
        .scalar_subquery()
    )
    connection.execute(
        update(queues)
        .where(
            queues.c.id == bindparam("queue", type_=Id),
            queues.c.revision == bindparam("seen", type_=Integer),
        )
        .values(next_due_at=soonest),
        {"queue": queue_id, "seen": revision},
    )


def finish_batches(connection: Connection) -> list[Any]:
    """Batches of which nothing is queued or sending any more: id, name and options of each.

    Two statements: whoever reopens a batch locks it too, so only what is seen once the lock is
    held is still true when this commits.
    """
    b = batches.c
    waiting = exists().where(
        queues.c.batch_id == b.id, messages.c.queue_id == queues.c.id, is_in(State.QUEUED)
    )
    sending = exists().where(messages.c.batch_id == b.id, is_in(State.SENDING))
    # A lane says so when it finds a queue empty; in a cancelled batch no lane looks any more.
    empty = ~exists().where(queues.c.batch_id == b.id, queues.c.next_due_at.is_not(None))
    over = and_(
        b.finished_at.is_(None),
        or_(and_(b.sealed_at.is_not(None), empty), b.cancelled_at.is_not(None)),
        ~waiting,
        ~sending,
    )
    ids = connection.execute(
        select(b.id).where(over).order_by(b.id).limit(STEP).with_for_update(skip_locked=True)
    ).scalars().all()  # fmt: skip
    if not ids:
        return []
    ended = connection.execute(
        update(batches)
        .where(b.id.in_(ids), over)
        .values(finished_at=now(), told_at=case((_nobody_waits(), now()), else_=None))
        .returning(batches.c.id, batches.c.name, batches.c.options)
    )  # fmt: skip
    return list(ended.mappings())


def _nobody_waits() -> ColumnElement[bool]:
    """Whether no task of the application's is to be told of the batch's end."""
    task: ColumnElement[str] = batches.c.options["on_finished"].as_string()
    return task.is_(None)


def untold(connection: Connection) -> list[Any]:
    """Finished batches whose application does not know yet: id and options of some of them."""
    rows = connection.execute(
        select(batches.c.id, batches.c.options)
        .where(batches.c.finished_at.is_not(None), batches.c.told_at.is_(None))
        .order_by(batches.c.id)
        .limit(STEP)
    )
    return list(rows.mappings())


def told(connection: Connection, batch_id: str) -> None:
    """The application knows that the batch has finished, unless it was reopened meanwhile."""
    connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.finished_at.is_not(None))
        .values(told_at=now())
    )


def due_targets(connection: Connection) -> list[tuple[str, str]]:
    """(kind, target) of every queue that has due work: one row a queue, whatever the backlog.

    Without the mailboxes that are suspended, until their probe is due.
    """
    rests = exists().where(
        queues.c.target_kind == "mailbox", mailboxes.c.address == queues.c.target,
        mailboxes.c.suspended_at.is_not(None),
        or_(mailboxes.c.probe_at.is_(None), mailboxes.c.probe_at > now()),
    )  # fmt: skip
    rows = connection.execute(
        select(queues.c.target_kind, queues.c.target)
        .where(queues.c.next_due_at <= now(), running(queues.c.batch_id), ~rests)
        .distinct()
    )
    return [(row.target_kind, row.target) for row in rows]
