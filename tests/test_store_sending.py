"""Sending: one claimant wins, outcomes are written once, and evidence only rises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select

from tests.store_kit import (
    AGAIN,
    FAILED,
    IN_DOUBT,
    LATER,
    MAILBOX,
    SENT,
    Kit,
    not_sent,
    opened,
    outcome_for,
    postgresql_only,
    to_record,
)
from tests.support import wait_until
from worker.model import Priority, State, Verdict
from worker.store.chores import correct_queue
from worker.store.schema import mailboxes

HOUR = timedelta(hours=1)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


# ---- looking ------------------------------------------------------------------------------------


def test_the_best_priority_is_served_first(kit: Kit) -> None:
    """However many turns the high queue had, a bulk queue waits for it."""
    bulk, _ = kit.batch(2, priority=Priority.BULK)
    high, _ = kit.batch(2, priority=Priority.HIGH)

    seen = kit.look(turns={high.queue_id: 1000, bulk.queue_id: 0})

    assert seen.queue_id == high.queue_id


def test_two_queues_of_one_priority_share_turns(kit: Kit) -> None:
    """A large batch does not keep a small one waiting: whoever had fewer turns is next."""
    heads = [kit.batch(4)[0] for _ in range(2)]
    turns = dict.fromkeys((head.queue_id for head in heads), 0)
    for _ in range(6):
        turns[kit.look(turns=turns, count=1).queue_id] += 1

    assert list(turns.values()) == [3, 3]


def test_equal_batches_advance_together_where_every_lane_is_short(kit: Kit) -> None:
    """A lane that may send one message and ends remembers no turns: then chance is fair."""
    heads = [kit.batch(40)[0] for _ in range(2)]
    served = Counter(kit.look(count=1).queue_id for _ in range(64))

    assert min(served[head.queue_id] for head in heads) >= 10


def test_lanes_of_a_pool_see_different_messages_first_and_all_reach_all(kit: Kit) -> None:
    """Each mailbox prefers its own share, so that lanes seldom ask for the same message."""
    pools = {"news": ["c@contoso.com", "a@contoso.com", "b@contoso.com"]}
    kit.batch(12, target_kind="pool", target="news")
    first = [{due.id for due in kit.look(m, 4, pools=pools).due} for m in pools["news"]]
    every = [{due.id for due in kit.look(m, 12, pools=pools).due} for m in pools["news"]]

    assert len(set().union(*first)) == 12
    assert [len(one) for one in every] == [12, 12, 12]


def test_a_mailbox_sees_no_queue_of_another(kit: Kit) -> None:
    """Nor that of a pool which it is not in."""
    kit.batch(1)
    kit.batch(1, target_kind="pool", target="news")

    assert kit.look("other@contoso.com") is None
    assert kit.look("other@contoso.com", pools={"offers": ["other@contoso.com"]}) is None


def test_an_expired_message_does_not_stand_in_the_way(kit: Kit) -> None:
    """It cannot be claimed, so a lane must not be shown it again and again."""
    _, [gone, good] = kit.batch(2)
    kit.put(gone, deadline_at=datetime.now(UTC) - HOUR)

    assert [due.id for due in kit.look(count=1).due] == [good]


# ---- claiming -----------------------------------------------------------------------------------


def test_a_claim_binds_mailbox_lease_and_token(kit: Kit) -> None:
    """What is needed to end the message's doubt is committed before a byte leaves."""
    _, [one] = kit.batch()

    assert kit.claim([one], lease=90.0, token_left=3000.0) == {one: 1}

    row, now = kit.message(one), datetime.now(UTC)
    assert (row["state"], row["mailbox"], row["size"]) == ("sending", MAILBOX, 900)
    assert abs(row["lease_until"] - now - timedelta(seconds=90)) < timedelta(seconds=30)
    assert abs(row["token_ends_at"] - now - timedelta(seconds=3000)) < timedelta(seconds=30)


def test_of_two_claimants_one_wins(kit: Kit) -> None:
    """Two processes that claim the same messages at once never both get one."""
    _, ids = kit.batch(40)
    start = Barrier(2)

    def claim(worker: str) -> set[str]:
        start.wait(10)
        return {one for part in range(0, 40, 4)
                for one in kit.claim(ids[part : part + 4], worker=worker)}  # fmt: skip

    with ThreadPoolExecutor(2) as threads:
        a, b = threads.map(claim, ["w-1", "w-2"])

    assert a & b == set()
    assert a | b == set(ids)


