"""A lane alone, in one process: what it meets in SQL and Redis that it did not leave there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from tests.post_kit import SENDER, Post, opened
from tests.store_kit import sqlite_only
from tests.support import wait_until
from worker.deliver.standing import SUSPENDED
from worker.gate import COOLING, keys_of
from worker.model import Message, message_id_of
from worker.store.schema import messages
from worker.tasks.work import run_sweep

pytestmark = sqlite_only


@pytest.fixture
def post(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Post]:
    with opened(tmp_path, redis_url, migrated_url) as running:
        yield running


def letters(count: int) -> list[Message]:
    return [Message(f"u{n}@example.com", subject="s", text="x") for n in range(count)]


@pytest.mark.parametrize(
    "content",
    [
        {"to": [{"address": "a@b.org"}], "attachments": [{}]},
        {"to": [{"address": "a@b.org"}], "headers": ["x"]},
    ],
    ids=["attachments", "headers"],
)
def test_what_no_producer_of_ours_wrote_stops_nobody_but_itself(post: Post, content: Any) -> None:
    """It ends as failed with a reason; the message behind it is sent."""
    batch_id = post.enqueue(*letters(2)).batch_id
    post.ingest()
    first, second = (message_id_of(batch_id, n) for n in (1, 2))
    store = post.runtime.store
    with store.engine.begin() as connection:
        connection.execute(update(messages).where(messages.c.id == first).values(content=content))
    post.deliver()

    assert [(store.message(one) or {})["state"] for one in (first, second)] == ["failed", "sent"]


def test_a_cooldown_that_only_sql_knows_is_kept(post: Post) -> None:
    """Redis was away when Graph asked for the rest, and came back with all that it had before."""
    post.simulator.fault("status", 1, status=429, headers={"Retry-After": "300"})
    post.enqueue(*letters(1))
    post.ingest()
    post.deliver()
    post.runtime.redis.hset(keys_of(SENDER)[0], "cool", 0)

    post.enqueue(*letters(1))
    post.ingest()
    assert post.deliver()["waits_for"] == COOLING
    assert [r["operation"] for r in post.simulator.requests()].count("send") == 1


def test_a_suspension_reaches_a_lane_at_work(post: Post) -> None:
    """By SQL, where Redis was not told: nothing more is claimed for the rest of its turn."""
    post.simulator.settings(latency_ms=100)
    batch = post.enqueue(*letters(1000)).batch_id
    post.ingest()
    with ThreadPoolExecutor(1) as thread:
        lane = thread.submit(post.deliver)
        wait_until(lambda: post.client.status(batch)["counts"]["sent"] > 10, "some are sent", 30)
        post.runtime.store.mailboxes.suspend(SENDER, by="ann", why="test")
        ended = lane.result()
    assert ended["waits_for"] == SUSPENDED
    assert post.client.status(batch)["counts"]["queued"] > 0


def test_a_lane_sees_no_more_large_messages_than_it_can_hold(post: Post) -> None:
    """Of short ones it looks at dozens; a worker with many lanes cannot hold megabytes for each."""
    short = [Message("u@example.com", subject="s", text="x")] * 300
    assert max(looked_at(post, short)) == 64
    large = [Message("u@example.com", subject="s", html="x" * 100_000)] * 40
    assert set(looked_at(post, large)[1:]) == {5}
    assert max(looked_at(post, large[:20] + short)) == 64


def looked_at(post: Post, mails: list[Message]) -> list[int]:
    """How many messages each look asked for while these were sent."""
    asked: list[int] = []

    def note(_c: Any, _cur: Any, statement: str, values: Any, _ctx: Any, _many: bool) -> None:
        if "AS front" in statement:
            asked.append(values[-2])  # count, then an offset

    post.enqueue(*mails)
    post.ingest()
    event.listen(post.runtime.store.engine, "before_cursor_execute", note)
    post.deliver()
    event.remove(post.runtime.store.engine, "before_cursor_execute", note)
    return asked


def test_what_redis_keeps_of_a_batch_goes_with_its_end(post: Post) -> None:
    """Its head holds the template: a worker that died between the commit and the word to Redis
    must not leave it there for ever.
    """
    rt = post.runtime
    batch = post.enqueue(*letters(1)).batch_id
    post.ingest()
    rt.redis.persist(f"postroom:batch:{batch}")
    post.deliver()
    assert run_sweep(rt)["batches"] == 1
    assert 0 < rt.redis.ttl(f"postroom:batch:{batch}") <= 3600
