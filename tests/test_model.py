"""The transitions of the model are those that the store can do, no more and no fewer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from tests.store_kit import (
    AGAIN,
    FAILED,
    IN_DOUBT,
    MAILBOX,
    SENT,
    Kit,
    chunk,
    opened,
    to_record,
)
from worker.model import TRANSITIONS, Priority, State, batch_id_of, message_id_of
from worker.store.doubt import Looked
from worker.store.schema import batches, messages

PAST = datetime.now(UTC) - timedelta(hours=1)

#: What no function of the store does yet: cancelling and suppressing.
TO_COME = {
    (State.QUEUED, State.CANCELLED),
    (State.QUEUED, State.SUPPRESSED),
}

Step = Callable[[Kit, Any, str, int], object]


def _recorded(verdict: Any, back: int = 0) -> Step:
    return lambda kit, head, one, fence: kit.record(to_record(head, one, fence - back, verdict))


def _ended(resend: bool) -> Step:
    return lambda kit, _head, _one, _fence: kit.end_leases(resend=resend)


def _retried(kit: Kit, head: Any, _one: str, _fence: int) -> object:
    if kit.status(head.id)["state"] == "cancelled":
        return None
    return kit.retry(head.id, include_unknown=True)


def _expired(kit: Kit, head: Any, one: str, _fence: int) -> object:
    kit.put(one, deadline_at=PAST)
    kit.sql("UPDATE queues SET deadline_at = next_due_at WHERE id = :id", id=head.queue_id)
    return kit.store.end_deadlines()


def _settled(to: State) -> Step:
    def settle(kit: Kit, head: Any, one: str, _fence: int) -> object:
        if to is State.QUEUED and kit.status(head.id)["state"] == "cancelled":
            return None
        return kit.store.doubt.settle(
            to, message_id=one, force=True, wait=60, age=60, by="x", why=None
        )

    return settle


def _nothing_came(tries: int) -> Step:
    def step(kit: Kit, _head: Any, one: str, _fence: int) -> object:
        kit.put(one, look_at=PAST, tries=tries)
        return [
            kit.store.doubt.nothing_came(
                Looked(taken, "absent", "not there", MAILBOX), wait=60, max_attempts=6
            )
            for taken in kit.store.doubt.take(9, lease=60, wait=60)
        ]

    return step


def _found(kit: Kit, _head: Any, one: str, _fence: int) -> object:
    kit.put(one, look_at=PAST)
    taken = kit.store.doubt.take(9, lease=60, wait=60)
    return [kit.store.doubt.found(Looked(t, "found", "there", MAILBOX)) for t in taken]


STEPS: list[Step] = [
    *(_settled(to) for to in (State.SENT, State.FAILED, State.QUEUED)),
    _found,
    _nothing_came(tries=0),
    _nothing_came(tries=6),
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


def _values(state: State, doubt: bool) -> dict[str, Any]:
    """The columns of a message in this state."""
    values: dict[str, Any] = {"state": state, "doubt": doubt, "fence": 2}
    if state is State.SENDING:
        values |= {"lease_until": PAST, "mailbox": MAILBOX, "token_ends_at": PAST}
    if state is State.SENT:
        values["sent_at"] = PAST
    return values


def _possible(state: State, doubt: bool) -> bool:
    if state is State.UNKNOWN:
        return doubt
    not_sent = {State.FAILED, State.CANCELLED, State.EXPIRED, State.SUPPRESSED}
    return not doubt or state not in not_sent


#: Where a message can be: its state, whether in doubt, whether its batch is cancelled.
PLACES = [
    (state, doubt, cancelled)
    for state, doubt, cancelled in itertools.product(State, (False, True), (False, True))
    if _possible(state, doubt)
]


def _arrange(kit: Kit) -> list[tuple[State, Any, str]]:
    """A message in every place, each in a batch of its own."""
    heads = [kit.head(1) for _ in PLACES]
    kit.store.arrive(heads, [chunk(head, 1, [1]) for head in heads])
    ids = [message_id_of(head.id, 1) for head in heads]
    with kit.engine.begin() as connection:
        for (state, doubt, cancelled), head, one in zip(PLACES, heads, ids, strict=True):
            its = update(messages).where(messages.c.id == one)
            connection.execute(its.values(**_values(state, doubt)))
            if cancelled:
                its = update(batches).where(batches.c.id == head.id)
                connection.execute(its.values(cancelled_at=PAST))
    return list(zip((state for state, _, _ in PLACES), heads, ids, strict=True))


def test_the_store_makes_exactly_the_legal_transitions(kit: Kit) -> None:
    """Every step of the store on a message in every place."""
    made = set()
    for step in STEPS:
        arranged = _arrange(kit)
        for _, head, one in arranged:
            step(kit, head, one, 2)
        found = {str(row[0]): State(row[1]) for row in kit.sql("SELECT id, state FROM messages")}
        made |= {(state, found[one]) for state, _, one in arranged}
        kit.sql("DELETE FROM attempts")
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
