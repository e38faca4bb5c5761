"""Settling doubt in SQL: which looks are due, what they change, what a person's word changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pytest

from tests.store_kit import FAILED, IN_DOUBT, LATER, MAILBOX, SENT, Kit, opened, to_record
from worker.model import State, WrongState
from worker.store.doubt import InDoubt, Looked

WAIT = 360.0
PAST = datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def doubted(
    kit: Kit, one: str, head: Any, *, token_left: float = 3000.0, mailbox: str = MAILBOX
) -> int:
    """The message is claimed and ends in doubt; the fence of that attempt."""
    fence = kit.claim([one], mailbox=mailbox, token_left=token_left)[one]
    told = to_record(head, one, fence, IN_DOUBT)
    kit.record(replace(told, mailbox=mailbox, token_left=token_left))
    return fence


def in_doubt(kit: Kit, **how: Any) -> tuple[Any, str]:
    """A batch of one, whose message is in doubt: head and id."""
    head, [one] = kit.batch()
    doubted(kit, one, head, **how)
    return head, one


def take(kit: Kit, **how: Any) -> list[InDoubt]:
    """Takes what is due, as a worker does."""
    return kit.store.doubt.take(100, **{"lease": 60.0, "wait": WAIT, **how})


def due_now(kit: Kit, one: str) -> InDoubt:
    """The look of this message is due, and taken."""
    kit.put(one, look_at=PAST)
    [taken] = [t for t in take(kit) if t.id == one]
    return taken


def absent(one: InDoubt) -> Looked:
    return Looked(one, "absent", "not in the mailbox", one.mailboxes[0])


def nothing_came(kit: Kit, one: InDoubt, **how: Any) -> State | None:
    return kit.store.doubt.nothing_came(absent(one), **{"wait": WAIT, "max_attempts": 6, **how})


def events(kit: Kit, one: str) -> list[dict[str, Any]]:
    return [e for e in kit.message(one)["events"] if e["message_id"] == one]


def settle(kit: Kit, to: State, **its: Any) -> Any:
    how = {"force": False, "wait": WAIT, "age": 3600.0, "by": "ann", "why": "asked them"}
    return kit.store.doubt.settle(to, **{**how, **its})


# ---- when to look -------------------------------------------------------------------------------


def test_a_doubt_is_looked_after_half_a_minute_later(kit: Kit) -> None:
    """By the outcome, by a lost lease and by a deadline; no look for anything else."""
    _, by_outcome = in_doubt(kit)
    _, lost, _ = kit.claimed()
    kit.lose(lost)
    kit.end_leases()
    head, [late] = kit.batch()
    kit.put(late, doubt=True, deadline_at=PAST)
    kit.sql("UPDATE queues SET deadline_at = next_due_at WHERE id = :id", id=head.queue_id)
    kit.store.end_deadlines()
    others = []
    for verdict in (SENT, FAILED, LATER):
        head, one, fence = kit.claimed()
        kit.record(to_record(head, one, fence, verdict))
        others.append(one)

    for one in (by_outcome, lost, late):
        found = kit.message(one)
        assert found["state"] == State.UNKNOWN
        assert 0 < (found["look_at"] - datetime.now(UTC)).total_seconds() < 31
    assert [kit.message(one)["look_at"] for one in others] == [None] * 3
    assert not kit.store.doubt.due()
    assert take(kit) == []


def test_a_look_is_taken_once_and_comes_back_if_its_taker_dies(kit: Kit) -> None:
    """Two workers never look for the same message at once."""
    _, one = in_doubt(kit)
    kit.put(one, look_at=PAST)

    assert kit.store.doubt.due()
    assert [t.id for t in take(kit)] == [one]
    assert not kit.store.doubt.due()
    assert take(kit) == []
    kit.store.doubt.postpone([due_now(kit, one)], -1)
    assert [t.id for t in take(kit)] == [one]


def test_looks_are_shared_between_workers(kit: Kit) -> None:
    """Four that take at the same moment get every message, and none of them twice."""
    ids = [in_doubt(kit)[1] for _ in range(12)]
    for one in ids:
        kit.put(one, look_at=PAST)
    together = Barrier(4)

    def worker(_: int) -> list[str]:
        together.wait()
        return [t.id for _ in range(4) for t in kit.store.doubt.take(3, lease=60, wait=WAIT)]

    with ThreadPoolExecutor(4) as pool:
        taken = [one for some in pool.map(worker, range(4)) for one in some]

    assert sorted(taken) == sorted(ids)


def test_every_doubtful_attempt_counts(kit: Kit) -> None:
    """Its mailboxes, the last one first; the last of their tokens' ends; no other attempt's."""
    head, [one] = kit.batch()
    for mailbox, token_left in (("a@x.org", 500.0), ("b@x.org", 2000.0), ("a@x.org", 100.0)):
        doubted(kit, one, head, mailbox=mailbox, token_left=token_left)
        kit.store.control.retry(head.id, include_unknown=True, by="x", why=None, age=60)
    fence = kit.claim([one], mailbox="c@x.org", token_left=9000.0)[one]
    kit.record(replace(to_record(head, one, fence, LATER), mailbox="c@x.org", token_left=9000.0))
    kit.put(one, state=State.UNKNOWN)

    taken = due_now(kit, one)

    assert taken.mailboxes == ("a@x.org", "b@x.org")
    assert 2000 + WAIT - 60 < taken.left <= 2000 + WAIT
    assert (taken.fence, taken.looks, taken.keeps_copy, taken.quarantined) == (4, 0, True, False)


@pytest.mark.parametrize(("left", "over"), [(-WAIT - 1, True), (-WAIT + 60, False), (60, False)])
def test_nothing_can_come_once_token_and_margin_are_over(kit: Kit, left: float, over: bool) -> None:
    """By the database's clock."""
    _, one = in_doubt(kit, token_left=left)

    assert (due_now(kit, one).left <= 0) is over


