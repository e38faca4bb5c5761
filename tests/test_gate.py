"""The gate: one lane a mailbox, four slots, one cooldown, for all workers together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from tests.doors_kit import nothing
from worker.gate import Back, Gate, keys_of, lane_token
from worker.limits import Cost, Limits, Used

MAILBOX = "notices@contoso.com"
MS = timedelta(milliseconds=1)
LONG = timedelta(minutes=1)


def slots(*names: str) -> list[tuple[str, Cost]]:
    """One message each."""
    return [(name, Cost(1, 1, 1)) for name in names]


def back(*names: str) -> list[Back]:
    """Accepted just now."""
    return [Back(name, timedelta(0), Used.ALL) for name in names]


async def ring(gate: Gate, **options: Any) -> int:
    """A ring for the one mailbox."""
    [answer] = await gate.ring([MAILBOX], **options)
    return answer


FOUR = slots("1", "2", "3", "4")


def on_gate(redis_url: str, work: Callable[[Gate, Redis], Awaitable[Any]], **options: Any) -> None:
    """Runs `work` with a gate on real Redis; no key is left without an end."""

    async def run() -> None:
        async with Redis.from_url(redis_url, decode_responses=False) as redis:
            await work(gate_of(redis, **options), redis)
            assert [k async for k in redis.scan_iter() if await redis.pttl(k) < 0] == []

    asyncio.run(run())


def gate_of(redis: Redis, *, limits: Limits | None = None, **options: Any) -> Gate:
    """Four slots and no windows, unless said otherwise."""
    return Gate(redis, limits or Limits(), history=nothing, **{"lease": LONG} | options)


async def until(ask: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Asks again until the answer is true."""
    deadline = asyncio.get_running_loop().time() + 20
    while not (answer := await ask()):
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.005)
    return answer


def test_one_lane_at_a_time_holds_a_mailbox(redis_url: str) -> None:
    """The second is told how long the first one's lease lasts; other mailboxes are free."""

    async def work(gate: Gate, _: Redis) -> None:
        assert (await gate.ask(MAILBOX, "a", wanted=slots("1"))).word == "granted"
        held = await gate.ask(MAILBOX.upper(), "b", wanted=slots("2"))
        assert (held.word, held.count) == ("held", 0)
        assert held.wait is not None
        assert timedelta(0) < held.wait <= LONG
        assert (await gate.ask("other@contoso.com", "b", wanted=slots("2"))).word == "granted"
        assert await gate.leave(MAILBOX, "a")
        assert (await gate.ask(MAILBOX, "b", wanted=slots("2"))).word == "granted"

    on_gate(redis_url, work)


def test_the_lane_of_a_dead_worker_passes_on_with_its_slots(redis_url: str) -> None:
    """Nobody ends the lane of a killed process: its lease does, and frees its slots with it."""

    async def work(gate: Gate, _: Redis) -> None:
        assert (await gate.ask(MAILBOX, "dead", wanted=FOUR)).count == 4

        async def next_lane() -> Any:
            grant = await gate.ask(MAILBOX, "next", wanted=FOUR)
            return grant if grant.word != "held" else None

        grant = await until(next_lane, "the lease ends")
        assert (grant.word, grant.count) == ("granted", 4)
        assert (await gate.ask(MAILBOX, "dead", wanted=slots("5"))).word == "held"

    on_gate(redis_url, work, lease=200 * MS)


def test_a_lane_that_asks_keeps_lease_and_slots(redis_url: str) -> None:
    """A request of a minute keeps its slot as long as its lane is heard of."""

    async def work(gate: Gate, _: Redis) -> None:
        loop = asyncio.get_running_loop()
        await gate.ask(MAILBOX, "a", wanted=slots("1", "2", "3"))
        ends = loop.time() + 1.5
        while loop.time() < ends:  # three leases long
            await gate.ask(MAILBOX, "a", wanted=())
        assert (await gate.ask(MAILBOX, "b", wanted=())).word == "held"
        assert (await gate.ask(MAILBOX, "a", wanted=FOUR)).count == 1

    on_gate(redis_url, work, lease=500 * MS)


