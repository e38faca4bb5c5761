"""Delivery in trouble: servers that die in mid-batch, a credential refused, hostile answers."""

from __future__ import annotations

import signal
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import redis
from sqlalchemy import select, text

from tests.support import upgrade, wait_until
from tests.test_spine import (
    MAILBOXES,
    TEMPLATE,
    Service,
    service,
    simulator_options,
    some_messages,
)
from worker.servers import Child, PostgresServer, RedisServer
from worker.store.schema import attempts, messages

__all__ = ["service", "simulator_options"]  # fixtures

RESUME = 5.0  # seconds: sends go on so soon after a fault has passed


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """A Redis of the test's own, which it may kill."""
    return own_redis.url


@pytest.fixture
def migrated_url(own_postgres: PostgresServer, tmp_path: Path) -> str:
    """A PostgreSQL of the test's own, which it may stop."""
    upgrade(own_postgres.url)
    return own_postgres.url


def accepted(service: Service) -> int:
    """How many mails Graph has accepted, whatever became of our servers."""
    return int(service.simulator.stats()["accepted"])


def log_of(worker: Child) -> str:
    """All that a worker has said."""
    return worker.tail(10_000_000)


def resumed_after(service: Service) -> float:
    """Seconds until Graph accepts another twenty mails."""
    began, before = time.monotonic(), accepted(service)
    wait_until(lambda: accepted(service) >= before + 20, "sends go on", 30)
    return time.monotonic() - began


def test_sends_resume_after_redis_was_killed(service: Service, own_redis: RedisServer) -> None:
    """Redis gone for a while in mid-batch: the worker lives, nothing is lost, nothing is doubled,
    nothing is unknown: what was in flight ends and is recorded.
    """
    worker = service.worker("one")
    batch = service.enqueue(1000)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    own_redis.kill()
    wait_until(lambda: log_of(worker).count("Cannot connect to") >= 2, "the outage is seen")
    own_redis.start()
    took = resumed_after(service)

    assert service.wait_for_end(batch) == Counter(sent=1000)
    assert set(service.accepted().values()) == {1}
    assert worker.running
    for alarming in ("Traceback", "EMERGENCY", "DeprecationWarning"):
        assert alarming not in log_of(worker)
    assert log_of(worker).count("trying again every second") <= 2
    assert "Redis and database answer again" in log_of(worker)
    assert took < RESUME


def test_sends_resume_after_the_database_was_stopped(
    service: Service, own_postgres: PostgresServer
) -> None:
    """A crash of PostgreSQL in mid-batch: outcomes wait for it, none is lost."""
    worker = service.worker("one")
    batch = service.enqueue(1000)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    own_postgres.stop_immediate()
    wait_until(lambda: "the database does not answer" in log_of(worker), "the outage is seen")
    own_postgres.start()
    took = resumed_after(service)

    assert service.wait_for_end(batch) == Counter(sent=1000)
    assert set(service.accepted().values()) == {1}
    assert worker.running
    assert "Traceback" not in log_of(worker)
    assert took < RESUME


def test_a_lane_that_ends_its_turn_goes_on_at_once(
    service: Service, own_redis: RedisServer
) -> None:
    """A lane gives its mailbox back when its turn ends: no lease of it stands in the next's way."""
    service.worker("one", "-c", "1")
    batch = service.client.enqueue(
        some_messages(400), sender=MAILBOXES[0], template=TEMPLATE
    ).batch_id

    service.wait_for_end(batch)

    times = sorted(r["time"] for r in service.simulator.ledger())
    assert max(later - earlier for earlier, later in pairwise(times)) < 3


def test_mailboxes_beyond_the_threads_take_turns(service: Service) -> None:
    """Sixteen busy mailboxes and one thread: each is served before any has had two turns more."""
    mailboxes = [f"box{n}@contoso.com" for n in range(16)]
    for mailbox in mailboxes:
        service.client.enqueue(some_messages(400), sender=mailbox, template=TEMPLATE)
    service.worker("one", "-c", "1")

    def served() -> Counter[str]:
        return Counter(entry["mailbox"] for entry in service.simulator.ledger())

    wait_until(lambda: len(served()) == len(mailboxes), "each is served", 60)

    assert max(served().values()) < 400, "one was served to its end while others waited"


def test_a_refused_credential_waits_and_goes_on_by_itself(service: Service) -> None:
    """Entra away: a result that a person can read, one request for all mailboxes at each try, no
    message fails; when Entra is back, so are we, without a restart.
    """
    service.simulator.fault("token_status", 0, status=503)
    worker = service.worker("one")
    batch = service.enqueue(100)
    wait_until(lambda: "'waits_for': 'AADSTS90033'" in log_of(worker), "the lanes say why")
    wait_until(lambda: service.simulator.stats()["token_requests"] >= 2, "it is tried again")
    assert service.simulator.stats()["token_requests"] == 2
    assert +service.counts(batch) == Counter(queued=100)

    service.simulator.clear_faults()

    assert service.wait_for_end(batch) == Counter(sent=100)
    assert "Traceback" not in log_of(worker)


