"""A reference model of the store: what must become of each message, in a few lines of Python.

It knows no SQL. Time is a number of seconds that only `advance` moves; all durations are so long
that the seconds a test takes cannot matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.model import OnUnknown, State, Verdict

LEASE = 1000.0
TOKEN = 6000.0
REST = 1000.0  #: what is queued again is due after this
WAIT = 500.0  #: so long after its token's end nothing of a request can come any more
LIFE = 40_000.0  #: until the deadline
POISON = 3
MAX_ATTEMPTS = 4
MOVING = {State.QUEUED, State.SENDING}


@dataclass(slots=True)
class Mail:
    """One message."""

    batch: str
    due: float
    deadline: float
    state: State = State.QUEUED
    doubt: bool = False
    fence: int = 0
    tries: int = 0
    crashes: int = 0
    lease: float = 0.0
    token_ends: float = 0.0  #: of the last claim
    doubtful: list[float] = field(default_factory=list)  #: token ends of its doubtful attempts

    def shown(self) -> tuple[State, bool, int, int, int]:
        """What is compared with the row."""
        return (self.state, self.doubt, self.fence, self.tries, self.crashes)


@dataclass(slots=True)
class Parcel:
    """One batch: how many chunks it has, which are there, and what an operator said."""

    chunks: int
    arrived: set[int] = field(default_factory=set)
    paused: bool = False
    cancelled: bool = False

    @property
    def sealed(self) -> bool:
        return len(self.arrived) == self.chunks

    @property
    def running(self) -> bool:
        return self.sealed and not self.paused and not self.cancelled


@dataclass(slots=True)
class Reference:
    """All of it. Each method is one thing that may happen."""

    policy: OnUnknown
    now: float = 0.0
    batches: dict[str, Parcel] = field(default_factory=dict)
    mails: dict[str, Mail] = field(default_factory=dict)

    def arrive(self, batch: str, chunk: int, ids: Iterable[str]) -> None:
        parcel = self.batches[batch]
        if chunk in parcel.arrived:
            return
        parcel.arrived.add(chunk)
        for one in ids:
            self.mails[one] = Mail(batch, self.now, self.now + LIFE)
            if parcel.cancelled:
                self.mails[one].state = State.CANCELLED

    def claimable(self, one: str) -> bool:
        mail = self.mails[one]
        in_time = mail.due <= self.now < mail.deadline
        return mail.state is State.QUEUED and in_time and self.batches[mail.batch].running

    def claim(self, ids: Iterable[str]) -> dict[str, int]:
        """Id → fence of those that were claimed."""
        claimed = {}
        for one in ids:
            if self.claimable(one):
                mail = self.mails[one]
                mail.state, mail.fence, mail.lease = State.SENDING, mail.fence + 1, self.now + LEASE
                mail.token_ends = self.now + TOKEN
                claimed[one] = mail.fence
        return claimed

    def record(self, one: str, fence: int, verdict: Verdict) -> bool:
        """Whether the claim was still the recorder's; if not, only a 202 counts."""
        mail = self.mails[one]
        if mail.state is not State.SENDING or mail.fence != fence:
            if verdict.state is State.SENT:
                mail.state, mail.doubt = State.SENT, False
            return False
        doubt = mail.doubt or verdict.doubt
        mail.tries += verdict.spends_try
        mail.due = self.now + REST if verdict.state is State.QUEUED else mail.due
        mail.state = self._where(mail, verdict.state, doubt)
        mail.doubt = doubt and verdict.state is not State.SENT
        return True

    def _where(self, mail: Mail, wanted: State, doubt: bool) -> State:
        if wanted is State.QUEUED and self.batches[mail.batch].cancelled:
            return State.UNKNOWN if doubt else State.CANCELLED
        return State.UNKNOWN if wanted is State.FAILED and doubt else wanted

    def end_leases(self) -> int:
        over = [m for m in self.mails.values() if m.state is State.SENDING and m.lease < self.now]
        for mail in over:
            mail.tries, mail.crashes, mail.doubt = mail.tries + 1, mail.crashes + 1, True
            mail.doubtful.append(mail.token_ends)
            again = (
                self.policy is OnUnknown.RESEND
                and mail.tries < MAX_ATTEMPTS
                and mail.crashes < POISON
                and not self.batches[mail.batch].cancelled
            )
            mail.state, mail.due = (State.QUEUED if again else State.UNKNOWN), self.now
        return len(over)

    def end_deadlines(self) -> int:
        over = [m for m in self._in(State.QUEUED) if m.deadline <= self.now]
        for mail in over:
            mail.state = State.UNKNOWN if mail.doubt else State.EXPIRED
        return len(over)

    def cancel(self, batch: str) -> None:
        self.batches[batch].cancelled = True
        for mail in self._in(State.QUEUED, batch=batch):
            mail.state = State.UNKNOWN if mail.doubt else State.CANCELLED

    def retry(self, batch: str, *, include_unknown: bool) -> int:
        states = {State.FAILED, State.UNKNOWN} if include_unknown else {State.FAILED}
        found = self._in(*states, batch=batch)
        for mail in found:
            mail.state, mail.tries, mail.crashes = State.QUEUED, 0, 0
            mail.due, mail.deadline = self.now, self.now + LIFE
        return len(found)

    def found(self, one: str) -> None:
        """A look into the mailbox found it."""
        self.mails[one].state, self.mails[one].doubt = State.SENT, False

    def nothing_came(self, one: str) -> State | None:
        """A look found nothing: its new state, or None where something may still come."""
        mail = self.mails[one]
        may_come = any(ends + WAIT > self.now for ends in mail.doubtful)
        if mail.state is not State.UNKNOWN or may_come or mail.crashes >= POISON:
            return None
        cancelled = self.batches[mail.batch].cancelled
        again = State.QUEUED if mail.tries < MAX_ATTEMPTS else State.FAILED
        mail.state = State.CANCELLED if cancelled else again
        mail.doubt, mail.due = False, self.now
        return mail.state

    def over(self, batch: str) -> bool:
        """Nothing of it can move by itself any more."""
        parcel = self.batches[batch]
        return (parcel.sealed or parcel.cancelled) and not any(
            m.batch == batch and m.state in MOVING for m in self.mails.values()
        )

    def _in(self, *states: State, batch: str | None = None) -> list[Mail]:
        """Messages in these states, of all batches or of one."""
        return [m for m in self.mails.values() if m.state in states and batch in (None, m.batch)]
