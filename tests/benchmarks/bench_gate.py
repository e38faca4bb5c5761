"""The gate: how much of what Graph allows is used, across worker processes, and what it costs.

    ./dev bench gate [--runs 3] [--seconds 60] [--only share,rate,load,plain] [--no-limits]

share   20 mailboxes, 200 to 400 ms latency, three workers: share of 20 x 4 / mean latency
rate    10 mailboxes, 300 requests in any 10 s, two workers: time for each 300 after the first
load    backlog of ten times what the limits allow in a minute, beside one times: processor time
plain   2,000 messages to the mailboxes of `rate`, and by plain Celery with autoretry_for, with and
        without rate_limit

Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks import plain_kit
from tests.benchmarks.kit import (
    Stage,
    by_mailbox,
    doubles,
    machine,
    mailboxes,
    sleep_until,
    spread,
    table,
    wait,
)

#: 300 in any 10 s, for Postroom and for the simulator.
PACED = {"MAILBOX_REQUEST_RATE": "300/10s", "RESERVE_HIGH": "0"}
PACE = {"request_limit": 300, "request_window": 10.0}
SLOW = {"MAILBOX_REQUEST_RATE": "100/10s", "RESERVE_HIGH": "0"}
SLOWNESS = {"request_limit": 100, "request_window": 10.0}
#: Plain Celery is waited for so long, seconds.
ENOUGH = 120.0
HEAD = ("case", "goal", "measured", "429s", "most at once", "twice")


def main(words: list[str]) -> int:
    """Runs what is asked for; prints a table."""
    given = _arguments(words)
    print(f"{machine()}; {given.runs} runs, median (least to most)\n", flush=True)
    rows, missed = [], []
    cases: dict[str, Callable[[argparse.Namespace], tuple[list[list[str]], bool]]] = {
        "share": share, "rate": paced, "load": load, "plain": plain,
    }  # fmt: skip
    for name, case in cases.items():
        if name in given.only:
            found, well = case(given)
            rows += found
            missed += [] if well else [name]
            print("\n".join(" | ".join(row) for row in found), flush=True)
    print("\n" + table(HEAD, rows) + "\n")
    print(f"missed: {', '.join(missed)}" if missed else "all goals held")
    return 1 if missed and not given.no_limits else 0


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev bench gate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of `share` and `load`")
    parser.add_argument("--only", default="share,rate,load,plain", type=lambda w: w.split(","))
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    return parser.parse_args(words)


def share(given: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """How much of the ceiling is used, from two seconds after the first acceptance on."""
    senders, ceiling = mailboxes(20), 20 * 4 / 0.3
    each = round(4 / 0.3 * (given.seconds + 20))
    runs = []
    for _ in range(given.runs):
        with Stage.set_up({"MAILBOX_REQUEST_RATE": "off"}, latency_ms="200-400") as stage:
            stage.start_workers(3)
            sleep_until(stage.prepare(dict.fromkeys(senders, each)))
            wait(stage.accepted, "the first mail")
            began = time.monotonic() + 2
            sleep_until(began + given.seconds)
            rows = stage.simulator.ledger()
            runs.append(seen(stage, rows) | {
                "share": 100 / given.seconds / ceiling * sum(
                    1 for row in rows if began <= row["monotonic"] < began + given.seconds),
            })  # fmt: skip
    shares = [run["share"] for run in runs]
    well = statistics.median(shares) >= 94 and clean(runs)
    said = ["3 workers, 20 mailboxes, 200 to 400 ms", "96 %, at least 94 %"]
    return [[*said, f"{spread(shares)} %", *told(runs)]], well


def paced(given: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """The time for each 300 of a mailbox after the first 300."""
    blocks, senders = 4, mailboxes(10)
    runs, spans = [], []
    for _ in range(given.runs):
        with Stage.set_up(PACED, **PACE) as stage:
            stage.start_workers(2)
            sleep_until(stage.prepare(dict.fromkeys(senders, 300 * blocks)))
            stage.wait_accepted(300 * blocks * len(senders))
            rows = stage.simulator.ledger()
            runs.append(seen(stage, rows))
            for times in by_mailbox(rows).values():
                ends = times[299::300]
                spans += [later - sooner for sooner, later in itertools.pairwise(ends)]
    well = statistics.median(spans) <= 10.5 and clean(runs)
    said = ["2 workers, 10 mailboxes, 300 in any 10 s: each 300", "10.2 s, at most 10.5 s"]
    return [[*said, f"{spread(spans, 2)} s", *told(runs)]], well


def load(given: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """Processor time of the workers per message sent, under one and ten times the load."""
    rows, costs, clean_all = [], {}, True
    for times in (1, 10):
        runs, spent = [], []
        for _ in range(given.runs):
            run = _under_load(times, given.seconds)
            runs.append(run)
            spent.append(run["ms"])
        costs[times] = statistics.median(spent)
        clean_all &= clean(runs)
        ratio = f", ratio {costs[10] / costs[1]:.2f}" if times == 10 else ""
        rows.append([f"2 workers, {times} times what the limits allow in {given.seconds:g} s",
                     "the same for both", f"{spread(spent, 2)} ms a message{ratio}",
                     *told(runs)])  # fmt: skip
    return rows, clean_all and costs[10] <= 1.1 * costs[1]


def _under_load(times: int, seconds: float) -> dict[str, Any]:
    senders = mailboxes(10)
    each = int(100 * (seconds / 10 + 1)) * times
    with Stage.set_up(SLOW, **SLOWNESS) as stage:
        stage.start_workers(2)
        at = stage.prepare(dict.fromkeys(senders, each))
        sleep_until(at - 0.2)
        before = stage.seconds()
        sleep_until(at + seconds)
        spent, rows = stage.seconds() - before, stage.simulator.ledger()
        return seen(stage, rows) | {"ms": 1000 * spent / len(rows)}


def plain(given: argparse.Namespace) -> tuple[list[list[str]], bool]:
    """The same 2,000 messages by each; nothing is judged.

    With `rate_limit` a worker on Redis is slower than its limit, whatever pool it has:
    https://github.com/celery/celery/issues/5927. So it is measured without one, too.
    """
    to = dict.fromkeys(mailboxes(10), 200)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(given.runs):
        with Stage.set_up(PACED, **PACE) as stage:
            stage.start_workers(2)
            sleep_until(stage.prepare(to))
            stage.wait_accepted(sum(to.values()))
            runs.setdefault("Postroom, 2 workers", []).append(_timed(stage))
        for rate, name in (("150/s", "rate_limit, autoretry_for"), ("", "autoretry_for")):
            run = _by_plain_celery(to, rate)
            runs.setdefault(f"plain Celery, 2 workers of 4, {name}", []).append(run)
    rows = []
    for name, found in runs.items():
        seconds = spread([run["seconds"] for run in found])
        left = max(run.get("left", 0) for run in found)
        unsent = f", up to {left} not sent after {ENOUGH:g} s" if left else ""
        rows.append([f"2,000 messages: {name}", "-", f"{seconds} s{unsent}", *told(found)])
    return rows, True


def _by_plain_celery(to: Mapping[str, int], rate: str) -> dict[str, Any]:
    with Stage.set_up({}, **PACE) as stage, plain_kit.running(
        stage, processes=2, concurrency=4, rate_limit=rate
    ) as sender:  # fmt: skip
        sender.produce(to)
        left = sender.left_after(sum(to.values()), ENOUGH)
        return _timed(stage, "reference") | {"left": left}


def _timed(stage: Stage, key: str = "marker") -> dict[str, Any]:
    rows = stage.simulator.ledger()
    times = [row["monotonic"] for row in rows]
    marks = rows if key == "marker" else [row["headers"] | row for row in rows]
    key = key if key == "marker" else "x-reference"
    return seen(stage, rows) | {
        "seconds": max(times) - min(times), "twice": doubles(marks, key),
    }  # fmt: skip


def seen(stage: Stage, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a run must be so, whatever it was about."""
    stats = stage.simulator.stats()
    return {"throttled": stats["throttled"], "most": max(stats["max_concurrent"].values()),
            "twice": doubles(rows)}  # fmt: skip


def clean(runs: list[dict[str, Any]]) -> bool:
    """Whether no run met a 429, had more than four at once in a mailbox, or sent anything twice."""
    return all(not run["throttled"] and run["most"] <= 4 and not run["twice"] for run in runs)


def told(runs: list[Mapping[str, Any]] | list[dict[str, Any]]) -> list[str]:
    """The worst of the runs, for the table."""
    return [str(max(run[name] for run in runs)) for name in ("throttled", "most", "twice")]
