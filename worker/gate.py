"""The gate: where a lane asks leave to send. All its state lies in Redis, for all workers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from redis.asyncio import Redis

#: A lane that is not heard of for this long is dead: another worker may take the mailbox.
LANE_LEASE = timedelta(seconds=10)
#: A ring counts as under way for this long; then the next one sends a task again: a task that was
#: lost costs this time.
BELL = timedelta(seconds=3)

_SCRIPT = Path(__file__).with_name("gate.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Grant:
    """What the gate said: how many of those asked for may go, or how long to wait and why."""

    word: Literal["granted", "held", "cooling", "full"]
    count: int
    wait: timedelta
    rung: int  #: how often the lane was rung so far
    trouble: int = 0  #: how often in a row sends of this mailbox went wrong


class Gate:
    """The gates of all mailboxes. Raises redis.RedisError when Redis is gone: nothing is sent."""

    def __init__(
        self, redis: Redis, *, concurrency: int, lease: timedelta = LANE_LEASE,
        bell: timedelta = BELL,
    ) -> None:  # fmt: skip
        self._call = redis.register_script(_SCRIPT)
        self._concurrency = concurrency
        self.lease = lease
        self._lease_ms = int(lease.total_seconds() * 1000)
        self._bell_ms = int(bell.total_seconds() * 1000)

    async def ask(
        self, mailbox: str, lane: str, *, wanted: Sequence[str], given_back: Sequence[str] = ()
    ) -> Grant:
        """Renews the lease, frees the slots given back, takes slots for the first of `wanted`.

        `wanted` and `given_back` are slot ids of the lane's own choosing.
        """
        word, count, wait_ms, rung, trouble = await self._do(
            mailbox, "ask", lane, self._lease_ms, self._concurrency,
            len(given_back), *given_back, len(wanted), *wanted,
        )  # fmt: skip
        return Grant(word.decode(), count, timedelta(milliseconds=wait_ms), rung, trouble)

    async def leave(self, mailbox: str, lane: str, rung: int | None = None) -> bool:
        """Ends the lane's lease; refused (False) if it was rung since `rung` was told."""
        answer = await self._do(mailbox, "leave", lane, "" if rung is None else rung)
        return int(answer) != 0

    async def ring(self, mailbox: str, bell: timedelta | None = None) -> int:
        """Tells the lane of this mailbox that there is work.

        1: somebody must start the lane; 0: it is at work or being started; negative: it cools
        down for so many milliseconds more. `bell`: how long an earlier ring counts.
        """
        bell_ms = self._bell_ms if bell is None else int(bell.total_seconds() * 1000)
        return int(await self._do(mailbox, "ring", bell_ms))

    async def cool(self, mailbox: str, rest: timedelta, trouble: int | None = None) -> None:
        """No worker sends from this mailbox for so long; a longer cooldown stands.

        `trouble`: counts one more in a row, unless another worker has since this was told.
        """
        told = "" if trouble is None else trouble
        await self._do(mailbox, "cool", max(1, int(rest.total_seconds() * 1000)), told)

    async def calm(self, mailbox: str) -> None:
        """A send went well: the mailbox is in no trouble any more."""
        await self._do(mailbox, "calm", "")

    async def _do(self, mailbox: str, *args: Any) -> Any:
        return await self._call(keys=keys_of(mailbox), args=args)


def keys_of(mailbox: str) -> list[str]:
    """The Redis keys of a mailbox's gate; the braces keep them in one hash slot."""
    stem = "postroom:{" + mailbox.lower() + "}"
    return [f"{stem}:gate", f"{stem}:slots"]


def lane_token() -> str:
    """A new lane's token: unguessable, so that no lane takes another for itself."""
    return secrets.token_hex(8)
