"""The sweep's chores: leases and deadlines that ran out, batches that ended."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from tests.store_kit import (
    AGAIN,
    FAILED,
    LATER,
    SENT,
    Kit,
    opened,
    postgresql_only,
    retry_in,
    to_record,
)
from tests.support import wait_until
from worker.model import State
from worker.store import chores
from worker.store.sending import POISON

HOUR = timedelta(hours=1)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


# ---- leases -------------------------------------------------------------------------------------


def test_a_claim_whose_lease_ran_out_becomes_unknown(kit: Kit) -> None:
    """Its worker is dead or late, nobody knows what it sent; the audit says so, once."""
    _, one, fence = kit.claimed()
    assert kit.end_leases() == 0

    kit.lose(one)

    assert [kit.end_leases(), kit.end_leases()] == [1, 0]
    row = kit.message(one)
    [attempt] = row["attempts"]
    assert (row["state"], row["doubt"], row["error_code"]) == ("unknown", True, "LeaseExpired")
    assert (attempt["fence"], attempt["outcome"], attempt["late"]) == (fence, "unknown", False)
    assert attempt["token_ends_at"] == row["token_ends_at"]


def test_with_resend_it_is_queued_again_and_stays_in_doubt(kit: Kit) -> None:
    """Those who chose so accept a second copy; the doubt is not forgotten by it."""
    _, one, _ = kit.claimed()
    kit.look()
    kit.lose(one)
    kit.end_leases(resend=True)

    [due] = kit.look().due
    assert (due.id, due.doubt, due.tries) == (one, True, 1)


def test_with_resend_its_tries_are_not_endless(kit: Kit) -> None:
    """The last try that ends in doubt ends as unknown."""
    _, one, _ = kit.claimed()
    kit.lose(one)
    kit.end_leases(resend=True, max_attempts=1)

    assert kit.message(one)["state"] == "unknown"


def test_a_message_that_ends_three_leases_is_quarantined(kit: Kit) -> None:
    """It may be the message that kills the workers: even with resend it goes no further."""
    _, [one] = kit.batch()
    for _ in range(POISON):
        assert kit.claim([one])
        kit.lose(one)
        kit.end_leases(resend=True, max_attempts=100)

    row = kit.message(one)
    assert (row["state"], row["error_code"], len(row["attempts"])) == ("unknown", "Quarantined", 3)
    assert kit.claim([one]) == {}


def test_nothing_of_a_cancelled_batch_is_queued_again(kit: Kit) -> None:
    """A lost lease in a cancelled batch ends as unknown even with resend: nobody would send it."""
    head, one, _ = kit.claimed()
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))
    kit.lose(one)
    kit.end_leases(resend=True)

    assert kit.message(one)["state"] == "unknown"


# ---- deadlines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("doubt", "state"), [(False, "expired"), (True, "unknown")])
def test_what_waited_too_long_ends(kit: Kit, doubt: bool, state: str) -> None:
    """`expired` says surely not sent, so a message in doubt becomes `unknown`."""
    _, [one] = kit.batch(deadline_at=datetime.now(UTC) - HOUR)
    kit.put(one, doubt=doubt)

    assert [kit.store.end_deadlines(), kit.store.end_deadlines()] == [1, 0]
    assert kit.message(one)["state"] == state


def test_what_still_has_time_is_left_alone_and_found_later(kit: Kit) -> None:
    """The queue's row names the next deadline after the first ones have passed."""
    head, [early, late] = kit.batch(2, deadline_at=datetime.now(UTC) - HOUR)
    kit.put(late, deadline_at=datetime.now(UTC) + HOUR)

    assert kit.store.end_deadlines() == 1
    assert kit.message(early)["state"] == "expired"
    assert kit.queue(head)["deadline_at"] == kit.message(late)["deadline_at"]


