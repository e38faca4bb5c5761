"""Doubt from its beginning to its end, with real processes: looks, a person's word, zombies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, text, update

from tests.proxy import before_simulator
from tests.support import clean_environment, wait_until
from tests.test_spine import (
    MAILBOXES,
    POSTGRESQL,
    TEMPLATE,
    Service,
    service,
    simulator_options,
    some_messages,
)
from worker.store import Store, make_engine
from worker.store.schema import attempts, events, messages

__all__ = ["service", "simulator_options"]  # fixtures

pytestmark = POSTGRESQL

#: So short that a test can wait for the moment from which nothing can come any more.
SHORT = {"POSTROOM_SETTLE_MARGIN": "1s", "POSTROOM_REQUEST_TIMEOUT": "2s", "POSTROOM_LEASE": "4s"}


def enqueue(service: Service, count: int = 1) -> str:
    """A batch from the first mailbox."""
    return service.client.enqueue(
        some_messages(count), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id


def run(service: Service, statement: Any) -> None:
    """Changes SQL apart from the product."""
    engine = create_engine(service.environment["POSTROOM_DATABASE_URL"])
    with engine.begin() as connection:
        connection.execute(statement)
    engine.dispose()


def time_passes(service: Service) -> None:
    """The next looks are due."""
    past = datetime.now(UTC) - timedelta(hours=1)
    run(service, update(messages).where(messages.c.look_at.is_not(None)).values(look_at=past))


def doubted(service: Service, batch: str, count: int = 1) -> None:
    """Waits until so many messages of the batch are in doubt."""
    wait_until(lambda: service.counts(batch)["unknown"] == count, f"{count} in doubt", 40)


def postroom(service: Service, *words: str, status: int = 0) -> Any:
    """The document that a command prints with --json, or its line on standard error."""
    done = subprocess.run(
        [Path(sys.executable).parent / "postroom", *words, *([] if status else ["--json"])],
        env=clean_environment() | service.environment, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr if status else json.loads(done.stdout)


@pytest.mark.parametrize("simulator_options", [{"drafts_seconds": 5, "search_delay": 2}])
def test_a_504_after_graph_had_accepted_is_found_by_the_workers(service: Service) -> None:
    """Under hold too, although searches find it only after a while, and in Drafts first."""
    service.simulator.fault("status_after", status=504)
    service.worker("one")
    batch = enqueue(service, 3)
    doubted(service, batch)
    assert service.wait_for_end(batch) == Counter(sent=2, unknown=1)

    def settled() -> bool:
        time_passes(service)
        return service.counts(batch)["unknown"] == 0

    wait_until(settled, "the look finds it", 40)

    assert service.counts(batch) == Counter(sent=3)
    assert service.client.status(batch)["state"] == "finished"
    assert set(service.accepted().values()) == {1}
    [one] = service.rows(select(events.c.message_id).where(events.c.kind == "settle"))
    shown = postroom(service, "message", "show", str(one.message_id))
    assert [a["outcome"] for a in shown["attempts"]] == ["unknown", "accepted"]
    told = [(e["kind"], e["detail"].get("result")) for e in shown["events"]]
    assert told[-2:] == [("look", "found"), ("settle", None)]


@pytest.mark.parametrize("simulator_options", [{"token_lifetime": 10}])
def test_what_never_arrived_is_sent_once_nothing_can_come(service: Service) -> None:
    """reconcile: a reset before Graph had it; not before token, margin and timeout are over."""
    service.environment |= SHORT | {"POSTROOM_ON_UNKNOWN": "reconcile"}
    service.simulator.fault("reset_before")
    service.worker("one")
    batch = enqueue(service, 3)
    doubted(service, batch)
    service.wait_for_end(batch)
    time_passes(service)

    wait_until(lambda: service.counts(batch)["sent"] == 3, "it is sent in the end", 60)

    assert set(service.accepted().values()) == {1}
    assert len(service.accepted()) == 3
    rows = service.rows(
        select(attempts.c.at, attempts.c.token_ends_at, attempts.c.outcome)
        .where(
            attempts.c.message_id.in_(select(events.c.message_id).where(events.c.kind == "look"))
        )
        .order_by(attempts.c.fence)
    )
    assert [row.outcome for row in rows] == ["unknown", "accepted"]
    assert rows[1].at - rows[0].token_ends_at >= timedelta(seconds=3)
    results = service.rows(
        select(events.c.detail).where(events.c.kind == "look").order_by(events.c.id)
    )
    assert [row.detail["result"] for row in results][-1] == "absent"
    assert service.wait_for_end(batch) == Counter(sent=3)


@pytest.mark.parametrize("simulator_options", [{"token_lifetime": 10}])
def test_reconcile_leaves_nothing_unknown_after_a_kill(service: Service) -> None:
    """A worker killed in mid-batch: each message is sent once, and known to be."""
    service.environment |= SHORT | {"POSTROOM_ON_UNKNOWN": "reconcile"}
    victim = service.worker("one")
    batch = service.enqueue(1000)
    wait_until(lambda: service.counts(batch)["sent"] > 200, "some are sent")
    victim.kill()
    service.worker("two")

    def all_sent() -> bool:
        time_passes(service)
        return service.counts(batch)["sent"] == 1000

    wait_until(all_sent, "all are sent", 80)

    assert set(service.accepted().values()) == {1}
    assert service.rows(select(attempts.c.code).where(attempts.c.code == "LeaseExpired"))


@pytest.mark.parametrize("simulator_options", [{"mail_read": False}])
def test_without_mail_read_a_person_settles(service: Service) -> None:
    """The message says why; the person's word is taken, once, with name and reason."""
    service.simulator.fault("status_after", status=504)
    service.worker("one")
    batch = enqueue(service, 2)
    doubted(service, batch)
    time_passes(service)
    where = (messages.c.batch_id == batch, messages.c.state == "unknown")
    coded = select(messages.c.id).where(*where, messages.c.error_code == "LookForbidden")
    [one] = wait_until(lambda: service.rows(coded), "it says why")
    shown = postroom(service, "message", "show", str(one.id))
    assert "grant Mail.Read" in shown["events"][-1]["why"]
    service.wait_for_end(batch)

    line = postroom(service, "message", "settle", str(one.id), "--as", "queued", status=1)
    assert "may still be sent" in line
    assert "--force" in line
    assert line.count("\n") == 1
    words = ("settle", batch, "--as", "sent", "--by", "ann", "--why", "asked them")
    assert postroom(service, "batch", *words) == {"settled": 1, "left": {"sent": 1}}
    assert postroom(service, "batch", *words) == {"settled": 0, "left": {"sent": 2}}

    shown = postroom(service, "message", "show", str(one.id))
    assert shown["state"] == "sent"
    said = [e for e in shown["events"] if e["kind"] == "settle"]
    assert {(e["by"], e["why"]) for e in said} == {("ann", "asked them")}
    assert service.counts(batch) == Counter(sent=2)


