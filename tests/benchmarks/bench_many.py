"""Many messages of many mailboxes through one worker process: memory, threads, a sweep.

    ./dev bench many [--count 200000] [--mailboxes 1000] [--kilobytes N] [--no-limits]

First all messages are sent, as fast as they go: what the worker holds in memory on the way, and
what Redis holds before and after. Then the worker is started anew with a limit under which every
mailbox must wait, and each gets ten more messages: threads and processor time of a worker whose
lanes all wait, and what a sweep takes. Exit status 1 where the worker's memory is over 150 MB or
grows, threads come with mailboxes, or a sweep takes 50 ms.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import redis

from tests.benchmarks.kit import Stage, machine, mailboxes, own_mb, resident_mb, table, wait
from worker.runtime import Runtime
from worker.tasks.work import run_sweep

#: Threads for tasks; and at most so many that a worker has besides.
THREADS, OWN = 32, 12
#: Goals: MB of a worker, milliseconds of a sweep, and what a later memory may be of an earlier one.
MOST_MB, SWEEP_MS, SLOPE = 150.0, 50.0, 1.05
SETTLING, SWEEPS = 30.0, 50
#: A lane that waits for a window comes once in so many seconds (HOLD in worker/deliver/lane.py).
PERIOD = 60.0


def main(words: list[str]) -> int:
    """Both parts; prints a table."""
    parser = argparse.ArgumentParser(prog="./dev bench many", description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--mailboxes", type=int, default=1000)
    parser.add_argument("--kilobytes", type=int, help="of each body, in place of a template")
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    given = parser.parse_args(words)
    print(machine(), flush=True)
    with Stage.set_up({}, limits=False) as stage:
        stage.start_workers(1, THREADS)
        sending = send(stage, given.mailboxes, given.count, given.kilobytes)
        stage.stop_workers()
        found = sending | hold_back(stage, given.mailboxes, given.count)
    print(table(("measured", "value"), [[name, f"{value:,.1f}"] for name, value in found.items()]))
    missed = judged(found)
    print("\n".join(missed) or "all goals held")
    return 1 if missed and not given.no_limits else 0


def judged(found: dict[str, float]) -> list[str]:
    """The goals that were not reached, each as a line."""
    later, earlier = found["worker at the end, MB"], found["worker half way, MB"]
    goals = {
        f"a worker under {MOST_MB:.0f} MB": found["worker at most, MB"] < MOST_MB,
        "no growth of the worker": later < SLOPE * earlier,
        "no thread for a lane that waits": found["threads while all wait"] <= THREADS + OWN,
        f"a sweep under {SWEEP_MS:.0f} ms": found["a sweep, ms"] < SWEEP_MS,
    }  # fmt: skip
    return [f"missed: {goal}" for goal, held in goals.items() if not held]


def send(stage: Stage, senders: int, count: int, kilobytes: int | None) -> dict[str, float]:
    """All messages, and the memory of the worker on the way."""
    with redis.Redis.from_url(stage.redis.url) as client:
        before = client.info("memory")["used_memory"]
        began = time.monotonic()
        stage.produce(dict.fromkeys(mailboxes(senders), count // senders), kilobytes=kilobytes)
        wanted, samples = count // senders * senders, list[tuple[int, float]]()
        wait(lambda: watched(stage, samples) >= wanted, f"{wanted} accepted mails", pause=1,
             seconds=1800)  # fmt: skip
        seconds = time.monotonic() - began
        stage.wait_accepted(wanted)
        after = client.info("memory")["used_memory"]
    half = [mb for done, mb in samples if 0.4 < done / wanted < 0.6]
    end = [mb for done, mb in samples if done / wanted > 0.8]
    own = own_mb(stage.workers[0].pid)
    return {
        "messages": wanted, "seconds, with the producer": seconds,
        "worker at most, MB": max(mb for _, mb in samples),
        "worker half way, MB": statistics.median(half),
        "worker at the end, MB": statistics.median(end),
        "of which no other process shares, MB": own,
        "Redis before, MB": before / 1e6, "Redis after, MB": after / 1e6,
    }  # fmt: skip


def watched(stage: Stage, samples: list[tuple[int, float]]) -> int:
    """How many mails were accepted; notes it with the worker's memory."""
    done = stage.accepted()
    samples.append((done, resident_mb(stage.workers[0].pid)))
    return done


def hold_back(stage: Stage, senders: int, sent: int) -> dict[str, float]:
    """What a worker costs whose lanes all wait for a limit."""
    stage.environment["POSTROOM_MAILBOX_MESSAGE_RATE"] = f"{sent // senders // 2}/24h"
    stage.processes = type(stage.processes)(stage.directory, stage.environment)
    try:
        stage.start_workers(1, THREADS)
        there = stage.accepted()
        stage.produce(dict.fromkeys(mailboxes(senders), 10))
        wait(lambda: stage.scalar("SELECT count(*) FROM messages WHERE state = 'queued'")
             == 10 * senders, "the rows")  # fmt: skip
        time.sleep(SETTLING)  # until every lane was told to wait
        used, sampled = stage.seconds(), list[float]()
        for _ in range(int(PERIOD)):
            sampled.append(threads(stage))
            time.sleep(1)
        used = stage.seconds() - used
        assert stage.accepted() == there, "a mailbox sent more than its limit"
        return {
            "mailboxes that wait": senders, "threads while all wait": max(sampled),
            "processor while all wait, %": 100 * used / PERIOD,
            "a sweep, ms": sweeping(stage),
        }  # fmt: skip
    finally:
        stage.processes.kill()


def threads(stage: Stage) -> float:
    """How many threads the worker has."""
    return float(len(list(Path(f"/proc/{stage.workers[0].pid}/task").iterdir())))


def sweeping(stage: Stage) -> float:
    """Milliseconds of a sweep with all that it rings, the median of many."""
    os.environ |= {k: v for k, v in stage.environment.items() if k.startswith("POSTROOM_")}
    rt, taken = Runtime.from_env(), []
    try:
        for _ in range(SWEEPS):
            began = time.perf_counter()
            run_sweep(rt)
            taken.append(1000 * (time.perf_counter() - began))
    finally:
        rt.close()
    return statistics.median(taken)
