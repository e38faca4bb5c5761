"""Mailboxes that refuse or are suspended: nothing is sent from them, and no message pays for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from sqlalchemy import select, update

from tests.store_kit import AGAIN, MAILBOX, SENT, Kit, answer, opened, to_record
from tests.support import wait_until
from tests.test_spine import (
    MAILBOXES,
    POSTGRESQL,
    TEMPLATE,
    Service,
    service,
    simulator_options,
    some_messages,
)
from worker.client import Client
from worker.deliver.standing import Standing
from worker.model import Accepted, Blame, Blocked, Rejected
from worker.runtime import Runtime
from worker.store.schema import attempts, events, mailboxes, messages

__all__ = ["service", "simulator_options"]  # fixtures

REFUSED = Blocked(
    answer(status=403, code="ErrorAccessDenied", detail="Access to OData is disabled."),
    Blame.MAILBOX,
)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def refuse(kit: Kit, times: int = 1, together: bool = False) -> None:
    """Claims and records so many refusals, each in its transaction or all in one."""
    results = []
    for _ in range(times):
        head, one, fence = kit.claimed()
        outcome = replace(REFUSED, answer=answer(status=403, code="ErrorAccessDenied"))
        results.append(to_record(head, one, fence, AGAIN, outcome))
    for group in [results] if together else [[one] for one in results]:
        kit.record(*group)


def accept(kit: Kit, *, clears: bool = True) -> None:
    """Claims and records an acceptance; `clears` is what the lane says of it."""
    head, one, fence = kit.claimed()
    kit.record(replace(to_record(head, one, fence, SENT), clears=clears))


def row(kit: Kit, address: str = MAILBOX) -> Any:
    """The mailbox's row."""
    with kit.engine.connect() as c:
        return c.execute(select(mailboxes).where(mailboxes.c.address == address)).mappings().one()


def put(kit: Kit, **values: Any) -> None:
    """Puts the mailbox where a test needs it."""
    with kit.engine.begin() as c:
        c.execute(update(mailboxes).where(mailboxes.c.address == MAILBOX).values(**values))


def told(kit: Kit) -> list[tuple[str, str]]:
    """The events of the mailbox: kind, by."""
    with kit.engine.connect() as c:
        found = c.execute(select(events).where(events.c.mailbox == MAILBOX).order_by(events.c.id))
        return [(event.kind, event.by) for event in found]


def due(kit: Kit) -> list[tuple[str, str]]:
    return kit.store.due_targets()


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_three_refusals_in_a_row_suspend(kit: Kit, together: bool) -> None:
    """With Graph's code, a reason in plain words, an event, and a probe in a minute."""
    kit.batch()
    refuse(kit, 2, together)
    assert row(kit)["suspended_at"] is None
    assert due(kit) == [("mailbox", MAILBOX)]

    refuse(kit)

    found = row(kit)
    assert found["suspended_code"] == "ErrorAccessDenied"
    assert "The application may not send from this mailbox." in found["suspended_reason"]
    assert found["probe_at"] - found["suspended_at"] == timedelta(minutes=1)
    assert told(kit) == [("suspend", "postroom")]
    assert due(kit) == []
    assert kit.store.mailboxes.resting() == {MAILBOX}


def test_an_acceptance_between_refusals_starts_the_count_anew(kit: Kit) -> None:
    """Three in a row are meant, not three in all; also where they share a transaction."""
    refuse(kit, 2)
    accept(kit)
    refuse(kit, 2, together=True)

    assert row(kit)["suspended_at"] is None
    assert row(kit)["refusals"] == 2
    assert told(kit) == []


def test_rejections_of_messages_are_no_refusals_of_the_mailbox(kit: Kit) -> None:
    """A bad message says nothing about its mailbox."""
    for _ in range(5):
        head, one, fence = kit.claimed()
        kit.record(to_record(head, one, fence, AGAIN, Rejected(answer(status=400))))

    assert kit.store.mailboxes.seen(MAILBOX).refusals == 0


