"""The standing of a lane's mailbox: whether it may work, and with how many messages at once.

Read when the lane begins; what the lane itself sees is counted on, and an operator's limits are
read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

from worker.model import Accepted, Blame, Blocked, Outcome
from worker.store import Store
from worker.store.mailboxes import REFUSALS

#: What a lane waits for whose mailbox is suspended.
SUSPENDED = "its suspension"


@dataclass(slots=True)
class Standing:
    """What was known of a mailbox when its lane began, and what the lane has seen since."""

    limits: Mapping[str, Any] = field(default_factory=dict)  #: what differs from the settings
    refusals: int = 0
    suspended: bool = False
    probe_in: timedelta | None = None  #: None: an operator must resume it
    rest: timedelta = timedelta(0)  #: of its cooldown

    @classmethod
    def of(cls, store: Store, mailbox: str) -> Self:
        """Asks SQL."""
        seen = store.mailboxes.seen(mailbox)
        probe_in = None if seen.probe_in is None else timedelta(seconds=max(0.0, seen.probe_in))
        rest = timedelta(seconds=seen.rest)
        return cls(seen.limits, seen.refusals, seen.suspended, probe_in, rest)

    def heard(self, now: Standing) -> None:
        """What an operator, or another's outcome, changed while the lane works."""
        self.limits = now.limits
        if now.suspended and not self.suspended:
            self.suspended, self.probe_in = True, now.probe_in

    @property
    def over(self) -> bool:
        """Nothing more is to be claimed for this mailbox: it is suspended, no probe is due."""
        if self.suspended:
            return self.probe_in is None or self.probe_in > timedelta(0)
        return self.refusals >= REFUSALS

    @property
    def wait(self) -> timedelta:
        """Until the next probe; zero where only an operator ends the suspension."""
        return self.probe_in or timedelta(0)

    def most(self, concurrency: int) -> int:
        """How many messages may be under way at once: a mailbox that refused tries with one."""
        return 1 if self.suspended or self.refusals else concurrency

    def saw(self, outcome: Outcome) -> bool:
        """Counts an outcome; whether its record must clear what SQL holds against the mailbox."""
        match outcome:
            case Blocked(_, Blame.MAILBOX):
                self.refusals += 1
                # A refused probe: the next is due in a minute at the soonest.
                self.probe_in = None
            case Accepted() if self.suspended and self.probe_in is None:
                pass  # it was under way: only an operator, or the next probe, ends this
            case Accepted() if self.suspended or self.refusals:
                self.refusals, self.suspended = 0, False
                return True
        return False
