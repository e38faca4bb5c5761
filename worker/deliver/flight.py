"""The way of one message from its claim to its audit row: run, conclude, record."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

from redis.exceptions import RedisError

from worker.deliver import parcels
from worker.deliver.standing import Standing
from worker.deliver.values import Deps, Prepared
from worker.gate import Back
from worker.limits import Used
from worker.model import (
    Accepted,
    Answer,
    Blame,
    Blocked,
    NotSent,
    Outcome,
    Rejected,
    State,
    Throttled,
    Unknown,
    Verdict,
)
from worker.policy import RESTING, backoff, conclude
from worker.store import ToRecord
from worker.tokens import Token

log = logging.getLogger(__name__)

#: After these a mailbox rests, each time in a row for longer, up to so long. Without a connection
#: another try does no harm; in doubt it may cost another message its certainty.
TROUBLE: Mapping[type[Outcome], timedelta] = {
    NotSent: timedelta(seconds=10),
    Throttled: timedelta(minutes=5),
    Unknown: timedelta(minutes=5),
    Blocked: timedelta(seconds=4),  # then the mailbox is suspended
}

#: A message that the cooldown keeps back is due a little before its end: the lane that is woken at
#: the end finds it.
EARLY = timedelta(milliseconds=200)

#: What a request came to for the windows, by its outcome.
USED: Mapping[type[Outcome], Used] = {
    Accepted: Used.ALL,
    Unknown: Used.ALL,
    Throttled: Used.REQUEST,
    Rejected: Used.REQUEST,
    Blocked: Used.REQUEST,
    NotSent: Used.NOTHING,
}

#: What a person reads in Flower for each outcome.
NAMES: Mapping[type[Outcome], str] = {
    Accepted: "sent",
    Throttled: "throttled",
    Rejected: "failed",
    Blocked: "blocked",
    NotSent: "not_sent",
    Unknown: "unknown",
}


@dataclass(slots=True)
class Rest:
    """Until when the lane's mailbox is to rest (monotonic), which Redis may not know yet."""

    until: float = 0.0

    def for_(self, span: timedelta) -> None:
        """A longer rest stands."""
        self.until = max(self.until, time.monotonic() + span.total_seconds())

    @property
    def left(self) -> timedelta:
        """Zero where there is none."""
        return timedelta(seconds=max(0.0, self.until - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Landed:
    """How a flight ended: for the lane's count and for the gate."""

    name: str
    outcome: Outcome
    at: float  #: monotonic, when its answer was there

    def back(self) -> Back:
        """The slot as it is given back now."""
        age = timedelta(seconds=time.monotonic() - self.at)
        return Back(self.name, age, USED[type(self.outcome)])


@dataclass(frozen=True, slots=True)
class Flight:
    """A claimed message with all that its way needs."""

    prepared: Prepared
    mailbox: str
    fence: int
    token: Token
    deadline: float  #: monotonic: from then on the request must not leave
    trouble: int  #: how often in a row sends of this mailbox had gone wrong
    rest: Rest
    standing: Standing
    answered: Callable[[Landed], None]  #: called once its outcome is on the way to the writer

    async def fly(self, deps: Deps) -> Landed:
        """Sends, concludes, tells the other workers, records; on return it is committed.

        The slot falls free with the answer: what is claimed for it is committed with this outcome
        or after it, never before, for the writer keeps the order.
        """
        due = self.prepared.due
        outcome = self.prepared.problem or self._resting() or await parcels.send(
            deps, self.mailbox, self.prepared, self.token, deadline=self.deadline,
            fence=self.fence, limits=deps.gate.limits.changed(self.standing.limits),
        )  # fmt: skip
        landed = Landed(due.id, outcome, time.monotonic())
        verdict = self._conclude(deps, outcome)
        await self._warn(deps, outcome, verdict)
        record = ToRecord(
            id=due.id, fence=self.fence, batch_id=due.batch_id, queue_id=due.queue_id,
            mailbox=self.mailbox, worker=deps.worker, recipients=due.recipients,
            size=self.prepared.size, external=self.prepared.cost.external,
            outcome=outcome, verdict=verdict,
            token_left=self.token.ends_at - time.monotonic(),
            clears=self.standing.saw(outcome),
        )  # fmt: skip
        recording = deps.writer.record(record)
        self.answered(landed)
        await recording
        self._log(outcome, verdict)
        return landed

    def _log(self, outcome: Outcome, verdict: Verdict) -> None:
        """One line; where no message is to blame, one that nobody's level hides."""
        due, blocked = self.prepared.due, isinstance(outcome, Blocked)
        log.log(logging.WARNING if blocked else logging.INFO, "message %s: %s (%s)", due.id,
                verdict.state, outcome.answer.code or "accepted",
                extra={"message_id": due.id, "batch_id": due.batch_id})  # fmt: skip
        if blocked and self.standing.over:
            log.warning("mailbox %s is suspended: %s", self.mailbox, outcome.answer.code,
                        extra={"mailbox": self.mailbox})  # fmt: skip

    def _resting(self) -> NotSent | None:
        """The mailbox was told to rest while this message was being claimed."""
        if self.rest.left:
            return NotSent(Answer(code=RESTING, detail="the mailbox rests"))
        return None

    def _conclude(self, deps: Deps, outcome: Outcome) -> Verdict:
        due, rules = self.prepared.due, deps.rules
        verdict = conclude(
            outcome, tries=due.tries, doubt=due.doubt, max_attempts=rules.max_attempts,
            on_unknown=rules.on_unknown, jitter=random.random(),  # noqa: S311
        )  # fmt: skip
        if verdict.cooldown and in_trouble(outcome):
            cap = TROUBLE[type(outcome)]
            longer = backoff(self.trouble, random.random(), cap=cap)  # noqa: S311
            verdict = replace(verdict, cooldown=max(verdict.cooldown, longer))
        rests = verdict.cooldown or outcome.answer.code == RESTING
        if verdict.state is State.QUEUED and rests and not isinstance(outcome, Unknown):
            # Where one mailbox rests, the others of its pool go on.
            rest = timedelta(0) if self.prepared.shared else max(verdict.delay, self.rest.left)
            verdict = replace(verdict, delay=max(rest - EARLY, timedelta(0)))
        return verdict

    async def _warn(self, deps: Deps, outcome: Outcome, verdict: Verdict) -> None:
        """Tells the other workers what they must know before they send again."""
        gate = deps.gate
        try:
            if verdict.cooldown:
                self.rest.for_(verdict.cooldown)
                seen = self.trouble if in_trouble(outcome) else None
                too_many = outcome.answer.status == 429
                await gate.cool(self.mailbox, verdict.cooldown, seen, too_many=too_many)
            elif self.trouble and isinstance(outcome, Accepted | Rejected):
                await gate.calm(self.mailbox)
            if isinstance(outcome, Blocked) and outcome.blame is Blame.TOKEN:
                code = outcome.answer.code or "Unauthorized"
                await asyncio.to_thread(deps.tokens.reject, self.token.serial, code)
        except RedisError as error:
            log.warning("Redis does not answer (%s): nothing more is sent", type(error).__name__)


def in_trouble(outcome: Outcome) -> bool:
    """Whether it counts as one more that went wrong in a row; not where Graph said how long."""
    if isinstance(outcome, Throttled):
        return outcome.answer.retry_after is None
    return type(outcome) in TROUBLE
