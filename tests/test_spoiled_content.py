"""A row whose content no producer of ours could have written stops nobody but itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.post_kit import Post, opened
from worker.model import Message, message_id_of
from worker.store.schema import messages


@pytest.fixture(scope="module")
def post(
    tmp_path_factory: pytest.TempPathFactory, redis_server: str, request: pytest.FixtureRequest
) -> Iterator[Post]:
    """Everything in one process, once for all contents."""
    directory: Path = tmp_path_factory.mktemp("spoiled")
    url = request.getfixturevalue("_sqlite").create(directory, migrated=True)
    with opened(directory, f"{redis_server}", url) as running:
        running.runtime.redis.flushdb()
        yield running
        running.runtime.redis.flushdb()


@pytest.mark.parametrize(
    "content",
    [
        {"to": [{"address": "a@b.org"}], "attachments": [{}]},
        {"to": [{"address": "a@b.org"}], "headers": ["x"]},
    ],
    ids=repr,
)  # fmt: skip
def test_the_lane_goes_on(post: Post, content: Any) -> None:
    """It ends as failed with a reason, or waits; the message behind it is sent."""
    mails = [Message(f"u{n}@example.com", subject="s", text="x") for n in (1, 2)]
    batch_id = post.enqueue(*mails).batch_id
    post.ingest()
    first, second = (message_id_of(batch_id, n) for n in (1, 2))
    with post.runtime.store.engine.begin() as connection:
        connection.execute(update(messages).where(messages.c.id == first).values(content=content))
    post.deliver()
    store = post.runtime.store
    assert [(store.message(one) or {})["state"] for one in (first, second)] == ["failed", "sent"]
