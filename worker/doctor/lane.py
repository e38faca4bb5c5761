"""A slot of a mailbox beside the workers' lane: the limits hold for the doctor too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from worker.gate import COOLING, lane_token

if TYPE_CHECKING:
    from worker.runtime import Runtime

T = TypeVar("T")

#: A worker's turn at a mailbox takes seconds; so long the doctor waits for its own.
PATIENCE = 20.0


class Busy(Exception):
    """The mailbox could not be borrowed; the text says why."""


async def borrowed(rt: Runtime, mailbox: str, work: Callable[[], Awaitable[T]]) -> T:
    """Runs `work` in a slot of this mailbox. Raises Busy, RedisError, SQLAlchemyError."""
    slot = f"doctor-{lane_token()}"
    seen = await asyncio.to_thread(rt.store.mailboxes.seen, mailbox)
    limits = rt.gate.limits.changed(seen.limits)
    give_up = time.monotonic() + PATIENCE
    while True:
        grant = await rt.gate.visit(mailbox, slot, rt.settings.lease.total_seconds(), limits=limits)
        if grant.count:
            break
        if grant.word == COOLING and grant.wait:
            raise Busy(f"it rests for {grant.wait.total_seconds():.0f} s after an error")
        if time.monotonic() > give_up:
            raise Busy("a worker is sending from it all the time")
        await asyncio.sleep(0.2)
    try:
        return await work()
    finally:
        await rt.gate.give_back(mailbox, slot, limits=limits)
