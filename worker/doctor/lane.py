"""A mailbox's lane, borrowed from the workers: the limits hold for the doctor too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from worker.gate import lane_token

if TYPE_CHECKING:
    from worker.runtime import Runtime

T = TypeVar("T")

#: A worker's turn at a mailbox takes seconds; so long the doctor waits for its own.
PATIENCE = 20.0


class Busy(Exception):
    """The mailbox could not be borrowed; the text says why."""


async def borrowed(rt: Runtime, mailbox: str, work: Callable[[], Awaitable[T]]) -> T:
    """Runs `work` while no worker sends from this mailbox. Raises Busy, redis.RedisError."""
    lane = lane_token()
    slot = f"{lane}-0"
    give_up = time.monotonic() + PATIENCE
    while True:
        grant = await rt.gate.ask(mailbox, lane, wanted=[slot])
        if grant.count:
            break
        if grant.word == "cooling":
            raise Busy(f"it rests for {grant.wait.total_seconds():.0f} s after an error")
        if time.monotonic() > give_up:
            raise Busy("a worker is sending from it all the time")
        await asyncio.sleep(0.2)
    try:
        return await work()
    finally:
        await rt.gate.ask(mailbox, lane, wanted=[], given_back=[slot])
        await rt.gate.leave(mailbox, lane)
