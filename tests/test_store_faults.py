"""A database that refuses for now: each kind of refusal is waited out, and nothing is lost."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, make_url

from tests.store_kit import (
    LATER,
    SENT,
    Kit,
    answer,
    opened,
    outcome_for,
    postgresql_only,
    sqlite_only,
    to_record,
)
from tests.support import wait_until
from worker.model import Verdict
from worker.store import Head, Writer

LOG = "worker.store.writer"


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


class Recording(threading.Thread):
    """The writer records how all messages of a batch fared; `ours` tells when it is committed."""

    def __init__(self, kit: Kit, total: int, verdict: Verdict = SENT, detail: str = "") -> None:
        super().__init__(daemon=True)
        self.kit = kit
        self.verdict = verdict
        self.head: Head
        self.head, self.ids = kit.batch(total)
        self.claims = kit.claim(self.ids)
        self.ours: list[bool] = []
        self._detail = detail

    def run(self) -> None:
        self.ours = asyncio.run(self._record())

    async def _record(self) -> list[bool]:
        outcome = replace(outcome_for(self.verdict), answer=answer(detail=self._detail))
        writer = Writer(self.kit.engine, self.kit.sending)
        done = await asyncio.gather(
            *(
                writer.record(to_record(self.head, one, fence, self.verdict, outcome))
                for one, fence in self.claims.items()
            )
        )
        await writer.close()
        return done

    def assert_written_once(self) -> None:
        """Every outcome was committed, with one audit row each."""
        self.join(30)
        assert self.ours == [True] * len(self.ids)
        state = self.verdict.state.value
        assert self.kit.status(self.head.id)["counts"][state] == len(self.ids)
        assert self.kit.sql("SELECT count(*) FROM attempts") == [(len(self.ids),)]


def returning(kit: Kit) -> Recording:
    """Two messages come back to a queue that must be woken for them, last of all."""
    recording = Recording(kit, 2, LATER)
    kit.sql("UPDATE queues SET next_due_at = NULL")
    return recording


def seen_in(caplog: pytest.LogCaptureFixture, name: str) -> Callable[[], bool]:
    """Whether the writer has said that this stands in its way."""
    line = f"the database does not answer ({name}); trying again"
    return lambda: line in caplog.messages


@contextmanager
def another(kit: Kit, **options: Any) -> Iterator[psycopg.Connection[Any]]:
    """A session beside ours, as an administrator's or another program's."""
    url = make_url(kit.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, **options) as connection:
        yield connection


def is_blocked(kit: Kit, other: psycopg.Connection[Any]) -> bool:
    """Whether somebody waits for a lock that the other session holds."""
    pid = other.info.backend_pid
    return bool(kit.sql("SELECT 1 FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))",
                        pid=pid))  # fmt: skip


@postgresql_only
def test_a_deadlock_is_tried_again(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Another session holds what we want and wants what we hold: the server ends our transaction,
    and its outcomes are written by the next one.
    """
    recording = returning(kit)
    lock = "SELECT 1 FROM {} WHERE id = %s FOR UPDATE"
    with caplog.at_level(logging.WARNING, LOG), another(kit) as other:
        # Ours updates the messages first and their batch's queue last.
        other.execute(lock.format("queues"), (recording.head.queue_id,))
        recording.start()
        wait_until(lambda: is_blocked(kit, other), "the writer waits for the queue")
        other.execute("SET LOCAL deadlock_timeout = '30s'")  # so that the server ends ours
        other.execute(lock.format("messages"), (recording.ids[0],))
        other.commit()

        recording.assert_written_once()

    assert seen_in(caplog, "DeadlockDetected")()


@postgresql_only
def test_a_serialization_failure_is_tried_again(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """Where the operator's database is strict about snapshots, a row changed meanwhile is met."""
    kit.sql("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = "
            "''repeatable read''', current_database()); END $$")  # fmt: skip
    kit.engine.dispose()
    recording = returning(kit)
    with caplog.at_level(logging.WARNING, LOG), another(kit) as other:
        other.execute("UPDATE queues SET priority = priority WHERE id = %s",
                      (recording.head.queue_id,))  # fmt: skip
        recording.start()
        wait_until(lambda: is_blocked(kit, other), "the writer waits for the queue")
        other.commit()

        recording.assert_written_once()

    assert seen_in(caplog, "SerializationFailure")()


@postgresql_only
def test_a_full_pool_is_waited_for(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """All connections of the process are in use for longer than the pool waits for one."""
    recording = Recording(kit, 1)
    with caplog.at_level(logging.WARNING, LOG):
        held = [kit.engine.connect() for _ in range(kit.engine.pool.size())]  # type: ignore[attr-defined]
        recording.start()
        wait_until(seen_in(caplog, "TimeoutError"), "the pool is full")
        for connection in held:
            connection.close()

        recording.assert_written_once()


@postgresql_only
def test_a_database_that_turned_read_only_is_left_for_one_that_is_not(
    kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    """After a failover the old primary still answers, but takes nothing: a connection to it would
    stay read-only for ever, so a new one is made for each try.
    """
    recording = Recording(kit, 2)
    with caplog.at_level(logging.WARNING, LOG):
        held = [kit.engine.connect() for _ in range(kit.engine.pool.size())]  # type: ignore[attr-defined]
        for connection in held:
            connection.exec_driver_sql("SET default_transaction_read_only = on")
            connection.commit()
            connection.close()
        recording.start()

        recording.assert_written_once()

    assert seen_in(caplog, "ReadOnlySqlTransaction")()


@sqlite_only
def test_a_full_disk_is_waited_out(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite says that the disk is full until there is room again."""
    recording = Recording(kit, 50, detail="x" * 400)
    [[pages]] = kit.sql("PRAGMA page_count")
    room = [pages]

    @event.listens_for(kit.engine, "checkout")
    def _limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {room[0]}")

    with caplog.at_level(logging.WARNING, LOG):
        recording.start()
        wait_until(seen_in(caplog, "OperationalError"), "the disk is full")
        room[0] = 2**30

        recording.assert_written_once()
