"""Every interleaving of one message: no promise breaks, and every known bug is found."""

from __future__ import annotations

import pytest

from tests.protocol import (
    Bounds,
    Bug,
    Rules,
    WayInBug,
    World,
    explore,
    explore_way_in,
    steps,
)
from worker.model import TRANSITIONS, OnUnknown, State

HOLD, RECONCILE, RESEND = OnUnknown.HOLD, OnUnknown.RECONCILE, OnUnknown.RESEND
NOWHERE = {(0, State.CANCELLED), (0, State.FAILED), (0, State.UNKNOWN)}


@pytest.mark.parametrize(
    ("policy", "bounds", "at_least"),
    [
        (HOLD, Bounds(crashes=2), 15_000),
        (RECONCILE, Bounds(), 80_000),
        (RECONCILE, Bounds(claims=2, crashes=2, doubts=2), 25_000),
    ],
)
def test_no_interleaving_sends_twice_or_says_what_is_not(
    policy: OnUnknown, bounds: Bounds, at_least: int
) -> None:
    """Two workers, crashes, pauses of any length, late answers, looks, token ends, a cancel: Graph
    accepts one copy at most, and wherever it comes to rest the row says what happened.
    """
    walk = explore(Rules(policy, bounds=bounds))

    assert walk.problem is None, (walk.problem, walk.path)
    assert walk.worlds >= at_least
    assert walk.ends == NOWHERE | {(1, State.SENT)}


def test_resend_may_double_but_never_lies() -> None:
    """Who chose resend gets a second copy now and then; a row that says otherwise never."""
    walk = explore(Rules(RESEND, bounds=Bounds(claims=2, token_ends=0, doubts=2)))

    assert walk.problem is None, (walk.problem, walk.path)
    assert walk.ends == NOWHERE | {(1, State.SENT), (2, State.SENT)}


#: Where each bug shows: the policy, and what is to be found.
SHOWS: dict[Bug, tuple[OnUnknown, str]] = {
    Bug.NO_FENCE: (RECONCILE, "failed, and Graph has accepted it"),
    Bug.RESEND_ON_504: (HOLD, "sent twice"),
    Bug.NO_SETTLE: (RECONCILE, "sent twice"),
    Bug.PERMIT_LEAK: (RECONCILE, "queued for ever"),
    Bug.RETRY_AFTER_IGNORED: (HOLD, "called too early"),
    Bug.UPDATE_THEN_POST: (HOLD, "sent, and Graph has accepted nothing"),
    Bug.LEASE_MEANS_NOT_SENT: (HOLD, "sent twice"),
    Bug.DOUBT_FORGOTTEN: (RESEND, "failed, and Graph has accepted it"),
    Bug.LATE_WORD_LOST: (HOLD, "unknown, and a 202 was recorded"),
}


@pytest.mark.parametrize("bug", Bug)
def test_the_walk_finds_each_known_bug(bug: Bug) -> None:
    """Switched on one by one: a walk that found nothing anywhere would prove nothing."""
    policy, problem = SHOWS[bug]

    walk = explore(Rules(policy, bug, Bounds(claims=2, cancels=False)))

    assert walk.problem == problem
    assert walk.path


def test_a_path_that_was_found_can_be_walked_again() -> None:
    """What is reported is a real way to the problem, step by step."""
    rules = Rules(HOLD, Bug.RESEND_ON_504, Bounds(claims=2, cancels=False))
    worlds = {World()}

    for name in explore(rules).path:
        worlds = {then for world in worlds for step, then in steps(world, rules) if step == name}

    assert any(len(world.copies) > 1 for world in worlds)


def test_only_transitions_that_the_product_calls_legal_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table is the product's own: taken out of it, a step is reported as illegal."""
    fewer = {**TRANSITIONS, State.SENDING: TRANSITIONS[State.SENDING] - {State.UNKNOWN}}
    monkeypatch.setattr("tests.protocol.TRANSITIONS", fewer)

    assert explore(Rules(HOLD)).problem == "sending → unknown"


def test_an_acknowledged_chunk_becomes_its_rows_once_whatever_dies() -> None:
    """The way in: two readers and crashes at every point lose nothing and double nothing."""
    assert explore_way_in(None) is None


@pytest.mark.parametrize(
    ("bug", "problem"),
    [
        (WayInBug.ACK_BEFORE_COMMIT, "lost"),
        (WayInBug.CELERY_PAYLOAD, "lost"),
        (WayInBug.NO_KEY, "doubled"),
    ],
)
def test_the_walk_finds_each_known_bug_on_the_way_in(bug: WayInBug, problem: str) -> None:
    """An acknowledgement too early, a Celery message as the only copy, rows without a key."""
    assert explore_way_in(bug) == problem
