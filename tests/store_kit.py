"""What the tests of the store share: a migrated database, batches in it, and hands to move rows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text, update

from worker.model import (
    Accepted,
    Answer,
    NotSent,
    Outcome,
    Rejected,
    State,
    Throttled,
    Unknown,
    Verdict,
    message_id_of,
)
from worker.store import Chunk, Head, Store, ToClaim, ToRecord, control, make_engine
from worker.store.schema import batches, messages, queues
from worker.store.sending import Sending

MAILBOX = "notices@contoso.com"
postgresql_only = pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
sqlite_only = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

SENT = Verdict(State.SENT)
LATER = Verdict(State.QUEUED, timedelta(hours=1))
AGAIN = Verdict(State.QUEUED)
FAILED = Verdict(State.FAILED, spends_try=True)
IN_DOUBT = Verdict(State.UNKNOWN, spends_try=True, doubt=True)


def answer(**fields: Any) -> Answer:
    """An answer with a client-request-id of its own, as each real exchange has."""
    return Answer(**{"client_request_id": str(uuid.uuid4())} | fields)


def outcome_for(verdict: Verdict) -> Outcome:
    """The outcome that commonly leads to this verdict."""
    if verdict.state is State.SENT:
        return Accepted(answer(status=202, request_id="r-1"))
    if verdict.doubt:
        return Unknown(answer(status=504, code="GatewayTimeout"))
    if verdict.state is State.FAILED:
        return Rejected(answer(status=400, code="ErrorInvalidRecipients"))
    return Throttled(answer(status=429, code="ApplicationThrottled"))


class Kit:
    """A store on a real database, and short ways to arrange and to look."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        self.store = Store(self.engine)
        self.sending = Sending(self.engine.dialect.name)

    def head(self, total: int, *, chunks: int = 1, **fields: Any) -> Head:
        """A head, due for an hour and with a day left, unless `fields` say otherwise."""
        at = datetime.now(UTC)
        known: dict[str, Any] = {
            "id": str(uuid.uuid4()), "digest": "d" * 64, "name": "June", "target_kind": "mailbox",
            "target": MAILBOX, "priority": 1, "chunks": chunks, "total": total, "created_at": at,
            "due_at": at - timedelta(hours=1), "deadline_at": at + timedelta(days=1),
            "template": None, "options": {},
        }  # fmt: skip
        return Head(**known | fields)

    def batch(self, total: int = 1, **fields: Any) -> tuple[Head, list[str]]:
        """A batch that has arrived whole, and its messages' ids by position."""
        head = self.head(total, **fields)
        self.store.arrive([head], [chunk(head, 1, range(1, total + 1))])
        return head, [message_id_of(head.id, n) for n in range(1, total + 1)]

    def sql(self, statement: str, **parameters: Any) -> list[Any]:
        """Runs one statement in one transaction; its rows, if it gives any."""
        with self.engine.begin() as connection:
            result = connection.execute(text(statement), parameters)
            return list(result) if result.returns_rows else []

    def message(self, message_id: str) -> Any:
        """A message as `message show` sees it."""
        found = self.store.message(message_id)
        assert found is not None
        return found

    def status(self, batch_id: str) -> dict[str, Any]:
        """A batch as `batch status` sees it."""
        found = self.store.batch_status(batch_id)
        assert found is not None
        return found

    def put(self, message_id: str, **values: Any) -> None:
        """Puts a message where a test needs it."""
        with self.engine.begin() as c:
            c.execute(update(messages).where(messages.c.id == message_id).values(**values))

    def set_batch(self, batch_id: str, **values: Any) -> None:
        """Sets a batch's columns directly: pause, cancel."""
        with self.engine.begin() as c:
            c.execute(update(batches).where(batches.c.id == batch_id).values(**values))

    def queue(self, head: Head) -> Any:
        """The queue of a batch."""
        with self.engine.connect() as c:
            return c.execute(queues.select().where(queues.c.batch_id == head.id)).mappings().one()

    def claim(self, ids: Sequence[str], **fields: Any) -> dict[str, int]:
        """Claims messages in a transaction of its own: id → fence."""
        with self.engine.begin() as connection:
            return self.claim_in(connection, ids, **fields)

    def claim_in(self, connection: Connection, ids: Sequence[str], **fields: Any) -> dict[str, int]:
        """Claims messages in the given transaction."""
        return self.sending.claim(connection, [to_claim(i, **fields) for i in ids])

    def record(self, *results: ToRecord) -> set[tuple[str, int]]:
        """Records outcomes in one transaction: (id, fence) of those whose claim was ours."""
        with self.engine.begin() as connection:
            return self.sending.record(connection, results)

    def claimed(self, **fields: Any) -> tuple[Head, str, int]:
        """A batch of one whose message is claimed: head, id, fence."""
        head, [one] = self.batch(**fields)
        return head, one, self.claim([one])[one]

    def lose(self, message_id: str) -> None:
        """Lets the lease of a claim have run out."""
        self.put(message_id, lease_until=datetime.now(UTC) - timedelta(minutes=1))

    def end_leases(self, *, resend: bool = False, max_attempts: int = 6) -> int:
        """The sweep's chore."""
        return self.store.end_leases(resend=resend, max_attempts=max_attempts)

    def retry(self, batch_id: str, **more: Any) -> int:
        """An operator's retry; how many were queued again."""
        known: dict[str, Any] = {"by": "ann", "why": "mended", "age": 3600}
        found = self.store.control.retry(batch_id, **known | more)
        assert found is not None
        return int(found["requeued"])

    def look(self, mailbox: str = MAILBOX, count: int = 64, **more: Any) -> Any:
        """What a lane of this mailbox sees."""
        return self.store.look(mailbox, more.get("pools", {}), more.get("turns", {}), count)


def retry_in(connection: Connection, batch_id: str) -> None:
    """A retry of the failed messages in the given transaction, with a minute until they expire."""
    which = control.wanted(batch_id, code=None, since=None, include_unknown=False)
    control.requeue(connection, batch_id=batch_id, which=which, by="x", why=None, age=60)


def chunk(head: Head, number: int, positions: Any, digest: str | None = None) -> Chunk:
    """A chunk with one row a position."""
    rows = [(n, 1, f"user{n}@example.com", {"to": [{"address": f"user{n}@example.com"}]})
            for n in positions]  # fmt: skip
    return Chunk(head.id, number, digest or f"{number:064}", rows)


def to_claim(message_id: str, **fields: Any) -> ToClaim:
    """A request to claim."""
    known: dict[str, Any] = {
        "size": 900,
        "mailbox": MAILBOX,
        "worker": "w-1",
        "lease": 90.0,
        "token_left": 3000.0,
    }
    return ToClaim(message_id, **known | fields)


def to_record(
    head: Head, message_id: str, fence: int, verdict: Verdict, outcome: Outcome | None = None
) -> ToRecord:
    """An outcome to write."""
    return ToRecord(
        id=message_id, fence=fence, batch_id=head.id, queue_id=head.queue_id, mailbox=MAILBOX,
        worker="w-1", recipients=1, size=900, outcome=outcome or outcome_for(verdict),
        verdict=verdict, token_left=3000.0,
    )  # fmt: skip


def not_sent() -> Outcome:
    """Refused by our own guard: there was no exchange, so there is no id of one."""
    return NotSent(Answer(code="LeaseNearlyOver"))


@contextmanager
def opened(url: str) -> Iterator[Kit]:
    """A kit on a migrated database."""
    kit = Kit(url)
    try:
        yield kit
    finally:
        kit.store.close()
