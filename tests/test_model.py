"""The transitions of the model are those that the store can do, no more and no fewer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.store_kit import (
    AGAIN,
    FAILED,
    IN_DOUBT,
    MAILBOX,
    SENT,
    Kit,
    opened,
    to_record,
)
from worker.model import TRANSITIONS, Priority, State, batch_id_of, message_id_of

PAST = datetime.now(UTC) - timedelta(hours=1)

#: What no function of the store does yet: cancelling, suppressing and settling by hand.
TO_COME = {
    (State.QUEUED, State.CANCELLED),
    (State.QUEUED, State.SUPPRESSED),
    (State.UNKNOWN, State.FAILED),
}

Step = Callable[[Kit, Any, str, int], object]


def _recorded(verdict: Any, back: int = 0) -> Step:
    return lambda kit, head, one, fence: kit.record(to_record(head, one, fence - back, verdict))


def _ended(resend: bool) -> Step:
    return lambda kit, _head, _one, _fence: kit.end_leases(resend=resend)


def _retried(kit: Kit, head: Any, _one: str, _fence: int) -> object:
    if kit.store.batch_status(head.id)["state"] == "cancelled":
        return None
    return kit.store.retry(head.id, include_unknown=True, by="x", why=None, age=60)


def _expired(kit: Kit, _head: Any, one: str, _fence: int) -> object:
    kit.set(one, deadline_at=PAST)
    column = "deadline_at"
    kit.sql(f"UPDATE queues SET {column} = next_due_at")
    return kit.store.end_deadlines()


STEPS: list[Step] = [
    lambda kit, _head, one, _fence: kit.claim([one]),
    *(_recorded(v, back) for v in (SENT, AGAIN, FAILED, IN_DOUBT) for back in (0, 1)),
    _ended(resend=True),
    _ended(resend=False),
    _retried,
    _expired,
]


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def _put(kit: Kit, state: State, doubt: bool, cancelled: bool) -> tuple[Any, str]:
    """A message in this state, in a batch of its own."""
    head, [one] = kit.batch()
    values: dict[str, Any] = {"state": state, "doubt": doubt, "fence": 2}
    if state is State.SENDING:
        values |= {"lease_until": PAST, "mailbox": MAILBOX, "token_ends_at": PAST}
    if state is State.SENT:
        values["sent_at"] = PAST
    kit.set(one, **values)
    kit.set_batch(head.id, cancelled_at=PAST if cancelled else None)
    return head, one


def _possible(state: State, doubt: bool) -> bool:
    if state is State.UNKNOWN:
        return doubt
    return not doubt or state not in {State.FAILED, State.CANCELLED, State.EXPIRED}


def test_the_store_makes_exactly_the_legal_transitions(kit: Kit) -> None:
    """Every step of the store on a message in every state, doubtful or not, cancelled or not."""
    made = set()
    for state, doubt, cancelled in itertools.product(State, (False, True), (False, True)):
        if not _possible(state, doubt):
            continue
        for step in STEPS:
            head, one = _put(kit, state, doubt, cancelled)
            step(kit, head, one, 2)
            made.add((state, State(kit.message(one)["state"])))
            kit.sql("DELETE FROM attempts")
            kit.sql("DELETE FROM messages")
            kit.sql("DELETE FROM batches")

    legal = {(a, b) for a, targets in TRANSITIONS.items() for b in targets}
    assert {(a, b) for a, b in made if a != b} == legal - TO_COME


def test_every_state_has_its_transitions_and_sent_is_the_end() -> None:
    """And any state but sent can still become sent: evidence only rises."""
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.SENT] == frozenset()
    assert all(State.SENT in TRANSITIONS[s] for s in State if s is not State.SENT)


def test_ids_are_the_same_at_every_call() -> None:
    """A repeated call names the same rows; a key that is a UUID is itself the batch id."""
    batch = batch_id_of("june-2030")

    assert batch == batch_id_of("june-2030") != batch_id_of("july-2030")
    assert batch_id_of(batch.upper()) == batch
    assert message_id_of(batch, 1) == message_id_of(batch, 1) != message_id_of(batch, 2)


@pytest.mark.parametrize("name", ["high", "Normal", "BULK"])
def test_a_priority_is_found_by_its_name(name: str) -> None:
    """In any case of letters; smaller goes first."""
    assert Priority.named(name).name == name.upper()
    assert Priority.HIGH < Priority.NORMAL < Priority.BULK


def test_an_unknown_priority_is_refused_with_what_is_allowed() -> None:
    """The text names the three."""
    with pytest.raises(ValueError, match="high, normal, bulk"):
        Priority.named("urgent")
