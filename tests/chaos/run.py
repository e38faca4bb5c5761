"""One run: everything is started, broken, left to come to rest, and then compared."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.checker import Violation, check
from tests.chaos.history import History, from_journals, from_sql
from tests.chaos.nemesis import Nemesis
from tests.chaos.plan import Plan
from tests.chaos.stage import Stage, host_load, wait_for

#: What was never in doubt is to be at rest so soon after the last fault, in seconds.
REST = 60.0
#: So long is waited for it, to tell what is slow from what stands still.
LONGEST_WAIT = 240.0
SHOWN = 10  # violations of each promise


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a run."""

    plan: Plan
    history: History
    violations: Sequence[Violation]
    figures: dict[str, Any]
    directory: Path | None  #: where its files are kept: only after a violation

    def table(self) -> str:
        """The figures, and what was violated."""
        lines = [f"{name:34} {value}" for name, value in self.figures.items()]
        shown: Counter[str] = Counter()
        for violation in self.violations:
            shown[violation.promise] += 1
            if shown[violation.promise] <= SHOWN:
                lines.append(f"VIOLATION  {violation}")
        for promise, count in shown.items():
            lines.append(f"VIOLATED   {promise}: {count} times")
        if self.directory:
            lines.append(f"The run's files are kept in {self.directory}")
        return "\n".join(lines)


def run(plan: Plan, tell: Callable[[str], None], rest: float = REST) -> Result:
    """Plays the plan. `rest`: seconds after the last fault by which everything must be at rest."""
    began = time.monotonic()
    stage = Stage(plan)
    with stage:
        nemesis = Nemesis(plan, stage)
        nemesis.run(tell)
        stage.simulator.settings(hostile_percent=0)
        waited, settled = _come_to_rest(stage, tell)
        stage.stop()  # the books must not change while they are read
        stats = stage.simulator.stats()
        history = History(
            policy=plan.policy,
            journal=from_journals(stage.journals),
            ledger=stage.simulator.ledger(),
            exposed=nemesis.exposed + stats["hostile"],
            too_early=stats["too_early"],
            waiting=stage.waiting(),
            faults=nemesis.struck,
            **from_sql(stage.postgres.url),
        )
    violations = check(history)
    if settled is None:
        violations.append(Violation("not at rest", "some doubt is never settled"))
    if waited is None or waited > rest:
        detail = "stands still" if waited is None else f"{waited:.0f} s after the last fault"
        violations.append(Violation("not at rest", detail))
    figures = _figures(plan, history, stage, time.monotonic() - began, waited) | {
        "seconds until doubt was settled": None if settled is None else round(settled, 1),
        "hostile answers": stats["hostile"],
        "tokens fetched": stats["tokens_issued"],
        "most at once from one mailbox": max(stats["max_concurrent"].values(), default=0),
        "searches": stats["searches"],
    }
    if not violations:
        stage.remove()
    kept = stage.directory if violations else None
    return Result(plan, history, violations, figures, kept)


def _come_to_rest(stage: Stage, tell: Callable[[str], None]) -> tuple[float | None, float | None]:
    """Seconds from the last fault until nothing moves that was never in doubt, and until all doubt
    is settled that the policy settles; None where something does not stop.
    """
    began = told = time.monotonic()

    def over(left: Callable[[], int]) -> bool:
        nonlocal told
        count, waiting, producing = left(), stage.waiting(), stage.producing
        if time.monotonic() > told + 10:
            told = time.monotonic()
            tell(f"{count} not at rest, {waiting} chunks wait, producers at work: {producing}")
        return not producing and waiting == 0 and count == 0

    rested = wait_for(lambda: over(stage.moving), LONGEST_WAIT)
    settled = wait_for(lambda: over(stage.unsettled), LONGEST_WAIT)
    return rested, None if settled is None else time.monotonic() - began


def _figures(
    plan: Plan, history: History, stage: Stage, took: float, waited: float | None
) -> dict[str, Any]:
    states = Counter(row["state"] for row in history.messages)
    copies = Counter(r for entry in history.ledger for r in entry["recipients"])
    unknown = [row for row in history.messages if row["state"] == "unknown"]
    done = Counter(line["do"] for line in history.journal)
    return {
        "seed": plan.seed,
        "policy": plan.policy,
        "messages": len(history.messages),
        "states": dict(states),
        "accepted by Graph": len(history.ledger),
        "sent twice": sum(n > 1 for n in copies.values()),
        "unknown": len(unknown),
        "of these accepted by Graph": sum(row["recipient"] in copies for row in unknown),
        "unknown allowed": history.exposed if plan.policy != "reconcile" else 0,
        "late words that settled doubt": sum(a["late"] for a in history.attempts),
        "faults": dict(sorted(history.faults.items())),
        "ended by themselves": dict(stage.ended),
        "calls, repeated, refused": f"{done['receipt']}, {done['again']}, {done['refused']}",
        "conflicts, abandoned": f"{done['conflict']}, {done['abandoned']}",
        "seconds in all": round(took, 1),
        "seconds to rest": None if waited is None else round(waited, 1),
        "load of the machine": host_load(),
    }
