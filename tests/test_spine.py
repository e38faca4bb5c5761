"""One real batch, end to end: worker processes, Redis, SQL, TLS; with stops and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import create_engine, select

from tests.proxy import before_redis
from tests.support import Processes, clean_environment, wait_until
from worker.client import Client
from worker.config import Settings
from worker.model import Message, Template
from worker.runtime import Runtime
from worker.servers import Child
from worker.simulator import Simulator
from worker.store.schema import attempts, messages

MAILBOXES = [f"notices{n}@contoso.com" for n in range(1, 6)]
TEMPLATE = Template("News for {{ name }}", html="<p>Hello {{ name }}</p>")
POSTGRESQL = pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)


@dataclass
class Service:
    """Everything of one test: the simulator, the servers, and the way to start workers."""

    simulator: Simulator
    processes: Processes
    environment: dict[str, str]
    client: Client

    def worker(self, name: str, *options: str) -> Child:
        """A worker process, returned when it is ready to work."""
        command = ["celery", "-A", "worker", "worker", "-P", "threads", "-c", "8",
                   "-n", f"{name}@test", "-l", "INFO", *options]  # fmt: skip
        child = self.processes.start(command, env=self.environment, log=name)
        wait_until(lambda: " ready." in child.tail(100_000), f"worker {name} is ready", 30)
        return child

    def enqueue(self, count: int, key: str | None = None) -> str:
        """A batch of `count` to the pool; gives its id."""
        return self.client.enqueue(
            some_messages(count), pool="notices", template=TEMPLATE, idempotency_key=key
        ).batch_id

    def counts(self, batch: str) -> Counter[str]:
        """How many messages are in each state."""
        return Counter(self.client.status(batch)["counts"])

    def wait_for_end(self, batch: str, timeout: float = 60) -> Counter[str]:
        """Waits until the batch is finished; gives its counts."""
        wait_until(
            lambda: self.client.status(batch)["state"] == "finished", "the batch ends", timeout
        )
        return self.counts(batch)

    def accepted(self) -> Counter[str]:
        """How often the simulator accepted each message."""
        return Counter(entry["marker"] for entry in self.simulator.ledger())

    def rows(self, statement: Any) -> list[Any]:
        """What SQL says, read apart from the product."""
        engine = create_engine(self.environment["POSTROOM_DATABASE_URL"])
        with engine.connect() as connection:
            found = list(connection.execute(statement))
        engine.dispose()
        return found


def some_messages(count: int) -> Iterator[Message]:
    """`count` personal messages."""
    return (
        Message(f"person{n}@example.org", variables={"name": f"Person {n}"}) for n in range(count)
    )


@pytest.fixture
def simulator_options() -> dict[str, Any]:
    """What a test asks of the simulator beyond its defaults."""
    return {}


@pytest.fixture
def service(
    tmp_path: Path, redis_url: str, migrated_url: str, simulator_options: dict[str, Any]
) -> Iterator[Service]:
    """A service without workers: each test starts its own."""
    options = {"latency_ms": "50"} | simulator_options
    with Simulator(tmp_path / "simulator", **options) as simulator:
        environment = simulator.environment() | {
            "POSTROOM_REDIS_URL": redis_url,
            "POSTROOM_DATABASE_URL": migrated_url,
            "POSTROOM_POOLS": json.dumps({"notices": MAILBOXES}),
            "POSTROOM_REQUEST_TIMEOUT": "5s",
            "POSTROOM_LEASE": "8s",
        }
        runtime = Runtime(
            Settings.from_env(
                redis_url=redis_url, database_url=migrated_url, pools={"notices": MAILBOXES}
            )
        )
        processes = Processes(tmp_path, clean_environment())
        try:
            yield Service(simulator, processes, environment, Client(lambda: runtime))
        finally:
            processes.kill()
            runtime.close()


def test_a_batch_over_two_workers_is_sent_once_with_one_token(service: Service) -> None:
    """A thousand messages: each accepted once, one token, four at once, an audit row each."""
    service.worker("one")
    service.worker("two")

    batch = service.enqueue(1000)
    counts = service.wait_for_end(batch)

    stats = service.simulator.stats()
    assert counts == Counter(sent=1000)
    assert set(service.accepted().values()) == {1}
    assert len(service.accepted()) == 1000
    assert stats["token_requests"] == 1
    assert stats["throttled"] == 0
    assert max(stats["max_concurrent"].values()) <= 4
    told = {entry["marker"]: entry["request_id"] for entry in service.simulator.ledger()}
    audit = service.rows(select(attempts.c.message_id, attempts.c.request_id, attempts.c.status))
    assert {str(row.message_id): row.request_id for row in audit} == told
    assert {row.status for row in audit} == {202}


@POSTGRESQL
def test_sigterm_leaves_nothing_unknown_and_the_rest_is_sent_later(service: Service) -> None:
    """A deploy in the middle of a batch costs nothing: what is in flight ends first."""
    first = [service.worker("one"), service.worker("two")]
    batch = service.enqueue(2000)
    wait_until(lambda: service.counts(batch)["sent"] > 200, "some are sent")

    for worker in first:
        worker.signal(signal.SIGTERM)
    exits = [worker.process.wait(20) for worker in first]
    counts = service.counts(batch)

    assert exits == [0, 0]
    assert 200 < counts["sent"] < 2000
    assert counts["unknown"] == counts["sending"] == 0
    service.worker("three")
    assert service.wait_for_end(batch) == Counter(sent=2000)
    assert set(service.accepted().values()) == {1}


@POSTGRESQL
def test_sigkill_leaves_in_doubt_only_what_was_in_flight(service: Service) -> None:
    """At most four of a mailbox; none is lost, none is sent twice, and SQL agrees."""
    victim = service.worker("one")
    batch = service.enqueue(1500)
    wait_until(lambda: service.counts(batch)["sent"] > 200, "some are sent")

    victim.kill()
    service.worker("two")
    counts = service.wait_for_end(batch)

    accepted = service.accepted()
    rows = service.rows(select(messages.c.id, messages.c.state, messages.c.mailbox))
    in_doubt = Counter(row.mailbox for row in rows if row.state == "unknown")
    assert counts["sent"] + counts["unknown"] == 1500
    assert set(accepted.values()) == {1}
    assert all(n <= 4 for n in in_doubt.values())
    assert {str(row.id) for row in rows if row.state == "sent"} <= set(accepted)


PRODUCER = """
import sys
from tests.test_spine import TEMPLATE, some_messages
from worker import Client
Client.from_env().enqueue(some_messages(20_000), pool="notices", template=TEMPLATE,
                          idempotency_key="the-news")
