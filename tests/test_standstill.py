"""No silent standstill: dead lines, stalled servers, hanging workers hold nothing up for long."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.proxy import Proxy, before_redis
from tests.support import wait_until
from tests.test_spine import Service, service, simulator_options
from tests.test_trouble import (
    RESUME,
    accepted,
    log_of,
    migrated_url,
    redis_url,
    resumed_after,
)
from worker.servers import Child, RedisServer

__all__ = ["migrated_url", "redis_url", "service", "simulator_options"]  # fixtures


@pytest.fixture
def line(own_redis: RedisServer, service: Service) -> Iterator[Proxy]:
    """The workers' way to Redis, which may break; the test itself has another."""
    with before_redis(own_redis) as proxy:
        service.environment["POSTROOM_REDIS_URL"] = f"redis://127.0.0.1:{proxy.port}/0"
        yield proxy


def test_sends_go_on_though_the_broker_s_connection_is_dead_without_a_word(
    service: Service, line: Proxy
) -> None:
    """The line swallows all for a while; then the worker's connection to the broker stays dead,
    and nobody hears its tasks: the lanes begin without them.
    """
    worker = service.worker("one")
    batch = service.enqueue(2000)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    line.half_open()
    wait_until(lambda: "TimeoutError: trying again" in log_of(worker), "the outage is seen")
    line.heal()
    took = resumed_after(service)

    assert took < RESUME
    assert service.wait_for_end(batch) == Counter(sent=2000)
    assert set(service.accepted().values()) == {1}
    assert "nobody heard its task" in log_of(worker)
    assert "Traceback" not in log_of(worker)
    worker.signal(signal.SIGTERM)
    worker.process.wait(60)


def test_sends_resume_after_redis_stalled(service: Service, own_redis: RedisServer) -> None:
    """Stopped for seconds and then awake again: nothing is lost, doubled or unknown."""
    worker = service.worker("one")
    batch = service.enqueue(1000)
    wait_until(lambda: accepted(service) > 200, "some are sent")

    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: "TimeoutError: trying again" in log_of(worker), "the stall is seen")
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    took = resumed_after(service)

    assert took < RESUME
    assert service.wait_for_end(batch) == Counter(sent=1000)
    assert set(service.accepted().values()) == {1}
    assert worker.running


def start_wedged(service: Service) -> Child:
    """A worker that can be made to hang."""
    command = ["celery", "-A", "tests.wedged", "worker", "-P", "threads", "-c", "8", "-l", "INFO"]
    root = str(Path(__file__).parent.parent)
    short = {"POSTROOM_REQUEST_TIMEOUT": "2s", "POSTROOM_LEASE": "4s", "PYTHONPATH": root}
    worker = service.processes.start(command, env=service.environment | short, log="wedged")
    wait_until(lambda: " ready." in log_of(worker), "the worker is ready", 30)
    return worker


@pytest.mark.parametrize("part", ["loop", "writer"])
def test_a_worker_that_stands_still_says_why_and_ends_for_its_supervisor(
    service: Service, redis_url: str, part: str
) -> None:
    """Work is due, the servers answer, and nothing moves: it ends by itself, with an exit status
    that is no success, and the next worker sends the rest.
    """
    worker = start_wedged(service)
    batch = service.enqueue(1500)
    wait_until(lambda: accepted(service) > 100, "some are sent")

    with redis.Redis.from_url(redis_url) as client:
        client.set("wedge", part)
    began = time.monotonic()
    status = worker.process.wait(90)

    assert status == 70
    assert time.monotonic() - began > 10, "a slow answer is no standstill"
    assert "standstill: " in log_of(worker)
    service.worker("two")
    counts = service.wait_for_end(batch)
    assert counts["sent"] + counts["unknown"] == 1500
    assert counts["unknown"] <= 4 * 5
    assert set(service.accepted().values()) == {1}
