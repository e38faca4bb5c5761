"""One exporter for the whole service: Prometheus asks it, it asks Redis and SQL, both cheaply.

Labels are bounded: states, outcomes, limits, and at most TARGETS mailboxes and pools; the rest
stand together as `(others)`.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker import meters, report
from worker.model import Priority
from worker.store.gauges import Taken

if TYPE_CHECKING:
    from worker.runtime import Runtime

TARGETS = 50
OTHERS = "(others)"


class Exporter(Collector):
    """What Prometheus is told at each scrape. Where a server is gone, `postroom_up` says so."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must ask no server."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        up = GaugeMetricFamily("postroom_up", "Whether it answers.", labels=["part"])
        for part, families in (("redis", self._of_redis), ("database", self._of_database)):
            try:
                found = list(families())
            except (RedisError, SQLAlchemyError, OSError):
                up.add_metric([part], 0)
            else:
                up.add_metric([part], 1)
                yield from found
        yield up

    def _of_redis(self) -> Iterator[Metric]:
        rt = self._rt
        yield from _counters(rt.meters.read())
        yield _gauge("workers", "Workers that ticked lately.", report.workers(rt.redis))
        yield _gauge("beat_heard", "1: beat rang lately.", rt.redis.exists(report.BEAT))
        inbox = rt.inbox.depth()
        yield _gauge("inbox_chunks", "Chunks that are not yet rows in SQL.", inbox.chunks)
        yield _gauge("inbox_bytes", "Their bytes.", inbox.bytes)
        yield _gauge("inbox_lag_seconds", "How long the oldest has waited.", inbox.lag)

    def _of_database(self) -> Iterator[Metric]:
        taken = self._rt.store.gauges.taken()
        yield _by("messages", "Messages, counted up to 100,000.", "state", taken.messages)
        yield _gauge("messages_capped", "1: there are more than were counted.", taken.capped)
        yield _by("batches", "Batches that are not finished.", "state", taken.batches)
        yield _gauge("mailboxes_cooling", "Mailboxes at rest after a 429 or 5xx.", taken.cooling)
        yield _gauge("mailboxes_suspended", "Mailboxes that are suspended.", taken.suspended)
        yield from _queues(taken)


def serve(rt: Runtime, host: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answers at /metrics until told to stop; gives the port, and how to stop."""
    registry = CollectorRegistry()
    registry.register(Exporter(rt))
    server, thread = start_http_server(port, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return int(server.server_port), stop


def serve_forever(rt: Runtime, host: str, port: int, ready: Callable[[int], None]) -> None:
    """As `serve`, until Ctrl-C or SIGTERM."""
    there, stop = serve(rt, host, port)
    ready(there)
    try:
        threading.Event().wait()
    finally:
        stop()


def _counters(counts: Mapping[str, int]) -> Iterator[Metric]:
    for prefix, name, label, text in (
        (meters.ATTEMPTS, "attempts", "outcome", "Exchanges with Graph."),
        (meters.WAITS, "lane_waits", "limit", "Turns of a lane that ended to wait for it."),
        (meters.BOUNCES, "bounces", "kind", "Reports that a sent message came back."),
    ):
        family = CounterMetricFamily(f"postroom_{name}", text, labels=[label])
        for key, n in counts.items():
            if key.startswith(prefix):
                family.add_metric([key.removeprefix(prefix)], n)
        yield family
    for key, name, text in (
        (meters.TOKENS, "token_requests", "Token requests to Entra."),
        (meters.LEASES, "expired_leases", "Claims of workers that were not heard of again."),
    ):
        yield CounterMetricFamily(f"postroom_{name}", text, value=counts.get(key, 0))
    yield _latency(counts)


def _latency(counts: Mapping[str, int]) -> Metric:
    each = [counts.get(f"{meters.LATENCY}{n}", 0) for n in range(len(meters.LATENCIES) + 1)]
    ends = [str(end) for end in meters.LATENCIES] + ["+Inf"]
    buckets = [(end, float(n)) for end, n in zip(ends, accumulate(each), strict=True)]
    seconds = counts.get(meters.LATENCY_MS, 0) / 1000
    family = HistogramMetricFamily("postroom_attempt_seconds", "How long an exchange took.")
    family.add_metric([], buckets=buckets, sum_value=seconds)
    return family


def _queues(taken: Taken) -> Iterator[Metric]:
    depth, oldest = Tally(taken.depth), Tally(taken.oldest)
    shown = {key for key, _ in depth.most_common(TARGETS)}
    shown |= {key for key, _ in oldest.most_common(TARGETS)}
    for name, text, values, join in (
        ("queue_depth", "Queued messages by target.", taken.depth, sum),
        ("oldest_due_seconds", "How long the oldest of a target is due.", taken.oldest, max),
    ):
        family = GaugeMetricFamily(f"postroom_{name}", text, labels=["target", "priority"])
        grouped: dict[tuple[str, int], list[float]] = {}
        for (target, priority), value in values.items():
            there = target if (target, priority) in shown else OTHERS
            grouped.setdefault((there, priority), []).append(value)
        for (target, priority), some in sorted(grouped.items()):
            family.add_metric([target, Priority(priority).name.lower()], join(some))
        yield family


def _gauge(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(f"postroom_{name}", text, value=float(value or 0))


def _by(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"postroom_{name}", text, labels=[label])
    for value, n in values.items():
        family.add_metric([value], n)
    return family
