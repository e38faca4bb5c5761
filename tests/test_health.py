"""Probes for containers: when is a process to be restarted, and when is it to get no work."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import redis

from tests.test_cli import Command, call, document, postroom, said
from worker.report import ALIVE, BEAT

__all__ = ["postroom"]

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def test_a_host_lives_while_a_worker_of_its_own_ticks(
    postroom: Command, redis_client: redis.Redis
) -> None:
    """Another host's worker says nothing about this one."""
    redis_client.set(f"{ALIVE}another-host:1:x", "1", ex=60)
    assert f"no worker of {socket.gethostname()} was heard of" in said(postroom("health", "live"))
    redis_client.set(f"{ALIVE}{socket.gethostname()}:1:x", "1", ex=60)
    assert document(postroom("health", "live", "--json"))["healthy"] is True


def test_a_redis_that_is_gone_restarts_nobody_but_gets_nobody_ready(postroom: Command) -> None:
    """All workers would be restarted at once, and it would mend nothing."""
    gone = {"REDIS_URL": "redis://127.0.0.1:9/0"}
    live = postroom("health", "live", **gone)
    assert live.returncode == 0
    assert live.stdout.startswith("cannot tell: Redis does not answer")
    assert "Redis does not answer" in said(postroom("health", "ready", **gone))


def test_a_host_is_ready_when_redis_and_a_migrated_database_answer(
    postroom: Command, tmp_path: Path, redis_url: str
) -> None:
    """Not before `db upgrade` has run."""
    assert document(postroom("health", "ready", "--json"))["healthy"] is True
    empty = call("health", "ready", REDIS_URL=redis_url, DATABASE_URL=f"sqlite:///{tmp_path}/x.db")
    assert "postroom db upgrade" in said(empty)


def test_beat_is_well_while_its_rings_are_heard(
    postroom: Command, redis_client: redis.Redis
) -> None:
    """By the workers, who are the ones that count."""
    assert "no ring of beat" in said(postroom("health", "beat"))
    redis_client.set(BEAT, "1", ex=60)
    assert json.loads(postroom("health", "beat", "--json").stdout)["healthy"] is True
