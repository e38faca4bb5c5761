"""Workers of plain Celery on a benchmark's stage."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from celery import Celery

from tests.benchmarks import kit
from tests.benchmarks.kit import Stage, processor, wait
from worker.servers import Child


@dataclass
class Plain:
    """Running workers; what they noted is in the table plain_sent."""

    stage: Stage
    environment: dict[str, str]
    workers: list[Child]

    def produce(self, to: Mapping[str, int]) -> dict[str, Any]:
        """Calls `delay` so often for each mailbox, in a process of its own."""
        order = {"to": dict(to), "stem": uuid.uuid4().hex[:8]}
        return kit.run_module("produce_plain", order, self.environment)

    def wait_done(self, count: int) -> None:
        """Until so many mails in all are noted."""
        wait(lambda: self.stage.scalar("SELECT count(*) FROM plain_sent") >= count,
             f"{count} mails of plain Celery", pause=0.25)  # fmt: skip

    def left_after(self, count: int, seconds: float) -> int:
        """How many of so many mails are not noted after so many seconds: their retries wait ever
        longer.
        """
        end = time.monotonic() + seconds
        while (left := count - noted(self.stage)) > 0 and time.monotonic() < end:
            time.sleep(0.25)
        return left

    def seconds(self) -> float:
        """Processor seconds of the workers so far."""
        return processor(self.workers)


@contextlib.contextmanager
def running(
    stage: Stage, *, processes: int, concurrency: int, pool: str = "prefork", rate_limit: str = ""
) -> Iterator[Plain]:
    """So many workers of plain Celery, until the block ends."""
    environment = stage.environment | {
        "PLAIN_BROKER": stage.redis.celery_url, "PLAIN_DATABASE": stage.postgres.url,
        "PLAIN_RATE_LIMIT": rate_limit, "PYTHONPATH": str(kit.HOME),
        "REQUESTS_CA_BUNDLE": stage.simulator.ca_bundle,  # would win over MSAL's own argument
    }  # fmt: skip
    _create_table(stage)
    workers = [
        stage.processes.start(
            ["celery", "-A", "tests.benchmarks.plain", "worker", "-P", pool, "-c",
             str(concurrency), "-n", f"plain{n}@x"],
            env=environment, log="plain",
        )
        for n in range(processes)
    ]  # fmt: skip
    try:
        with Celery(broker=stage.redis.celery_url, set_as_current=False) as app:
            wait(lambda: len(app.control.ping(timeout=0.5) or ()) == processes, "plain Celery")
        yield Plain(stage, environment, workers)
    finally:
        for child in workers:
            child.stop()


def noted(stage: Stage) -> int:
    """How many mails plain Celery has noted so far."""
    _create_table(stage)
    return int(stage.scalar("SELECT count(*) FROM plain_sent"))


def _create_table(stage: Stage) -> None:
    from sqlalchemy import Column, DateTime, Integer, MetaData, String, Table

    metadata = MetaData()
    Table("plain_sent", metadata, Column("id", Integer, primary_key=True),
          Column("reference", String(40), index=True), Column("mailbox", String(200)),
          Column("recipient", String(200)), Column("status", Integer),
          Column("request_id", String(100)), Column("at", DateTime(timezone=True)))  # fmt: skip
    engine = sqlalchemy.create_engine(stage.postgres.url)
    metadata.create_all(engine)
    engine.dispose()
