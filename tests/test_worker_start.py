"""What a worker says when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import Processes, wait_until
from worker.servers import RedisServer
from worker.simulator import Simulator


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_redis_that_would_lose_messages_is_named_with_the_line_to_change(
    processes: Processes, simulator: Simulator, migrated_url: str, tmp_path: Path
) -> None:
    """No append-only file, keys thrown away when full, no limit; a good one is passed over."""
    with RedisServer(tmp_path / "bad", appendonly=False, maxmemory="0") as server:
        import redis

        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        environment = simulator.environment() | {
            "POSTROOM_REDIS_URL": server.url, "POSTROOM_DATABASE_URL": migrated_url,
        }  # fmt: skip
        command = ["celery", "-A", "worker", "worker", "-P", "threads", "-c", "1", "-l", "WARNING"]
        worker = processes.start(command, env=environment)

        for line in ("set appendonly yes", "set maxmemory-policy noeviction", "set maxmemory to"):
            wait_until(lambda line=line: line in worker.tail(100_000), line, 30)  # type: ignore[misc]
        worker.kill()