@pytest.mark.parametrize("column", ["paused_at", "cancelled_at"])
def test_nothing_is_claimed_after_pause_or_cancel(kit: Kit, column: str) -> None:
    """A lane with a full buffer is stopped by the claim itself."""
    head, [one] = kit.batch()
    kit.set_batch(head.id, **{column: datetime.now(UTC)})

    assert kit.claim([one]) == {}
    assert kit.look() is None


@pytest.mark.parametrize(("column", "hours"), [("deadline_at", -1), ("due_at", 1)])
def test_nothing_is_claimed_outside_its_time(kit: Kit, column: str, hours: int) -> None:
    """Neither past its deadline nor before it is due."""
    _, [one] = kit.batch()
    kit.put(one, **{column: datetime.now(UTC) + hours * HOUR})

    assert kit.claim([one]) == {}
    assert kit.look() is None


# ---- recording ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "state", "outcome"),
    [
        (SENT, "sent", "accepted"),
        (LATER, "queued", "throttled"),
        (FAILED, "failed", "rejected"),
        (IN_DOUBT, "unknown", "unknown"),
    ],
)
def test_an_outcome_becomes_state_and_audit_row(
    kit: Kit, verdict: Verdict, state: str, outcome: str
) -> None:
    """One transaction writes both; the lease ends with it."""
    head, one, fence = kit.claimed()

    assert kit.record(to_record(head, one, fence, verdict)) == {(one, fence)}

    row = kit.message(one)
    [attempt] = row["attempts"]
    assert (row["state"], row["lease_until"], row["tries"]) == (
        state, None, int(verdict.spends_try),
    )  # fmt: skip
    assert (attempt["outcome"], attempt["late"], attempt["fence"]) == (outcome, False, fence)


@pytest.mark.parametrize("verdict", [SENT, LATER, FAILED, IN_DOUBT])
@pytest.mark.parametrize("exchange", [True, False])
def test_the_same_outcome_again_changes_nothing(kit: Kit, verdict: Verdict, exchange: bool) -> None:
    """The reply to a COMMIT was lost: the repetition finds its own rows, and says "ours"."""
    head, one, fence = kit.claimed()
    outcome = outcome_for(verdict) if exchange else not_sent()
    result = to_record(head, one, fence, verdict, outcome)
    kit.record(result)
    before, queue = kit.message(one), dict(kit.queue(head))

    assert kit.record(result) == {(one, fence)}
    assert (kit.message(one), dict(kit.queue(head))) == (before, queue)


def test_an_outcome_of_an_older_claim_is_not_taken_for_the_newer(kit: Kit) -> None:
    """The fencing number guards, also when both outcomes share a transaction."""
    head, one, old = kit.claimed()
    kit.lose(one)
    kit.end_leases(resend=True)
    new = kit.claim([one])[one]
    done = kit.record(to_record(head, one, old, FAILED), to_record(head, one, new, LATER))

    row = kit.message(one)
    assert done == {(one, new)}
    assert row["state"] == "queued"
    assert [(a["fence"], a["late"]) for a in row["attempts"]] == [
        (old, False), (old, True), (new, False),
    ]  # fmt: skip


def _unknown(kit: Kit) -> tuple[Any, str, int]:
    head, one, fence = kit.claimed()
    kit.lose(one)
    assert kit.end_leases() == 1
    return head, one, fence


@pytest.mark.parametrize("state", ["unknown", "queued", "failed", "cancelled", "expired"])
def test_a_late_202_turns_any_state_into_sent(kit: Kit, state: str) -> None:
    """Evidence only rises; the late word is a second audit row, never over the first."""
    head, one, fence = _unknown(kit)
    kit.put(one, state=state, doubt=state == "unknown")

    assert kit.record(to_record(head, one, fence, SENT)) == set()

    row = kit.message(one)
    assert (row["state"], row["doubt"], row["request_id"]) == ("sent", False, "r-1")
    assert [(a["outcome"], a["late"]) for a in row["attempts"]] == [
        ("unknown", False), ("accepted", True),
    ]  # fmt: skip


def test_a_late_202_counts_while_the_next_claim_is_under_way(kit: Kit) -> None:
    """And the outcome of that next claim then comes late itself: it changes no state."""
    head, one, old = _unknown(kit)
    kit.put(one, state=State.QUEUED)
    new = kit.claim([one])[one]
    kit.record(to_record(head, one, old, SENT))
    kit.record(to_record(head, one, new, IN_DOUBT))

    row = kit.message(one)
    assert row["state"] == "sent"
    assert [(a["fence"], a["late"]) for a in row["attempts"]] == [
        (old, False), (old, True), (new, True),
    ]  # fmt: skip


