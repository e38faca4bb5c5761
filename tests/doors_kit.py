"""The doors of one process to a simulator and to Redis, without a lane: for looks and readings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
from redis.asyncio import Redis as AsyncRedis

from worker.gate import Gate, Past
from worker.graph import Graph
from worker.limits import Limits
from worker.simulator import Simulator
from worker.tokens import Tokens

#: Of a request.
TIMEOUT = timedelta(seconds=10)


async def nothing(_mailbox: str, _limits: Limits) -> Past:
    """A mailbox that is new."""
    return Past()


@dataclass
class Doors:
    """`ours` is for the runner's loop, `redis` for the test."""

    runner: asyncio.Runner
    simulator: Simulator
    redis: redis.Redis
    ours: AsyncRedis
    tokens: Tokens
    gate: Gate
    graph: Graph


@contextmanager
def opened(directory: Path, redis_url: str, **options: Any) -> Iterator[Doors]:
    """Doors to a simulator with these options."""
    with (
        Simulator(directory / "simulator", **options) as simulator,
        redis.Redis.from_url(redis_url) as client,
        asyncio.Runner() as runner,
    ):
        tokens = Tokens(
            client, authority=simulator.url, tenant_id=simulator.tenant_id,
            client_id=simulator.client_id, credential=simulator.client_secret,
            scope=f"{simulator.url}/.default", ca_bundle=simulator.ca_bundle,
            margin=timedelta(minutes=5),
        )  # fmt: skip
        ours = AsyncRedis.from_url(redis_url)
        gate = Gate(ours, Limits(), history=nothing)
        graph = Graph(simulator.url, ca_bundle=simulator.ca_bundle, request_timeout=TIMEOUT)
        try:
            yield Doors(runner, simulator, client, ours, tokens, gate, graph)
        finally:
            runner.run(graph.close())
            runner.run(ours.aclose())
            tokens.close()
