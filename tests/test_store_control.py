"""What operators do with a batch: pause, resume, cancel, retry, and their races with the lanes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.store_kit import (
    AGAIN,
    FAILED,
    SENT,
    Kit,
    chunk,
    opened,
    sqlite_only,
    to_record,
)
from worker.model import State, WrongState, message_id_of
from worker.store import control
from worker.store.retrying import is_conflict
from worker.store.schema import messages

WHO: dict[str, Any] = {"by": "ann", "why": "a typo"}


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def told(kit: Kit) -> list[tuple[str, str, str | None]]:
    """The events: kind, by, why."""
    return [tuple(row) for row in kit.sql('SELECT kind, "by", why FROM events ORDER BY id')]


def ended(kit: Kit, batch_id: str) -> None:
    """The sweep ends the batch."""
    kit.look()
    assert [row["id"] for row in kit.store.finish_batches()] == [batch_id]


# ---- pause and resume ---------------------------------------------------------------------------


def test_a_paused_batch_waits_until_it_is_resumed(kit: Kit) -> None:
    """Nothing is claimed and nobody is woken meanwhile; again changes and tells nothing."""
    head, ids = kit.batch(3)
    kit.claim(ids[:1])

    for _ in range(2):
        answer = kit.store.control.pause(head.id, **WHO)
        assert answer == {"batch_id": head.id, "state": "paused", "queued": 2, "in_flight": 1}
    assert (kit.look(), kit.store.due_targets(), kit.claim(ids)) == (None, [], {})

    for _ in range(2):
        answer = kit.store.control.resume(head.id, **WHO)
        assert answer == {"batch_id": head.id, "state": "running", "queued": 2, "in_flight": 1}
    assert len(kit.claim(ids)) == 2
    assert told(kit) == [("pause", "ann", "a typo"), ("resume", "ann", "a typo")]


def test_an_open_batch_may_be_paused_and_then_is_whole_and_waits(kit: Kit) -> None:
    """Its producer goes on; what was to wait waits."""
    head = kit.head(2, chunks=2)
    kit.store.arrive([head], [chunk(head, 1, [1])])
    kit.store.control.pause(head.id, **WHO)
    kit.store.arrive([head], [chunk(head, 2, [2])])

    assert kit.status(head.id)["state"] == "paused"
    assert kit.claim([message_id_of(head.id, 1)]) == {}


@pytest.mark.parametrize(
    ("column", "command", "says"),
    [
        ("finished_at", "pause", "is finished: there is nothing to pause"),
        ("cancelled_at", "pause", "is cancelled: there is nothing to pause"),
        ("cancelled_at", "resume", "is cancelled: it cannot be resumed"),
        ("finished_at", "cancel", "is finished: nothing of it is left to cancel"),
    ],
)
@sqlite_only
def test_what_cannot_be_is_said_in_a_line(kit: Kit, column: str, command: str, says: str) -> None:
    """And changes nothing."""
    head, _ = kit.batch()
    kit.set_batch(head.id, **{column: datetime.now(UTC)})

    with pytest.raises(WrongState, match=says):
        getattr(kit.store.control, command)(head.id, **WHO)
    assert told(kit) == []


def test_what_is_not_there_is_said_so(kit: Kit) -> None:
    """The client then asks the inbox."""
    absent = "00000000-0000-4000-8000-000000000000"
    does = kit.store.control

    assert does.pause(absent, **WHO) is does.resume(absent, **WHO) is None
    assert does.cancel(absent, **WHO) is does.retry(absent, age=60, **WHO) is None


# ---- cancel -------------------------------------------------------------------------------------


def test_a_cancel_says_how_many_of_each_and_ends_with_what_is_in_flight(kit: Kit) -> None:
    """What may have been sent becomes unknown; again gives the same answer and one event."""
    head, ids = kit.batch(6)
    claims = kit.claim(ids[:2])
    kit.record(to_record(head, ids[0], claims[ids[0]], SENT))
    kit.put(ids[2], doubt=True)

    for _ in range(2):
        assert kit.store.control.cancel(head.id, **WHO) == {
            "batch_id": head.id, "state": "cancelled", "cancelled": 3, "in_flight": 1,
            "unknown": 1,
        }  # fmt: skip
    kit.record(to_record(head, ids[1], claims[ids[1]], AGAIN))

    assert kit.status(head.id)["counts"] | {"cancelled": 0} == {
        **dict.fromkeys(map(str, State), 0), "sent": 1, "unknown": 1,
    }  # fmt: skip
    assert kit.message(ids[1])["state"] == "cancelled"
    assert told(kit) == [("cancel", "ann", "a typo")]
    ended(kit, head.id)


def test_a_cancelled_open_batch_ends_whatever_else_arrives(kit: Kit) -> None:
    """Its producer died: the batch is discarded, and a repeat of the call cannot revive it."""
    head = kit.head(3, chunks=2)
    kit.store.arrive([head], [chunk(head, 1, [1, 2])])

    answer = kit.store.control.cancel(head.id, **WHO)
    kit.store.arrive([head], [chunk(head, 2, [3])])

    assert answer is not None
    assert (answer["cancelled"], kit.status(head.id)["counts"]["cancelled"]) == (2, 3)
    assert kit.claim([message_id_of(head.id, n) for n in (1, 2, 3)]) == {}


def test_a_batch_without_any_chunk_may_be_cancelled(kit: Kit) -> None:
    """Only its head is known to SQL: all of it still lies in the inbox."""
    head = kit.head(1)
    kit.store.arrive([head], [])
    kit.store.control.cancel(head.id, **WHO)
    kit.store.arrive([head], [chunk(head, 1, [1])])

    assert kit.status(head.id)["counts"]["cancelled"] == 1
    ended(kit, head.id)


def test_what_a_killed_cancel_has_left_is_taken_back_by_the_sweep(kit: Kit) -> None:
    """The first step says that it is cancelled; whoever comes next carries it out."""
    head, ids = kit.batch(4)
    other, _ = kit.batch(2)
    kit.put(ids[0], doubt=True)
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))

    assert [kit.store.control.end_cancelled() for _ in range(2)] == [4, 0]
    counts = kit.status(head.id)["counts"]
    assert (counts["cancelled"], counts["unknown"]) == (3, 1)
    assert kit.status(other.id)["counts"]["queued"] == 2


def test_a_large_batch_is_taken_back_in_steps(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many: no transaction takes more than a step, and the answer counts them all."""
    monkeypatch.setattr(control, "STEP", 100)
    head, _ = kit.batch(1000)

    answer = kit.store.control.cancel(head.id, **WHO)

    assert answer is not None
    assert answer["cancelled"] == 1000


