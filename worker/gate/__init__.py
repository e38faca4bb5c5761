"""The gate: where a lane asks leave to send. All its state lies in Redis, for all workers.

Where Redis knows nothing of a mailbox (it is new, or Redis was emptied), the gate learns first
what SQL knows of it: no window, slot or cooldown is ever begun anew.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import RedisError

from worker.gate.script import Script
from worker.limits import WINDOWS, Cost, Limit, Limits, Used, Window

#: A lane that is not heard of for this long is dead: another worker may take the mailbox.
LANE_LEASE = timedelta(seconds=10)
#: A ring counts as under way for this long; then the next one sends a task again: a task that was
#: lost costs this time.
BELL = timedelta(seconds=3)

HELD, COOLING, GRANTED = "held", "cooling", "granted"
_UNKNOWN = b"unknown"
#: So often in a row a gate may be forgotten while it learns; then something empties Redis again
#: and again, and nothing is sent.
_LESSONS = 3

_SCRIPT = Path(__file__).with_name("gate.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Grant:
    """What the gate said: how many of those asked for may go, or how long to wait and why."""

    word: str  #: granted, held (by another lane), cooling, or the limit that binds
    count: int
    wait: timedelta | None  #: None: it never fits, for it is larger than the limit
    rung: int  #: how often the lane was rung so far
    trouble: int = 0  #: how often in a row sends of this mailbox went wrong


@dataclass(frozen=True, slots=True)
class Back:
    """A slot that is given back: its request ended `age` ago and came to `used`."""

    name: str
    age: timedelta
    used: Used


@dataclass(frozen=True, slots=True)
class Past:
    """What SQL knows of a mailbox. Times are milliseconds before the look, negative."""

    windows: Mapping[Limit, Window] = field(default_factory=dict)
    flying: Sequence[tuple[str, int, Cost]] = ()  #: claims: slot id, ms they live yet, cost
    cooldown: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a mailbox's windows are. `bound`: the limit that binds now."""

    cooldown: timedelta
    bound: str | None
    used: Mapping[Limit, int]


#: Asks SQL for the past of a mailbox, as far as these limits look back.
History = Callable[[str, Limits], Awaitable[Past]]


