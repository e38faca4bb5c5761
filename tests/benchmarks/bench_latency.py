"""One urgent message on an idle system: milliseconds from `enqueue` to Graph's 202.

    ./dev bench latency [--count 30] [--no-limits]

One worker process, PostgreSQL, no latency in the simulator. Exit status 1 where the median is over
100 ms.
"""

from __future__ import annotations

import argparse
import statistics

from tests.benchmarks import kit
from tests.benchmarks.kit import Stage, machine, spread

GOAL = 100.0


def main(words: list[str]) -> int:
    """Sends one after the other, each when all is quiet; prints the spread."""
    parser = argparse.ArgumentParser(prog="./dev bench latency", description=__doc__)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    given = parser.parse_args(words)
    print(machine(), flush=True)
    with Stage.set_up({}, limits=False) as stage:
        stage.start_workers(1)
        [mailbox] = kit.mailboxes(1)
        stage.produce({mailbox: 20})
        stage.wait_accepted(20)
        order = {"to": {mailbox: given.count}, "one_by_one": 1.5}
        began = kit.run_module("produce", order, stage.environment)["began"]
        stage.wait_accepted(20 + given.count)
        accepted = [row["monotonic"] for row in stage.simulator.ledger()[20:]]
    took = [1000 * (end - start) for start, end in zip(began, accepted, strict=True)]
    print(f"from enqueue to 202: {spread(took, 0)} ms, {given.count} messages")
    return 1 if statistics.median(took) > GOAL and not given.no_limits else 0
