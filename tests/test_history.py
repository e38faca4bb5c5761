"""What SQL knows of a mailbox's last hours becomes the books of a gate that Redis has lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis
from sqlalchemy import update

from tests.store_kit import AGAIN, IN_DOUBT, MAILBOX, SENT, Kit, opened, to_record
from worker.gate import Gate, Past
from worker.limits import Cost, Limit, Limits, Rate
from worker.model import Verdict
from worker.store.schema import attempts, mailboxes

LIMITS = Limits(
    4, Rate.parse("100/10min"), Rate.parse("50/10min"), Rate.parse("9500/24h"),
    Rate.parse("1MB/5min"), Rate.parse("1000/24h"), reserve_high=0,
)  # fmt: skip


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def used(kit: Kit, mailbox: str = MAILBOX) -> dict[Limit, int]:
    """How much each window holds."""
    return {limit: w.total for limit, w in kit.store.history.windows(mailbox, LIMITS).items()}


def worked(kit: Kit, verdict: Verdict, count: int = 1) -> None:
    """A batch of which every message was tried once, with this verdict."""
    head, ids = kit.batch(count)
    fences = kit.claim(ids, external=1)
    kit.record(*(replace(to_record(head, i, fences[i], verdict), external=1) for i in ids))


def test_every_window_holds_what_its_attempts_came_to(kit: Kit) -> None:
    """Accepted and in doubt count in all, a refusal as a request with its bytes."""
    worked(kit, SENT, 3)
    worked(kit, IN_DOUBT, 2)
    worked(kit, AGAIN, 4)

    assert used(kit) == {
        Limit.REQUESTS: 9, Limit.MESSAGES: 5, Limit.RECIPIENTS: 5, Limit.UPLOAD: 9 * 900,
        Limit.EXTERNAL: 5,
    }  # fmt: skip


def test_what_lies_further_back_than_a_window_is_not_in_it(kit: Kit) -> None:
    """An attempt of half an hour ago is in the day's window alone."""
    worked(kit, SENT, 3)
    with kit.engine.begin() as connection:
        past = datetime.now(UTC) - timedelta(minutes=30)
        connection.execute(update(attempts).values(at=past))

    assert {limit for limit, n in used(kit).items() if n} == {Limit.RECIPIENTS, Limit.EXTERNAL}


def test_the_tenants_window_holds_what_all_mailboxes_sent(kit: Kit) -> None:
    """And what the others have in flight: only their own gates know those slots."""
    worked(kit, SENT, 2)
    _, ids = kit.batch(1)
    kit.claim(ids, external=1)

    assert used(kit, "other@contoso.com")[Limit.EXTERNAL] == 3
    assert used(kit, "other@contoso.com")[Limit.RECIPIENTS] == 0


def test_open_claims_and_the_cooldown_are_known_with_the_time_they_last(kit: Kit) -> None:
    """They become slots and a rest again."""
    _, ids = kit.batch(1)
    kit.claim(ids, external=1)
    with kit.engine.begin() as connection:
        until = datetime.now(UTC) + timedelta(minutes=5)
        connection.execute(mailboxes.insert().values(address=MAILBOX, cooldown_until=until))

    [(name, ms, cost)] = kit.store.history.flying(MAILBOX)

    assert (name, cost) == (ids[0], Cost(1, 1, 1, 900, 1))
    assert 0 < ms <= 90_000
    assert timedelta(minutes=4) < kit.store.history.cooldown(MAILBOX) <= timedelta(minutes=5)
    assert kit.store.history.cooldown("other@contoso.com") == timedelta(0)


def test_a_gate_that_redis_forgot_learns_before_it_grants(kit: Kit, redis_url: str) -> None:
    """47 of 50 messages are known to SQL, one of them still in flight: three more may go."""
    worked(kit, SENT, 46)
    _, ids = kit.batch(1)
    kit.claim(ids, external=1)

    async def past(mailbox: str, limits: Limits) -> Past:
        known = kit.store.history
        return Past(known.windows(mailbox, limits), known.flying(mailbox))

    async def granted() -> list[tuple[str, int]]:
        async with Redis.from_url(redis_url) as client:
            gate = Gate(client, LIMITS, history=past)
            wanted = [(str(n), Cost(1, 1)) for n in range(9)]
            first = await gate.ask(MAILBOX, "lane", wanted=wanted)
            second = await gate.ask(MAILBOX, "lane", wanted=wanted[:1])
            await client.flushdb()
            again = await gate.ask(MAILBOX, "lane", wanted=[("x", Cost(1, 4))])
            return [(grant.word, grant.count) for grant in (first, second, again)]

    assert asyncio.run(granted()) == [("granted", 3), ("slots", 0), ("messages", 0)]
