"""The cooldown: what each Retry-After means, how long it grows, and whom it concerns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.post_kit import SENDER, Post, opened
from worker.model import Message
from worker.store.schema import mailboxes, messages

OTHER = "other@contoso.com"
sqlite = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@pytest.fixture
def post(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Post]:
    """Everything in one process."""
    with opened(tmp_path, redis_url, migrated_url) as running:
        yield running


def letters(count: int) -> list[Message]:
    return [Message(f"p{n}@example.org", subject="Hi", text="Hello") for n in range(count)]


def rest_of(post: Post, mailbox: str = SENDER) -> float:
    """Seconds that a mailbox is to rest yet, by the gate."""
    return post.runtime.call(post.runtime.gate.usage(mailbox)).cooldown.total_seconds()


def rows(post: Post, statement: Any) -> list[Any]:
    with post.runtime.store.engine.connect() as connection:
        return list(connection.execute(statement))


def throttle(post: Post, **headers: str) -> None:
    """The next answer is a 429 with these headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    post.simulator.fault("status", 1, status=429, code="ApplicationThrottled", headers=named)


@sqlite
@pytest.mark.parametrize(("value", "rest"), [("20", 20), ("20.5", 20.5), ("999999", 3600)])
def test_a_rest_that_graph_asks_for_is_kept_in_redis_and_in_sql(
    post: Post, value: str, rest: float
) -> None:
    """A fraction counts, an hour is the most; it spends no try, and the message waits."""
    throttle(post, Retry_After=value)
    post.enqueue(*letters(1))
    post.ingest()
    began = time.monotonic()
    post.deliver()
    took = time.monotonic() - began

    [seen] = rows(post, select(messages.c.state, messages.c.tries, messages.c.due_at))
    [known] = rows(post, select(mailboxes.c.cooldown_until))
    assert (seen.state, seen.tries) == ("queued", 0)
    assert rest - took - 0.1 <= rest_of(post) <= rest
    assert seen.due_at <= known.cooldown_until + timedelta(seconds=0.5)


@sqlite
@pytest.mark.parametrize(
    ("value", "least"), [("0", 1.0), (None, 0.5), ("soon", 0.5), ("-5", 0.5), ("nan", 0.5)]
)
def test_what_says_nothing_usable_is_a_rest_of_our_own(
    post: Post, value: str | None, least: float
) -> None:
    """Half a second to a second at first, waited in place; then the message is sent."""
    throttle(post, **({"Retry_After": value} if value else {}))
    post.enqueue(*letters(1))
    post.ingest()
    post.deliver()

    first, second = (r["monotonic"] for r in post.simulator.requests() if r["operation"] == "send")
    [seen] = rows(post, select(messages.c.state, messages.c.tries))
    assert (seen.state, seen.tries) == ("sent", 0)
    assert second - first >= least


@sqlite
def test_a_date_is_held_against_the_answers_own(post: Post) -> None:
    """Our clock may be wrong by hours: Graph's two dates say how long it is."""
    there = datetime.now(UTC) + timedelta(hours=5)
    throttle(
        post,
        Date=format_datetime(there, usegmt=True),
        Retry_After=format_datetime(there + timedelta(seconds=40), usegmt=True),
    )
    post.enqueue(*letters(1))
    post.ingest()
    post.deliver()

    assert 30 < rest_of(post) <= 41


@sqlite
def test_a_202_with_retry_after_is_sent_and_cools_down(post: Post) -> None:
    """It was taken: sending it again would be the second time."""
    post.simulator.fault("accepted_retry_after", 1, retry_after=30)
    batch = post.enqueue(*letters(1)).batch_id
    post.ingest()
    post.deliver()

    assert post.client.status(batch)["counts"]["sent"] == 1
    assert 20 < rest_of(post) <= 30


@sqlite
def test_nothing_is_sent_into_a_cooldown_and_others_do_not_notice(post: Post) -> None:
    """The mailbox that rests sends nothing, whoever asks; the next one sends as ever."""
    post.runtime.call(post.runtime.gate.cool(SENDER, timedelta(minutes=5)))
    resting = post.enqueue(*letters(3)).batch_id
    others = post.enqueue(*letters(3), sender=OTHER).batch_id
    post.ingest()

    assert post.deliver()["waits_for"] == "cooling"
    assert post.deliver(OTHER)["sent"] == 3
    assert post.client.status(resting)["counts"]["queued"] == 3
    assert post.client.status(others)["counts"]["sent"] == 3
    assert {entry["mailbox"] for entry in post.simulator.requests()} == {OTHER}


@sqlite
def test_without_the_header_the_rest_grows_and_shrinks_again(post: Post) -> None:
    """Each 429 in a row doubles the rest; each success takes one step back."""
    gate = post.runtime.gate

    async def trouble() -> int:
        return (await gate.ask(SENDER, "test")).trouble

    async def work(send: int) -> None:
        for _ in range(send):
            await gate.cool(SENDER, timedelta(milliseconds=1), trouble=await trouble())

    post.runtime.call(work(3))
    assert post.runtime.call(trouble()) == 3
    post.runtime.call(gate.leave(SENDER, "test"))
    throttle(post)
    post.enqueue(*letters(1))
    post.ingest()
    post.deliver()
    assert 2 < rest_of(post) <= 8, "the fourth in a row rests for 4 to 8 seconds"

    post.runtime.call(gate.calm(SENDER))
    assert post.runtime.call(trouble()) == 3


@sqlite
def test_a_mailbox_of_which_others_use_a_slot_is_soon_throttled_no_more(post: Post) -> None:
    """Graph admits three at once, for another program sends too: four would cost a second's rest
    for each three messages.
    """
    post.simulator.settings(concurrency=3, retry_after=1, latency_ms=50)
    batch = post.enqueue(*letters(90)).batch_id
    post.ingest()

    while post.client.status(batch)["counts"]["sent"] < 90:
        post.deliver()

    assert post.simulator.stats()["throttled"] <= 6
