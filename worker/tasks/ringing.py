"""Ringing: a mailbox with work for it gets the task of its lane, once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta

from redis.exceptions import RedisError

from worker.broker import EXPIRES
from worker.gate import BELL, unheard
from worker.runtime import Runtime
from worker.sweep import mailboxes_of

#: A wait of at most so many seconds is rung after to the moment; longer ones the sweep ends.
SOON = 10.0
#: A task that nobody followed for so long may never be: its lane begins without it.
UNHEARD = timedelta(seconds=1.5)


def wake(rt: Runtime, targets: Sequence[tuple[str, str]], *, news: bool) -> None:
    """Rings for each mailbox that serves a target (kind, name). `news`: something new is due."""
    pools = rt.pools() if any(kind == "pool" for kind, _ in targets) else {}
    resting = rt.store.mailboxes.resting() if pools else set()
    mailboxes = [m for m in mailboxes_of(targets, pools) if m not in resting]
    answers = rt.call(rt.gate.ring(mailboxes, _patience(rt), news=news))
    for mailbox, answer in zip(mailboxes, answers, strict=True):
        if answer > 0:
            rt.bell.deliver(mailbox)


def _patience(rt: Runtime) -> timedelta:
    """How long a task that was sent counts as under way.

    Where tasks queue up for a thread, it is not lost: a second one would take another's turn.
    """
    return timedelta(seconds=EXPIRES) if rt.crowded.is_set() else BELL


def ring_after(rt: Runtime, mailbox: str, seconds: float) -> None:
    """Rings when a wait is over; costs no thread meanwhile. If it is lost, the sweep rings."""

    async def later() -> None:
        rest: float | None = seconds  # 0: its turn is over, and it goes on at once
        with contextlib.suppress(RedisError):
            while rest is not None and not rt.stop.is_set():
                await asyncio.sleep(rest)
                [answer] = await rt.gate.ring([mailbox], _patience(rt), news=False)
                if answer > 0:
                    await asyncio.to_thread(rt.bell.deliver, mailbox)
                rest = -answer / 1000 if 0 < -answer < SOON * 1000 else None

    rt.submit(later())


async def never_heard(rt: Runtime) -> list[str]:
    """The mailboxes whose task was sent, and nobody followed."""
    targets = await asyncio.to_thread(rt.store.due_targets)
    pools = await asyncio.to_thread(rt.pools) if targets else {}
    return await unheard(rt.loops_redis, mailboxes_of(targets, pools), UNHEARD)
