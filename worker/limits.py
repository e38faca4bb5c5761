"""The arithmetic of limits: rates, costs, and windows that never hold more than they may. Pure.

The twin of gate.lua's slots and windows, with time as an argument. The gate keeps its books in
Redis; plans and the books that are written anew from SQL are reckoned here with `Window`, and a
test holds the script against `Book`.

A window counts what is in flight and what came to its end in the last `span` milliseconds. Graph
sees a request somewhere between its grant and its answer, so whatever Graph's own window holds,
ours held when the last of it was granted: no window of Graph's ever holds more than the limit.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import IntEnum, StrEnum
from typing import Any, Self

#: A window keeps at most so many entries (and one): what ends within span/PARTS is one entry, and
#: is forgotten with its last. So memory is bounded, and at most 1 % of a limit is wasted.
PARTS = 100

_RATE = re.compile(r"(\d+) *([kmg]b)? */ *(\d+)? *(s|min|h)", re.IGNORECASE)
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
#: The longest window that is worth keeping, and the largest amount that stays exact in Lua.
_LONGEST = timedelta(days=31)
_LARGEST = 10**12


class Limit(StrEnum):
    """What can bind, by the name that people read."""

    SLOTS = "slots"  #: requests at once
    REQUESTS = "requests"
    MESSAGES = "messages"
    RECIPIENTS = "recipients"
    UPLOAD = "upload"  #: bytes
    EXTERNAL = "external"  #: recipients outside the organisation, of the whole tenant


#: What can be set for one mailbox alone.
OVERRIDABLE = frozenset(Limit) - {Limit.EXTERNAL}
#: The limits that are windows, in the order in which gate.lua takes them.
WINDOWS: tuple[Limit, ...] = (
    Limit.REQUESTS, Limit.MESSAGES, Limit.RECIPIENTS, Limit.UPLOAD, Limit.EXTERNAL,
)  # fmt: skip


class Used(IntEnum):
    """What a slot's use came to, when it is given back."""

    NOTHING = 0  #: nothing left this process
    REQUEST = 1  #: Graph refused: a request and its bytes
    ALL = 2  #: accepted, or it may have been


@dataclass(frozen=True, slots=True)
class Rate:
    """So much in any `span`."""

    amount: int
    span: timedelta

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """`10000/10min`, `30/min`, `150MB/5min`; None for `off`. Raises ValueError."""
        if text.strip().lower() == "off":
            return None
        match = _RATE.fullmatch(text.strip())
        if not match:
            raise ValueError(
                "give a rate such as 10000/10min, 30/min or 150MB/5min (units s, min, h), or off"
            )
        amount, size, count, unit = match.groups()
        found = cls(
            int(amount) * _BYTES.get((size or "").lower(), 1),
            timedelta(seconds=int(count or 1) * _SECONDS[unit.lower()]),
        )
        if not 0 < found.amount <= _LARGEST:
            raise ValueError(f"the amount of a rate is from 1 to {_LARGEST}")
        if not timedelta(0) < found.span <= _LONGEST:
            raise ValueError(f"the time of a rate is from 1 s to {_LONGEST.days * 24} h")
        return found

    @property
    def span_ms(self) -> int:
        """The window's length in milliseconds."""
        return self.span // timedelta(milliseconds=1)

    def __str__(self) -> str:
        seconds = int(self.span.total_seconds())
        unit = next(u for u in ("h", "min", "s") if seconds % _SECONDS[u] == 0)
        return f"{self.amount}/{seconds // _SECONDS[unit]}{unit}"