def test_a_prefix_is_granted_and_what_is_given_back_is_free_at_once(redis_url: str) -> None:
    """As many of those asked for as there is room for, in the same call that gives back."""

    async def work(gate: Gate, redis: Redis) -> None:
        assert (await gate.ask(MAILBOX, "a", wanted=slots("1", "2", "3"))).count == 3
        assert (await gate.ask(MAILBOX, "a", wanted=slots("4", "5"))).count == 1
        full = await gate.ask(MAILBOX, "a", wanted=slots("5"))
        assert (full.word, full.count) == ("slots", 0)
        assert full.wait is not None
        assert full.wait > timedelta(0)
        again = await gate.ask(MAILBOX, "a", wanted=slots("5", "6", "7"), given_back=back("1", "4"))
        assert (again.word, again.count) == ("granted", 2)
        names = await redis.hkeys(keys_of(MAILBOX)[1])
        assert sorted(names) == [b"2", b"3", b"5", b"6"]

    on_gate(redis_url, work)


def test_fifty_tasks_never_send_more_than_four_at_once(redis_url: str) -> None:
    """The limit holds whoever asks: lanes that come and go, each with several senders."""

    async def work(_: Gate, redis: Redis) -> None:
        flying: set[str] = set()
        most = 0
        sent = 0

        async def lane(number: int) -> None:
            nonlocal most, sent
            gate, token, mine = gate_of(redis), lane_token(), 0
            while mine < 6:
                wanted = [f"{token}-{mine}-{n}" for n in range(1 + number % 6)]
                grant = await gate.ask(MAILBOX, token, wanted=slots(*wanted))
                got = wanted[: grant.count]
                flying.update(got)
                most, mine, sent = max(most, len(flying)), mine + len(got), sent + len(got)
                await asyncio.sleep(0)
                flying.difference_update(got)
                await gate.ask(MAILBOX, token, wanted=(), given_back=back(*got))
                await gate.leave(MAILBOX, token)

        await asyncio.gather(*(lane(n) for n in range(50)))
        assert most == 4
        assert sent >= 300

    on_gate(redis_url, work)


def test_fifty_senders_of_one_lane_share_its_four_slots(redis_url: str) -> None:
    """Asking many times at once gives no more than asking once."""

    async def work(gate: Gate, _: Redis) -> None:
        grants = await asyncio.gather(
            *(gate.ask(MAILBOX, "a", wanted=slots(f"{n}-1", f"{n}-2", f"{n}-3")) for n in range(50))
        )
        assert sum(grant.count for grant in grants) == 4

    on_gate(redis_url, work)


def test_a_visitor_that_found_no_slot_is_left_one(redis_url: str) -> None:
    """A lane that takes each slot as it falls free would keep it out; one that does not come again
    costs the lane a second.
    """
    now = 10_000_000

    async def work(gate: Gate, _: Redis) -> None:
        nonlocal now
        assert (await gate.ask(MAILBOX, "a", wanted=FOUR)).count == 4
        assert (await gate.visit(MAILBOX, "v", 60)).word == "slots"
        kept = await gate.ask(MAILBOX, "a", wanted=slots("5"), given_back=back("1"))
        assert (kept.word, kept.count) == ("slots", 0)
        assert (await gate.visit(MAILBOX, "v", 60)).count == 1
        full = await gate.ask(MAILBOX, "a", wanted=slots("6", "7"), given_back=back("2"))
        assert full.count == 1

        assert (await gate.visit(MAILBOX, "w", 60)).word == "slots"
        now += 1000
        assert (await gate.ask(MAILBOX, "a", wanted=slots("8"), given_back=back("3"))).count == 1

    on_gate(redis_url, work, clock=lambda: now)


def test_leaving_is_refused_when_rung_meanwhile(redis_url: str) -> None:
    """The ring came after the lane's last look: it must look again, or the wake-up is lost."""

    async def work(gate: Gate, _: Redis) -> None:
        seen = (await gate.ask(MAILBOX, "a", wanted=())).rung
        await ring(gate)
        assert not await gate.leave(MAILBOX, "a", seen)
        now = (await gate.ask(MAILBOX, "a", wanted=())).rung
        assert now == seen + 1
        assert await gate.leave(MAILBOX, "a", now)
        assert (await gate.ask(MAILBOX, "b", wanted=())).word == "granted"

    on_gate(redis_url, work)


def test_who_lost_the_lane_cannot_end_that_of_another(redis_url: str) -> None:
    """A worker that was frozen comes back: it is told to go, and the lane of today stays."""

    async def work(gate: Gate, _: Redis) -> None:
        await gate.ask(MAILBOX, "today", wanted=slots("1"))
        assert await gate.leave(MAILBOX, "yesterday")
        assert (await gate.ask(MAILBOX, "b", wanted=())).word == "held"

    on_gate(redis_url, work)


