"""A database in trouble of its own: work waits, the log says why, and it goes on once mended.

Lost connections are in test_store_writer, silent ones in test_store_patience.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tests.store_kit import (
    AGAIN,
    FAILED,
    LATER,
    Kit,
    opened,
    postgresql_only,
    to_claim,
    to_record,
)
from tests.support import upgrade, wait_until
from worker import ingest as room
from worker.client import Client
from worker.config import Settings
from worker.ingest import ingest
from worker.model import Message
from worker.runtime import Runtime
from worker.servers import PostgresServer
from worker.store import Writer
from worker.store.retrying import is_passing, name_of


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def setting(kit: Kit, name: str, value: str | None) -> None:
    """What the operator sets for the whole database; it holds for connections made from now on."""
    base = kit.engine.url.database
    change = f"SET {name} = '{value}'" if value else f"RESET {name}"
    admin = create_engine(kit.engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text("SET default_transaction_read_only = off"))
        connection.execute(text(f'ALTER DATABASE "{base}" {change}'))


@contextmanager
def other(kit: Kit) -> Iterator[Connection]:
    """Somebody else's transaction."""
    engine = create_engine(kit.engine.url, poolclass=NullPool, isolation_level="READ COMMITTED")
    with engine.connect() as connection:
        yield connection


def somebody_waits(kit: Kit) -> bool:
    """Whether a transaction of this database waits for a lock."""
    found = kit.sql(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )
    return bool(found)


class Work:
    """One call that writes: how it is arranged, what it does, what it comes to."""

    def __init__(self, kit: Kit, kind: str) -> None:
        self.kit, self.kind = kit, kind
        self.head, [self.id] = kit.batch()
        self.fence = kit.claim([self.id])[self.id] if kind != "claim" else 0
        if kind == "retry":
            kit.record(to_record(self.head, self.id, self.fence, FAILED))

    def do(self) -> Any:
        """The call itself, in a thread of its own."""
        if self.kind == "retry":
            return self.kit.retry(self.head.id)
        return asyncio.run(self._write())

    async def _write(self) -> Any:
        writer = Writer(self.kit.engine, self.kit.sending)
        if self.kind == "claim":
            done: Any = await writer.claim([to_claim(self.id)])
        else:
            done = await writer.record(to_record(self.head, self.id, self.fence, LATER))
        await writer.close()
        return done

    def check(self, done: Any) -> None:
        """It was done, and done once."""
        message = self.kit.message(self.id)
        if self.kind == "claim":
            assert done == {self.id: 1}
            assert (message["state"], self.kit.claim([self.id])) == ("sending", {})
        elif self.kind == "record":
            assert done is True
            assert (message["state"], len(message["attempts"])) == ("queued", 1)
        else:
            assert done == 1
            assert message["state"] == "queued"
            assert [e["kind"] for e in message["events"]].count("retry") <= 1


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """Where a call waits while the test goes on."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@postgresql_only
@pytest.mark.parametrize(
    ("kind", "then"),
    [
        ("record", "UPDATE messages SET size = size WHERE batch_id = :batch"),
        ("retry", "UPDATE batches SET name = name WHERE id = :batch"),
    ],
)
def test_a_deadlock_is_tried_again(
    kit: Kit, thread: ThreadPoolExecutor, kind: str, then: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two transactions wait crosswise; PostgreSQL ends ours, which began to wait first."""
    setting(kit, "deadlock_timeout", "300ms")
    work = Work(kit, kind)
    kit.engine.dispose()
    failures = errors_of(kit)
    with other(kit) as theirs:
        theirs.execute(text("SELECT set_config('deadlock_timeout', '20s', false)"))
        theirs.execute(text("SELECT 1 FROM queues WHERE batch_id = :batch FOR UPDATE"),
                       {"batch": work.head.id})  # fmt: skip
        done = thread.submit(work.do)
        wait_until(lambda: somebody_waits(kit), "ours waits for the queue")
        theirs.execute(text(then), {"batch": work.head.id})
        theirs.commit()
        work.check(done.result(20))
    assert failures == ["DeadlockDetected"]
    if kind == "record":
        assert "(DeadlockDetected); trying again" in caplog.text


@postgresql_only
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
@pytest.mark.parametrize("kind", ["claim", "record", "retry"])
def test_a_serialization_failure_is_tried_again(
    kit: Kit, thread: ThreadPoolExecutor, isolation: str, kind: str
) -> None:
    """Where an operator made all transactions so, a row that changed meanwhile is an error."""
    setting(kit, "default_transaction_isolation", isolation)
    kit.engine.dispose()
    work = Work(kit, kind)
    failures = errors_of(kit)
    with other(kit) as theirs:
        theirs.execute(text("UPDATE messages SET size = size WHERE batch_id = :batch"),
                       {"batch": work.head.id})  # fmt: skip
        done = thread.submit(work.do)
        wait_until(lambda: somebody_waits(kit), "ours waits for the message")
        theirs.commit()
        work.check(done.result(20))
    assert failures == ["SerializationFailure"]


def errors_of(kit: Kit) -> list[str]:
    """The names of all errors that the engine meets from now on."""
    met: list[str] = []
    event.listen(
        kit.engine, "handle_error", lambda c: met.append(type(c.original_exception).__name__)
    )
    return met


def bound(kit: Kit) -> Callable[[str], None]:
    """Hands to break and to mend the database under the engine: takes a word of SQL."""
    words: list[str] = []

    def on_checkout(connection: Any, *_: Any) -> None:
        for word in words[-1:]:
            connection.execute(word)

    if kit.engine.dialect.name == "sqlite":
        event.listen(kit.engine, "checkout", on_checkout)
    return words.append


