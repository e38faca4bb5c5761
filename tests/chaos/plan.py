"""What a run does, decided before it begins: the same seed plans the same calls and faults."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

GOAL = 20_000  # messages; a smaller run has proportionally fewer faults
#: Fault -> how many of it a run of `GOAL` messages meets, and how many any run does at least.
FAULTS: dict[str, tuple[int, int]] = {
    "worker_kill": (97, 6),
    "all_workers_kill": (1, 0),  # three more
    "worker_pause": (20, 2),
    "worker_stop": (6, 1),
    "redis_kill": (10, 1),
    "redis_pause": (2, 0),
    "postgres_stop": (5, 1),
    "backends_end": (3, 1),
    "producer_kill": (10, 1),
    "beat_kill": (2, 0),
    "cut": (9, 1),
    "half_open": (9, 1),
    "delay": (6, 1),
}
SERVERS = ("redis", "postgres", "graph")
SIZES = (1, 7, 40, 120, 200, 350, 600)
MAILBOXES = tuple(f"notices{n}@contoso.com" for n in range(1, 17))
POOL = "notices"
WORKERS = 3
PRODUCERS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `policy` is ON_UNKNOWN."""

    messages: int = GOAL
    seconds: float = 400.0
    seed: int = 1
    policy: str = "hold"
    hostile_percent: float = 1.0

    def calls(self) -> list[dict[str, Any]]:
        """The calls of enqueue: key, rows, target; together they make the run's messages.

        No mailbox has much more to send than another: four requests at once of 300 ms each make
        13 a second, and the end of a run would be a wait for the one that had the most.
        """
        chance = random.Random(f"calls {self.seed}")
        given = dict.fromkeys(chance.sample(MAILBOXES, len(MAILBOXES)), 0)
        sizes, left = [], self.messages
        while left:
            size = min(left, chance.choice([s for s in SIZES if s <= max(1, self.messages // 5)]))
            sizes.append(size)
            left -= size
        return [
            {"key": f"s{self.seed}-{n}", "rows": rows, **_target(chance, given, rows)}
            for n, rows in enumerate(sizes)
        ]

    def faults(self) -> list[Fault]:
        """The faults in their order."""
        chance = random.Random(f"faults {self.seed}")
        kinds = [kind for kind, count in self.counts().items() for _ in range(count)]
        chance.shuffle(kinds)
        kinds.sort(key=_early(chance, len(kinds)))
        servers = _in_turn(chance)
        return [
            Fault(
                n, kind, due=(n + 1) / (len(kinds) + 1), slot=chance.randrange(WORKERS),
                server=next(servers), strength=chance.random(),
            )
            for n, kind in enumerate(kinds)
        ]  # fmt: skip

    def counts(self) -> dict[str, int]:
        """How many of each fault."""
        share = self.messages / GOAL
        return {kind: max(least, round(most * share)) for kind, (most, least) in FAULTS.items()}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. It is due when this share of the messages has been accepted by Graph."""

    number: int
    kind: str
    due: float
    slot: int  #: which worker, where one is meant
    server: str  #: which line, where one is meant
    strength: float  #: in [0, 1): how long it lasts, within what its kind allows


def _early(chance: random.Random, count: int) -> Callable[[str], float]:
    """Producers are killed while they are at work: in the first half."""
    places = itertools.count()
    return lambda kind: chance.uniform(0, count / 2) if kind == "producer_kill" else next(places)


def _target(chance: random.Random, given: dict[str, int], rows: int) -> dict[str, str]:
    """The pool, or the mailbox that was given the least so far."""
    if chance.random() < 0.7:
        return {"pool": POOL}
    least = min(given, key=given.__getitem__)
    given[least] += rows
    return {"sender": least}


def _in_turn(chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(SERVERS, len(SERVERS))