def test_a_ring_starts_a_lane_once(redis_url: str) -> None:
    """1: start it; 0: it is being started, or at work; 1 again when it was at work and left."""

    async def work(gate: Gate, _: Redis) -> None:
        assert [await ring(gate) for _ in range(3)] == [1, 0, 0]
        rung = (await gate.ask(MAILBOX, "a", wanted=())).rung
        assert await gate.leave(MAILBOX, "a", rung)
        assert await ring(gate) == 1
        await gate.ask(MAILBOX, "a", wanted=())
        assert await ring(gate) == 0

    on_gate(redis_url, work)


def test_a_sweeps_ring_does_not_disturb_a_lane_at_work(redis_url: str) -> None:
    """Only news makes it look anew; a mailbox without a lane is rung by both."""

    async def work(gate: Gate, _: Redis) -> None:
        before = (await gate.ask(MAILBOX, "a", wanted=())).rung
        await gate.ring([MAILBOX], timedelta(seconds=1), news=False)
        assert (await gate.ask(MAILBOX, "a", wanted=())).rung == before
        await gate.ring([MAILBOX], timedelta(seconds=1), news=True)
        assert (await gate.ask(MAILBOX, "a", wanted=())).rung == before + 1

    on_gate(redis_url, work)


def test_a_ring_whose_task_was_lost_is_sent_again(redis_url: str) -> None:
    """After a while without a lane at work, the next ring starts one."""

    async def work(gate: Gate, _: Redis) -> None:
        assert await ring(gate) == 1

        async def again() -> bool:
            return await ring(gate) == 1

        await until(again, "the bell ends")

    on_gate(redis_url, work, bell=100 * MS)


def test_a_cooldown_holds_for_every_lane_and_only_grows(redis_url: str) -> None:
    """A shorter one does not end a longer one; a ring says how much is left."""

    async def work(gate: Gate, _: Redis) -> None:
        await gate.cool(MAILBOX, 30 * LONG)
        await gate.cool(MAILBOX, LONG)
        grant = await gate.ask(MAILBOX, "a", wanted=slots("1"))
        assert (grant.word, grant.count) == ("cooling", 0)
        assert grant.wait is not None
        assert 29 * LONG < grant.wait <= 30 * LONG
        await gate.leave(MAILBOX, "a")
        assert (await gate.ask(MAILBOX, "b", wanted=slots("1"))).word == "cooling"
        await gate.leave(MAILBOX, "b")
        assert -30 * LONG <= await ring(gate) * MS < -29 * LONG
        assert (await gate.ask("other@contoso.com", "b", wanted=slots("1"))).word == "granted"

    on_gate(redis_url, work)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [([0, 3, 90], [4, 3, 3]), ([9, 9, 9], [4, 4, 4]), ([0, 3, 2, 1, 1], [4, 3, 2, 2, 2])],
    ids=["one slot is another's", "too seldom to say so", "never less than half"],
)
def test_where_graph_says_too_many_again_and_again_a_slot_less_is_used(
    redis_url: str, accepted: list[int], expected: list[int]
) -> None:
    """Who tries with all four each time pays for each time with a rest: for half a minute a slot is
    left to whoever has it.
    """
    now = [1_790_000_000_000]

    async def work(gate: Gate, _: Redis) -> None:
        async def room() -> int:
            """How many may go at once; none of them goes."""
            grant = await gate.ask(MAILBOX, "a", wanted=FOUR)
            unused = [Back(name, timedelta(0), Used.NOTHING) for name, _ in FOUR]
            await gate.ask(MAILBOX, "a", given_back=unused)
            return grant.count

        seen = []
        for sends in accepted:
            for n in range(sends):
                await gate.ask(MAILBOX, "a", wanted=slots(f"{n}"))
                await gate.ask(MAILBOX, "a", given_back=back(f"{n}"))
            for _n in range(2):  # those who flew together are told together
                await gate.cool(MAILBOX, 1000 * MS, too_many=True)
            now[0] += 1001
            seen.append(await room())
        assert seen == expected
        now[0] += 70_000
        assert await room() == 4

    on_gate(redis_url, work, clock=lambda: now[0], lease=100 * LONG)


