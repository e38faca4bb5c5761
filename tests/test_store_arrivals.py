"""Arrival: what came through the inbox becomes rows, whatever the order and however often."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier

import pytest

from tests.store_kit import MAILBOX, Kit, chunk, opened
from worker.model import State, message_id_of


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def test_the_same_chunk_twice_changes_nothing(kit: Kit) -> None:
    """A block that is read again after a crash is harmless, and seals nothing a second time."""
    head = kit.head(3)
    sealed = [kit.store.arrive([head], [chunk(head, 1, range(1, 4))]) for _ in range(2)]
    twice_in_one_block = kit.store.arrive([head], [chunk(head, 1, range(1, 4))] * 2)

    assert [len(one) for one in sealed] == [1, 0]
    assert twice_in_one_block == []
    assert kit.sql("SELECT count(*) FROM messages")[0][0] == 3
    assert kit.sql("SELECT count(*) FROM events")[0][0] == 0


@pytest.mark.parametrize("together", [True, False])
def test_another_content_under_the_same_number_is_refused(kit: Kit, together: bool) -> None:
    """The first content stands, also within one block, and the refusal leaves an event."""
    head = kit.head(2, chunks=2)
    first, other = chunk(head, 1, [1]), chunk(head, 1, [1, 2], digest="f" * 64)
    for block in [[first, other]] if together else [[first], [other]]:
        assert kit.store.arrive([head], block) == []

    assert [row[0] for row in kit.sql("SELECT position FROM messages")] == [1]
    assert kit.sql("SELECT kind, why FROM events")[0][0] == "conflict"


def test_another_batch_under_the_same_id_is_refused(kit: Kit) -> None:
    """An idempotency key that was used with other content does not add to the first batch."""
    head = kit.head(2, chunks=2)
    kit.store.arrive([head], [chunk(head, 1, [1])])
    impostor = kit.head(2, chunks=2, id=head.id, digest="e" * 64)

    assert kit.store.arrive([impostor], [chunk(impostor, 2, [2])]) == []
    assert kit.sql("SELECT count(*) FROM messages")[0][0] == 1
    assert kit.sql("SELECT count(*) FROM events WHERE kind = 'conflict'")[0][0] == 1


def test_chunks_in_any_order_seal_exactly_once(kit: Kit) -> None:
    """The chunk that completes the total seals the batch, whichever it is."""
    head = kit.head(20, chunks=10)
    pieces = [chunk(head, n, [2 * n - 1, 2 * n]) for n in range(1, 11)]
    random.Random(7).shuffle(pieces)
    sealed = [kit.store.arrive([head], [piece]) for piece in pieces]

    assert [len(one) for one in sealed] == [0] * 9 + [1]
    assert kit.status(head.id)["counts"]["queued"] == 20


def test_chunks_from_two_threads_seal_exactly_once(kit: Kit) -> None:
    """Two readers of the inbox at once neither double a message nor both see the end."""
    heads = [kit.head(8, chunks=4) for _ in range(5)]
    start = Barrier(2)

    def arrive(seed: int) -> list[str]:
        pieces = [(h, chunk(h, n, [2 * n - 1, 2 * n])) for h in heads for n in range(1, 5)]
        random.Random(seed).shuffle(pieces)
        start.wait(10)
        blocks = [pieces[i : i + 3] for i in range(0, len(pieces), 3)]
        done = [kit.store.arrive([h for h, _ in b], [c for _, c in b]) for b in blocks]
        return [head.id for one in done for head in one]

    with ThreadPoolExecutor(2) as threads:
        sealed = [one for done in threads.map(arrive, [1, 2]) for one in done]

    assert sorted(sealed) == sorted(head.id for head in heads)
    assert kit.sql("SELECT count(*) FROM messages")[0][0] == 40
    assert kit.sql("SELECT count(*) FROM events")[0][0] == 0


def test_nothing_of_an_open_batch_can_be_looked_at_or_claimed(kit: Kit) -> None:
    """Nothing is sent of a batch of which a chunk is missing; with the last one it may go."""
    head = kit.head(2, chunks=2)
    kit.store.arrive([head], [chunk(head, 1, [1])])
    first = message_id_of(head.id, 1)

    assert kit.look() is None
    assert kit.store.due_targets() == []
    assert kit.claim([first]) == {}

    kit.store.arrive([head], [chunk(head, 2, [2])])

    assert len(kit.look().due) == 2
    assert kit.store.due_targets() == [("mailbox", MAILBOX)]
    assert kit.claim([first]) == {first: 1}


def test_what_arrives_of_a_cancelled_batch_is_cancelled(kit: Kit) -> None:
    """The rest of a discarded batch wakes nobody, and the batch can end."""
    head = kit.head(2, chunks=2)
    kit.store.arrive([head], [chunk(head, 1, [1])])
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))
    kit.put(message_id_of(head.id, 1), state=State.CANCELLED)
    kit.store.arrive([head], [chunk(head, 2, [2])])

    assert kit.status(head.id)["counts"]["cancelled"] == 2
    assert [row["id"] for row in kit.store.finish_batches()] == [head.id]


def test_what_is_known_of_a_batch_says_which_chunks_came(kit: Kit) -> None:
    """A producer that repeats its call learns what is already there."""
    head = kit.head(3, chunks=2)
    assert kit.store.batch_digest(head.id) is None
    kit.store.arrive([head], [chunk(head, 2, [3])])

    seen = kit.store.batch_digest(head.id)

    assert seen is not None
    assert (seen.digest, seen.sealed, dict(seen.chunks)) == (head.digest, False, {2: 1})
