"""What lies ahead of a lane: due messages that it has looked up, and those of them made ready."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.deliver.prepare import prepare
from worker.deliver.values import Deps, Prepared
from worker.model import Due, Priority
from worker.store import Seen

#: How many due messages are looked at in one go; fewer where those before were so large that these
#: bytes would be more. A worker has dozens of lanes, and they all wait with what they have seen.
PEEK, PEEK_BYTES = 64, 512 * 1024


@dataclass(slots=True)
class Ahead:
    """Nothing of it is claimed: what is forgotten here is found again at the next look."""

    deps: Deps
    mailbox: str
    _pools: Mapping[str, list[str]] = field(default_factory=dict)  # that it is in: name → members
    _seen: Seen | None = None  # where those that wait come from
    _waiting: deque[Due] = field(default_factory=deque)
    _ready: deque[Prepared] = field(default_factory=deque)  # rendered, and not granted yet
    _turns: Counter[str] = field(default_factory=Counter)
    _largest: int = 0  # bytes, of the bodies that were rendered since the last look
    _expected: int = 32 * 1024  # the same of the time before it; at first a guess

    @property
    def is_high(self) -> bool:
        """Whether these messages may use what is kept for priority high."""
        return self._seen is not None and self._seen.priority == Priority.HIGH

    def join(self, pools: Mapping[str, list[str]]) -> None:
        """The mailbox is in these pools now. What was seen may be for others to send."""
        if pools != self._pools:
            self._pools = pools
            self.forget()

    def forget(self) -> None:
        """Looks anew: something may be due that is more urgent."""
        self._waiting.clear()
        self._ready.clear()

    async def look(self) -> None:
        """Where nothing is left: the best queue's, priority first, then whoever had fewer turns."""
        if self._waiting or self._ready:
            return
        self._expected, self._largest = self._largest or self._expected, 0
        count = max(1, min(PEEK, PEEK_BYTES // self._expected))
        self._seen = await asyncio.to_thread(
            self.deps.store.look, self.mailbox, self._pools, dict(self._turns), count
        )
        if self._seen is not None:
            self._turns[self._seen.queue_id] += len(self._seen.due)
            self._waiting.extend(self._seen.due)

    def take(self, most: int) -> list[Prepared]:
        """The next messages, at most so many, rendered."""
        inside = self._inside()
        while self._seen and self._waiting and len(self._ready) < most:
            due, seen = self._waiting.popleft(), self._seen
            one = prepare(due, seen.template, shared=seen.shared, internal=inside,
                          staging=self.deps.rules.staging)  # fmt: skip
            self._largest = max(self._largest, len(one.body))
            self._ready.append(one)
        return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    def put_back(self, ready: Sequence[Prepared]) -> None:
        """They were taken and may not go yet; they come first again."""
        self._ready.extendleft(reversed(ready))

    def _inside(self) -> frozenset[str]:
        """The domains of the organisation: as set, else those of the senders."""
        if self.deps.rules.internal_domains:
            return self.deps.rules.internal_domains
        senders = {self.mailbox, *itertools.chain.from_iterable(self._pools.values())}
        return frozenset(sender.rpartition("@")[2] for sender in senders)
