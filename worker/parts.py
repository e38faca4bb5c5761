"""Parts of attachments on their way into SQL: a Redis stream beside the inbox.

A content travels once, whatever number of messages refers to it, and before all of them. The
chunks of messages hold references only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from worker.model import InboxFull, Part, Unavailable

if TYPE_CHECKING:
    from redis import Redis
    from redis.commands.core import Script

STREAM = "postroom:parts"
GROUP = "postroom"
BYTES = "postroom:parts:bytes"
_INBOX_BYTES = "postroom:inbox:bytes"
#: How many parts one transaction takes: a few megabytes.
BLOCK = 4
#: A part whose reader was not heard of for so long is read by another, in milliseconds.
IDLE_MS = 10_000
#: How long a content that SQL has need not come again, in seconds.
FORGET = 60

_LUA = Path(__file__).with_name("parts.lua").read_text(encoding="utf-8")


class Parts:
    """The stream's two sides. `redis` must not retry by itself."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    @cached_property
    def _script(self) -> Script:
        script: Script = self._redis.register_script(_LUA)
        return script

    def append(self, part: Part, *, budget: int, batch_id: str) -> bool:
        """Appends a part unless it is there; whether it was not.

        `budget`: bytes that may wait, messages and parts together. Raises InboxFull, Unavailable.
        """
        args: list[Any] = ["append", part.sha256, part.size, part.number, part.content, budget]
        try:
            word = _text(self._script(keys=_keys(part.sha256), args=args))
        except RedisError as error:
            if "OOM command not allowed" in str(error):
                raise InboxFull(batch_id) from error
            what = f"Redis does not answer ({type(error).__name__})"
            raise Unavailable(what, batch_id) from error
        if word == "full":
            raise InboxFull(batch_id)
        return word == "created"

    def drain(
        self, consumer: str, write: Callable[[Sequence[Part]], None],
        enough: Callable[[], bool] = lambda: False,
    ) -> int:  # fmt: skip
        """Gives what waits to `write`, block by block, and takes it away once it is written.

        A crash in between leaves the block to the next reader. Gives the number of parts.
        """
        count = 0
        while not enough() and (block := self._read(consumer)):
            write([part for _, part in block])
            for entry, part in block:
                args: list[Any] = ["done", FORGET, entry, len(part.content)]
                self._script(keys=_keys(part.sha256), args=args)
            count += len(block)
        return count

    def waiting(self) -> int:
        """How many parts wait."""
        return int(self._redis.xlen(STREAM))

    def _read(self, consumer: str) -> list[tuple[str, Part]]:
        if not self._redis.exists(STREAM):
            return []
        try:
            return self._entries(consumer)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        try:
            self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):  # another reader was quicker
                raise
        return self._entries(consumer)

    def _entries(self, consumer: str) -> list[tuple[str, Part]]:
        claimed = self._redis.xautoclaim(STREAM, GROUP, consumer, IDLE_MS, "0-0", count=BLOCK)
        found = [(i, f) for i, f in claimed[1] if f]
        if len(found) < BLOCK:
            wanted = BLOCK - len(found)
            answer = self._redis.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=wanted)
            found += _of_stream(answer)
        return [(_text(i), _part(f)) for i, f in found]


def _keys(sha256: str) -> list[str]:
    return [STREAM, BYTES, f"postroom:content:{sha256}", _INBOX_BYTES]


def _of_stream(answer: Any) -> list[Any]:
    """The entries of the one stream that was read, from RESP2's list or RESP3's map."""
    if not answer:
        return []
    if isinstance(answer, dict):
        found = next(iter(answer.values()))
        return list(found[0]) if found and isinstance(found[0], list) else list(found)
    return list(answer[0][1])


def _part(fields: Mapping[Any, Any]) -> Part:
    of = {_text(key): value for key, value in fields.items()}
    return Part(_text(of["sha"]), int(of["size"]), int(of["n"]), of["part"])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
