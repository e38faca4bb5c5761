"""When a batch would end: the arithmetic of the limits, played forward in time. Pure."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from worker.limits import PARTS, Limit, Limits, Window, share

#: What takes longer than this is not said to end.
_HORIZON = timedelta(days=3660) // timedelta(milliseconds=1)


@dataclass(slots=True)
class Sender:
    """A mailbox: its limits, and what its windows hold. Times are ms from now, so negative.

    The tenant's window is one object in all senders.
    """

    limits: Limits
    windows: dict[Limit, Window]


@dataclass(frozen=True, slots=True)
class Typical:
    """What one message takes on average."""

    seconds: float  #: from request to answer
    size: int  #: bytes
    external: float  #: addresses outside the organisation

    def of(self, limit: Limit) -> float:
        """What it takes of a window; it has one recipient."""
        taken = {Limit.UPLOAD: float(self.size), Limit.EXTERNAL: self.external}
        return taken.get(limit, 1.0)


@dataclass(frozen=True, slots=True)
class End:
    """After how long the last message is sent (None: never), and what it waited for most."""

    after: timedelta | None
    limit: Limit


def forecast(senders: Sequence[Sender], count: int, one: Typical) -> End:
    """Shares `count` messages among the senders as they have room. Uses up their windows."""
    free = [(0, n) for n in range(len(senders))]
    waited: Counter[Limit] = Counter()
    left, end = count, 0
    while left > 0:
        if not free:
            return End(None, _most(waited))
        now, n = heapq.heappop(free)
        room, limit, wait = _room(senders[n], now, one)
        if limit is not None:
            waited[limit] += wait or _HORIZON
            if wait is not None and now + wait <= _HORIZON:
                heapq.heappush(free, (now + wait, n))
            continue
        each = 1000 * one.seconds / senders[n].limits.slots
        step = max(1, int(min((w.span for w in senders[n].windows.values()), default=_HORIZON)
                          / PARTS / each))  # fmt: skip
        sent = min(left, room, step, max(1, left // (2 * len(senders))))  # the last end together
        now += max(1, round(sent * each))
        for taken, window in senders[n].windows.items():
            window.add(now, round(sent * one.of(taken)))
        left, end = left - sent, max(end, now)
        heapq.heappush(free, (now, n))
    return End(timedelta(milliseconds=end), _most(waited))


def _most(waited: Counter[Limit]) -> Limit:
    return max(waited, key=lambda limit: waited[limit], default=Limit.SLOTS)


def _room(sender: Sender, now: int, one: Typical) -> tuple[int, Limit | None, int | None]:
    """How many may go now; if none, what binds and for how long (ms; None: for ever)."""
    room, worst, longest = _HORIZON, None, 0
    for limit, most, need in _needs(sender, one):
        window = sender.windows[limit]
        window.forget(now)
        surplus = window.total + max(1, round(need)) - most
        if surplus <= 0:
            room = min(room, int((most - window.total) / need))
            continue
        wait = None if need > most else window.wait(now, surplus)
        if wait is None:
            return 0, limit, None
        if worst is None or wait > longest:
            worst, longest = limit, wait
    return (room, None, 0) if worst is None else (0, worst, max(1, longest))


def _needs(sender: Sender, one: Typical) -> Iterator[tuple[Limit, int, float]]:
    """(limit, what it allows, what one message takes) of each window that counts."""
    for limit in sender.windows:
        rate, need = sender.limits.rate(limit), one.of(limit)
        if rate is not None and need > 0:
            yield limit, share(rate.amount, sender.limits.reserve_high), need