def test_an_outage_of_graph_leaves_a_handful_in_doubt(service: Service) -> None:
    """A mailbox in doubt rests with growing time and tries again with one message."""
    for name in ("one", "two"):
        service.worker(name)
    service.simulator.fault("status", 0, status=503)
    batch = service.enqueue(500)

    def tried() -> Counter[str]:
        rows = service.rows(select(attempts.c.mailbox))
        return Counter(row.mailbox for row in rows)

    wait_until(lambda: len(tried()) == 5 and min(tried().values()) >= 6, "each probed twice", 40)
    service.simulator.clear_faults()
    counts = service.wait_for_end(batch)

    assert counts["unknown"] <= 5 * 8  # four at once, then one at a time
    assert counts["sent"] == 500 - counts["unknown"]
    assert set(service.accepted().values()) == {1}


@pytest.mark.parametrize("simulator_options", [{"latency_ms": "200"}])
def test_a_worker_paused_past_its_claims_sends_nothing_twice(service: Service) -> None:
    """It wakes with its lease over: it posts nothing, and what Graph answered meanwhile counts."""
    service.environment |= {"POSTROOM_REQUEST_TIMEOUT": "2s", "POSTROOM_LEASE": "4s"}
    first, second = service.worker("one"), service.worker("two")
    batch = service.enqueue(600)
    wait_until(lambda: service.counts(batch)["sent"] > 50, "some are sent")

    first.signal(signal.SIGSTOP)
    lost = select(attempts.c.message_id).where(attempts.c.code == "LeaseExpired")
    wait_until(lambda: service.rows(lost), "its claims end without a word")
    first.signal(signal.SIGCONT)
    service.wait_for_end(batch)
    late = select(attempts.c.message_id, attempts.c.outcome).where(attempts.c.late)
    unsent = select(messages.c.id).where(messages.c.state != "sent")

    def all_told() -> bool:
        """Sent, or the worker has said that it had not let it leave."""
        held = {row.message_id for row in service.rows(late) if row.outcome == "notsent"}
        return {row.id for row in service.rows(unsent)} <= held

    wait_until(all_told, "what it learnt or withheld is recorded")

    assert second.running
    assert service.rows(late)
    assert set(service.accepted().values()) == {1}
    assert not {str(row.id) for row in service.rows(unsent)} & set(service.accepted())
    assert {row.outcome for row in service.rows(late)} <= {"accepted", "notsent"}
    assert max(service.simulator.stats()["max_concurrent"].values()) <= 4


@pytest.mark.parametrize("gone", ["redis", "database"])
def test_a_stop_ends_whatever_is_down(
    service: Service, own_redis: RedisServer, own_postgres: PostgresServer, gone: str
) -> None:
    """SIGTERM with a server away: the worker ends within the request timeout and a few seconds."""
    worker = service.worker("one")
    batch = service.enqueue(1000)
    wait_until(lambda: accepted(service) > 100, "some are sent")
    if gone == "redis":
        own_redis.kill()
    else:
        own_postgres.stop_immediate()

    worker.signal(signal.SIGTERM)
    status = worker.process.wait(5 + 10)

    assert status == 0
    assert "Traceback" not in log_of(worker)
    if gone == "redis":
        own_redis.start()
        assert service.counts(batch)["sending"] == 0
        assert len(service.accepted()) == service.counts(batch)["sent"]


def test_lost_rings_and_no_beat_cost_moments(service: Service) -> None:
    """Celery's list is deleted again and again: the ticker rings until somebody comes."""
    service.worker("one")
    batch = service.enqueue(400)
    queue = redis.Redis.from_url(service.environment["POSTROOM_REDIS_URL"])

    def ended() -> bool:
        queue.delete("postroom:postroom")
        return bool(service.client.status(batch)["state"] == "finished")

    wait_until(ended, "the batch ends", 60)
    queue.close()

    assert service.counts(batch) == Counter(sent=400)
    assert set(service.accepted().values()) == {1}


@pytest.mark.parametrize("simulator_options", [{"latency_ms": "3000"}])
def test_no_connection_is_held_while_graph_takes_its_time(service: Service) -> None:
    """Twenty requests are under way: no transaction of the worker's is open, no lock is held."""
    service.worker("one")
    service.enqueue(100)
    underway = select(messages.c.id).where(messages.c.state == "sending")
    wait_until(lambda: len(service.rows(underway)) == 20, "all slots are taken")

    database = text("pid <> pg_backend_pid() AND datname = current_database()")
    activity = select(text("state FROM pg_stat_activity")).where(database)
    states = [row.state for _ in range(10) for row in service.rows(activity)]

    assert states
    assert not [state for state in states if state and "transaction" in state]
    assert len(service.rows(underway)) == 20


def test_a_message_that_takes_its_worker_down_three_times_is_set_aside(service: Service) -> None:
    """Whatever ON_UNKNOWN says: it ends as unknown, quarantined, and a fourth worker lives."""
    service.environment |= {
        "POSTROOM_ON_UNKNOWN": "resend", "POSTROOM_REQUEST_TIMEOUT": "2s", "POSTROOM_LEASE": "4s",
    }  # fmt: skip
    service.simulator.fault("hang_before", 0)
    batch = service.enqueue(1)
    for n in range(1, 4):
        worker = service.worker(f"victim{n}")
        claim = select(messages.c.id).where(messages.c.state == "sending", messages.c.fence == n)
        wait_until(partial(service.rows, claim), "it is claimed", 30)
        worker.kill()

    service.worker("four")
    counts = service.wait_for_end(batch)

    [row] = service.rows(select(messages.c.error_code, messages.c.crashes))
    assert +counts == Counter(unknown=1)
    assert (row.error_code, row.crashes) == ("Quarantined", 3)