def test_a_token_whose_end_is_not_known_never_ends(kit: Kit) -> None:
    """Then only a person can say so."""
    _, one = in_doubt(kit, token_left=-10_000)
    kit.sql("UPDATE attempts SET token_ends_at = NULL")

    taken = due_now(kit, one)

    assert taken.left == math.inf
    assert nothing_came(kit, taken) is None


def test_what_leaves_no_copy_is_known(kit: Kit) -> None:
    """Nobody can find it."""
    _, one = in_doubt(kit)
    kit.put(one, content={"to": [], "save_to_sent_items": False})
    assert due_now(kit, one).keeps_copy is False
    kit.put(one, content={"to": [], "save_to_sent_items": True})
    assert due_now(kit, one).keeps_copy is True
    kit.put(one, content=None)
    assert due_now(kit, one).keeps_copy is True


# ---- what looks change --------------------------------------------------------------------------


def test_what_is_found_is_sent_with_evidence_and_events(kit: Kit) -> None:
    """Once; a second finder changes nothing."""
    _, one = in_doubt(kit)
    taken = due_now(kit, one)
    looked = Looked(
        taken, "found", "found in the mailbox", MAILBOX, detail={"graph_id": "AA\0k", "x": 1}
    )

    assert kit.store.doubt.found(looked)
    assert not kit.store.doubt.found(looked)

    found = kit.message(one)
    assert (found["state"], found["doubt"], found["look_at"]) == (State.SENT, False, None)
    assert found["sent_at"] is not None
    assert found["error_code"] is None
    assert [(a["outcome"], a["late"], a["code"]) for a in found["attempts"]] == [
        ("unknown", False, "GatewayTimeout"), ("accepted", True, "FoundInMailbox"),
    ]  # fmt: skip
    look, settled = events(kit, one)
    assert (look["kind"], look["mailbox"], look["by"]) == ("look", MAILBOX, "postroom")
    assert look["detail"] == {"result": "found", "look": 1, "graph_id": "AAk", "x": 1}
    assert (settled["kind"], settled["detail"]) == ("settle", {"as": "sent", "look": "found"})


def test_what_is_absent_stays_unknown_and_is_looked_for_again(kit: Kit) -> None:
    """Until the last look."""
    _, one = in_doubt(kit)
    kit.store.doubt.stays(replace(absent(due_now(kit, one)), again=120.0))

    found = kit.message(one)
    assert (found["state"], found["looks"], found["doubt"]) == (State.UNKNOWN, 1, True)
    assert 60 < (found["look_at"] - datetime.now(UTC)).total_seconds() < 121
    assert found["error_code"] == "GatewayTimeout"

    kit.store.doubt.stays(absent(due_now(kit, one)))

    assert kit.message(one)["look_at"] is None
    assert [e["detail"]["look"] for e in events(kit, one)] == [1, 2]
    assert take(kit) == []


