"""Enqueue and ingest: messages a second into Redis, rows a second into SQL, memory.

    ./dev bench enqueue [--count 100000] [--no-limits]

`client.enqueue` from a generator, in a process of its own, with the append-only file synced each
second and at each write; then one worker takes in, into PostgreSQL. Nothing is due, so nothing is
sent. Exit status 1 where a goal is missed: 15,000 messages a second, 10,000 rows a second.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta

import redis

from tests.benchmarks import kit
from tests.benchmarks.kit import Stage, machine, table, wait


def main(words: list[str]) -> int:
    """Both kinds of append-only file; prints a table."""
    parser = argparse.ArgumentParser(prog="./dev bench enqueue", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    given = parser.parse_args(words)
    print(machine(), flush=True)
    rows, missed = [], False
    with Stage.set_up({}, limits=False) as stage:
        for fsync in ("everysec", "always"):
            with redis.Redis.from_url(stage.redis.url) as client:
                client.config_set("appendfsync", fsync)
            small = _produce(stage, given.count // 10)
            produced = _produce(stage, given.count)
            ingest, used = _take_in(stage)
            rate = given.count / produced["seconds"]
            memory = f"{small['peak_mb']:.0f}, {produced['peak_mb']:.0f}"
            rows.append([fsync, f"{rate:,.0f}", memory, f"{ingest:,.0f}", f"{used:.3f}"])
            missed |= rate < 15_000 or ingest < 10_000
    print(table(("append-only file", "messages enqueued a second",
                 "producer's MB for a tenth and for all", "rows taken in a second",
                 "worker's ms a row"), rows))  # fmt: skip
    return 1 if missed and not given.no_limits else 0


def _produce(stage: Stage, count: int) -> dict:
    due = datetime.now(UTC) + timedelta(days=1)
    return stage.produce({kit.mailboxes(1)[0]: count}, due)


def _take_in(stage: Stage) -> tuple[float, float]:
    """Rows a second and processor ms a row of one worker; the worker's start is not counted."""
    before = stage.scalar("SELECT count(*) FROM messages")
    with redis.Redis.from_url(stage.redis.url) as client:
        batches = stage.scalar("SELECT count(*) FROM batches")
        stage.start_workers(1)
        first = wait_for_first(stage, batches)
        began, used = time.monotonic(), stage.seconds()
        wait(lambda: not client.xlen("postroom:inbox"), "the rows")
        took, used = time.monotonic() - began, stage.seconds() - used
    stage.stop_workers()
    count = stage.scalar("SELECT count(*) FROM messages") - before - first
    return count / took, 1000 * used / count


def wait_for_first(stage: Stage, batches: int) -> int:
    """Until taking in has begun; how many rows there are already."""
    there = stage.scalar("SELECT count(*) FROM messages")
    wait(lambda: stage.scalar("SELECT count(*) FROM batches") > batches, "the first rows",
         pause=0.01)  # fmt: skip
    return int(stage.scalar("SELECT count(*) FROM messages")) - int(there)
