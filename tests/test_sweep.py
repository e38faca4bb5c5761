"""The sweep: whatever ring was lost, SQL says what is to be done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta

import pytest

from tests.store_kit import FAILED, MAILBOX, SENT, Kit, opened, to_record
from worker.model import OnUnknown
from worker.sweep import mailboxes_of, sweep, tell_ends


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def swept(
    kit: Kit, on_unknown: OnUnknown = OnUnknown.HOLD
) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """One round: what it did, whom it woke, which batches it told of."""
    woken: list[tuple[str, str]] = []
    told: list[str] = []
    done = sweep(
        kit.store, on_unknown=on_unknown, max_attempts=6,
        wake=woken.extend, finished=told.append,
    )  # fmt: skip
    return done, woken, told


def test_a_sweep_wakes_each_target_with_due_work_once(kit: Kit) -> None:
    """However many batches are due there; what is not due, open or paused wakes nobody."""
    kit.batch()
    kit.batch()
    kit.batch(target_kind="pool", target="news")
    later = datetime.now(UTC) + timedelta(hours=1)
    kit.batch(target="later@contoso.com", due_at=later)
    paused, _ = kit.batch(target="paused@contoso.com")
    kit.set_batch(paused.id, paused_at=datetime.now(UTC))

    done, woken, _ = swept(kit)

    assert sorted(woken) == [("mailbox", MAILBOX), ("pool", "news")]
    assert done == {"leases": 0, "expired": 0, "cancelled": 0, "targets": 2, "batches": 0}


@pytest.mark.parametrize(
    ("on_unknown", "state", "woken"),
    [
        (OnUnknown.HOLD, "unknown", []),
        (OnUnknown.RECONCILE, "unknown", []),
        (OnUnknown.RESEND, "queued", [("mailbox", MAILBOX)]),
    ],
)
def test_a_sweep_ends_lost_leases(
    kit: Kit, on_unknown: OnUnknown, state: str, woken: list[tuple[str, str]]
) -> None:
    """Only those who chose to resend get the message queued, and its lane woken in that round."""
    _, one, _ = kit.claimed()
    kit.look()
    kit.lose(one)

    done, rung, _ = swept(kit, on_unknown)

    assert (done["leases"], rung, kit.message(one)["state"]) == (1, woken, state)


def test_a_sweep_ends_deadlines_and_tells_of_the_end_of_a_batch_once(kit: Kit) -> None:
    """A batch whose last message expired is finished at once: no lane may look there for long."""
    head, _ = kit.batch(deadline_at=datetime.now(UTC) - timedelta(hours=1))

    done, _, told = swept(kit)
    assert (done["expired"], told) == (1, [head.id])
    assert swept(kit)[2] == []


def test_a_sweep_finishes_what_was_sent(kit: Kit) -> None:
    """Every message has its end, so the batch has."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, SENT))
    kit.look()

    done, woken, told = swept(kit)

    assert (done["batches"], woken, told) == (1, [], [head.id])


def test_a_pool_is_served_by_its_members_and_a_mailbox_by_itself() -> None:
    """A pool that is not there any more is served by nobody."""
    pools = {"news": ["b@x.org", "a@x.org"]}

    assert mailboxes_of([("mailbox", "c@x.org")], pools) == ["c@x.org"]
    assert mailboxes_of([("pool", "news"), ("mailbox", "a@x.org")], pools) == ["a@x.org", "b@x.org"]
    assert mailboxes_of([("pool", "gone")], pools) == []


def ended(kit: Kit, **options: str) -> str:
    """A batch of one that was sent, and has finished."""
    head, one, fence = kit.claimed(options=options)
    kit.record(to_record(head, one, fence, SENT))
    assert kit.look() is None
    assert len(kit.store.finish_batches()) == 1
    return head.id


def test_an_application_is_told_of_an_end_until_it_was_told(kit: Kit) -> None:
    """Once where all goes well; again where the broker was away or the sweep died in between."""
    calls: list[tuple[str, str, int]] = []
    answers = [False, True]

    def tell(task: str, batch_id: str, counts: Mapping[str, int]) -> bool:
        calls.append((task, batch_id, counts["sent"]))
        return answers.pop(0)

    ended(kit)
    batch_id = ended(kit, on_finished="billing.done")

    assert [tell_ends(kit.store, tell) for _ in range(3)] == [0, 1, 0]
    assert calls == [("billing.done", batch_id, 1)] * 2


def test_a_batch_that_was_reopened_is_told_of_its_next_end(kit: Kit) -> None:
    """A retry makes it run again: the first word was not the last."""
    calls: list[str] = []

    def tell(_task: str, batch_id: str, _counts: Mapping[str, int]) -> bool:
        calls.append(batch_id)
        return True

    head, one, fence = kit.claimed(options={"on_finished": "billing.done"})
    kit.record(to_record(head, one, fence, FAILED))
    for state in ("failed", "sent"):
        assert kit.look() is None
        assert len(kit.store.finish_batches()) == 1
        assert tell_ends(kit.store, tell) == 1
        if state == "failed":
            kit.retry(head.id)
            assert tell_ends(kit.store, tell) == 0
            kit.record(to_record(head, one, kit.claim([one])[one], SENT))
    assert calls == [head.id] * 2
