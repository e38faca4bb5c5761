"""A server that says nothing: the caller is told within two seconds, with the batch to repeat."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.proxy import Proxy, before_postgres
from tests.store_kit import sqlite_only
from tests.support import upgrade
from worker.client import Client
from worker.client.asking import GLANCE, THERE
from worker.config import Settings
from worker.model import Message, Unavailable, batch_id_of
from worker.runtime import Runtime
from worker.servers import PostgresServer, RedisServer

SENDER = "notices@contoso.com"
KEY = "order 17"
#: Two seconds are promised; the machine that tests may be busy with other things.
PROMISED = 2.0 + 1.0


def mails(count: int = 1) -> Iterator[Message]:
    return (Message(f"u{n}@example.com", subject="s", text="x") for n in range(1, count + 1))


@contextmanager
def told_in_time(batch_id: str | None = None) -> Iterator[None]:
    """The call raises Unavailable in time, with this id."""
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        yield
    assert time.monotonic() - began < PROMISED
    assert caught.value.batch_id == batch_id


@pytest.fixture
def line(own_postgres: PostgresServer) -> Iterator[Proxy]:
    upgrade(own_postgres.url)
    with before_postgres(own_postgres) as proxy:
        yield proxy


def test_the_two_seconds_are_not_used_up() -> None:
    """By waiting for the answer and by asking whether anybody is there."""
    assert GLANCE + THERE < 2.0


@sqlite_only
def test_a_redis_that_is_stopped_is_told_in_time(own_redis: RedisServer, migrated_url: str) -> None:
    """Before the first word and in the middle of a batch; awake again, the repeat completes it."""
    rt = Runtime(Settings(redis_url=own_redis.url, database_url=migrated_url))
    client = Client(lambda: rt)
    client.enqueue(mails(), sender=SENDER)

    def stopping() -> Iterator[Message]:
        yield from mails(450)
        os.kill(own_redis.pid, signal.SIGSTOP)

    try:
        with told_in_time(batch_id_of(KEY)):
            client.enqueue(stopping(), sender=SENDER, idempotency_key=KEY)
        with told_in_time(batch_id_of(KEY)):
            client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY)
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)

    receipt = client.enqueue(mails(450), sender=SENDER, idempotency_key=KEY)
    assert receipt.accepted + receipt.duplicates == 450
    assert rt.inbox.waiting() == 1 + 3
    rt.close()


def test_a_database_that_says_nothing_is_told_in_time(redis_url: str, line: Proxy) -> None:
    """Whatever is asked of it; mended, it answers again."""
    url = f"postgresql+psycopg://postgres@127.0.0.1:{line.port}/postgres"
    rt = Runtime(Settings(redis_url=redis_url, database_url=url))
    client = Client(lambda: rt)
    batch = client.enqueue(mails(3), sender=SENDER).batch_id
    assert client.status(batch)["counts"]["queued"] == 3

    line.half_open()
    asked: list[Callable[[], Any]] = [
        lambda: client.status(batch), lambda: client.retry(batch), lambda: client.pause(batch),
    ]  # fmt: skip
    for ask in asked:
        with told_in_time():
            ask()
    rt.redis.delete(f"postroom:batch:{batch}")
    with told_in_time(batch):
        client.enqueue(mails(3), sender=SENDER, idempotency_key=batch)
    with told_in_time(batch_id_of(KEY)):
        client.enqueue(mails(), pool="absent", idempotency_key=KEY)

    line.heal()
    assert client.enqueue(mails(3), sender=SENDER, idempotency_key=batch).accepted == 3
    rt.close()


def test_a_long_answer_is_waited_for(own_postgres: PostgresServer, redis_url: str) -> None:
    """A large batch is counted for longer than a glance: that is no silence."""
    from sqlalchemy import text

    from worker.client.asking import ask

    rt = Runtime(Settings(redis_url=redis_url, database_url=own_postgres.url))

    def slow() -> Any:
        with rt.store.engine.connect() as connection:
            return connection.execute(text("SELECT 5 FROM pg_sleep(3)")).scalar()

    assert ask(rt, slow) == 5
    rt.close()