@contextmanager
def full(kit: Kit) -> Iterator[None]:
    """SQLite's file may not grow any more. (As a full disk: SQLITE_FULL.)"""
    say = bound(kit)
    [[pages]] = kit.sql("PRAGMA page_count")
    say(f"PRAGMA max_page_count={pages}")
    try:
        yield
    finally:
        say("PRAGMA max_page_count=1000000")


@contextmanager
def read_only(kit: Kit) -> Iterator[None]:
    """It takes no writes: as a server that a failover has left behind."""
    if kit.engine.dialect.name == "sqlite":
        say = bound(kit)
        say("PRAGMA query_only=ON")
        try:
            yield
        finally:
            say("PRAGMA query_only=OFF")
        return
    setting(kit, "default_transaction_read_only", "on")
    kit.engine.dispose()
    try:
        yield
    finally:
        setting(kit, "default_transaction_read_only", None)


@contextmanager
def pool_taken(kit: Kit) -> Iterator[None]:
    """Other threads hold every connection."""
    pool: Any = kit.engine.pool
    pool._timeout = 0.1
    held = [kit.engine.raw_connection() for _ in range(pool.size())]
    try:
        yield
    finally:
        for one in held:
            one.close()


#: Each trouble on each database that can have it, and the word for it in the log.
troubles = pytest.mark.parametrize(
    ("trouble", "database_kind", "name"),
    [
        (full, "sqlite", "SQLITE_FULL"),
        (read_only, "sqlite", "SQLITE_READONLY"),
        (read_only, "postgresql", "ReadOnlySqlTransaction"),
        (pool_taken, "sqlite", "all connections of the pool are taken"),
        (pool_taken, "postgresql", "all connections of the pool are taken"),
    ],
    indirect=["database_kind"],
)


@troubles
def test_outcomes_wait_until_they_can_be_written(
    kit: Kit, thread: ThreadPoolExecutor, trouble: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are known only here: none is lost, each is written once, and one line says why."""
    head, ids = kit.batch(300)
    claims = kit.claim(ids)
    results = [to_record(head, one, claims[one], AGAIN) for one in ids]
    with trouble(kit):
        done = thread.submit(asyncio.run, record(kit, results))
        line = f"the database does not answer ({name}); trying again"
        wait_until(lambda: line in caplog.text, "the log says why")
        assert not done.done()
    assert done.result(20) == [True] * 300
    assert kit.sql("SELECT late, count(*) FROM attempts GROUP BY 1") == [(False, 300)]
    assert kit.status(head.id)["counts"]["queued"] == 300


@troubles
def test_what_was_enqueued_waits_in_the_inbox(
    kit: Kit, redis_url: str, trouble: Any, name: str
) -> None:
    """It becomes rows when the database takes them, and is not taken for rows that cannot be."""
    rt = Runtime(Settings(redis_url=redis_url, database_url=kit.url))
    rt.store.engine = kit.engine
    mails = [Message(f"u{n}@example.com", subject="s" * 200, text="x") for n in range(450)]
    batch_id = Client(lambda: rt).enqueue(mails, sender="notices@contoso.com").batch_id
    with trouble(kit):
        with pytest.raises(SQLAlchemyError) as caught:
            take_in(rt)
        assert is_passing(caught.value)
        assert name_of(caught.value) == name
        assert rt.inbox.waiting() > 0
    wait_until(lambda: take_in(rt) and not rt.inbox.waiting(), "it is taken in")
    assert kit.status(batch_id)["counts"]["queued"] == 450
    rt.close()


@pytest.fixture
def disk(own_postgres: PostgresServer) -> Iterator[Path]:
    """A small disk of the server's own."""
    place = own_postgres.directory / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=777", "tmpfs", place], check=True)
    yield place
    own_postgres.stop()
    subprocess.run(["umount", place], check=True)


def move_audit(kit: Kit, server: PostgresServer, disk: Path) -> None:
    """The table of attempts lies on this disk from now on."""
    place = disk / "tables"
    place.mkdir()
    os.chown(place, server.directory.stat().st_uid, -1)
    admin = create_engine(kit.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text(f"CREATE TABLESPACE small LOCATION '{place}'"))
        connection.execute(text("ALTER TABLE attempts SET TABLESPACE small"))


@pytest.mark.whole
def test_outcomes_wait_while_postgresql_has_no_disk(
    own_postgres: PostgresServer, disk: Path, thread: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Somebody has filled the disk that the audit lies on. (Root: it is mounted.)"""
    upgrade(own_postgres.url)
    with opened(own_postgres.url) as kit:
        move_audit(kit, own_postgres, disk)
        head, ids = kit.batch(300)
        claims = kit.claim(ids)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass
        results = [to_record(head, one, claims[one], AGAIN) for one in ids]
        done = thread.submit(asyncio.run, record(kit, results))
        line = "the database does not answer (DiskFull); trying again"
        wait_until(lambda: line in caplog.text, "the log says why")
        (disk / "filler").unlink()
        assert done.result(20) == [True] * 300
        assert kit.sql("SELECT late, count(*) FROM attempts GROUP BY 1") == [(False, 300)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose reader failed is read again at once."""
    monkeypatch.setattr(room, "IDLE_MS", 1)


def take_in(rt: Runtime) -> dict[str, int]:
    """What the ticker does each second."""
    return ingest(rt.inbox, rt.store, consumer="t", max_age=timedelta(hours=1),
                  wake=lambda _targets: None)  # fmt: skip


async def record(kit: Kit, results: list[Any]) -> list[bool]:
    """All outcomes at once, through one writer."""
    writer = Writer(kit.engine, kit.sending)
    done = await asyncio.gather(*map(writer.record, results))
    await writer.close()
    return done