@pytest.mark.parametrize("simulator_options", [{"latency_ms": "200"}])
def test_a_busy_mailbox_does_not_keep_looks_out(service: Service) -> None:
    """Its lane has work for every slot that falls free; a look gets one all the same."""
    service.simulator.fault("status_after", status=504)
    service.worker("one")
    batch = enqueue(service, 900)
    doubted(service, batch)
    wait_until(lambda: service.counts(batch)["sent"] > 60, "it sends with all its slots", 60)
    time_passes(service)

    settled = select(events.c.message_id).where(events.c.kind == "settle")
    wait_until(lambda: service.rows(settled), "the look finds it", 60)

    assert service.counts(batch)["queued"] > 0
    assert max(service.simulator.stats()["max_concurrent"].values()) <= 4


def test_a_person_queues_what_may_still_come_by_force(service: Service) -> None:
    """The finished batch goes on, and the message is sent."""
    service.simulator.fault("reset_before")
    service.worker("one")
    batch = enqueue(service)
    doubted(service, batch)
    service.wait_for_end(batch)

    done = postroom(service, "batch", "settle", batch, "--as", "queued", "--force")

    assert done == {"settled": 1, "left": {}}
    wait_until(lambda: service.counts(batch)["sent"] == 1, "it is sent")
    assert service.wait_for_end(batch) == Counter(sent=1)
    assert set(service.accepted().values()) == {1}
    nobody = "00000000-0000-0000-0000-000000000000"
    for what in ("batch", "message"):
        line = postroom(service, what, "settle", nobody, "--as", "sent", status=1)
        assert line == f"postroom: no {what} {nobody}\n"


