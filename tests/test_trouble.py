"""Delivery in trouble: servers that die in mid-batch, a credential refused, hostile answers."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import upgrade, wait_until
from tests.test_spine import Service, service, simulator_options
from worker.servers import PostgresServer, RedisServer

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
    batch = service.enqueue(1500)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    own_redis.kill()
    time.sleep(2.5)
    own_redis.start()
    took = resumed_after(service)
    print("RESUMED", took)

    assert service.wait_for_end(batch) == Counter(sent=1500)
    assert set(service.accepted().values()) == {1}
    assert worker.running
    assert "Traceback" not in worker.tail(10**6)
    assert took < RESUME


def test_sends_resume_after_the_database_was_stopped(
    service: Service, own_postgres: PostgresServer
) -> None:
    """A crash of PostgreSQL in mid-batch: outcomes wait for it, none is lost."""
    worker = service.worker("one")
    batch = service.enqueue(1500)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    own_postgres.stop_immediate()
    time.sleep(2.5)
    own_postgres.start()
    took = resumed_after(service)
    print("RESUMED", took)

    assert service.wait_for_end(batch) == Counter(sent=1500)
    assert set(service.accepted().values()) == {1}
    assert worker.running
    assert "Traceback" not in worker.tail(10**6)
    assert took < RESUME