@dataclass(frozen=True, slots=True)
class Limits:
    """What binds one mailbox; `external` binds the tenant. None: no limit."""

    slots: int = 4
    requests: Rate | None = None
    messages: Rate | None = None
    recipients: Rate | None = None
    upload: Rate | None = None
    external: Rate | None = None
    reserve_high: int = 5  #: percent of each window that priority `high` alone may use

    def rate(self, limit: Limit) -> Rate | None:
        """The window of this limit."""
        found: Rate | None = getattr(self, limit)
        return found

    def changed(self, overrides: Mapping[str, Any]) -> Self:
        """With what differs for one mailbox: limit → rate as text, or the number of slots."""
        changes: dict[str, Any] = {
            name: int(value) if name == Limit.SLOTS else Rate.parse(str(value))
            for name, value in overrides.items()
            if name in OVERRIDABLE
        }
        return replace(self, **changes) if changes else self


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request takes of each window."""

    requests: int = 1
    messages: int = 0
    recipients: int = 0
    upload: int = 0
    external: int = 0

    def used(self, used: Used) -> Cost:
        """What of it counts in the end."""
        if used is Used.ALL:
            return self
        return Cost(self.requests, upload=self.upload) if used else Cost(0)

    def of(self, limit: Limit) -> int:
        """What it takes of one window."""
        amount: int = getattr(self, limit)
        return amount


@dataclass(slots=True)
class Window:
    """What ended within the last `span` ms: entries of (first, last, amount), oldest first."""

    span: int
    entries: deque[tuple[int, int, int]] = field(default_factory=deque)
    total: int = 0

    def add(self, at: int, amount: int) -> None:
        """`amount` ended at `at` (ms)."""
        if amount <= 0:
            return
        self.total += amount
        if self.entries:
            first, last, there = self.entries[-1]
            if at - first < self.span / PARTS:
                # Also what comes a little late: it counts for longer, never for less long.
                self.entries[-1] = (first, max(last, at), there + amount)
                return
        self.entries.append((at, at, amount))

    def forget(self, now: int) -> None:
        """Drops what lies further back than the span."""
        while self.entries and self.entries[0][1] + self.span < now:
            self.total -= self.entries.popleft()[2]

    def wait(self, now: int, surplus: int) -> int | None:
        """How long until `surplus` of it is forgotten; None: it does not hold as much."""
        for _, last, amount in self.entries:
            surplus -= amount
            if surplus <= 0:
                return last + self.span + 1 - now
        return None


@dataclass(frozen=True, slots=True)
class Slot:
    """A request in flight, until `until` (ms) at the latest."""

    until: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class Leave:
    """How many of those asked for may go; if none, what binds and for how long (ms).

    `wait` is None where waiting does not help: one of them is larger than the limit.
    """

    count: int
    binds: Limit | None = None
    wait: int | None = 0


class Book:
    """Slots and windows of one mailbox, with the tenant's window where that is limited."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots: dict[str, Slot] = {}
        self.windows = {
            limit: Window(rate.span_ms) for limit in WINDOWS if (rate := limits.rate(limit))
        }

    def ask(self, now: int, wanted: Sequence[tuple[str, Cost]], *, until: int, high: bool) -> Leave:
        """Takes slots until `until` for the first of `wanted`, as many as all limits allow."""
        self.settle(now)
        granted = 0
        for name, cost in wanted:
            binds, wait = self._binds(now, cost, high)
            if binds is not None:
                return Leave(granted) if granted else Leave(0, binds, wait)
            self.slots[name] = Slot(until, cost)
            granted += 1
        return Leave(granted)

    def give_back(self, now: int, name: str, *, age: int, used: Used) -> None:
        """The slot's request came to its end `age` ms ago."""
        slot = self.slots.pop(name, None)
        if slot is not None:
            self._count(now - age, slot.cost.used(used))

    def settle(self, now: int) -> None:
        """Ends slots whose time is over, as if all of their cost had been used just then."""
        late = sorted((s.until, n) for n, s in self.slots.items() if s.until <= now)
        for until, name in late:
            self._count(until, self.slots.pop(name).cost)
        for window in self.windows.values():
            window.forget(now)

    def used(self, limit: Limit) -> int:
        """How much of a window is taken: ended and in flight."""
        flying = sum(slot.cost.of(limit) for slot in self.slots.values())
        return flying + self.windows[limit].total

    def _binds(self, now: int, cost: Cost, high: bool) -> tuple[Limit | None, int | None]:
        """The limit that keeps this cost out for the longest, and for how long."""
        if len(self.slots) >= self.limits.slots:
            return Limit.SLOTS, min(s.until for s in self.slots.values()) - now
        worst: tuple[Limit | None, int | None] = (None, 0)
        for limit, window in self.windows.items():
            rate = self.limits.rate(limit)
            assert rate is not None  # noqa: S101  # its window stands here
            need = cost.of(limit)
            if need > rate.amount:
                return limit, None
            most = share(rate.amount, 0 if high else self.limits.reserve_high)
            most = max(most, need)  # one that is larger than its share still goes, alone
            surplus = self.used(limit) + need - most
            if need and surplus > 0:
                wait = window.wait(now, surplus)
                if wait is None:  # what is in flight must land first
                    wait = min((s.until for s in self.slots.values()), default=now + 1) - now
                if worst[0] is None or wait > (worst[1] or 0):
                    worst = (limit, wait)
        return worst

    def _count(self, at: int, cost: Cost) -> None:
        for limit, window in self.windows.items():
            window.add(at, cost.of(limit))


def share(amount: int, reserve: int) -> int:
    """What of a window is left when `reserve` percent of it are kept for others."""
    return amount - amount * reserve // 100


def outside(addresses: Iterable[str], internal: frozenset[str]) -> int:
    """How many of these addresses lie outside the internal domains."""
    return sum(a.rpartition("@")[2].lower() not in internal for a in addresses)