# ---- a zombie cannot send -----------------------------------------------------------------------


def seconds_pass(seconds: float) -> None:
    """Waits for the clock, which is what a lease waits for."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, "the clock goes on", seconds + 5)


def test_a_worker_stopped_between_claim_and_post_posts_nothing(service: Service) -> None:
    """Its claim waits for a lock, then it sleeps past the lease: the last line before the request
    leaves refuses, although the claim was committed and the connection was there.
    """
    service.environment |= SHORT
    worker = service.worker("one")
    batch = enqueue(service, 300)
    engine = create_engine(service.environment["POSTROOM_DATABASE_URL"])
    queued = select(messages.c.id).where(messages.c.state == "queued").with_for_update()
    waiting = text(
        "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND query LIKE 'UPDATE messages%' AND datname = current_database()"
    )
    wait_until(lambda: service.counts(batch)["sent"] > 0, "it sends")
    with engine.connect() as connection:
        locked = {str(row.id) for row in connection.execute(queued)}
        wait_until(lambda: service.rows(waiting), "the next claim waits")
        worker.signal(signal.SIGSTOP)
        seconds_pass(5)
        asleep = set(service.accepted())
    engine.dispose()
    worker.signal(signal.SIGCONT)

    refused = select(attempts.c.message_id, attempts.c.fence).where(
        attempts.c.code == "LeaseNearlyOver"
    )
    wait_until(lambda: service.rows(refused), "the guard refuses", 30)
    counts = service.wait_for_end(batch)

    assert locked
    assert not locked & asleep
    assert {str(row.message_id) for row in service.rows(refused)} <= locked
    assert {row.fence for row in service.rows(refused)} == {1}
    assert counts["sent"] + counts["unknown"] == 300
    assert counts["unknown"] <= 4
    assert len(service.accepted()) == counts["sent"]
    assert set(service.accepted().values()) == {1}


def test_a_worker_stopped_while_it_connects_posts_nothing(service: Service) -> None:
    """It wakes connected, after others have ended its claims: nothing leaves, and what it records
    takes nothing away from what is known.
    """
    service.environment |= SHORT
    store = Store(make_engine(service.environment["POSTROOM_DATABASE_URL"]))
    with before_simulator(service.simulator) as line:
        line.delay = 1.0
        service.environment |= {"POSTROOM_GRAPH_URL": f"https://127.0.0.1:{line.port}"}
        worker = service.worker("one")
        batch = enqueue(service, 4)
        claims = select(messages.c.id).where(messages.c.state == "sending")
        wait_until(lambda: service.rows(claims) and line.connections, "it has claims, and connects")
        worker.signal(signal.SIGSTOP)
        wait_until(lambda: store.end_leases(resend=False, max_attempts=6), "its claims end", 20)
        store.close()
        lost = {str(r.id) for r in service.rows(select(messages.c.id).where(messages.c.doubt))}
        line.heal()
        worker.signal(signal.SIGCONT)

        late = select(attempts.c.message_id, attempts.c.outcome).where(attempts.c.late)
        wait_until(lambda: len(service.rows(late)) == len(lost), "it says what it knows", 30)
        wait_until(lambda: service.counts(batch)["sent"] == 4 - len(lost), "it goes on", 30)

    assert {row.outcome for row in service.rows(late)} == {"notsent"}
    assert not lost & set(service.accepted())
    assert set(service.accepted().values()) <= {1}
    assert service.counts(batch)["unknown"] == len(lost) > 0
