"""The store's part in ingest: what came through the inbox becomes batches, queues and messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Self

from sqlalchemy import Connection, bindparam, case, func, insert, literal, or_, select, update

from worker.model import NAMESPACE, Priority, State, message_id_of
from worker.store import contents
from worker.store.clock import now
from worker.store.given import given
from worker.store.schema import batches, chunks, events, messages, queues
from worker.store.statements import insert_for

#: The error of messages that came in a chunk that could not be read.
UNREADABLE = "Unreadable"
#: What a batch's head says that is kept as it is.
OPTIONS = ("on_finished", "max_failures", "ignore_suppressions", "by")


@dataclass(frozen=True, slots=True)
class Head:
    """What a batch says of itself, apart from its messages."""

    id: str
    digest: str
    name: str | None
    target_kind: str
    target: str
    priority: int
    chunks: int
    total: int
    created_at: datetime
    due_at: datetime
    deadline_at: datetime
    template: Mapping[str, Any] | None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, batch_id: str, known: Mapping[str, Any], max_age: timedelta) -> Self:
        """The head of a batch as the inbox knows it. Raises ValueError, KeyError, TypeError."""
        head: Mapping[str, Any] = known["head"]
        kind, target = head["target_kind"], head["target"]
        created = datetime.fromisoformat(head["created_at"])
        due = datetime.fromisoformat(head["send_at"]) if head.get("send_at") else created
        expires = datetime.fromisoformat(head["expires_at"]) if head.get("expires_at") else None
        return cls(
            id=batch_id, digest=known["digest"], name=head.get("name"),
            target_kind=kind, target=target.lower() if kind == "mailbox" else target,
            priority=Priority(head["priority"]),
            chunks=known["chunks"], total=known["messages"], created_at=created, due_at=due,
            deadline_at=expires or due + max_age, template=head.get("template"),
            options={name: head.get(name) for name in OPTIONS},
        )  # fmt: skip

    @property
    def queue_id(self) -> str:
        """The id of the batch's queue, the same at every call."""
        return str(uuid.uuid5(NAMESPACE, f"{self.id}/{self.target}/{self.priority}"))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some messages of a batch: rows of (position, recipients, recipient, content).

    `trouble`: why it cannot be read. Then the rows have no content, and end as failed.
    """

    batch_id: str
    number: int
    digest: str
    rows: Sequence[tuple[int, int, str | None, Mapping[str, Any] | None]]
    trouble: str | None = None

    @classmethod
    def lost(cls, batch_id: str, number: int, digest: str, positions: range, why: str) -> Self:
        """A chunk that cannot be read: so many messages at these positions are known to have been
        in it.
        """
        return cls(batch_id, number, digest, [(n, 1, None, None) for n in positions], why)


@dataclass(frozen=True, slots=True)
class BatchSeen:
    """What SQL knows of a batch that is enqueued again."""

    digest: str
    sealed: bool
    chunks: Mapping[int, int]  #: number → count


def arrive(connection: Connection, heads: Iterable[Head], arrived: Sequence[Chunk]) -> list[Head]:
    """Writes chunks of batches, in one transaction; gives the batches that became whole by them.

    The same chunk again changes nothing; another content under the same number, or another batch
    under the same id, is refused and recorded as an event.
    """
    known = {head.id: head for head in heads}
    locked = _open_batches(connection, known)
    touched = set()
    for chunk in arrived:
        head = known[chunk.batch_id]
        if _is_fresh(connection, chunk, head, locked):
            taken_back = locked[head.id]["cancelled_at"] is not None
            state = _first_state(chunk, taken_back)
            _write(connection, chunk, head, state)
            if state is State.QUEUED:
                touched.add(head.id)
    for batch_id in sorted(touched):
        _wake_queue(connection, known[batch_id])
    whole = [known[b] for b in _seal(connection, sorted({c.batch_id for c in arrived}))]
    _tell_of_heedless(connection, whole)
    return whole


def _write(connection: Connection, chunk: Chunk, head: Head, state: State) -> None:
    insert_new = insert_for(connection.dialect.name)
    if chunk.rows:
        parameters = _shared(head, state) | {"rows": json.dumps(_rows(chunk))}
        connection.execute(_insert_messages(connection.dialect.name), parameters)
        contents.used(connection, (content for *_, content in chunk.rows if content))
    connection.execute(
        insert_new(chunks)
        .values(
            batch_id=chunk.batch_id, number=chunk.number, digest=chunk.digest,
            count=len(chunk.rows), arrived_at=now(),
        )
        .on_conflict_do_nothing()
    )  # fmt: skip
    if chunk.trouble:
        detail = {"chunk": chunk.number, "messages": len(chunk.rows)}
        tell_unreadable(connection, chunk.trouble, batch_id=chunk.batch_id, detail=detail)


def tell_unreadable(
    connection: Connection, why: str, *, batch_id: str | None, detail: Mapping[str, Any]
) -> None:
    """What came through the inbox and could not be read is on the audit."""
    connection.execute(
        insert(events).values(
            at=now(), kind="unreadable", batch_id=batch_id, by="ingest", why=why,
            detail=dict(detail),
        )
    )  # fmt: skip


def _first_state(chunk: Chunk, taken_back: bool) -> State:
    if chunk.trouble:
        return State.FAILED
    return State.CANCELLED if taken_back else State.QUEUED


def _open_batches(connection: Connection, known: Mapping[str, Head]) -> dict[str, Any]:
    """Makes sure of the batch and queue rows, and locks the batches in the order of their ids."""
    new = insert_for(connection.dialect.name)
    heads = sorted(known.values(), key=lambda head: head.id)
    connection.execute(new(batches).on_conflict_do_nothing(), [_batch(head) for head in heads])
    connection.execute(new(queues).on_conflict_do_nothing(), [_queue(head) for head in heads])
    rows = connection.execute(
        select(batches.c.id, batches.c.digest, batches.c.cancelled_at)
        .where(batches.c.id.in_([head.id for head in heads]))
        .order_by(batches.c.id)
        .with_for_update()
    )
    return {row["id"]: row for row in rows.mappings()}


def _is_fresh(connection: Connection, chunk: Chunk, head: Head, locked: Mapping[str, Any]) -> bool:
    there = connection.execute(
        select(chunks.c.digest).where(
            chunks.c.batch_id == chunk.batch_id, chunks.c.number == chunk.number
        )
    ).scalar()
    if locked[head.id]["digest"] == head.digest and there in {None, chunk.digest}:
        return there is None
    connection.execute(
        insert(events).values(
            at=now(),
            kind="conflict",
            batch_id=chunk.batch_id,
            by="ingest",
            why="a chunk came again with other content; the first content stands",
            detail={"chunk": chunk.number},
        )
    )
    return False


def _batch(head: Head) -> dict[str, Any]:
    return {
        "id": head.id, "name": head.name, "digest": head.digest, "target_kind": head.target_kind,
        "target": head.target, "priority": head.priority, "template": head.template,
        "options": dict(head.options), "chunks": head.chunks, "total": head.total,
        "created_at": head.created_at,
    }  # fmt: skip


def _queue(head: Head) -> dict[str, Any]:
    return {
        "id": head.queue_id, "batch_id": head.id, "target_kind": head.target_kind,
        "target": head.target, "priority": head.priority,
    }  # fmt: skip


def _rows(chunk: Chunk) -> list[dict[str, Any]]:
    return [
        {
            "id": message_id_of(chunk.batch_id, position), "position": position,
            "recipients": recipients, "recipient": recipient, "content": content,
        }
        for position, recipients, recipient, content in chunk.rows
    ]  # fmt: skip


def _shared(head: Head, state: State) -> dict[str, Any]:
    """What all messages of a chunk have in common."""
    return {
        "batch_id": head.id, "queue_id": head.queue_id, "due_at": head.due_at,
        "deadline_at": head.deadline_at, "state": state,
        "error_code": UNREADABLE if state is State.FAILED else None,
    }  # fmt: skip


#: What differs from message to message of a chunk, and what does not.
OF_EACH = ("id", "position", "recipients", "recipient", "content")
OF_ALL = ("batch_id", "queue_id", "due_at", "deadline_at", "state", "error_code")


@cache
def _insert_messages(dialect: str) -> Any:
    """The messages of a chunk by one statement: a list of parameters for each takes far longer."""
    rows = given(dialect, **{name: messages.c[name].type for name in OF_EACH})
    shared = [bindparam(name, type_=messages.c[name].type) for name in OF_ALL]
    chosen = select(*rows.c, *shared).where(literal(True))  # for SQLite, as in attempts_statement
    insert_new = insert_for(dialect)(messages).from_select([*OF_EACH, *OF_ALL], chosen)
    return insert_new.on_conflict_do_nothing()


def _wake_queue(connection: Connection, head: Head) -> None:
    sooner = or_(queues.c.next_due_at.is_(None), queues.c.next_due_at > head.due_at)
    nearer = or_(queues.c.deadline_at.is_(None), queues.c.deadline_at > head.deadline_at)
    due = literal(head.due_at, queues.c.next_due_at.type)
    deadline_at = literal(head.deadline_at, queues.c.deadline_at.type)
    connection.execute(
        update(queues)
        .where(queues.c.id == head.queue_id)
        .values(
            next_due_at=case((sooner, due), else_=queues.c.next_due_at),
            deadline_at=case((nearer, deadline_at), else_=queues.c.deadline_at),
            revision=queues.c.revision + 1,
        )
    )


def _seal(connection: Connection, ids: Sequence[str]) -> list[str]:
    """Seals the batches of which every chunk has arrived; gives those that this call sealed."""
    arrived = select(func.count()).where(chunks.c.batch_id == batches.c.id).scalar_subquery()
    sealed = connection.execute(
        update(batches)
        .where(batches.c.id.in_(ids), batches.c.sealed_at.is_(None), arrived == batches.c.chunks)
        .values(sealed_at=now())
        .returning(batches.c.id)
    )
    return [row.id for row in sealed]


def _tell_of_heedless(connection: Connection, whole: Sequence[Head]) -> None:
    """That a batch goes to suppressed recipients too is on the audit, once."""
    rows = [{"batch_id": head.id, "by": head.options.get("by") or "api"}
            for head in whole if head.options.get("ignore_suppressions")]  # fmt: skip
    if rows:
        connection.execute(insert(events).values(at=now(), kind="ignore_suppressions"), rows)


def seen(connection: Connection, batch_id: str) -> BatchSeen | None:
    """What is known of a batch that is enqueued again; None where it never arrived."""
    batch = connection.execute(
        select(batches.c.digest, batches.c.sealed_at).where(batches.c.id == batch_id)
    ).one_or_none()
    if batch is None:
        return None
    there = connection.execute(
        select(chunks.c.number, chunks.c["count"]).where(chunks.c.batch_id == batch_id)
    )
    return BatchSeen(batch.digest, batch.sealed_at is not None, {row[0]: row[1] for row in there})
