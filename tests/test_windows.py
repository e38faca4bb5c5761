"""The limits across processes: kills, pauses and a Redis that forgets exceed no window."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import redis
from sqlalchemy import select

from tests.support import wait_until
from tests.test_spine import POSTGRESQL, Service, service, simulator_options
from worker.model import Message
from worker.servers import Child
from worker.store.schema import attempts, messages

__all__ = ["service", "simulator_options"]

#: What Graph allows in these tests, and what Postroom is told of it.
TIGHT = {"latency_ms": "30", "request_limit": 20, "request_window": 3.0}
RATE = {"POSTROOM_MAILBOX_REQUEST_RATE": "20/3s", "POSTROOM_RESERVE_HIGH": "0"}
WINDOWS = pytest.mark.parametrize("simulator_options", [TIGHT])


def wait_for_sent(of: Service, batch: str, count: int) -> None:
    wait_until(lambda: of.counts(batch)["sent"] >= count, "it goes on", 60)


def held(of: Service) -> dict[str, int]:
    """What Graph saw of the limits: answers of 429, and the most that ran at once."""
    stats = of.simulator.stats()
    return {"throttled": stats["throttled"], "peak": max(stats["max_concurrent"].values())}


@POSTGRESQL
@WINDOWS
@pytest.mark.timeout(180)
def test_workers_killed_and_started_at_random_exceed_no_window(service: Service) -> None:
    """Whoever sends, whoever dies: Graph sees one sender a mailbox, and it never says 429."""
    service.environment |= RATE
    chance = random.Random(3)
    workers = [service.worker(f"w{n}") for n in range(3)]
    batch = service.enqueue(300)
    for number in range(4):
        wait_for_sent(service, batch, 30 + 60 * number)
        victim = workers.pop(chance.randrange(3))
        victim.signal(signal.SIGKILL)
        workers.append(service.worker(f"again{number}"))
    counts = service.wait_for_end(batch, 90)

    assert held(service) == {"throttled": 0, "peak": 4}
    assert counts["sent"] + counts["unknown"] == 300
    assert counts["unknown"] <= 4 * 4 * 5  # what was in flight at each kill, at the very most
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
def test_the_lane_of_a_killed_worker_goes_on_elsewhere_within_15_seconds(service: Service) -> None:
    """Its lease runs out, and the sweep of another worker wakes the mailbox."""
    workers = {name: service.worker(name) for name in ("one", "two")}
    service.client.enqueue(letters(3000), sender="notices1@contoso.com")
    at_work = select(messages.c.worker).where(messages.c.state == "sending")
    wait_until(lambda: service.rows(at_work), "somebody sends")
    victim = at_work_in(service, workers)
    victim.signal(signal.SIGKILL)
    before = len(service.accepted())

    wait_until(lambda: len(service.accepted()) > before + 8, "the other goes on", 15)


def letters(count: int) -> Iterator[Message]:
    return (Message(f"p{n}@example.org", subject="Hello", text="Hi") for n in range(count))


def at_work_in(of: Service, workers: dict[str, Child]) -> Child:
    """The worker process that holds the only lane."""

    def holder() -> Child | None:
        rows = of.rows(select(messages.c.worker).where(messages.c.state == "sending"))
        pids = {int(row.worker.split(":")[1]) for row in rows}
        return next((w for w in workers.values() if w.pid in pids), None)

    found = wait_until(holder, "a claim names its worker")
    assert found
    return found


@POSTGRESQL
@WINDOWS
@pytest.mark.timeout(180)
def test_a_pause_past_the_lease_breaks_no_limit(service: Service) -> None:
    """Another worker has the lanes when it wakes: it sends nothing more on them."""
    service.environment |= RATE
    first, _ = service.worker("one"), service.worker("two")
    batch = service.enqueue(350)
    wait_until(lambda: service.counts(batch)["sent"] > 50, "some are sent")
    first.signal(signal.SIGSTOP)
    before = len(service.accepted())
    lost = select(attempts.c.message_id).where(attempts.c.code == "LeaseExpired")
    wait_until(
        lambda: service.rows(lost) or len(service.accepted()) > before + 200, "others go on", 60
    )
    first.signal(signal.SIGCONT)
    service.wait_for_end(batch, 90)

    assert held(service) == {"throttled": 0, "peak": 4}
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
@WINDOWS
@pytest.mark.timeout(180)
def test_a_redis_emptied_in_mid_run_costs_no_429(service: Service) -> None:
    """Windows, slots and cooldowns are learned from SQL before the first grant."""
    service.environment |= RATE
    for name in ("one", "two"):
        service.worker(name)
    batch = service.enqueue(300)
    with redis.Redis.from_url(service.environment["POSTROOM_REDIS_URL"]) as client:
        for sent in (60, 140, 220):
            wait_for_sent(service, batch, sent)
            client.flushdb()
    counts = service.wait_for_end(batch, 90)

    assert counts == Counter(sent=300) + Counter()
    assert held(service) == {"throttled": 0, "peak": 4}
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
@pytest.mark.parametrize("simulator_options", [TIGHT | {"request_window": 10.0}])
def test_an_urgent_message_uses_what_is_kept_for_it(service: Service) -> None:
    """Bulk has used its share of the window; the share of priority high is still there."""
    service.environment |= {
        "POSTROOM_MAILBOX_REQUEST_RATE": "20/10s",
        "POSTROOM_RESERVE_HIGH": "20",
    }
    service.worker("one")
    mailbox = "notices1@contoso.com"
    bulk = service.client.enqueue(letters(20), sender=mailbox, priority="bulk").batch_id
    wait_until(lambda: service.counts(bulk)["sent"] >= 16, "bulk has used its share")
    urgent = service.client.enqueue(letters(4), sender=mailbox, priority="high").batch_id
    wait_until(lambda: service.counts(urgent)["sent"] == 4, "the urgent ones are sent")
    rows = service.rows(
        select(messages.c.batch_id).where(messages.c.sent_at.is_not(None)).order_by("sent_at")
    )
    service.wait_for_end(bulk)

    assert [row.batch_id for row in rows].count(bulk) == 16
    assert held(service) == {"throttled": 0, "peak": 4}