def test_a_cooldown_ends_by_itself(redis_url: str) -> None:
    """Nobody has to lift it."""

    async def work(gate: Gate, _: Redis) -> None:
        await gate.cool(MAILBOX, 150 * MS)
        assert (await gate.ask(MAILBOX, "a", wanted=slots("1"))).word == "cooling"

        async def granted() -> bool:
            return (await gate.ask(MAILBOX, "a", wanted=slots("1"))).count == 1

        await until(granted, "the cooldown ends")

    on_gate(redis_url, work)


def test_a_cooldown_of_days_is_not_forgotten_before_its_end(redis_url: str) -> None:
    """The keys of a mailbox that nobody works go after a day, but not a cooldown with them."""

    async def work(gate: Gate, redis: Redis) -> None:
        await gate.cool(MAILBOX, timedelta(days=3))
        await ring(gate)
        await gate.ask(MAILBOX, "a", wanted=())
        assert await redis.pttl(keys_of(MAILBOX)[0]) * MS > timedelta(days=2)

    on_gate(redis_url, work)


LIMITS = ["", 4, 5, *(0, -1) * 5]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sleep", "a"],
        ["ask", "a"],
        ["ask", "a", "soon", *LIMITS, 0, 0],
        ["ask", "a", 1000, *LIMITS, 1, "back"],
        ["ask", "a", 1000, *LIMITS, 0, 2, "1", 1, 1, 1, 1, 1],
        ["ask", "a", 1000, *LIMITS, 0, 1, "1", 1, 1, 1, 1, "some"],
        ["ask", "a", 1000, *LIMITS, 0, 0, "left over"],
        ["ask", "a", 1000, *LIMITS[:-1], 0, 0],
        ["ring", "often"],
        ["cool", "1.5"],
    ],
)
def test_wrong_arguments_are_an_error_and_leave_nothing(
    redis_url: str, arguments: list[Any]
) -> None:
    """All or nothing: a call that fails has written nothing."""

    async def work(gate: Gate, redis: Redis) -> None:
        await gate.ask(MAILBOX, "a", wanted=slots("back"))
        keys = keys_of(MAILBOX)
        before = [await redis.dump(key) for key in keys]
        with pytest.raises(ResponseError, match=r"gate\.lua"):
            await gate._do(MAILBOX, *arguments)
        assert [await redis.dump(key) for key in keys] == before

    on_gate(redis_url, work)


def test_a_redis_that_forgot_its_scripts_is_told_again(redis_url: str) -> None:
    """After a restart of Redis: the asking is heard, and once."""

    async def work(gate: Gate, redis: Redis) -> None:
        await gate.ask(MAILBOX, "a", wanted=slots("1"))
        await redis.script_flush()
        heard = await asyncio.gather(
            gate.ask(MAILBOX, "a", wanted=slots("2")), gate.ask("other@contoso.com", "b")
        )
        assert [one.word for one in heard] == ["granted", "granted"]
        assert await redis.hlen(keys_of(MAILBOX)[1]) == 2

    on_gate(redis_url, work)


def test_lanes_that_ask_together_share_a_round_trip(redis_url: str) -> None:
    """Each has its own answer, and no connection is added; whoever waits no longer gets nothing."""

    async def work(gate: Gate, redis: Redis) -> None:
        boxes = [f"box{n}@contoso.com" for n in range(20)]
        await asyncio.gather(*(gate.ask(b, b) for b in boxes))
        before = len(await redis.client_list())
        asked = [asyncio.create_task(gate.ask(b, b, wanted=slots(b, b + "2"))) for b in boxes]
        await asyncio.sleep(0)  # all of them have asked
        asked.pop(7).cancel()

        assert {(one.word, one.count) for one in await asyncio.gather(*asked)} == {("granted", 2)}
        assert await redis.hlen(keys_of(boxes[7])[1]) == 0
        assert len(await redis.client_list()) == before, "more connections"

    on_gate(redis_url, work)


def test_where_redis_is_gone_every_lane_that_asked_is_told(tmp_path: Path) -> None:
    """Nobody waits for an answer that cannot come."""

    async def run() -> list[Any]:
        async with Redis.from_url(f"unix://{tmp_path}/gone.sock") as redis:
            gate = gate_of(redis)
            asked = [gate.ask(MAILBOX, "a") for _ in range(3)]
            return await asyncio.gather(*asked, return_exceptions=True)

    assert [isinstance(one, RedisError) for one in asyncio.run(run())] == [True] * 3