def test_what_may_not_be_read_says_so_once(kit: Kit) -> None:
    """The reason is the message's code; an hourly event would say nothing new."""
    _, one = in_doubt(kit)
    for _ in range(3):
        barred = Looked(due_now(kit, one), "forbidden", "403: grant Mail.Read", MAILBOX, 3600.0)
        assert kit.store.doubt.stays(barred)

    found = kit.message(one)
    assert (found["error_code"], found["looks"]) == ("LookForbidden", 3)
    [event] = events(kit, one)
    assert event["why"] == "403: grant Mail.Read"


def test_what_did_not_come_is_queued_again_without_doubt(kit: Kit) -> None:
    """Its queue and its batch are awake again."""
    head, one = in_doubt(kit, token_left=-WAIT - 1)
    kit.look()  # the queue is found empty
    assert [b["id"] for b in kit.store.finish_batches()] == [head.id]
    kit.put(one, deadline_at=datetime.now(UTC) + timedelta(minutes=5))

    assert nothing_came(kit, due_now(kit, one)) is State.QUEUED

    found = kit.message(one)
    assert (found["state"], found["doubt"], found["tries"]) == (State.QUEUED, False, 1)
    assert kit.status(head.id)["state"] == "running"
    assert [due.id for due in kit.look().due] == [one]
    assert kit.queue(head)["deadline_at"] <= found["deadline_at"]
    assert [e["kind"] for e in events(kit, one)] == ["look", "settle"]
    fence = kit.claim([one])[one]
    kit.record(to_record(head, one, fence, FAILED))
    assert kit.message(one)["state"] == State.FAILED, "it surely was not sent"


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({"tries": 6}, State.FAILED),
        ({"tries": 5}, State.QUEUED),
        ({"crashes": 3}, None),
        ({"state": State.QUEUED}, None),
        ({"fence": 7}, None),
    ],
)
def test_what_did_not_come_ends_where_its_tries_end(
    kit: Kit, values: dict[str, Any], state: State | None
) -> None:
    """Quarantined it waits for a person; settled by someone else it is not touched."""
    _, one = in_doubt(kit, token_left=-WAIT - 1)
    taken = due_now(kit, one)
    kit.put(one, **values)
    before = kit.message(one)

    assert nothing_came(kit, taken) is state

    after = kit.message(one)
    assert after["state"] == (state or before["state"])
    assert after["doubt"] == (state is None)
    assert len(events(kit, one)) == (2 if state else 0)


def test_what_did_not_come_ends_with_its_batch(kit: Kit) -> None:
    """A cancelled batch sends nothing more: it is cancelled, for surely it was not sent."""
    head, one = in_doubt(kit, token_left=-WAIT - 1)
    kit.set_batch(head.id, cancelled_at=PAST)

    assert nothing_came(kit, due_now(kit, one)) is State.CANCELLED
    assert kit.message(one)["doubt"] is False


def test_what_may_still_come_is_not_queued_again(kit: Kit) -> None:
    """The statement looks again: also at attempts that came after the look was taken."""
    _, one = in_doubt(kit, token_left=-WAIT - 1)
    taken = due_now(kit, one)
    kit.sql("UPDATE attempts SET token_ends_at = :at", at=str(datetime.now(UTC))[:26])

    assert nothing_came(kit, taken) is None
    assert kit.message(one)["state"] == State.UNKNOWN


@pytest.mark.parametrize("verdict", [SENT, FAILED, LATER, IN_DOUBT])
@pytest.mark.parametrize("claimed", [False, True])
def test_a_late_word_of_the_old_claim_only_raises_evidence(
    kit: Kit, verdict: Any, claimed: bool
) -> None:
    """A worker that wakes after its message was queued again: its 202 counts, nothing else does."""
    head, one = in_doubt(kit, token_left=-WAIT - 1)
    nothing_came(kit, due_now(kit, one))
    if claimed:
        assert kit.claim([one]) == {one: 2}
    before = kit.message(one)

    assert kit.record(to_record(head, one, 1, verdict)) == set()

    after = kit.message(one)
    if verdict is SENT:
        assert (after["state"], after["doubt"]) == (State.SENT, False)
        assert kit.claim([one]) == {}
    else:
        assert {k: after[k] for k in ("state", "doubt", "fence", "due_at", "tries")} == {
            k: before[k] for k in ("state", "doubt", "fence", "due_at", "tries")
        }
    assert [a["late"] for a in after["attempts"]] == [False, True]


# ---- by hand ------------------------------------------------------------------------------------


