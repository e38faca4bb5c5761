"""Side by side: Postroom, plain Celery, msgraph-sdk and O365 against the same simulator.

    ./dev bench [side] [quick] [--rounds 3] [--count 4000] [--only NAME,...] [--no-limits]

One run, all senders in turn, no latency, no limits in the simulator; medians. Processor time is
that of the sender's worker processes per message: for Postroom from the claim to the audit row,
for plain Celery from the task to its commit, for the libraries the request alone. `whole way` adds
the producer and, for Postroom, taking in. Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.benchmarks import kit, plain_kit
from tests.benchmarks.kit import Stage, machine, mailboxes, sleep_until, spread, table

SENDERS = 20
WARM = 20  # messages a mailbox before anything is measured
HEAD = ("sender", "processor ms a message", "to plain Celery", "messages a second", "whole way, ms")
PREFORK = "plain Celery, prefork 4"
O365 = "O365 alone"
ONE = "Postroom, one worker process"


@dataclass(frozen=True)
class Measured:
    """One sender in one round: processor ms a message, messages a second, ms with all around."""

    ms: float
    rate: float
    whole: float | None = None


def main(words: list[str]) -> int:
    """Runs all senders in turn; prints a table."""
    given = _arguments(words)
    print(f"{machine()}; {given.rounds} rounds of {given.count} messages, {SENDERS} mailboxes, "
          "PostgreSQL; median (least to most)\n", flush=True)  # fmt: skip
    runs: dict[str, list[Measured]] = defaultdict(list)
    with Stage.set_up({}, limits=False) as stage:
        for _ in range(given.rounds):
            for name, sender in _senders().items():
                if any(word in name for word in given.only):
                    runs[name].append(sender(stage, given.count))
                    print(f"  {name}: {runs[name][-1]}", flush=True)
    print("\n" + _shown(runs) + "\n")
    missed = _missed(runs)
    print("\n".join(missed) or "all goals held")
    return 1 if missed and not given.no_limits else 0


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench side", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("quick", nargs="?", choices=["quick"], help="under a minute")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", default=[""], type=lambda w: w.split(","))
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    given = parser.parse_args(words)
    given.rounds = given.rounds or (1 if given.quick else 3)
    given.count = given.count or (1000 if given.quick else 4000)
    return given


def _senders() -> dict[str, Callable[[Stage, int], Measured]]:
    return {
        ONE: partial(_postroom, processes=1),
        "Postroom, two worker processes": partial(_postroom, processes=2),
        PREFORK: partial(_plain, pool="prefork", concurrency=4),
        "plain Celery, threads 16": partial(_plain, pool="threads", concurrency=16),
        "msgraph-sdk alone": partial(_alone, kind="sdk"),
        O365: partial(_alone, kind="o365"),
    }  # fmt: skip


def _each(count: int) -> dict[str, int]:
    return dict.fromkeys(mailboxes(SENDERS), count // SENDERS)


def _postroom(stage: Stage, count: int, *, processes: int) -> Measured:
    stage.start_workers(processes)
    there = stage.accepted()
    stage.produce(_each(WARM * SENDERS))
    stage.wait_accepted(there + WARM * SENDERS)
    there, before = stage.accepted(), stage.seconds()
    at = stage.prepare(_each(count))
    sleep_until(at - 0.3)
    between = stage.seconds()
    stage.wait_accepted(there + count)
    after = stage.seconds()
    stage.stop_workers()
    taken_in = between - before + stage.produced["processor"]
    return Measured(
        1000 * (after - between) / count, kit.rate(stage.simulator.ledger()[there:]),
        1000 * (after - between + taken_in) / count,
    )  # fmt: skip


def _plain(stage: Stage, count: int, *, pool: str, concurrency: int) -> Measured:
    done = plain_kit.noted(stage)
    with plain_kit.running(stage, processes=1, concurrency=concurrency, pool=pool) as sender:
        sender.produce(_each(WARM * SENDERS))
        sender.wait_done(done + WARM * SENDERS)
        there, before = stage.accepted(), sender.seconds()
        produced = sender.produce(_each(count))
        sender.wait_done(done + WARM * SENDERS + count)
        used = sender.seconds() - before
    return Measured(1000 * used / count, kit.rate(stage.simulator.ledger()[there:]),
                    1000 * (used + produced["processor"]) / count)  # fmt: skip


def _alone(stage: Stage, count: int, *, kind: str) -> Measured:
    count //= 4
    order = {"kind": kind, "count": count, "mailboxes": mailboxes(SENDERS)}
    found = kit.run_module("alone", order, stage.environment)
    return Measured(1000 * found["processor"] / count, count / found["seconds"])


def _shown(runs: dict[str, list[Measured]]) -> str:
    middle = {name: statistics.median(m.ms for m in of) for name, of in runs.items()}
    rows = []
    for name, of in runs.items():
        whole = [m.whole for m in of if m.whole is not None]
        ratio = f"1 / {middle[PREFORK] / middle[name]:.1f}" if PREFORK in runs else "-"
        ms, a_second = spread([m.ms for m in of], 2), spread([m.rate for m in of], 0)
        rows.append([name, ms, ratio, a_second, spread(whole, 2) if whole else "-"])
    return table(HEAD, rows)


def _missed(runs: dict[str, list[Measured]]) -> list[str]:
    """The goals that were not reached, each as a line."""
    if not {ONE, PREFORK, O365} <= runs.keys():
        return ["not judged: some senders were left out"]
    ms = {name: statistics.median(m.ms for m in of) for name, of in runs.items()}
    rates = {name: statistics.median(m.rate for m in of) for name, of in runs.items()}
    goals = {
        "at most a fifth of plain Celery's processor time": ms[ONE] <= ms[PREFORK] / 5,
        "below O365 alone": ms[ONE] < ms[O365],
        "twice plain Celery's messages a second": rates[ONE] >= 2 * rates[PREFORK],
    }
    return [f"missed: {goal}" for goal, held in goals.items() if not held]