class Gate:
    """The gates of all mailboxes. Raises redis.RedisError when Redis is gone: nothing is sent."""

    def __init__(
        self, redis: Redis, limits: Limits, *, history: History, lease: timedelta = LANE_LEASE,
        bell: timedelta = BELL, clock: Callable[[], int | str] = str,
    ) -> None:  # fmt: skip
        """`clock` is for tests: milliseconds; empty for Redis's own time."""
        self._call = Script(redis, _SCRIPT)
        self._history = history
        self._clock = clock
        self.limits = limits
        self.lease = lease
        self._bell = bell

    async def ask(
        self, mailbox: str, lane: str, *, wanted: Sequence[tuple[str, Cost]] = (),
        given_back: Sequence[Back] = (), limits: Limits | None = None, high: bool = False,
    ) -> Grant:  # fmt: skip
        """Renews the lease, frees the slots given back, takes slots for the first of `wanted`.

        `wanted`: (slot id, cost); ids are message ids, by which SQL knows them as well. `limits`:
        where they differ for this mailbox; `high`: what is kept for priority high may be used.
        """
        words = ["ask", lane, _ms(self.lease)]
        return await self._ask(mailbox, words, wanted, given_back, limits, high)

    async def visit(
        self, mailbox: str, name: str, seconds: float, *, cost: Cost | None = None,
        limits: Limits | None = None,
    ) -> Grant:  # fmt: skip
        """Takes one slot beside the lane, for a request that is no send; free after `seconds`."""
        words = ["visit", name, int(seconds * 1000)]
        return await self._ask(mailbox, words, [(name, cost or Cost())], (), limits, high=False)

    async def give_back(
        self, mailbox: str, name: str, *, age: timedelta = timedelta(0), used: Used = Used.ALL,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """The request of a visit came to its end `age` ago."""
        told = _limits(limits or self.limits, False)
        await self._do(mailbox, "back", *told, *_back([Back(name, age, used)]))

    async def leave(
        self, mailbox: str, lane: str, rung: int | None = None, *,
        given_back: Sequence[Back] = (), hold: timedelta = timedelta(0),
        limits: Limits | None = None,
    ) -> bool:  # fmt: skip
        """Ends the lane's lease; refused (False) if it was rung since `rung` was told.

        `hold`: the lane need not come again before, unless there is news.
        """
        answer = await self._do(
            mailbox, "leave", lane, "" if rung is None else rung, _ms(hold),
            *_limits(limits or self.limits, False), *_back(given_back),
        )  # fmt: skip
        return int(answer) != 0

    async def ring(
        self, mailboxes: Sequence[str], bell: timedelta | None = None, *, news: bool = True
    ) -> list[int]:
        """Tells the lanes of these mailboxes that there is work.

        For each, 1: somebody must start the lane; 0: it is at work or being started; negative: it
        need not come for so many milliseconds more. `bell`: how long an earlier ring counts;
        without `news` a lane that waits for a window is not disturbed.
        """
        if not mailboxes:
            return []
        args = [self._clock(), "ring", _ms(bell or self._bell), int(news)]
        return [int(n) for n in await self._call(keys=[_key(m) for m in mailboxes], args=args)]

    async def cool(
        self, mailbox: str, rest: timedelta, trouble: int | None = None, *, too_many: bool = False
    ) -> None:
        """No worker sends from this mailbox for so long; a longer cooldown stands.

        `trouble`: counts one more in a row, unless another worker has since this was told.
        `too_many`: Graph answered 429. Where that comes again after a few sends, somebody else
        uses the mailbox's slots as well: for a while, one less is used here.
        """
        seen = "" if trouble is None else trouble
        await self._do(mailbox, "cool", max(1, _ms(rest)), seen, int(too_many))

    async def calm(self, mailbox: str) -> None:
        """A send went well: the mailbox is in less trouble."""
        await self._do(mailbox, "calm")

    async def usage(self, mailbox: str, limits: Limits | None = None) -> Usage:
        """How full the windows of a mailbox are."""
        limits = limits or self.limits
        args = ["usage", *_limits(limits, True)]
        cool, bound, *used = await self._informed(mailbox, args, limits)
        amounts = {limit: n for limit, n in zip(WINDOWS, used, strict=True) if n >= 0}
        return Usage(timedelta(milliseconds=cool), bound.decode() or None, amounts)

    async def _ask(
        self, mailbox: str, words: list[Any], wanted: Sequence[tuple[str, Cost]],
        given_back: Sequence[Back], limits: Limits | None, high: bool,
    ) -> Grant:  # fmt: skip
        limits = limits or self.limits
        args = [*words, *_limits(limits, high), *_back(given_back), len(wanted)]
        for name, cost in wanted:
            args += (name, _cost(cost))
        word, count, wait, rung, trouble = await self._informed(mailbox, args, limits)
        waits = None if wait < 0 else timedelta(milliseconds=wait)
        return Grant(word.decode(), count, waits, rung, trouble)

    async def _informed(self, mailbox: str, args: Sequence[Any], limits: Limits) -> Any:
        """The answer of a gate that knows its past."""
        for _ in range(_LESSONS):
            answer = await self._do(mailbox, *args)
            if answer and answer[0] != _UNKNOWN:
                return answer
            await self._learn(mailbox, limits)
        raise RedisError("Redis forgets the gate again and again")

    async def _learn(self, mailbox: str, limits: Limits) -> None:
        """Tells Redis what SQL knows; a second lesson of the same changes nothing."""
        past = await self._history(mailbox, limits)
        args: list[Any] = [_ms(past.cooldown), *_limits(limits, True)]
        for limit in WINDOWS:
            entries = past.windows[limit].entries if limit in past.windows else ()
            args.append(len(entries))
            for first, last, amount in entries:
                args += (-first, -last, amount)
        args.append(len(past.flying))
        for name, ms, cost in past.flying:
            args += (name, ms, _cost(cost))
        await self._do(mailbox, "learn", *args)

    async def _do(self, mailbox: str, *args: Any) -> Any:
        return await self._call(keys=keys_of(mailbox), args=[self._clock(), *args])


def bounds(redis: SyncRedis, mailboxes: Sequence[str]) -> list[str | None]:
    """What keeps each of these mailboxes back now: a limit, `cooldown`, or nothing.

    For reports; asks without the script, and from any thread. Raises redis.RedisError.
    """
    with redis.pipeline(transaction=False) as pipe:
        pipe.time()
        for mailbox in mailboxes:
            pipe.hmget(_key(mailbox), "cool", "bound")
        (seconds, micros), *found = pipe.execute()
    now = seconds * 1000 + micros // 1000
    told: list[str | None] = []
    for cool, bound in found:
        name, _, until = (bound or b"").decode().partition(" ")
        binds = name if until and int(until) > now else None
        told.append("cooldown" if int(cool or 0) > now else binds)
    return told


@lru_cache(maxsize=1024)
def keys_of(mailbox: str) -> Sequence[str]:
    """The Redis keys of a mailbox's gate and of its tenant's."""
    stem = "postroom:{" + mailbox.lower() + "}"
    windows = [f"{stem}:{limit}" for limit in WINDOWS if limit is not Limit.EXTERNAL]
    tenant = "postroom:tenant"
    return (
        _key(mailbox), f"{stem}:slots", *windows,
        f"{tenant}:{Limit.EXTERNAL}", tenant, f"{tenant}:flying",
    )  # fmt: skip


def _key(mailbox: str) -> str:
    return "postroom:{" + mailbox.lower() + "}:gate"


def lane_token() -> str:
    """A new lane's token: unguessable, so that no lane takes another for itself."""
    return secrets.token_hex(8)


async def unheard(redis: Redis, mailboxes: Sequence[str], span: timedelta) -> list[str]:
    """Those whose task was sent so long ago or longer, and whose lane has not begun."""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    for mailbox in mailboxes:
        pipe.hmget(keys_of(mailbox)[0], "lease", "bell")
    (seconds, micros), *gates = await pipe.execute()
    now = seconds * 1000 + micros // 1000
    span_ms = int(span.total_seconds() * 1000)
    found = []
    for mailbox, gate in zip(mailboxes, gates, strict=True):
        lease, bell = (int(value or 0) for value in gate)
        if bell and lease <= now and now - bell >= span_ms:
            found.append(mailbox)
    return found


@lru_cache(maxsize=256)
def _limits(limits: Limits, high: bool) -> tuple[str, str]:
    """LIMITS of gate.lua."""
    rates = [limits.rate(limit) for limit in WINDOWS]
    shape = " ".join(f"{w}:{r.span_ms}" for w, r in zip(WINDOWS, rates, strict=True) if r)
    told = [limits.slots, 0 if high else limits.reserve_high]
    for rate in rates:
        told += (rate.amount, rate.span_ms) if rate else (0, -1)
    return shape, " ".join(map(str, told))


def _cost(c: Cost) -> str:
    """COST of gate.lua, in the order of WINDOWS."""
    return f"{c.requests} {c.messages} {c.recipients} {c.upload} {c.external}"


def _back(given_back: Sequence[Back]) -> list[Any]:
    """BACK of gate.lua. An age is rounded down: what ended counts for longer, never less long."""
    args: list[Any] = [len(given_back)]
    for one in given_back:
        args += (one.name, _ms(one.age), int(one.used))
    return args


def _ms(span: timedelta) -> int:
    return span // timedelta(milliseconds=1)
