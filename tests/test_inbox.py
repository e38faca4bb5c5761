"""The inbox: nothing lost, nothing twice, and a budget."""

from __future__ import annotations

import itertools

import pytest
import redis

from tests.support import wait_until
from worker.inbox import BELL, BELL_MS, BYTES, STREAM, Batch, Inbox
from worker.model import IdempotencyConflict, InboxFull, Unavailable
from worker.servers import RedisServer

BATCH = Batch("6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66", "d1", '{"name":"n"}', 3, 30)
PLENTY = 1_000_000


@pytest.fixture
def inbox(redis_url: str) -> Inbox:
    return Inbox(redis.Redis.from_url(redis_url))


def append(
    inbox: Inbox, number: int, body: bytes = b"[1]", batch: Batch = BATCH, budget: int = PLENTY
):
    return inbox.append_chunk(
        batch,
        number,
        count=10,
        first=10 * number - 9,
        digest=f"c{number}",
        body=body,
        budget=budget,
    )


def test_a_chunk_comes_out_as_it_went_in_and_leaves_only_when_it_is_done(inbox: Inbox):
    """Reading takes nothing away: only `done` does, and with it the bytes of the budget."""
    append(inbox, 1, '["ü"]'.encode())
    (entry,) = inbox.read("a", 10, 60_000)
    assert (entry.batch_id, entry.number, entry.count) == (BATCH.id, 1, 10)
    assert (entry.digest, entry.body, entry.deliveries) == ("c1", '["ü"]'.encode(), 1)
    assert inbox.read("b", 10, 60_000) == []
    assert inbox.waiting() == 1
    assert inbox.done([entry]) == 1
    assert inbox.done([entry]) == 0
    assert inbox.waiting() == 0


def test_the_same_chunk_again_is_there_already(inbox: Inbox):
    """Also after it was read and done: the batch's hash remembers it."""
    assert append(inbox, 1).created
    assert not append(inbox, 1).created
    inbox.done(inbox.read("a", 10, 60_000))
    assert not append(inbox, 1).created
    assert inbox.waiting() == 0
    known = inbox.batch(BATCH.id)
    assert known is not None
    assert (known["arrived"], known["numbers"], known["head"]) == (10, {1: 10}, {"name": "n"})
    assert (known["chunks"], known["messages"], known["digest"]) == (3, 30, "d1")


def test_other_content_under_the_same_id_is_refused(inbox: Inbox):
    """The first content stands, and nothing of the second is kept."""
    append(inbox, 1)
    with pytest.raises(IdempotencyConflict) as caught:
        append(inbox, 2, batch=Batch(BATCH.id, "d2", "{}", 3, 30))
    assert caught.value.batch_id == BATCH.id
    assert inbox.waiting() == 1


def test_the_budget_counts_bytes_and_gives_them_back(inbox: Inbox, redis_client: redis.Redis):
    """Full is said before anything is kept; what is done makes room."""
    append(inbox, 1, b"x" * 60, budget=100)
    with pytest.raises(InboxFull) as caught:
        append(inbox, 2, b"x" * 60, budget=100)
    assert caught.value.batch_id == BATCH.id
    assert inbox.waiting() == 1
    assert redis_client.get(BYTES) == "60"
    inbox.done(inbox.read("a", 10, 60_000))
    assert redis_client.get(BYTES) is None
    assert append(inbox, 2, b"x" * 60, budget=100).created


def test_what_is_larger_than_the_whole_budget_passes_alone(inbox: Inbox):
    """Else it never would."""
    assert append(inbox, 1, b"x" * 200, budget=100).created
    with pytest.raises(InboxFull):
        append(inbox, 2, b"x", budget=100)


def test_a_block_whose_reader_died_goes_to_the_next_and_says_how_often(inbox: Inbox):
    """A reader that comes back finds it gone or done; a live one is left alone."""
    append(inbox, 1)
    append(inbox, 2)
    assert [e.number for e in inbox.read("dead", 1, 60_000)] == [1]
    assert [e.number for e in inbox.read("live", 10, 60_000)] == [2]
    taken = wait_until(lambda: inbox.read("next", 10, 1), "the idle blocks")
    assert taken[0].deliveries >= 2
    wait_until(lambda: len(inbox.read("next", 10, 1)) == 2, "both blocks, idle")


def test_a_reader_gets_no_more_than_it_asked_for(inbox: Inbox):
    """Old and new together."""
    for number in (1, 2, 3):
        append(inbox, number)
    inbox.read("dead", 2, 60_000)
    wait_until(
        lambda: [e.number for e in inbox.read("next", 2, 1)] == [1, 2], "the two of the dead"
    )
    wait_until(
        lambda: [e.number for e in inbox.read("next", 3, 1)] == [1, 2, 3], "these and the new one"
    )


def test_a_group_that_is_gone_is_made_again(inbox: Inbox, redis_client: redis.Redis):
    """Redis was emptied: the reader heals it, and the next chunk is read from the start."""
    assert inbox.read("a", 10, 60_000) == []
    append(inbox, 1)
    redis_client.xgroup_destroy(STREAM, "postroom")
    assert [e.number for e in inbox.read("a", 10, 60_000)] == [1]
    redis_client.flushdb()
    append(inbox, 1)
    assert [e.number for e in inbox.read("a", 10, 60_000)] == [1]


def test_one_ring_is_asked_for_until_somebody_looks(inbox: Inbox, redis_client: redis.Redis):
    """A thousand chunks ring once; after a look, or after a second, the next rings again."""
    numbers = itertools.count(1)

    def only_the_first_rings() -> bool:
        inbox.read("a", 1, 60_000)
        assert append(inbox, next(numbers)).ring
        again = append(inbox, next(numbers)).ring
        return not again and 0 < redis_client.pttl(BELL) <= BELL_MS

    wait_until(only_the_first_rings, "two appends within a second")
    wait_until(lambda: append(inbox, next(numbers)).ring, "a ring that nobody followed")


def test_a_whole_batch_is_forgotten_after_a_while(inbox: Inbox, redis_client: redis.Redis):
    """SQL knows it: Redis need not keep it for ever."""
    append(inbox, 1)
    key = f"postroom:batch:{BATCH.id}"
    assert redis_client.ttl(key) == -1
    inbox.forget(BATCH.id)
    assert 3500 < redis_client.ttl(key) <= 3600
    assert inbox.batch("absent") is None


def test_a_redis_out_of_memory_keeps_nothing_of_the_chunk(own_redis: RedisServer):
    """All or nothing: neither the hash nor the stream has it, and the error says: full."""
    connection = redis.Redis.from_url(own_redis.url, decode_responses=True)
    inbox = Inbox(connection)
    append(inbox, 1)
    connection.config_set("maxmemory", "1")
    with pytest.raises(InboxFull):
        append(inbox, 2)
    connection.config_set("maxmemory", "0")
    assert inbox.waiting() == 1
    assert (inbox.batch(BATCH.id) or {})["numbers"] == {1: 10}
    assert append(inbox, 2).created


def test_a_redis_that_is_gone_is_said_with_the_batch_to_repeat(own_redis: RedisServer):
    """The caller learns the key that makes its repeat safe."""
    inbox = Inbox(redis.Redis.from_url(own_redis.url, retry=None))
    append(inbox, 1)
    own_redis.stop()
    with pytest.raises(Unavailable) as caught:
        append(inbox, 2)
    assert caught.value.batch_id == BATCH.id
    with pytest.raises(Unavailable):
        inbox.now(BATCH.id)