"""


@POSTGRESQL
def test_a_producer_killed_in_the_middle_is_completed_by_the_same_call(
    service: Service, redis_url: str
) -> None:
    """Half a batch stays open and unsent; the same call with the same key doubles nothing."""
    root = Path(__file__).parent.parent
    inbox = redis.Redis.from_url(redis_url, decode_responses=True)
    with before_redis(redis_url) as slow:  # else it is too quick to be killed in the middle
        slow.delay = 0.05
        slowly = {"POSTROOM_REDIS_URL": f"redis://127.0.0.1:{slow.port}/0"}
        producer = subprocess.Popen(
            [sys.executable, "-c", PRODUCER],
            env=clean_environment() | service.environment | {"PYTHONPATH": str(root)} | slowly,
        )
        key = str(wait_until(lambda: next(inbox.scan_iter("postroom:batch:*"), ""), "a chunk"))
        producer.kill()
        producer.wait()
    batch = key.removeprefix("postroom:batch:")

    worker = service.worker("one")
    wait_until(lambda: inbox.xlen("postroom:inbox") == 0, "the inbox is read")
    half = int(inbox.hget(key, "arrived") or 0)  # now that its last words were heard too
    assert 0 < half < 20_000
    status = service.client.status(batch)
    assert status["state"] == "open"
    assert status["counts"]["queued"] == half
    assert service.accepted() == Counter()
    worker.stop()

    receipt = service.client.enqueue(
        some_messages(20_000), pool="notices", template=TEMPLATE, idempotency_key="the-news"
    )
    assert (receipt.batch_id, receipt.duplicates) == (batch, half)
    assert receipt.accepted == 20_000 - half
    service.worker("two")
    wait_until(lambda: service.client.status(batch)["state"] == "running", "it is whole", 60)
    assert sum(service.counts(batch).values()) == 20_000


@POSTGRESQL
@pytest.mark.parametrize("simulator_options", [{"token_lifetime": 12, "latency_ms": "500"}])
def test_workers_renew_one_token_together(service: Service) -> None:
    """Tokens that end soon: one request for each renewal whatever the number of workers, no 401."""
    for name in ("one", "two", "three"):
        service.worker(name)
    batch = service.enqueue(2000)

    wait_until(lambda: service.simulator.stats()["token_requests"] >= 4, "three renewals", 60)
    sent = service.counts(batch)["sent"]

    stats = service.simulator.stats()
    times = [r["time"] for r in service.simulator.requests() if "/oauth2/" in str(r)]
    assert stats["token_requests"] == 4
    assert all(later - earlier > 4 for earlier, later in pairwise(times))
    assert stats["unauthorized"] == 0
    assert sent > 100


@POSTGRESQL
def test_a_revoked_token_costs_one_renewal_for_all(service: Service) -> None:
    """Twenty requests meet a 401 at once: one new token, no try spent, nothing failed."""
    for name in ("one", "two"):
        service.worker(name)
    batch = service.enqueue(1500)
    wait_until(lambda: service.counts(batch)["sent"] > 200, "some are sent")

    service.simulator.revoke_tokens()
    counts = service.wait_for_end(batch)

    assert counts == Counter(sent=1500)
    assert set(service.accepted().values()) == {1}
    assert service.simulator.stats()["token_requests"] == 2
    refused = service.rows(select(attempts.c.outcome).where(attempts.c.status == 401))
    assert 0 < len(refused) <= 20
    assert {row.outcome for row in refused} == {"blocked"}
    assert {row.tries for row in service.rows(select(messages.c.tries))} == {0}


@POSTGRESQL
def test_a_throttled_mailbox_rests_for_every_worker(service: Service) -> None:
    """A 429 with Retry-After: nobody calls too early, no try is spent, everything is sent."""
    for name in ("one", "two"):
        service.worker(name)
    service.simulator.fault(
        "status", 1, status=429, code="ApplicationThrottled", headers={"Retry-After": "2"},
        mailbox=MAILBOXES[0],
    )  # fmt: skip

    batch = service.enqueue(600)

    assert service.wait_for_end(batch) == Counter(sent=600)
    assert service.simulator.stats()["too_early"] == 0
    assert {row.tries for row in service.rows(select(messages.c.tries))} == {0}


@POSTGRESQL
def test_a_worker_asked_for_prefork_takes_threads(service: Service) -> None:
    """What must not be forked is not forked: Celery's default pool gives way to threads."""
    worker = service.worker("one", "-P", "prefork")

    batch = service.enqueue(20)

    assert service.wait_for_end(batch) == Counter(sent=20)
    assert "(thread)" in worker.tail(100_000)


@POSTGRESQL
def test_a_pool_that_cannot_work_is_refused_in_one_line(service: Service) -> None:
    """The worker ends at once and says which pool to take."""
    worker = service.processes.start(
        ["celery", "-A", "worker", "worker", "-P", "processes", "-c", "1"], env=service.environment
    )

    wait_until(lambda: not worker.running, "it ends", 30)

    assert "celery -A worker worker -P threads" in worker.tail().strip().splitlines()[-1]
    assert "Traceback" not in worker.tail()