# ---- races --------------------------------------------------------------------------------------


def claiming(kit: Kit, ids: list[str], begun: Event, answered: Event) -> dict[str, int]:
    """A lane that claims one message after the other, the last once the operator has his answer."""
    got: dict[str, int] = {}
    for one in ids:
        assert one != ids[-1] or answered.wait(60)
        try:
            got |= kit.claim([one])
        except OperationalError as error:  # as the writer does: it met the other, and comes again
            if not is_conflict(error):
                raise
            got |= kit.claim([one])
        begun.set()
    return got


@pytest.mark.parametrize("command", ["cancel", "pause"])
def test_of_a_claim_and_an_operator_each_message_meets_one(kit: Kit, command: str) -> None:
    """Whatever the timing: claimed ones are in flight, all others stay where the operator said, and
    after the answer nothing more is claimed.
    """
    head, ids = kit.batch(300)
    begun, answered = Event(), Event()
    with ThreadPoolExecutor(2) as threads:
        lanes = [threads.submit(claiming, kit, ids[n::2], begun, answered) for n in range(2)]
        assert begun.wait(20)
        answer = getattr(kit.store.control, command)(head.id, **WHO)
        answered.set()
        claimed = {one: fence for lane in lanes for one, fence in lane.result(60).items()}

    left = "cancelled" if command == "cancel" else "queued"
    counts = kit.status(head.id)["counts"]
    assert 0 < len(claimed) < 300
    assert (counts["sending"], counts[left]) == (len(claimed), 300 - len(claimed))
    # A claim that was under way when the pause was committed may still come after its count.
    late = 0 if command == "cancel" else 2
    assert 0 <= counts["sending"] - answer["in_flight"] <= late
    assert 0 <= answer[left] - counts[left] <= late
    assert kit.claim(ids) == {}


def test_what_comes_back_while_its_batch_is_cancelled_ends_too(kit: Kit) -> None:
    """Throttled messages return to their queue in the very moment: none stays queued."""
    head, ids = kit.batch(200)
    claims = kit.claim(ids)
    start = Barrier(2)

    def come_back() -> None:
        start.wait(20)
        for one, fence in claims.items():
            kit.record(to_record(head, one, fence, AGAIN))

    with ThreadPoolExecutor(1) as thread:
        lane = thread.submit(come_back)
        start.wait(20)
        kit.store.control.cancel(head.id, **WHO)
        lane.result(60)
    kit.store.control.end_cancelled()

    assert kit.status(head.id)["counts"]["cancelled"] == 200
    ended(kit, head.id)


def test_two_operators_at_once_leave_one_event(kit: Kit) -> None:
    """Both get the same answer."""
    head, _ = kit.batch(50)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: kit.store.control.cancel(head.id, **WHO), range(2)))

    assert answers[0] == answers[1]
    assert len(told(kit)) == 1


# ---- retry --------------------------------------------------------------------------------------