def test_a_refusal_that_is_recorded_again_counts_once(kit: Kit) -> None:
    """The reply to a COMMIT was lost."""
    head, one, fence = kit.claimed()
    result = to_record(head, one, fence, AGAIN, REFUSED)

    for _ in range(4):
        kit.record(result)

    assert row(kit)["refusals"] == 1


def test_refused_probes_grow_the_interval_up_to_half_an_hour(kit: Kit) -> None:
    """What was under way when the mailbox was suspended is no probe and moves nothing."""
    refuse(kit, 3)
    before = row(kit)["probe_at"]
    refuse(kit)
    assert (row(kit)["probe_at"], row(kit)["probes"]) == (before, 0)

    waits = []
    for _ in range(7):
        put(kit, probe_at=datetime.now(UTC) - timedelta(seconds=1))
        began = datetime.now(UTC)
        refuse(kit)
        waits.append(round((row(kit)["probe_at"] - began).total_seconds() / 60))

    assert waits == [2, 4, 8, 16, 30, 30, 30]
    assert told(kit) == [("suspend", "postroom")]


def test_an_accepted_probe_resumes(kit: Kit) -> None:
    """By itself, once, and with nothing held against the mailbox."""
    refuse(kit, 3)
    accept(kit)
    accept(kit)

    found = row(kit)
    assert (found["suspended_at"], found["refusals"], found["probes"]) == (None, 0, 0)
    assert told(kit) == [("suspend", "postroom"), ("resume", "postroom")]


def test_a_due_probe_wakes_the_lane_and_only_that(kit: Kit) -> None:
    """The sweep rings nobody for a suspended mailbox until one message may try."""
    kit.batch()
    refuse(kit, 3)
    assert due(kit) == []

    put(kit, probe_at=datetime.now(UTC) - timedelta(seconds=1))

    assert due(kit) == [("mailbox", MAILBOX)]
    assert kit.store.mailboxes.resting() == set()


# ---- operators ----------------------------------------------------------------------------------


def test_an_operators_suspension_waits_for_an_operator(kit: Kit) -> None:
    """It is not probed, and what was under way does not lift it. Twice is as once."""
    refuse(kit)
    accept_later = kit.claimed()
    assert kit.store.mailboxes.suspend(MAILBOX, by="ann", why="spam complaint")
    assert not kit.store.mailboxes.suspend(MAILBOX, by="ann", why="again")

    head, one, fence = accept_later
    kit.record(replace(to_record(head, one, fence, SENT), clears=True))

    assert row(kit)["probe_at"] is None
    [shown] = kit.store.mailboxes.suspended([MAILBOX])
    assert (shown["code"], shown["reason"]) == ("Suspended", "suspended by ann: spam complaint")
    assert kit.store.mailboxes.resume(MAILBOX, by="ann", why=None)
    assert not kit.store.mailboxes.resume(MAILBOX, by="ann", why=None)
    assert kit.store.mailboxes.seen(MAILBOX).refusals == 0
    assert told(kit) == [("suspend", "ann"), ("resume", "ann")]


def test_after_a_resume_one_refusal_suspends_again(kit: Kit) -> None:
    """The operator believed it mended: one message finds out, not three."""
    refuse(kit, 3)
    kit.store.mailboxes.resume(MAILBOX, by="ann", why=None)
    assert Standing.of(kit.store, MAILBOX).most(4) == 1

    refuse(kit)

    assert row(kit)["suspended_at"] is not None


# ---- the lane -----------------------------------------------------------------------------------