def test_a_person_settles_a_message(kit: Kit) -> None:
    """With their name and reason; again it finds nothing to settle."""
    for to in (State.SENT, State.FAILED):
        _, one = in_doubt(kit)
        done = settle(kit, to, message_id=one)
        assert (done.settled, done.left) == (1, {})
        again = settle(kit, to, message_id=one)
        assert (again.settled, again.left) == (0, {str(to): 1})

        found = kit.message(one)
        assert (found["state"], found["doubt"], found["look_at"]) == (to, False, None)
        [event] = events(kit, one)
        assert (event["kind"], event["by"], event["why"]) == ("settle", "ann", "asked them")
        assert event["detail"] == {"as": str(to), "force": False}


def test_queueing_what_may_still_come_wants_force_and_keeps_the_doubt(kit: Kit) -> None:
    """Forced, it may be sent twice: so it never ends as failed."""
    head, one = in_doubt(kit, token_left=3000.0)
    kit.put(one, tries=6, crashes=3)

    done = settle(kit, State.QUEUED, message_id=one)
    assert (done.settled, done.left, done.early) == (0, {"unknown": 1}, 1)
    seconds = (done.until - datetime.now(UTC)).total_seconds()
    assert 3000 + WAIT - 60 < seconds < 3000 + WAIT + 60
    assert kit.message(one)["state"] == State.UNKNOWN

    assert settle(kit, State.QUEUED, message_id=one, force=True).settled == 1
    found = kit.message(one)
    assert (found["state"], found["doubt"]) == (State.QUEUED, True)
    assert (found["tries"], found["crashes"]) == (0, 0)
    fence = kit.claim([one])[one]
    kit.record(to_record(head, one, fence, FAILED))
    assert kit.message(one)["state"] == State.UNKNOWN


def test_a_person_settles_a_batch_and_is_told_what_was_left(kit: Kit) -> None:
    """Only what is unknown; what may still come is left, and said until when."""
    head, ids = kit.batch(5)
    for one, left in zip(ids[:3], (-WAIT - 1, -WAIT - 1, 3000.0), strict=True):
        doubted(kit, one, head, token_left=left)
    fence = kit.claim([ids[3]])[ids[3]]
    kit.record(to_record(head, ids[3], fence, SENT))
    kit.set_batch(head.id, finished_at=PAST)

    done = settle(kit, State.QUEUED, batch_id=head.id)

    assert (done.settled, done.early) == (2, 1)
    assert done.left == {"queued": 1, "sent": 1, "unknown": 1}
    assert [kit.message(one)["state"] for one in ids] == [
        "queued", "queued", "unknown", "sent", "queued",
    ]  # fmt: skip
    assert kit.message(ids[0])["doubt"] is False
    assert kit.status(head.id)["state"] == "running"
    assert {due.id for due in kit.look().due} == {ids[0], ids[1], ids[4]}
    assert [e["detail"].get("settled") for e in kit.message(ids[0])["events"]] == [None, 2]
    again = settle(kit, State.QUEUED, batch_id=head.id)
    assert (again.settled, again.left) == (0, {"queued": 3, "sent": 1, "unknown": 1})
    assert settle(kit, State.FAILED, batch_id=head.id).settled == 1
    assert settle(kit, State.FAILED, batch_id=head.id).early == 0


def test_nothing_of_a_cancelled_batch_is_queued_by_hand(kit: Kit) -> None:
    """The other words are good there."""
    head, one = in_doubt(kit, token_left=-WAIT - 1)
    kit.set_batch(head.id, cancelled_at=PAST)

    with pytest.raises(WrongState, match="cancelled"):
        settle(kit, State.QUEUED, batch_id=head.id)
    assert settle(kit, State.SENT, message_id=one).settled == 1


def test_what_is_not_there_is_not_settled(kit: Kit) -> None:
    """None says so."""
    head, one = in_doubt(kit)
    assert settle(kit, State.SENT, message_id=head.id) is None
    assert settle(kit, State.SENT, batch_id=one) is None


def test_of_two_words_at_once_one_counts(kit: Kit) -> None:
    """Persons and looks that settle the same message together: one of them does."""
    for _ in range(5):
        _, one = in_doubt(kit, token_left=-WAIT - 1)
        taken = due_now(kit, one)
        together = Barrier(3)

        def work(which: int, one: str = one, taken: Any = taken, together: Any = together) -> bool:
            together.wait()
            if which == 0:
                return bool(settle(kit, State.FAILED, message_id=one).settled)
            if which == 1:
                return bool(settle(kit, State.SENT, message_id=one).settled)
            return nothing_came(kit, taken) is not None

        with ThreadPoolExecutor(3) as pool:
            assert sorted(pool.map(work, range(3))) == [False, False, True]
        assert [e["kind"] for e in events(kit, one)].count("settle") == 1