def test_a_retry_queues_the_failed_with_fresh_tries_and_says_so(kit: Kit) -> None:
    """Who and why stands in an event; the attempts of before stay on the audit."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, FAILED))

    assert kit.retry(head.id) == 1

    row = kit.message(one)
    assert (row["state"], row["tries"], row["error_code"]) == ("queued", 0, None)
    assert len(row["attempts"]) == 1
    assert [(e["kind"], e["by"], e["why"]) for e in row["events"]] == [("retry", "ann", "mended")]
    assert kit.claim([one]) == {one: fence + 1}


def test_two_retries_at_once_queue_once(kit: Kit) -> None:
    """Two operators press the button: nobody gets two mails, and one event tells of it."""
    head, ids = kit.batch(50)
    for one in ids:
        kit.put(one, state=State.FAILED)
    with ThreadPoolExecutor(2) as threads:
        requeued = list(threads.map(lambda _: kit.retry(head.id), range(2)))

    assert sorted(requeued) == [0, 50]
    assert len(kit.sql("SELECT 1 FROM events WHERE kind = 'retry'")) == 1


def test_the_unknown_are_retried_only_when_asked_and_stay_in_doubt(kit: Kit) -> None:
    """A second refusal then ends as unknown, not as failed: the first copy may be out."""
    head, one, _ = kit.claimed()
    kit.lose(one)
    kit.end_leases()
    assert kit.retry(head.id) == 0
    assert kit.retry(head.id, include_unknown=True) == 1
    assert kit.look().due[0].doubt

    kit.record(to_record(head, one, kit.claim([one])[one], FAILED))

    assert kit.message(one)["state"] == "unknown"


def test_a_retry_with_a_nearer_deadline_is_seen_by_the_sweep(kit: Kit) -> None:
    """The queue's deadline is never later than the earliest of its messages."""
    head, [one, _] = kit.batch(2)
    kit.put(one, state=State.FAILED)
    kit.retry(head.id, age=60)

    assert kit.queue(head)["deadline_at"] <= datetime.now(UTC) + 2 * timedelta(minutes=1)


def test_a_cancelled_batch_is_not_retried(kit: Kit) -> None:
    """Its messages would be queued and never sent."""
    head, one, fence = kit.claimed()
    kit.record(to_record(head, one, fence, FAILED))
    kit.set_batch(head.id, cancelled_at=datetime.now(UTC))

    with pytest.raises(WrongState, match="cancelled"):
        kit.retry(head.id)
    assert kit.message(one)["state"] == "failed"


def failed(kit: Kit, head: Any, one: str, code: str = "ErrorInvalidRecipients") -> None:
    """One message of a batch is refused."""
    kit.record(to_record(head, one, kit.claim([one])[one], FAILED))
    kit.put(one, error_code=code)


def test_a_retry_may_be_narrowed_by_code_and_time(kit: Kit) -> None:
    """Only what failed for this reason, only what was tried since then; the event says so."""
    head, ids = kit.batch(4)
    for one, code in zip(ids, ["A", "B", "B", "B"], strict=True):
        failed(kit, head, one, code)
    at = datetime.now(UTC) - timedelta(hours=1)
    long_ago = at - timedelta(hours=1)
    kit.sql("UPDATE attempts SET at = :at WHERE message_id = :id", id=ids[1],
            at=long_ago if kit.engine.dialect.name == "postgresql"
            else f"{long_ago:%Y-%m-%d %H:%M:%S.%f}")  # fmt: skip

    assert kit.retry(head.id, code="absent") == 0
    assert kit.retry(head.id, code="B", since=at) == 2
    assert [kit.message(one)["state"] for one in ids] == ["failed", "failed", "queued", "queued"]
    [event] = kit.message(ids[0])["events"]
    assert event["detail"] == {
        "requeued": 2, "include_unknown": False, "code": "B", "since": at.isoformat(),
    }  # fmt: skip


def test_a_dry_run_says_what_would_be_and_changes_nothing(kit: Kit) -> None:
    """The answer is that of the retry itself."""
    head, ids = kit.batch(4)
    failed(kit, head, ids[0])
    one = ids[1]
    kit.claim([one])
    kit.lose(one)
    kit.end_leases()
    does = kit.store.control
    many = {"age": 60, **WHO}

    would = [does.retry(head.id, include_unknown=u, dry_run=True, **many) for u in (False, True)]

    assert would == [
        {"requeued": 1, "left": {"queued": 2, "unknown": 1}},
        {"requeued": 2, "left": {"queued": 2}},
    ]
    assert told(kit) == []
    assert does.retry(head.id, include_unknown=True, **many) == would[1]


def test_a_retry_leaves_what_was_sent_and_what_has_no_content(kit: Kit) -> None:
    """The one is never sent again, the other cannot be; a large batch goes in steps."""
    head, ids = kit.batch(3)
    failed(kit, head, ids[0])
    failed(kit, head, ids[1])
    kit.put(ids[1], content=None)
    kit.record(to_record(head, ids[2], kit.claim([ids[2]])[ids[2]], SENT))

    assert kit.store.control.retry(head.id, include_unknown=True, age=60, **WHO) == {
        "requeued": 1, "left": {"failed": 1, "sent": 1},
    }  # fmt: skip


def test_a_retry_of_many_is_one_whole(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are queued and due, in one transaction and with one event."""
    monkeypatch.setattr(control, "STEP", 7)
    head, _ = kit.batch(50)
    with kit.engine.begin() as connection:
        connection.execute(messages.update().values(state=State.FAILED))
    kit.look()

    assert kit.retry(head.id) == 50
    assert len(kit.look().due) == 50
    assert len(told(kit)) == 1