def test_a_lane_of_a_suspended_mailbox_works_only_for_a_probe(kit: Kit) -> None:
    """One message; refused, the lane is over; accepted, it works on as ever, and says so once."""
    assert not Standing.of(kit.store, MAILBOX).over
    refuse(kit, 3)
    resting = Standing.of(kit.store, MAILBOX)
    assert resting.over
    assert timedelta(seconds=30) < resting.wait <= timedelta(minutes=1)

    put(kit, probe_at=datetime.now(UTC) - timedelta(seconds=1))
    refused, good = (Standing.of(kit.store, MAILBOX) for _ in range(2))
    assert (refused.over, refused.most(4)) == (False, 1)
    assert not refused.saw(REFUSED)
    assert refused.over
    told = [good.saw(Accepted(answer(status=202))) for _ in range(2)]
    assert told == [True, False]
    assert (good.over, good.most(4)) == (False, 4)


def test_a_lane_is_over_with_the_third_refusal_that_it_knows_of(kit: Kit) -> None:
    """Those before it began and those that it saw itself; it tries with one from the first on."""
    refuse(kit)
    standing = Standing.of(kit.store, MAILBOX)
    standing.saw(REFUSED)
    assert (standing.over, standing.most(4)) == (False, 1)
    standing.saw(REFUSED)
    assert standing.over


# ---- real workers -------------------------------------------------------------------------------


