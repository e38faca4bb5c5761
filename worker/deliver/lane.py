"""The lane: works one mailbox for a while, as fast as the gate allows.

A lane is a coroutine on the process's event loop. It looks at what is due, asks the gate, claims
what was granted, and lets each message go its own way: send, conclude, record. Only when the
outcome is committed does the slot fall free for the next message.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from redis.exceptions import RedisError

from worker import templates
from worker.deliver import parcels
from worker.deliver.standing import SUSPENDED, Standing
from worker.deliver.values import Deps, Prepared
from worker.gate import Grant, lane_token
from worker.graph import payload
from worker.model import (
    Accepted,
    Answer,
    Blame,
    Blocked,
    Due,
    NotSent,
    Outcome,
    Rejected,
    Throttled,
    Unknown,
    Verdict,
)
from worker.policy import backoff, conclude
from worker.store import ToClaim, ToRecord
from worker.store.retrying import is_passing
from worker.tokens import Token, TokenRefused

log = logging.getLogger(__name__)

#: A lane works for this long, then lets other mailboxes of the process have its thread; for the
#: shorter time where others wait.
TURN = timedelta(seconds=5)
SHORT_TURN = timedelta(seconds=1)
#: Waiting for less than this is done in place; for more, the lane ends and is woken.
MOMENT = timedelta(seconds=1)
#: The lane's lease is renewed at least this often, whatever the lane itself waits for.
HEARTBEAT = timedelta(seconds=2)
#: A refused credential is asked after again so soon; asking costs one look into Redis.
PROBE = timedelta(seconds=5)
#: Where Redis or the database is away, the next try comes so soon.
RECOVERY = timedelta(seconds=1)
#: After a stop, what is in flight has the request timeout and this much more to be recorded.
GRACE = timedelta(seconds=3)
#: How many due messages are looked at in one go.
PEEK = 64


@dataclass(slots=True)
class Lane:
    """One mailbox being worked. `run` gives what became of it, for people to read."""

    deps: Deps
    mailbox: str
    pools: Mapping[str, list[str]]  #: the pools this mailbox is in: name → members
    token: str = field(default_factory=lane_token)
    done: Counter[str] = field(default_factory=Counter)
    _buffer: deque[Due] = field(default_factory=deque)
    _templates: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    _turns: Counter[str] = field(default_factory=Counter)
    _free: list[str] = field(default_factory=list)  # slots to give back at the next asking
    _flying: set[asyncio.Task[None]] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _landed: asyncio.Event = field(default_factory=asyncio.Event)
    _rung: int = -1
    _ours_until: float = math.inf  # monotonic: until then no other lane has the mailbox
    _abandoned: bool = False  # a stop took too long
    _standing: Standing = field(default_factory=Standing)
    _trouble: int = 0  # how often in a row sends of this mailbox went wrong
    _rest_until: float = 0.0  # monotonic: the mailbox is to rest, which Redis may not know yet

    async def run(self) -> dict[str, Any]:
        """Works until nothing is due, the turn is over, or it must wait for more than a moment."""
        why, wait = "", timedelta(0)
        work = asyncio.create_task(self._work())
        keeper = asyncio.create_task(self._keep(work))
        try:
            why, wait = await work
        except TokenRefused as refused:
            why, wait = refused.code, refused.wait
            self._rest_until = time.monotonic() + min(wait, PROBE).total_seconds()
        except RedisError:
            why, wait = "Redis", RECOVERY
        except Exception as error:
            if not is_passing(error):
                raise
            why, wait = "the database", RECOVERY
        except asyncio.CancelledError:
            if not self._abandoned:
                raise
            why = "a stop"
        finally:
            await self._land(keeper)
        result: dict[str, Any] = dict(sorted(self.done.items()))
        if why:
            result |= {"waits_for": why, "seconds": round(wait.total_seconds(), 1)}
        return result

    async def _work(self) -> tuple[str, timedelta]:
        """The loop of the lane; gives what it must wait for and how long, if it must."""
        began = time.monotonic()
        grant, _ = await self._ask(0)  # takes the lane before anything is looked at
        self._standing = await asyncio.to_thread(Standing.of, self.deps.store, self.mailbox)
        while time.monotonic() < self._ours_until and not self.deps.stop.is_set():
            if ended := self._ended(began):
                return ended
            before = self._rung
            await self._look()
            wanted = min(len(self._buffer), self._allowed() - len(self._flying))
            token = await self._token() if wanted > 0 else None
            grant, slots = await self._ask(max(0, wanted))
            if token and slots:
                await self._send_next(slots, token)
            elif self._flying:
                await self._wait()
            elif grant.wait > MOMENT:
                return grant.word, grant.wait
            elif grant.wait:
                await asyncio.sleep(grant.wait.total_seconds())
            elif wanted <= 0 and await self.deps.gate.leave(self.mailbox, self.token, before):
                break
        return (grant.word, grant.wait) if grant.word == "held" else ("", timedelta(0))

    def _allowed(self) -> int:
        """How many may fly at once: a mailbox in trouble tries again with one message."""
        return 1 if self._trouble else self._standing.most(self.deps.rules.concurrency)

    def _ended(self, began: float) -> tuple[str, timedelta] | None:
        """Why the lane must end though there may be more to do; None: it may go on."""
        if self._standing.over:
            return SUSPENDED, self._standing.wait
        turn = SHORT_TURN if self.deps.crowded() else TURN
        over = time.monotonic() >= began + turn.total_seconds()
        return (NEXT_TURN, timedelta(0)) if over else None

    async def _keep(self, work: asyncio.Task[Any]) -> None:
        """Renews the lease while the lane waits for SQL, Entra or Graph; bounds a stop.

        What a stop gives up is not lost: its claim's lease runs out, and it is in doubt.
        """
        rules = self.deps.rules
        end, stopped_at = time.monotonic() + (TURN + rules.lease).total_seconds(), math.inf
        while not self._landed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._landed.wait(), HEARTBEAT.total_seconds() / 2)
                return
            now = time.monotonic()
            if self.deps.stop.is_set():
                stopped_at = min(stopped_at, now)
            if now > stopped_at + (rules.request_timeout + GRACE).total_seconds():
                log.error("mailbox %s: the stop leaves %d sends without a record",
                          self.mailbox, len(self._flying))  # fmt: skip
                self._abandoned = True
                for task in (work, *self._flying):
                    task.cancel()
                return
            if now < end:
                with contextlib.suppress(RedisError):
                    await self._renew()

    async def _look(self) -> None:
        """Fills the buffer from the best queue: priority first, then whoever had fewer turns."""
        if self._buffer:
            return
        seen = await asyncio.to_thread(
            self.deps.store.look, self.mailbox, self.pools, dict(self._turns), PEEK
        )
        if seen is not None:
            self._turns[seen.queue_id] += len(seen.due)
            self._templates[seen.batch_id] = seen.template
            self._buffer.extend(seen.due)

    async def _token(self) -> Token:
        token = self.deps.tokens.at_hand()
        return token if token is not None else await asyncio.to_thread(self.deps.tokens.get)

    async def _ask(self, wanted: int) -> tuple[Grant, list[str]]:
        """Asks for `wanted` slots; gives the names of those granted."""
        names = [f"{self.token}-{next(self._numbers)}" for _ in range(wanted)]
        grant = await self._renew(names)
        if grant.rung != self._rung:
            self._rung = grant.rung
            if not grant.count:
                self._buffer.clear()  # something new is due, and may be more urgent
        return grant, names[: grant.count]

    async def _renew(self, names: Sequence[str] = ()) -> Grant:
        """Renews the lease, gives slots back, asks for new ones of these names."""
        free, self._free = self._free, []
        asked = time.monotonic()
        try:
            grant = await self.deps.gate.ask(
                self.mailbox, self.token, wanted=names, given_back=free
            )
        except RedisError:
            self._free += free
            raise
        # A lease that lapsed is not taken up again: its slots may be another lane's by now.
        kept = grant.word != "held" and asked < self._ours_until
        self._ours_until = asked + self.deps.gate.lease.total_seconds() if kept else -math.inf
        self._trouble = grant.trouble
        return grant

    async def _send_next(self, slots: list[str], token: Token) -> None:
        """Claims the next messages, one a slot, committed, and lets each go its way."""
        rules = self.deps.rules
        ready = [self._prepare(self._buffer.popleft()) for _ in slots]
        began = time.monotonic()
        lease, left = rules.lease.total_seconds(), token.ends_at - began
        claimed = await self.deps.writer.claim([
            ToClaim(p.due.id, p.size, self.mailbox, self.deps.worker, lease, left)
            for p in ready
        ])  # fmt: skip
        deadline = min(
            began + (rules.lease - rules.request_timeout).total_seconds(), self._ours_until
        )
        for slot, prepared in zip(slots, ready, strict=True):
            fence = claimed.get(prepared.due.id)
            if fence is None:
                self._free.append(slot)  # cancelled, paused, or taken by another lane meanwhile
                continue
            flight = asyncio.create_task(self._fly(prepared, fence, slot, token, deadline))
            self._flying.add(flight)
            flight.add_done_callback(self._has_landed)

    def _prepare(self, due: Due) -> Prepared:
        """The request of a message; a template that fails is the message's own rejection."""
        try:
            shown = templates.render(self._templates.get(due.batch_id), due.content)
        except templates.TemplateProblem as problem:
            return Prepared(due, b"", Rejected(Answer(code=problem.code, detail=problem.detail)))
        body = payload(due.content, message_id=due.id, subject=shown.subject, html=shown.html,
                       text=shown.text)  # fmt: skip
        return Prepared(due, body, shown=shown)

    async def _fly(
        self, prepared: Prepared, fence: int, slot: str, token: Token, deadline: float
    ) -> None:
        """Run, conclude, record: the way of one message from its claim to its audit row."""
        deps, due, trouble = self.deps, prepared.due, self._trouble
        outcome = prepared.problem or await parcels.send(
            deps, self.mailbox, prepared, token, deadline=deadline
        )
        verdict = conclude(
            outcome, tries=due.tries, doubt=due.doubt, max_attempts=deps.rules.max_attempts,
            on_unknown=deps.rules.on_unknown, jitter=random.random(),  # noqa: S311
        )  # fmt: skip
        if verdict.cooldown and (cap := TROUBLE.get(type(outcome))):
            longer = backoff(trouble, random.random(), cap=cap)  # noqa: S311
            verdict = replace(verdict, cooldown=max(verdict.cooldown, longer))
        await self._warn(outcome, verdict, token, trouble)
        await deps.writer.record(
            ToRecord(
                id=due.id, fence=fence, batch_id=due.batch_id, queue_id=due.queue_id,
                mailbox=self.mailbox, worker=deps.worker, recipients=due.recipients,
                size=prepared.size, outcome=outcome, verdict=verdict,
                token_left=token.ends_at - time.monotonic(), clears=self._standing.saw(outcome),
            )
        )  # fmt: skip
        self._free.append(slot)
        self.done[NAMES[type(outcome)]] += 1
        log.info("message %s: %s (%s)", due.id, verdict.state, outcome.answer.code or "accepted",
                 extra={"message_id": due.id, "batch_id": due.batch_id})  # fmt: skip

    async def _warn(self, outcome: Outcome, verdict: Verdict, token: Token, trouble: int) -> None:
        """Tells the other workers what they must know before they send again."""
        gate = self.deps.gate
        try:
            if verdict.cooldown:
                rest_until = time.monotonic() + verdict.cooldown.total_seconds()
                self._rest_until = max(self._rest_until, rest_until)
                seen = trouble if isinstance(outcome, tuple(TROUBLE)) else None
                await gate.cool(self.mailbox, verdict.cooldown, trouble=seen)
            elif trouble and isinstance(outcome, Accepted | Rejected):
                await gate.calm(self.mailbox)
            if isinstance(outcome, Blocked) and outcome.blame is Blame.TOKEN:
                code = outcome.answer.code or "Unauthorized"
                await asyncio.to_thread(self.deps.tokens.reject, token.serial, code)
        except RedisError as error:
            log.warning("Redis does not answer (%s): nothing more is sent", type(error).__name__)

    def _has_landed(self, flight: asyncio.Task[None]) -> None:
        self._flying.discard(flight)
        if not flight.cancelled() and (error := flight.exception()):
            # The claim's lease runs out and the sweep takes the message for what it is: unknown.
            log.error("mailbox %s: a send broke off", self.mailbox, exc_info=error)

    async def _wait(self) -> None:
        await asyncio.wait(
            self._flying, timeout=HEARTBEAT.total_seconds(), return_when=asyncio.FIRST_COMPLETED
        )

    async def _land(self, keeper: asyncio.Task[None]) -> None:
        """Waits for what is in flight, then leaves the lane, for as long as it is ours."""
        while self._flying:
            await self._wait()
        self._landed.set()
        await keeper  # whose last asking must not come after the leave: it would take the lane anew
        lapses = min(self._ours_until, time.monotonic() + self.deps.gate.lease.total_seconds())
        while not await self._leave():
            if self.deps.stop.is_set() or time.monotonic() > lapses:
                return
            await asyncio.sleep(0.2)

    async def _leave(self) -> bool:
        """Leaves the lane; False where Redis does not answer."""
        try:
            rest = self._rest_until - time.monotonic()
            if rest > 0:
                await self.deps.gate.cool(self.mailbox, timedelta(seconds=rest))
            await self.deps.gate.leave(self.mailbox, self.token)
        except RedisError:
            return False
        return True


#: Why a lane ended that has more to do: other mailboxes come first.
NEXT_TURN = "its next turn"
#: After these a mailbox rests, each time in a row for longer, up to so long. Without a connection
#: another try does no harm; in doubt it may cost another message its certainty.
TROUBLE: Mapping[type[Outcome], timedelta] = {
    NotSent: timedelta(seconds=10),
    Unknown: timedelta(minutes=5),
    Blocked: timedelta(seconds=4),  # then the mailbox is suspended
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
