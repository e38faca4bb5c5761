"""Suppressions: whoever is not to be written to is not, however late that became known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.store_kit import AGAIN, IN_DOUBT, Kit, opened, to_claim, to_record
from worker.model import State, message_id_of
from worker.store import Chunk, Head

ANN, BOB = "Ann@example.com", "bob@example.com"


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def batch_to(kit: Kit, *contents: dict[str, list[str]], **options: Any) -> tuple[Head, list[str]]:
    """A batch with a message for each mapping of fields to addresses."""
    head = kit.head(len(contents), options=options)
    rows = []
    for n, content in enumerate(contents, start=1):
        shaped = {field: [{"address": a} for a in of] for field, of in content.items()}
        every = [a for of in content.values() for a in of]
        rows.append((n, len(every), every[0], shaped))
    kit.store.arrive([head], [Chunk(head.id, 1, "1" * 64, rows)])
    return head, [message_id_of(head.id, n) for n in range(1, len(contents) + 1)]


def suppress(kit: Kit, *addresses: str) -> int:
    return kit.store.suppressions.add(((a, "left") for a in addresses), by="ada", why=None)


def test_a_message_whose_recipient_is_suppressed_ends_and_the_others_go(kit: Kit) -> None:
    """At the look that would send it; whatever the case of the address. The event says why."""
    _, [first, second] = batch_to(kit, {"to": [ANN]}, {"to": [BOB]})
    suppress(kit, "ANN@EXAMPLE.COM")

    assert [due.id for due in kit.look().due] == [second]
    ended = kit.message(first)
    assert (ended["state"], ended["error_code"]) == (State.SUPPRESSED, "Suppressed")
    [event] = ended["events"]
    assert (event["kind"], event["detail"]) == ("suppressed", {"left_out": ["to[0]"], "left": 0})


def test_a_queue_of_suppressed_messages_ends_to_its_last(kit: Kit) -> None:
    """However many lie before the next that may go."""
    head, _ = batch_to(kit, *[{"to": [f"u{n}@example.com"]} for n in range(150)])
    suppress(kit, *(f"u{n}@example.com" for n in range(150)))

    assert kit.look() is None
    assert kit.status(head.id)["counts"]["suppressed"] == 150
    assert len(kit.store.finish_batches()) == 1


def test_a_suppressed_recipient_among_others_is_left_out(kit: Kit) -> None:
    """The others are not punished; who was left out is an event, written once."""
    _, [one] = batch_to(kit, {"to": [BOB], "cc": [ANN], "bcc": ["c@example.com"]})
    suppress(kit, ANN)

    for _ in range(2):
        [due] = kit.look().due
        assert due.content["cc"] == []
        assert due.content["to"] == [{"address": BOB}]
        assert (due.recipients, due.addresses) == (2, (BOB, "c@example.com"))
    [event] = kit.message(one)["events"]
    assert event["detail"] == {"left_out": ["cc[0]"], "left": 2}


def test_what_was_seen_before_is_not_claimed_once_its_recipient_is_suppressed(kit: Kit) -> None:
    """Between a lane's look and its claim: the claim's own statement refuses."""
    batch_to(kit, {"to": [BOB], "cc": [ANN]}, {"to": ["c@example.com"]})
    first, second = kit.look().due
    suppress(kit, ANN)
    wanted = [to_claim(due.id, addresses=due.addresses) for due in (first, second)]

    with kit.engine.begin() as connection:
        assert kit.sending.claim(connection, wanted) == {second.id: 1}


def test_a_message_in_doubt_ends_unknown_and_not_suppressed(kit: Kit) -> None:
    """It may have been sent before its recipient was suppressed."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, IN_DOUBT))
    kit.retry(head.id, include_unknown=True)
    suppress(kit, "user1@example.com")

    assert kit.look() is None
    assert kit.message(one)["state"] == State.UNKNOWN


def test_what_comes_back_to_its_queue_is_checked_again(kit: Kit) -> None:
    """A throttled message has waited: meanwhile its recipient may have left."""
    head, one, fence = kit.claimed()
    suppress(kit, "user1@example.com")
    kit.record(to_record(head, one, fence, AGAIN))

    assert kit.look() is None
    assert kit.message(one)["state"] == State.SUPPRESSED


def test_a_batch_that_ignores_suppressions_is_sent(kit: Kit) -> None:
    """A legal notice goes to everyone; the claim does not ask either."""
    _, [one] = batch_to(kit, {"to": [ANN]}, ignore_suppressions=True)
    suppress(kit, ANN)
    [due] = kit.look().due

    assert (due.id, due.addresses) == (one, ())
    with kit.engine.begin() as connection:
        claimed = kit.sending.claim(connection, [to_claim(one, addresses=due.addresses)])
    assert claimed == {one: 1}


def test_a_suppression_taken_off_lets_the_next_message_go(kit: Kit) -> None:
    """Also one that was queued all the while: it is judged when it is sent."""
    _, [one] = batch_to(kit, {"to": [ANN]})
    suppress(kit, ANN)
    assert kit.store.suppressions.remove([ANN.upper()], by="ada", why="asked") == 1

    assert [due.id for due in kit.look().due] == [one]


def test_the_list_is_kept_in_lower_case_in_order_and_its_changes_are_events(kit: Kit) -> None:
    """Twice is once; who and why stand in the events."""
    parts = kit.store.suppressions
    assert suppress(kit, BOB, ANN) == 2
    assert suppress(kit, "ANN@example.com", "c@example.com") == 1
    assert parts.remove(["nobody@example.com"], by="ada", why=None) == 0
    assert parts.remove([BOB], by="ada", why="asked") == 1

    assert [one["address"] for one in parts.all()] == ["ann@example.com", "c@example.com"]
    first = parts.listed(1)[0]
    assert (first["reason"], first["by"]) == ("left", "ada")
    told = kit.sql('SELECT kind, "by", why FROM events ORDER BY id')
    assert [tuple(row) for row in told] == [
        ("suppress", "ada", None), ("suppress", "ada", None), ("unsuppress", "ada", "asked"),
    ]  # fmt: skip


def test_many_are_added_and_listed_in_flat_steps(kit: Kit) -> None:
    """An import is a stream, in and out."""
    many = [f"u{n:05}@example.com" for n in range(1201)]

    assert suppress(kit, *many) == 1201
    assert [one["address"] for one in kit.store.suppressions.all()] == many