def blocked(service: Service, batch: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.client.status(batch)["blocked"]
    return found


def probe_now(service: Service) -> None:
    """Lets the time to the next probe have passed."""
    due = {"probe_at": datetime.now(UTC) - timedelta(seconds=1)}
    runtime = service.client._runtime()
    with runtime.store.engine.begin() as connection:
        suspended = mailboxes.c.suspended_at.is_not(None)
        connection.execute(update(mailboxes).where(suspended).values(**due))


@POSTGRESQL
def test_one_message_shows_a_mailbox_as_blocked_and_is_sent_when_it_is_mended(
    service: Service,
) -> None:
    """Refused three times quickly, then probed by itself: no try is spent, nothing fails."""
    service.simulator.settings(out_of_scope=[MAILBOXES[0]])
    service.worker("one")
    batch = service.client.enqueue(
        some_messages(1), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id

    [one] = wait_until(lambda: blocked(service, batch), "the batch shows it", 30)
    assert (one["mailbox"], one["code"]) == (MAILBOXES[0], "ErrorAccessDenied")
    assert "may not send" in one["reason"]
    times = sorted(row.at for row in service.rows(select(attempts.c.at)))
    assert len(times) == 3
    assert times[-1] - times[0] < timedelta(seconds=10)

    probe_now(service)
    wait_until(lambda: len(service.rows(select(attempts.c.at))) == 4, "one message tries")
    wait_until(lambda: service.counts(batch)["queued"] == 1, "it is queued again")
    service.simulator.settings(out_of_scope=[])
    probe_now(service)

    assert service.wait_for_end(batch) == Counter(sent=1)
    assert blocked(service, batch) == []
    assert [row.tries for row in service.rows(select(messages.c.tries))] == [0]


@POSTGRESQL
def test_a_suspended_mailbox_in_a_pool_costs_the_pool_no_message(service: Service) -> None:
    """Its four first refusals are taken over by the others; nothing waits for it."""
    service.simulator.settings(out_of_scope=[MAILBOXES[0]])
    for name in ("one", "two"):
        service.worker(name)

    batch = service.enqueue(800)
    counts = service.wait_for_end(batch)

    assert counts == Counter(sent=800)
    assert set(service.accepted().values()) == {1}
    statement = select(attempts.c.outcome).where(attempts.c.mailbox == MAILBOXES[0])
    outcomes = [row.outcome for row in service.rows(statement)]
    assert set(outcomes) == {"blocked"}
    assert 3 <= len(outcomes) <= 6
    assert [one["mailbox"] for one in blocked(service, batch)] == [MAILBOXES[0]]
    assert {row.tries for row in service.rows(select(messages.c.tries))} == {0}


@POSTGRESQL
def test_an_operators_suspension_holds_at_once_and_a_resume_sends_on(service: Service) -> None:
    """In the middle of a batch: what is in flight ends, nothing more is claimed; nothing fails."""
    service.worker("one")
    batch = service.client.enqueue(
        some_messages(600), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id
    wait_until(lambda: service.counts(batch)["sent"] > 50, "some are sent")

    assert service.client.suspend_mailbox(MAILBOXES[0], by="ann", why="look")["changed"]
    wait_until(lambda: not service.counts(batch)["sending"], "what is in flight ends")
    sent = service.counts(batch)["sent"]
    [one] = blocked(service, batch)
    assert (one["code"], one["reason"]) == ("Suspended", "suspended by ann: look")
    assert not service.client.suspend_mailbox(MAILBOXES[0], by="ann", why="look")["changed"]
    worker = service.processes.started[-1]
    rested = "'waits_for': 'its suspension'"
    wait_until(lambda: "cooling" in worker.tail(10**6) or rested in worker.tail(10**6), "it rests")
    assert service.counts(batch)["sent"] == sent < 600

    assert service.client.resume_mailbox(MAILBOXES[0], by="ann")["changed"]

    assert service.wait_for_end(batch) == Counter(sent=600)
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
def test_a_refused_credential_costs_one_request_a_probe_and_no_message(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, five mailboxes: each is shown as blocked with Entra's code in plain words; one
    token request, not one a lane; with the right secret all are sent.
    """
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    runtime = Runtime.from_env()  # only who has the credential can ask what became of it
    operator = Client(lambda: runtime)
    service.simulator.settings(secret_expired=True)
    for name in ("one", "two"):
        service.worker(name)
    batch = service.enqueue(100)

    shown = wait_until(lambda: operator.status(batch)["blocked"], "the batch shows it")
    assert [one["mailbox"] for one in shown] == MAILBOXES
    assert {one["code"] for one in shown} == {"AADSTS7000222"}
    assert "The client secret has expired." in shown[0]["reason"]
    told = "'waits_for': 'AADSTS7000222'"
    logs = service.processes.started
    wait_until(
        lambda: sum(w.tail(10**6).count(told) for w in logs) >= 8, "the lanes look often", 40
    )
    assert service.simulator.stats()["token_requests"] == 1
    assert +service.counts(batch) == Counter(queued=100)

    service.simulator.settings(secret_expired=False)
    probe = redis.Redis.from_url(service.environment["POSTROOM_REDIS_URL"])
    for key in probe.scan_iter("postroom:token:*:trouble:*"):
        probe.hset(key, "until", 1)  # the time to the next probe has passed
    probe.close()

    assert service.wait_for_end(batch) == Counter(sent=100)
    assert service.simulator.stats()["token_requests"] == 2
    assert operator.status(batch)["blocked"] == []
    runtime.close()
    assert {row.tries for row in service.rows(select(messages.c.tries))} == {0}


@POSTGRESQL
def test_an_urgent_message_passes_five_thousand_others(service: Service) -> None:
    """On the same mailbox, in its midst: it leaves before two seconds' worth of the others do."""
    service.worker("one")
    bulk = service.client.enqueue(
        some_messages(5000), sender=MAILBOXES[0], template=TEMPLATE, priority="bulk"
    ).batch_id
    wait_until(lambda: service.counts(bulk)["sent"] > 20, "the others are under way", 60)

    urgent = service.client.enqueue(
        some_messages(1), sender=MAILBOXES[0], template=TEMPLATE, priority="high"
    ).batch_id
    enqueued = time.time()
    wait_until(lambda: service.counts(urgent)["sent"] == 1, "it is sent", 60)

    mails = service.simulator.ledger()
    [marker] = [row["id"] for row in service.client.messages(urgent)]
    passed = next(n for n, mail in enumerate(mails) if mail["marker"] == marker)
    before = sum(mail["time"] > enqueued for mail in mails[:passed])
    assert before < 160  # 80 a second with four at once and 50 ms each


@POSTGRESQL
def test_a_mailboxs_own_limit_holds_and_the_status_names_it(service: Service) -> None:
    """Set while running; what is over it waits, and the batch says for what."""
    service.client.set_mailbox(MAILBOXES[0], {"message_rate": "40/h"})
    service.worker("one")
    batch = service.client.enqueue(
        some_messages(60), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id

    wait_until(lambda: service.client.status(batch)["limit"] == "messages", "the limit is named")

    wait_until(lambda: not service.counts(batch)["sending"], "what is in flight ends")
    assert service.counts(batch)["sent"] == 38  # 5 % are kept for priority high
    service.client.set_mailbox(MAILBOXES[0], {"message_rate": "default"})
    assert service.wait_for_end(batch) == Counter(sent=60)


@POSTGRESQL
def test_a_limit_that_is_set_holds_for_a_lane_at_work(service: Service) -> None:
    """Within seconds, not with its next turn."""
    service.simulator.settings(latency_ms="300")
    service.worker("one")
    batch = service.client.enqueue(
        some_messages(400), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id
    wait_until(lambda: service.counts(batch)["sent"] > 8, "some are sent")

    service.client.set_mailbox(MAILBOXES[0], {"message_rate": "40/h"})

    wait_until(lambda: service.client.status(batch)["limit"] == "messages", "the limit is named")
    wait_until(lambda: not service.counts(batch)["sending"], "what is in flight ends")
    assert service.counts(batch)["sent"] < 120  # a turn at this latency is 260


@POSTGRESQL
def test_a_pool_that_is_changed_holds_for_lanes_at_work(service: Service) -> None:
    """A mailbox that was taken out takes no more within seconds, a new one takes its share, and
    what was queued for the pool is sent by those who are in it.
    """
    service.simulator.settings(latency_ms="300")
    old, new = MAILBOXES[:2], MAILBOXES[1:3]
    service.client.set_pool("changing", old)
    service.worker("one")
    batch = service.client.enqueue(some_messages(500), pool="changing", template=TEMPLATE).batch_id
    wait_until(lambda: service.counts(batch)["sent"] > 20, "some are sent")

    service.client.set_pool("changing", new)

    def by_mailbox() -> Counter[str]:
        return Counter(entry["mailbox"] for entry in service.simulator.ledger())

    wait_until(lambda: by_mailbox()[MAILBOXES[2]] > 8, "the new one sends")
    left = by_mailbox()[MAILBOXES[0]]
    assert service.wait_for_end(batch) == Counter(sent=500)
    assert by_mailbox()[MAILBOXES[0]] <= left + 90  # of some 240, if its turn went on
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
def test_fresh_tokens_that_graph_refuses_cost_no_message(service: Service) -> None:
    """401 to every request: the credential is at fault. A few tokens are asked for, not one for
    each message; the mailboxes are shown as blocked, and all are sent once Graph takes them.
    """
    service.simulator.fault("status", 0, status=401, code="InvalidAuthenticationToken")
    service.worker("one")
    batch = service.enqueue(100)

    shown = wait_until(lambda: service.rows(select(attempts.c.code)), "it was refused")
    assert {row.code for row in shown} == {"InvalidAuthenticationToken"}
    told = "'waits_for': 'InvalidAuthenticationToken'"
    [worker] = service.processes.started
    wait_until(lambda: worker.tail(10**6).count(told) >= 5, "the lanes wait", 40)
    assert service.simulator.stats()["token_requests"] <= 4
    assert +service.counts(batch) == Counter(queued=100)

    service.simulator.clear_faults()
    probe = redis.Redis.from_url(service.environment["POSTROOM_REDIS_URL"])
    for key in probe.scan_iter("postroom:token:*:trouble:*"):
        probe.hset(key, "until", 1)  # the time to the next probe has passed
    probe.close()

    assert service.wait_for_end(batch) == Counter(sent=100)
    assert {row.tries for row in service.rows(select(messages.c.tries))} == {0}
