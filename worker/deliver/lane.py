"""The lane: works one mailbox for a while, as fast as the gate allows.

A lane is a coroutine on the process's event loop. It looks at what is due, asks the gate, claims
what was granted, and lets each message go its own way (see flight). When its answer has come, the
slot is free for the next message, whose claim is committed together with that outcome or after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from redis.exceptions import RedisError

from worker.deliver.ahead import Ahead
from worker.deliver.flight import NAMES, Flight, Landed, Rest
from worker.deliver.prepare import too_large
from worker.deliver.standing import SUSPENDED, Standing
from worker.deliver.values import Deps, Prepared
from worker.gate import COOLING, HELD, Back, Grant, lane_token
from worker.limits import Limit, Limits, Used
from worker.store import ToClaim
from worker.store.retrying import is_passing
from worker.tokens import Token, TokenRefused

log = logging.getLogger(__name__)

#: A lane works for this long, then lets other mailboxes of the process have its thread; for the
#: shorter time where others wait.
TURN = timedelta(seconds=20)
SHORT_TURN = timedelta(seconds=1)
#: Waiting for less than this is done in place; for more, the lane ends and is woken.
MOMENT = timedelta(seconds=1)
#: Whatever it waits for in place, the lane asks again so soon: a slot may have fallen free.
BRIEFLY = timedelta(milliseconds=200)
#: However long a window stays full, it is asked again so soon: somebody may have raised the limit.
HOLD = timedelta(minutes=1)
#: The lane's lease is renewed at least this often, whatever the lane itself waits for.
HEARTBEAT = timedelta(seconds=2)
#: What an operator changes of limits and pools holds for a lane at work after so long.
FRESH = timedelta(seconds=5)
#: A refused credential is asked after again so soon; asking costs one look into Redis.
PROBE = timedelta(seconds=5)
#: Where Redis or the database is away, the next try comes so soon.
RECOVERY = timedelta(seconds=1)
#: After a stop, what is in flight has the request timeout and this much more to be recorded.
GRACE = timedelta(seconds=3)
#: Why a lane ended that has more to do: other mailboxes come first.
NEXT_TURN = "its next turn"

_NOW = timedelta(0)


@dataclass(slots=True)
class Lane:
    """One mailbox being worked. `run` gives what became of it, for people to read."""

    deps: Deps
    mailbox: str
    token: str = field(default_factory=lane_token)
    done: Counter[str] = field(default_factory=Counter)
    _ahead: Ahead = field(init=False)
    _landed: list[Landed] = field(default_factory=list)  # slots to give back at the next asking
    _unused: list[str] = field(default_factory=list)  # slots that nothing was sent in
    _flying: set[asyncio.Task[Landed]] = field(default_factory=set)  # until they are recorded
    _answered: set[str] = field(default_factory=set)  # of these, whose outcome is being recorded
    _news: asyncio.Event = field(default_factory=asyncio.Event)  # since room was last looked for
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _rest: Rest = field(default_factory=Rest)
    _hold: timedelta = _NOW  # the lane need not come again before, unless there is news
    _rung: int = -1
    _ours_until: float = math.inf  # monotonic: until then no other lane has the mailbox
    _abandoned: bool = False  # a stop took too long
    _standing: Standing = field(default_factory=Standing)
    _limits: Limits | None = None  # that hold for the mailbox; None: those of the settings
    _fresh_until: float = -math.inf  # monotonic: then limits and pools are read again
    _trouble: int = 0  # how often in a row sends of this mailbox went wrong

    def __post_init__(self) -> None:
        self._ahead = Ahead(self.deps, self.mailbox)

    async def run(self) -> dict[str, Any]:
        """Works until nothing is due, the turn is over, or it must wait for more than a moment."""
        why, wait = "", _NOW
        work = asyncio.create_task(self._work())
        keeper = asyncio.create_task(self._keep(work))
        try:
            why, wait = await work
        except TokenRefused as refused:
            why, wait = refused.code, refused.wait
            self._rest.for_(min(wait, PROBE))
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
            result |= {"waits_for": why, "seconds": round(wait.total_seconds(), 3)}
        return result

    async def _work(self) -> tuple[str, timedelta]:
        """The loop of the lane; gives what it must wait for and how long, if it must."""
        began = time.monotonic()
        grant = await self._enter()
        while time.monotonic() < self._ours_until and not self.deps.stop.is_set():
            if ended := self._must_end(began):
                return ended
            before = self._rung
            await self._look()
            ready = self._take_ready()
            token = await self._token() if ready else None
            with self.deps.writer.asking():
                grant = await self._ask(ready)
            if token and grant.wait is None:
                ready[0] = too_large(ready[0], grant.word)
            go = grant.count or int(grant.wait is None)
            if grant.rung == before:
                self._ahead.put_back(ready[go:])
            if token and go:
                await self._send(ready[:go], token)
            elif self._flying:
                await self._wait(grant.wait)
            elif await self._has_ended(grant, idle=not ready, rung=before):
                break
            await self._until_room()
        return (grant.word, grant.wait) if grant.wait else ("", _NOW)

    async def _enter(self) -> Grant:
        """Takes the lane, before anything is looked at."""
        self._standing = await self._read()
        if rest := self._standing.rest:  # of which Redis was perhaps not told
            await self.deps.gate.cool(self.mailbox, rest)
        return await self._ask()

    async def _has_ended(self, grant: Grant, *, idle: bool, rung: int) -> bool:
        """Whether the lane goes, because nothing is due or it must wait for more than a moment."""
        if not grant.wait:
            return idle and await self._leave(rung)
        if grant.wait > MOMENT and grant.word != Limit.SLOTS:
            self._hold = _NOW if grant.word in {HELD, COOLING} else min(grant.wait, HOLD)
            return True
        await asyncio.sleep(min(grant.wait, BRIEFLY).total_seconds())
        return False

    def _must_end(self, began: float) -> tuple[str, timedelta] | None:
        """Why the lane must end though there may be more to do; None: it may go on."""
        if self._standing.over:
            return SUSPENDED, self._standing.wait
        turn = SHORT_TURN if self.deps.crowded() else TURN
        over = time.monotonic() >= began + turn.total_seconds()
        return (NEXT_TURN, _NOW) if over else None

    async def _keep(self, work: asyncio.Task[Any]) -> None:
        """Renews the lease while the lane waits for SQL, Entra or Graph; bounds a stop.

        What a stop gives up is not lost: its claim's lease runs out, and it is in doubt.
        """
        rules = self.deps.rules
        end, stopped_at = time.monotonic() + (TURN + rules.lease).total_seconds(), math.inf
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), HEARTBEAT.total_seconds() / 2)
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
                await self._renew()

    async def _renew(self) -> None:
        """As well as may be: while Redis or the database is away, the lease runs out."""
        try:
            await self._ask()
        except Exception as error:
            if not (isinstance(error, RedisError) or is_passing(error)):
                raise

    async def _read(self) -> Standing:
        """Takes over the limits and pools as an operator has them now, and gives the standing."""
        self._fresh_until = time.monotonic() + FRESH.total_seconds()
        standing = await asyncio.to_thread(Standing.of, self.deps.store, self.mailbox)
        self._limits = self.deps.gate.limits.changed(standing.limits)
        known = await asyncio.to_thread(self.deps.pools)
        self._ahead.join({name: list(of) for name, of in known.items() if self.mailbox in of})
        return standing

    # ---- what is next --------------------------------------------------------------------------

    async def _look(self) -> None:
        """Finds what is due, under the limits and pools as they are now."""
        if time.monotonic() >= self._fresh_until:
            self._standing.heard(await self._read())
        await self._ahead.look()

    def _take_ready(self) -> list[Prepared]:
        """As many as may fly now, rendered: a mailbox in trouble tries again with one message."""
        self._news.clear()
        return self._ahead.take(self._room())

    def _room(self) -> int:
        slots = (self._limits or self.deps.gate.limits).slots
        most = 1 if self._trouble else self._standing.most(slots)
        return max(0, most - len(self._flying) + len(self._answered))

    async def _token(self) -> Token:
        token = self.deps.tokens.at_hand()
        return token if token is not None else await asyncio.to_thread(self.deps.tokens.get)

    # ---- the gate ------------------------------------------------------------------------------

    async def _ask(self, ready: Sequence[Prepared] = ()) -> Grant:
        """Renews the lease, gives slots back, asks for one for each that is ready."""
        asked = time.monotonic()
        with self._giving_back([p.due.id for p in ready]) as back:
            grant = await self.deps.gate.ask(
                self.mailbox, self.token, wanted=[(p.due.id, p.cost) for p in ready],
                given_back=back, limits=self._limits,
                high=self._ahead.is_high,
            )  # fmt: skip
        # A lease that lapsed is not taken up again: its slots may be another lane's by now.
        kept = grant.word != HELD and asked < self._ours_until
        self._ours_until = asked + self.deps.gate.lease.total_seconds() if kept else -math.inf
        self._trouble = grant.trouble
        if grant.rung != self._rung:
            self._rung = grant.rung
            self._ahead.forget()
        return grant

    @contextlib.contextmanager
    def _giving_back(self, asked: Sequence[str] = ()) -> Iterator[list[Back]]:
        """The slots to give back; those `asked` for as well, where no answer tells of them."""
        landed, self._landed = self._landed, []
        unused, self._unused = self._unused, []
        try:
            yield [one.back() for one in landed] + [Back(n, _NOW, Used.NOTHING) for n in unused]
        except RedisError:
            # Whether it was heard nobody knows. What is given back twice is freed once.
            self._landed += landed
            self._unused += (*unused, *asked)
            raise

    async def _leave(self, rung: int | None = None) -> bool:
        """Leaves the lane unless it was rung since."""
        with self._giving_back() as back:
            return await self.deps.gate.leave(
                self.mailbox, self.token, rung, given_back=back, hold=self._hold,
                limits=self._limits,
            )  # fmt: skip

    # ---- in flight -----------------------------------------------------------------------------

    async def _send(self, ready: Sequence[Prepared], token: Token) -> None:
        """Claims these messages, committed, and lets each go its way."""
        rules, began = self.deps.rules, time.monotonic()
        lease, left = rules.lease.total_seconds(), token.ends_at - began
        claimed = await self.deps.writer.claim([
            ToClaim(p.due.id, p.size, self.mailbox, self.deps.worker, lease, left,
                    p.cost.external, p.due.addresses)
            for p in ready
        ])  # fmt: skip
        deadline = min(
            began + (rules.lease - rules.request_timeout).total_seconds(), self._ours_until
        )
        for prepared in ready:
            fence = claimed.get(prepared.due.id)
            if fence is None:  # cancelled, paused, or taken by another lane meanwhile
                self._unused.append(prepared.due.id)
                continue
            flight = Flight(
                prepared, self.mailbox, fence, token, deadline, self._trouble, self._rest,
                self._standing, self._has_answer,
            )  # fmt: skip
            task = asyncio.create_task(flight.fly(self.deps), name=prepared.due.id)
            self._flying.add(task)
            task.add_done_callback(self._has_landed)

    def _has_answer(self, landed: Landed) -> None:
        self._answered.add(landed.name)
        self._landed.append(landed)
        self._news.set()

    def _has_landed(self, task: asyncio.Task[Landed]) -> None:
        self._flying.discard(task)
        self._answered.discard(task.get_name())
        if not self._flying:
            self._news.set()
        if task.cancelled():
            return
        if error := task.exception():
            self._news.set()
            # The claim's lease runs out and the sweep takes the message for what it is: unknown.
            log.error("mailbox %s: a send broke off", self.mailbox, exc_info=error)
            return
        self.done[NAMES[type(task.result().outcome)]] += 1

    async def _until_room(self) -> None:
        """There is nothing to ask the gate for before one more message may fly.

        Asked between two transactions, lanes claim together: a transaction is dearer than a claim.
        """
        while not self._room():
            self._news.clear()
            await self._wait()
        await self.deps.writer.until_idle()

    async def _wait(self, wait: timedelta | None = None) -> None:
        """Until an answer has come, or the gate may say something else."""
        most = max(BRIEFLY, min(wait, HEARTBEAT)) if wait else HEARTBEAT
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most.total_seconds()):
                await self._news.wait()

    async def _land(self, keeper: asyncio.Task[None]) -> None:
        """Waits for what is in flight, then leaves the lane, for as long as it is ours."""
        while self._flying:
            await asyncio.wait(self._flying)
        self._over.set()
        await keeper  # whose last asking must not come after the leave: it would take the lane anew
        lapses = min(self._ours_until, time.monotonic() + self.deps.gate.lease.total_seconds())
        while not await self._left():
            if self.deps.stop.is_set() or time.monotonic() > lapses:
                return
            await asyncio.sleep(0.2)

    async def _left(self) -> bool:
        """Leaves the lane; False where Redis does not answer."""
        try:
            if rest := self._rest.left:
                await self.deps.gate.cool(self.mailbox, rest)
            await self._leave()
        except RedisError:
            return False
        return True
