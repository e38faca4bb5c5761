"""Seven days in minutes: daily limits, sleeping machines, purges, the hour that comes twice.

    ./dev bench week [--days 7] [--count 50000]        (wants Debian's faketime)

All processes (Redis, PostgreSQL, the simulator, a worker, beat) see one clock, which libfaketime
moves on: a day's messages are sent as fast as they go, then the clock jumps, by an hour at a time
while the mailboxes wait for their daily limit. So a worker meets what a virtual machine meets that
was asleep: all at once its tokens, leases and windows are old. The limits are the default ones; a
mailbox sends nearly what they allow, so most of a day waits for what was sent the day before. The
clock starts on a Thursday in Berlin, three days before its summer time ends. Exit status 1 where a
message is lost, sent twice or left over, a mailbox is over its daily limit, or something still
grows over the last days.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import redis

from tests.benchmarks.kit import HOME, Stage, machine, mailboxes, resident_mb, table

BEGIN = datetime(2026, 10, 22, 6, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
#: The default of POSTROOM_MAILBOX_RECIPIENT_RATE, and what it leaves to messages that are urgent.
DAILY, SENDERS = 9500, 6
#: So long after they finished, the contents of batches are forgotten, and then all of them.
CONTENT, AUDIT = "36h", "60h"
#: So much more than two days before may there be at the end of the last one.
GROWTH = 1.15
TOKEN_SECONDS = 600
#: A process looks into the clock's file once a second.
TAKEN_UP = 1.5
HEAD = ("day", "hours until all were sent", "rows of messages", "database, MB", "Redis, MB",
        "worker, MB", "tokens asked for")  # fmt: skip


class Clock:
    """The clock of all processes that were started with `environment`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.move(BEGIN - datetime.now(UTC))

    def move(self, offset: timedelta) -> None:
        """So far from the machine's clock."""
        self._offset = offset
        self._file.write_text(f"{offset.total_seconds():+.0f}\n", encoding="utf-8")

    def jump(self, span: timedelta) -> None:
        """All clocks go on by so much, at once; returns when all have heard of it."""
        self.move(self._offset + span)
        time.sleep(TAKEN_UP)

    @property
    def now(self) -> datetime:
        """What the others see."""
        return datetime.now(UTC) + self._offset

    def environment(self) -> dict[str, str]:
        """For os.environ: what is started then, sees this clock."""
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not found:
            raise SystemExit("bench week: no libfaketime here: apt install faketime")
        return {
            "LD_PRELOAD": str(found[0]), "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1", "TZ": "Europe/Berlin",
        }  # fmt: skip


def main(words: list[str]) -> int:
    """Lives through the days; prints a table and what the ledger says."""
    parser = argparse.ArgumentParser(prog="./dev bench week", description=__doc__)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--count", type=int, default=50_000, help="messages a day")
    given = parser.parse_args(words)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="postroom-week-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        clock = Clock(directory / "clock")
        os.environ |= clock.environment()
        settings = {"TOKEN_MARGIN": "60s"}
        with Stage.set_up(settings, limits=False, token_lifetime=TOKEN_SECONDS) as stage:
            stage.start_workers(1)
            stage.processes.start(["celery", "-A", "worker", "beat"])
            days = [live(stage, clock, day, given.count) for day in range(given.days)]
            stage.stop_workers()
            missed = judged(stage, days, given.count)
    rows = [[str(n), *(f"{value:,.1f}" for value in day.values())] for n, day in enumerate(days, 1)]
    print("\n" + table(HEAD, rows))
    print("\n".join(missed) or "nothing lost, nothing twice, nothing over a limit, no growth")
    return 1 if missed else 0


def live(stage: Stage, clock: Clock, day: int, count: int) -> dict[str, float]:
    """One day; what there is at its end."""
    if (rest := BEGIN + day * DAY - clock.now) > timedelta(0):
        clock.jump(rest)
    sent, began = stage.accepted(), clock.now
    each = count // SENDERS
    stage.produce(dict.fromkeys(mailboxes(SENDERS), each))
    while not at_rest(stage) or stage.accepted() < sent + each * SENDERS:
        clock.jump(HOUR)
        if clock.now > began + 2 * DAY:
            raise SystemExit(f"day {day + 1}: messages were left over")
    taken = (clock.now - began) / HOUR
    purge(stage)
    with redis.Redis.from_url(stage.redis.url) as client:
        memory = client.info("memory")["used_memory"]
    found = {
        "hours": taken, "rows": float(stage.scalar("SELECT count(*) FROM messages")),
        "database": stage.scalar("SELECT pg_database_size(current_database())") / 1e6,
        "redis": memory / 1e6, "worker": resident_mb(stage.workers[0].pid),
        "tokens": float(stage.simulator.stats()["token_requests"]),
    }  # fmt: skip
    print(f"  {clock.now:%a %d %b %H:%M} {found}", flush=True)
    return found


def at_rest(stage: Stage) -> bool:
    """Waits until nothing more is sent; whether all that was enqueued has ended."""
    seen, since = stage.accepted(), time.monotonic()
    while time.monotonic() < since + 4:
        time.sleep(0.25)
        if (now := stage.accepted()) != seen:
            seen, since = now, time.monotonic()
    open_ones = "SELECT count(*) FROM batches WHERE sealed_at IS NULL OR finished_at IS NULL"
    return not stage.scalar(open_ones)


def purge(stage: Stage) -> None:
    """As cron would do it each night; and what autovacuum does at leisure."""
    command = [sys.executable, "-m", "worker.cli", "purge", "--content-after", CONTENT,
               "--audit-after", AUDIT]  # fmt: skip
    subprocess.run(command, check=True, env=stage.environment, cwd=HOME, stdout=subprocess.DEVNULL)


def judged(stage: Stage, days: Sequence[dict[str, float]], count: int) -> list[str]:
    """What is not as it should be, each as a line."""
    wanted = len(days) * (count // SENDERS) * SENDERS
    markers, times = set[str](), defaultdict[str, list[float]](list)
    with (stage.simulator.directory / "ledger.jsonl").open("rb") as lines:
        for row in map(json.loads, lines):
            markers.add(row["marker"])
            times[row["mailbox"]].append(row["time"])
    accepted = sum(map(len, times.values()))
    busiest = max(map(most_in_a_day, times.values()))
    states = "SELECT count(*) FROM messages WHERE state <> 'sent'"
    print(f"\n{wanted:,} enqueued, {accepted:,} accepted, {len(markers):,} different; most of a "
          f"mailbox in any 24 hours: {busiest:,}")  # fmt: skip
    missed = []
    if accepted != wanted or len(markers) != wanted:
        missed.append("missed: each message exactly once")
    if stage.scalar(states):
        missed.append("missed: all messages are sent")
    if busiest > DAILY:
        missed.append(f"missed: at most {DAILY} recipients of a mailbox in any 24 hours")
    if len(days) >= 6:
        sizes = ("rows", "database", "redis", "worker")
        grown = (name for name in sizes if days[-1][name] > GROWTH * days[-3][name])
        missed += [f"missed: no growth of {name}" for name in grown]
    return missed


def most_in_a_day(times: Sequence[float]) -> int:
    """The most of these instants that lie within 24 hours of each other."""
    window, most = deque[float](), 0
    for instant in sorted(times):
        window.append(instant)
        while window[0] <= instant - DAY.total_seconds():
            window.popleft()
        most = max(most, len(window))
    return most