def test_what_was_being_sent_when_its_deadline_passed_expires_on_its_return(kit: Kit) -> None:
    """The queue's deadline counts what is in flight: else nobody would ever look again."""
    head, one, fence = kit.claimed()
    gone = datetime.now(UTC) - HOUR
    kit.put(one, deadline_at=gone)
    kit.sql("UPDATE queues SET deadline_at = :at", at=_text(kit, gone))

    assert kit.store.end_deadlines() == 0
    kit.record(to_record(head, one, fence, LATER))
    assert kit.store.end_deadlines() == 1
    assert kit.message(one)["state"] == "expired"


def _text(kit: Kit, at: datetime) -> object:
    return at if kit.engine.dialect.name == "postgresql" else f"{at:%Y-%m-%d %H:%M:%S.%f}"


@postgresql_only
def test_a_deadline_that_arrives_meanwhile_is_not_forgotten(kit: Kit) -> None:
    """A retry that commits while the sweep waits for the queue's row leaves its deadline there."""
    head, [expires, failed] = kit.batch(2, deadline_at=datetime.now(UTC) - HOUR)
    kit.put(failed, state=State.FAILED)
    with ThreadPoolExecutor(1) as thread, kit.engine.connect() as first:
        with first.begin():
            retry_in(first, head.id)
            sweep = thread.submit(kit.store.end_deadlines)
            _wait_for_lock(kit)
        assert sweep.result(20) == 1

    assert kit.message(expires)["state"] == "expired"
    assert kit.queue(head)["deadline_at"] is not None


# ---- the end of a batch -------------------------------------------------------------------------


def test_a_batch_is_finished_only_when_nothing_is_queued_or_sending(kit: Kit) -> None:
    """Deferred and in flight both count; once finished, it is told once."""
    head, one, fence = kit.claimed()
    kit.look()
    assert kit.store.finish_batches() == []

    kit.record(to_record(head, one, fence, AGAIN))
    kit.look()
    assert kit.store.finish_batches() == []

    fence = kit.claim([one])[one]
    kit.record(to_record(head, one, fence, SENT))
    kit.look()
    assert [row["id"] for row in kit.store.finish_batches()] == [head.id]
    assert kit.store.finish_batches() == []
    assert kit.status(head.id)["state"] == "finished"


def test_an_open_batch_is_never_finished(kit: Kit) -> None:
    """Nothing of it is queued for sending, but the rest may still come."""
    head = kit.head(2, chunks=2)
    kit.store.arrive([head], [])

    assert kit.store.finish_batches() == []


def test_a_cancelled_batch_ends_with_what_is_in_flight(kit: Kit) -> None:
    """No lane looks at its queue any more, and it must end all the same."""
    head, one, fence = kit.claimed()
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))
    assert kit.store.finish_batches() == []

    kit.record(to_record(head, one, fence, LATER))

    assert [row["id"] for row in kit.store.finish_batches()] == [head.id]
    assert kit.status(head.id)["state"] == "cancelled"


def test_a_retry_reopens_a_finished_batch(kit: Kit) -> None:
    """It has something queued again, so it is running, and ends again later."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, FAILED))
    kit.look()
    assert len(kit.store.finish_batches()) == 1

    assert kit.retry(head.id) == 1
    assert kit.status(head.id)["state"] == "running"
    assert kit.store.finish_batches() == []


@postgresql_only
@pytest.mark.parametrize("retry_first", [True, False])
def test_a_batch_that_is_retried_meanwhile_does_not_end_as_finished(
    kit: Kit, retry_first: bool
) -> None:
    """Whoever locks the batch first: what is queued again is never counted as finished."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, FAILED))
    kit.look()
    with ThreadPoolExecutor(1) as thread, kit.engine.connect() as first:
        with first.begin():
            if retry_first:
                retry_in(first, head.id)
                assert thread.submit(kit.store.finish_batches).result(20) == []
            else:
                assert len(chores.finish_batches(first)) == 1
                other = thread.submit(kit.retry, head.id)
                _wait_for_lock(kit)
        assert retry_first or other.result(20) == 1

    assert kit.status(head.id)["state"] == "running"


def _wait_for_lock(kit: Kit) -> None:
    wait_until(
        lambda: kit.sql(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()"
        ),
        "the second transaction waits for the first",
    )