@pytest.mark.parametrize("verdict", [FAILED, LATER, IN_DOUBT])
def test_a_late_word_that_proves_nothing_changes_no_state(kit: Kit, verdict: Verdict) -> None:
    """It stands on the audit, but does not clear a doubt."""
    head, one, fence = _unknown(kit)
    before = kit.message(one)
    kit.record(to_record(head, one, fence, verdict))
    after = kit.message(one)

    assert [a["late"] for a in after.pop("attempts")] == [False, True]
    before.pop("attempts")
    assert after == before


def test_a_refusal_of_a_message_in_doubt_leaves_it_unknown(kit: Kit) -> None:
    """An earlier attempt may have sent it: `failed` would claim what nobody knows."""
    head, one, fence = kit.claimed()
    kit.put(one, doubt=True)
    kit.record(to_record(head, one, fence, FAILED))

    assert kit.message(one)["state"] == "unknown"


@pytest.mark.parametrize(("doubt", "state"), [(False, "cancelled"), (True, "unknown")])
def test_a_throttled_message_of_a_cancelled_batch_ends(kit: Kit, doubt: bool, state: str) -> None:
    """It returns to no queue; where it may have been sent, nobody says that it was not."""
    head, one, fence = kit.claimed()
    kit.put(one, doubt=doubt)
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))
    kit.record(to_record(head, one, fence, LATER))

    assert kit.message(one)["state"] == state


def test_text_that_no_database_takes_does_not_cost_the_outcome(kit: Kit) -> None:
    """A NUL or half a surrogate pair in a foreign answer is left out of the audit."""
    head, one, fence = kit.claimed()
    outcome = outcome_for(FAILED)
    ugly = replace(outcome, answer=replace(outcome.answer, detail="a\0b\ud800c"))

    assert kit.record(to_record(head, one, fence, FAILED, ugly)) == {(one, fence)}
    assert kit.message(one)["attempts"][0]["detail"] == "ab?c"


def test_a_shorter_cooldown_does_not_end_a_longer_one(kit: Kit) -> None:
    """The mailbox's row keeps the longest, for the day that Redis forgets."""
    for hours in (2, 1):
        head, one, fence = kit.claimed()
        kit.record(to_record(head, one, fence, replace(LATER, cooldown=hours * HOUR)))

    with kit.engine.connect() as connection:
        until = connection.execute(select(mailboxes.c.cooldown_until)).scalar_one()
    assert until > datetime.now(UTC) + 1.5 * HOUR


# ---- the queue's row ----------------------------------------------------------------------------


def test_an_empty_queue_is_corrected_to_its_next_message(kit: Kit) -> None:
    """So that nobody looks there in vain: later where something waits, never where nothing does."""
    head, one, fence = kit.claimed()
    assert kit.look() is None
    assert kit.queue(head)["next_due_at"] is None

    kit.record(to_record(head, one, fence, LATER))

    assert kit.queue(head)["next_due_at"] > datetime.now(UTC) + HOUR / 2
    assert kit.look() is None


def test_a_correction_hides_nothing_that_became_due_meanwhile(kit: Kit) -> None:
    """A lane looks, finds nothing, and only then a message returns: the correction gives way."""
    head, one, fence = kit.claimed()
    revision = kit.queue(head)["revision"]
    kit.record(to_record(head, one, fence, AGAIN))
    with kit.engine.begin() as connection:
        correct_queue(connection, head.queue_id, revision)

    assert [due.id for due in kit.look().due] == [one]


@postgresql_only
@pytest.mark.parametrize("record_first", [True, False])
def test_two_transactions_never_hide_a_due_message(kit: Kit, record_first: bool) -> None:
    """Whoever reaches the queue's row first, the other one waits for it and then sees it."""
    head, one, fence = kit.claimed()
    revision = kit.queue(head)["revision"]
    with ThreadPoolExecutor(1) as thread, kit.engine.connect() as first:
        with first.begin():
            if record_first:
                kit.sending.record(first, [to_record(head, one, fence, AGAIN)])
            else:
                correct_queue(first, head.queue_id, revision)
            second = thread.submit(_other, kit, head, one, fence, revision, record_first)
            _wait_for_lock(kit)
        second.result(20)

    assert [due.id for due in kit.look().due] == [one]


def _other(kit: Kit, head: Any, one: str, fence: int, revision: int, correct: bool) -> None:
    with kit.engine.begin() as connection:
        if correct:
            correct_queue(connection, head.queue_id, revision)
        else:
            kit.sending.record(connection, [to_record(head, one, fence, AGAIN)])


def _wait_for_lock(kit: Kit) -> None:
    wait_until(
        lambda: kit.sql(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        ),
        "the second transaction waits for the first",
    )
