"""A batch with everything that is said of it at the door, through real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import update

from tests.support import Processes, clean_environment, wait_until
from worker.broker import celery_url
from worker.client import Client
from worker.config import Settings
from worker.model import Message
from worker.runtime import Runtime
from worker.simulator import Simulator
from worker.store.schema import messages, queues

SENDER = "notices@contoso.com"


class Service:
    """Redis, a database, the simulator, and a worker with settings of the test's own."""

    def __init__(self, directory: Path, redis_url: str, url: str, simulator: Simulator) -> None:
        self.settings = {"REDIS_URL": redis_url, "DATABASE_URL": url}
        self.simulator = simulator
        self.processes = Processes(directory, clean_environment())
        self.redis_url = redis_url
        self.runtime = Runtime(Settings.from_env(redis_url=redis_url, database_url=url))
        self.client = Client(lambda: self.runtime)

    def worker(self, **settings: str) -> Any:
        """A worker, ready."""
        environment = self.simulator.environment() | {
            f"POSTROOM_{name}": value for name, value in (self.settings | settings).items()
        }
        command = ["celery", "-A", "worker", "worker", "-P", "threads", "-c", "4", "-l", "INFO"]
        child = self.processes.start(command, env=environment, log="worker")
        wait_until(lambda: " ready." in child.tail(100_000), "the worker is ready", 30)
        return child

    def wait_for_end(self, batch_id: str) -> dict[str, int]:
        """The counts of the batch when it has finished; without those that are 0."""
        wait_until(
            lambda: self.client.status(batch_id)["state"] == "finished", "the batch ends", 60
        )
        return {k: n for k, n in self.client.status(batch_id)["counts"].items() if n}

    def close(self) -> None:
        self.processes.kill()
        self.runtime.close()


@pytest.fixture
def service(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Service]:
    with Simulator(tmp_path / "simulator") as simulator:
        one = Service(tmp_path, redis_url, migrated_url, simulator)
        yield one
        one.close()


def mail(to: Any, **more: Any) -> Message:
    return Message(to=to, subject="Hello", text="x", **more)


def test_staging_sends_everything_to_one_address_and_says_so(service: Service) -> None:
    """The worker's log and the subject tell; what was queued before is held to it as well."""
    service.client.enqueue([mail("a@strangers.org")], sender=SENDER)
    worker = service.worker(REDIRECT_TO="test@contoso.com", ALLOWED_DOMAINS="fabrikam.com")
    receipt = service.client.enqueue(
        [mail(["ann@fabrikam.com", "bob@fabrikam.com"]), mail("c@strangers.org")], sender=SENDER
    )

    assert service.wait_for_end(receipt.batch_id) == {"sent": 1, "failed": 1}
    [entry] = service.simulator.ledger()
    assert entry["recipients"] == ["test@contoso.com"]
    assert entry["subject"] == "[to ann@fabrikam.com, bob@fabrikam.com] Hello"
    assert "REDIRECT_TO: all mail goes to test@contoso.com" in worker.tail(100_000)
    failed = [m for m in service.client.messages(receipt.batch_id) if m["state"] == "failed"]
    assert [m["error_code"] for m in failed] == ["RCPT_POLICY"]


def test_suppressed_recipients_are_not_sent_to_unless_the_batch_says_so(service: Service) -> None:
    """Both in one run; the exception is an event with who asked for it."""
    service.runtime.store.suppressions.add([("ann@fabrikam.com", None)], by="ada", why=None)
    people = ["ann@fabrikam.com", "bob@fabrikam.com"]
    service.worker()
    usual = service.client.enqueue([mail(p) for p in people], sender=SENDER)
    legal = service.client.enqueue(
        [mail(p) for p in people], sender=SENDER, ignore_suppressions=True, by="ada"
    )

    assert service.wait_for_end(usual.batch_id) == {"sent": 1, "suppressed": 1}
    assert service.wait_for_end(legal.batch_id) == {"sent": 2}
    one = next(iter(service.client.messages(legal.batch_id)))
    events = (service.runtime.store.message(one["id"]) or {})["events"]
    assert [(e["kind"], e["by"]) for e in events] == [("ignore_suppressions", "ada")]


def test_a_message_waits_for_its_time_and_ends_after_it(service: Service) -> None:
    """send_at and expires_at, with zones; what is due goes meanwhile."""
    now = datetime.now(UTC)
    service.worker()
    later = service.client.enqueue(
        [mail("a@fabrikam.com")], sender=SENDER, send_at=now + timedelta(hours=1)
    )
    short = service.client.enqueue(
        [mail("b@fabrikam.com")], sender=SENDER, send_at=now + timedelta(seconds=300),
        expires_at=(now + timedelta(seconds=301)).isoformat(),
    )  # fmt: skip
    due = service.client.enqueue([mail("c@fabrikam.com")], sender=SENDER, priority="bulk")

    assert service.wait_for_end(due.batch_id) == {"sent": 1}
    for batch in (later, short):
        assert service.client.status(batch.batch_id)["counts"]["queued"] == 1
    past = now - timedelta(days=1)
    with service.runtime.store.engine.begin() as connection:  # six minutes pass
        for table, times in (
            (messages, {"deadline_at": past}),
            (queues, {"deadline_at": past, "next_due_at": past}),
        ):
            its = table.c.batch_id == short.batch_id
            connection.execute(update(table).where(its).values(times))
    assert service.wait_for_end(short.batch_id) == {"expired": 1}
    assert [e["recipients"] for e in service.simulator.ledger()] == [["c@fabrikam.com"]]


APPLICATION = """
import pathlib
from celery import Celery

app = Celery("billing", broker={broker!r})

@app.task(name="billing.done")
def done(batch_id, counts):
    with pathlib.Path({told!r}).open("a") as file:
        file.write(f"{{batch_id}} {{counts['sent']}}\\n")
"""


def test_the_application_s_own_task_is_called_when_a_batch_has_finished(
    service: Service, tmp_path: Path, redis_client: redis.Redis
) -> None:
    """Its Celery knows nothing of ours: another queue, no prefix, on the same Redis."""
    told = tmp_path / "told.txt"
    source = APPLICATION.format(broker=celery_url(service.redis_url), told=str(told))
    (tmp_path / "billing.py").write_text(source)
    service.worker()
    receipt = service.client.enqueue(
        [mail("a@fabrikam.com")], sender=SENDER, on_finished="billing.done"
    )
    wait_until(lambda: redis_client.llen("celery"), "the task lies in the application's queue")
    assert service.wait_for_end(receipt.batch_id) == {"sent": 1}
    body = json.loads(str(redis_client.lrange("celery", 0, -1)[0]))
    assert body["headers"]["task"] == "billing.done"

    service.processes.start(
        ["celery", "-A", "billing", "worker", "-P", "solo"],
        env={"PYTHONPATH": str(tmp_path)}, log="billing",
    )  # fmt: skip
    wait_until(told.exists, "the application was called", 40)
    assert wait_until(told.read_text, "its line") == f"{receipt.batch_id} 1\n"
