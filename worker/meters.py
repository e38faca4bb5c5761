"""Counters of the whole service: each process counts in memory and adds to one hash in Redis.

They are for graphs and alerts. What a killed process had not yet added is missing there; the audit
in SQL misses nothing.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from worker.model import Outcome

if TYPE_CHECKING:
    from redis import Redis

KEY = "postroom:meters"
#: Upper ends of the classes of latency, in seconds; above the last one: +Inf.
LATENCIES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0)

ATTEMPTS, LATENCY, LATENCY_MS = "attempts:", "latency:", "latency-ms"
WAITS, BOUNCES, TOKENS, LEASES = "waits:", "bounces:", "tokens", "leases"


class Meters:
    """Counts of one process. Safe for threads; `flush` is for whoever ticks."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, n: int = 1) -> None:
        """Counts `n` more of this name; costs no call to anywhere."""
        with self._lock:
            self._counts[name] += n

    def attempt(self, outcome: Outcome) -> None:
        """One exchange with Graph ended."""
        took: timedelta = outcome.answer.duration
        seconds = took.total_seconds()
        with self._lock:
            self._counts[ATTEMPTS + type(outcome).__name__.lower()] += 1
            self._counts[f"{LATENCY}{bisect_left(LATENCIES, seconds)}"] += 1
            self._counts[LATENCY_MS] += round(seconds * 1000)

    def flush(self) -> None:
        """Adds to the hash what was counted since the last time. Raises redis.RedisError."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            with self._redis.pipeline() as pipeline:  # all or nothing
                for name, n in counts.items():
                    pipeline.hincrby(KEY, name, n)
                pipeline.execute()
        except RedisError:
            with self._lock:
                self._counts += counts
            raise

    def read(self) -> dict[str, int]:
        """What all processes have counted. Raises redis.RedisError."""
        found = self._redis.hgetall(KEY)
        return {name.decode(): int(n) for name, n in found.items()}  # type: ignore[union-attr]
