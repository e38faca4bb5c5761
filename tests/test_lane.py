"""A lane alone, in one process: what it meets in SQL and Redis that it did not leave there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.post_kit import SENDER, Post, opened
from tests.store_kit import sqlite_only
from worker.gate import COOLING, keys_of
from worker.model import Message, message_id_of
from worker.store.schema import messages

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
