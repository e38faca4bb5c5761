"""The inbox: a Redis stream in which chunks of batches wait until they are rows in SQL.

The producer's calls translate Redis's failures into ours, with the batch id to repeat with; the
reader's calls let them pass, because the reader simply comes again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from worker.model import IdempotencyConflict, InboxFull, Unavailable

if TYPE_CHECKING:
    from redis import Redis
    from redis.commands.core import Script

STREAM = "postroom:inbox"
GROUP = "postroom"
BYTES = "postroom:inbox:bytes"
BELL = "postroom:inbox:bell"
#: What could not be read, and belongs to no batch; for a person to look at.
ASIDE = "postroom:inbox:aside"
#: How often each chunk was tried that had been given out before: a reader may have died of it.
SUSPECTS = "postroom:inbox:suspects"
#: A ring that nobody followed is repeated after this long, in milliseconds.
BELL_MS = 1000
#: How long a whole batch is remembered in Redis, so that a repeat needs no SQL.
REMEMBER = timedelta(hours=1)

#: What a batch's hash holds of the batch, and not of its chunks.
_HEAD = ("head", "digest", "chunks", "messages")
_LUA = Path(__file__).with_name("inbox.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Batch:
    """What every chunk says of its batch. `head` is JSON; `digest` decides what is the same."""

    id: str
    digest: str
    head: str
    chunks: int
    messages: int


@dataclass(frozen=True, slots=True)
class Appended:
    """`created` is false where the chunk was there already; `ring`: nobody was rung lately."""

    created: bool
    ring: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk as read. `body`: a JSON array of [position, recipients, primary, content]."""

    id: str
    batch_id: str
    number: int
    count: int
    first: int  #: the position of its first message; 0 where it does not say
    digest: str
    body: bytes
    deliveries: int  #: how often it was given to a reader, this time included
    trouble: str | None = None  #: why it is no chunk at all; None: it is one


@dataclass(frozen=True, slots=True)
class Depth:
    """What waits in the inbox: chunks, their bytes, and for how many seconds the oldest has."""

    chunks: int
    bytes: int
    lag: float


class Inbox:
    """The stream's two sides. `redis` must not retry by itself: a script would count twice."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    @cached_property
    def _script(self) -> Script:
        script: Script = self._redis.register_script(_LUA)
        return script

    # ---- the producer's side -------------------------------------------------------------------

    def now(self, batch_id: str | None = None) -> datetime:
        """Redis's time. Raises Unavailable."""
        try:
            seconds, micros = self._redis.time()
        except RedisError as error:
            raise _ours(error, batch_id) from error
        return datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=micros)

    def append_chunk(
        self, batch: Batch, number: int, *, count: int, first: int, digest: str, body: bytes,
        budget: int,
    ) -> Appended:  # fmt: skip
        """Appends chunk `number` (from 1) of `count` messages, from position `first`, unless it is
        there.

        `budget`: bytes that may wait. Raises IdempotencyConflict, InboxFull, Unavailable.
        """
        args: list[Any] = ["append", batch.id, number, batch.digest, batch.head, batch.chunks,
                           batch.messages, count, digest, body, budget, BELL_MS, first]  # fmt: skip
        try:
            word, ring = self._script(keys=[STREAM, BYTES, BELL, _key(batch.id)], args=args)
        except RedisError as error:
            raise _ours(error, batch.id) from error
        match word.decode() if isinstance(word, bytes) else word:
            case "conflict":
                raise IdempotencyConflict(batch.id)
            case "full":
                raise InboxFull(batch.id)
            case answer:
                return Appended(answer == "created", bool(ring))

    def known(self, batch_id: str) -> Mapping[str, Any] | None:
        """As `batch`, for the producer. Raises Unavailable."""
        try:
            return self.batch(batch_id)
        except RedisError as error:
            raise _ours(error, batch_id) from error

    # ---- the reader's side ---------------------------------------------------------------------

    def read(self, consumer: str, count: int, idle_ms: int) -> list[Entry]:
        """Up to `count` chunks: first those whose reader was silent for `idle_ms`, then new ones.

        Does not wait. A group that is absent (Redis was emptied) is made again.
        """
        self._redis.delete(BELL)
        try:
            return self._read(consumer, count, idle_ms)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        self._make_group()
        return self._read(consumer, count, idle_ms)

    def done(self, entries: Sequence[Entry]) -> int:
        """Takes chunks out of the inbox for good; how many were still there."""
        if not entries:
            return 0
        args: list[Any] = ["done"]
        for entry in entries:
            args += [entry.id, len(entry.body)]
        return int(self._script(keys=[STREAM, BYTES, BELL, _key("")], args=args))

    def suspect(self, entry: Entry) -> int:
        """A chunk is about to be tried again: how often that has ended without a word, with this.

        A reader that fails in order says so by `cleared`; one that dies does not.
        """
        return int(self._redis.hincrby(SUSPECTS, entry.id, 1))

    def cleared(self, entry: Entry) -> None:
        """The reader of a suspect lives."""
        self._redis.hdel(SUSPECTS, entry.id)

    def set_aside(self, entry: Entry, why: str) -> None:
        """Keeps a chunk that nothing can be made of, out of the others' way."""
        fields = {"batch": entry.batch_id, "n": entry.number, "count": entry.count,
                  "first": entry.first, "digest": entry.digest, "body": entry.body,
                  "why": why}  # fmt: skip
        self._redis.xadd(ASIDE, fields)

    def head(self, batch_id: str) -> dict[str, Any] | None:
        """As `batch`, without what grows with its chunks: arrived and numbers."""
        known = dict(zip(_HEAD, self._redis.hmget(_key(batch_id), _HEAD), strict=True))
        return None if known["head"] is None else _head_of(known)

    def batch(self, batch_id: str) -> dict[str, Any] | None:
        """What Redis knows of a batch, or None.

        head (mapping), digest, chunks and messages (totals), arrived (messages appended), numbers
        (number → count of the chunks appended).
        """
        raw = self._redis.hgetall(_key(batch_id))
        if not raw:
            return None
        found = {_text(k): _text(v) for k, v in raw.items()}
        return _head_of(found) | {
            "arrived": int(found["arrived"]),
            "numbers": {int(k[2:]): int(v) for k, v in found.items() if k.startswith("c:")},
        }

    def forget(self, batch_id: str) -> None:
        """SQL has all of this batch: Redis remembers it for an hour more."""
        self._redis.expire(_key(batch_id), REMEMBER)

    def waiting(self) -> int:
        """How many chunks are in the inbox."""
        return int(self._redis.xlen(STREAM))

    def depth(self) -> Depth:
        """What waits to become rows. Raises redis.RedisError."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xlen(STREAM).get(BYTES).xrange(STREAM, count=1).time()
            chunks, size, first, (seconds, micros) = pipeline.execute()
        now_ms = seconds * 1000 + micros // 1000
        since_ms = int(_text(first[0][0]).partition("-")[0]) if first else now_ms
        return Depth(chunks, int(size or 0), max(0, now_ms - since_ms) / 1000)

    def _read(self, consumer: str, count: int, idle_ms: int) -> list[Entry]:
        answer = self._redis.xautoclaim(STREAM, GROUP, consumer, idle_ms, "0-0", count=count)
        claimed = [(i, f) for i, f in answer[1] if f]
        if gone := [i for i, f in answer[1] if not f]:  # deleted by hand, and still pending
            self._redis.xack(STREAM, GROUP, *gone)
        deliveries = self._deliveries(claimed)
        fresh: list[Any] = []
        if len(claimed) < count:
            wanted = count - len(claimed)
            answer = self._redis.xreadgroup(GROUP, consumer, {STREAM: ">"}, count=wanted)
            fresh = _of_stream(answer)
        return [_entry(i, f, deliveries.get(i, 1)) for i, f in [*claimed, *fresh]]

    def _deliveries(self, claimed: Sequence[tuple[Any, Any]]) -> dict[Any, int]:
        if not claimed:
            return {}
        first, last = claimed[0][0], claimed[-1][0]
        # Between them lie those of other readers as well, at most as many as are pending.
        rows = self._redis.xpending_range(STREAM, GROUP, first, last, 10_000)
        return {row["message_id"]: int(row["times_delivered"]) for row in rows}

    def _make_group(self) -> None:
        try:
            self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):  # another reader was quicker
                raise


def _head_of(known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "head": json.loads(known["head"]), "digest": _text(known["digest"]),
        "chunks": int(known["chunks"]), "messages": int(known["messages"]),
    }  # fmt: skip


def _key(batch_id: str) -> str:
    return f"postroom:batch:{batch_id}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _of_stream(answer: Any) -> list[Any]:
    """The entries of the one stream that was read, from RESP2's list or RESP3's map."""
    if not answer:
        return []
    if isinstance(answer, dict):
        found = next(iter(answer.values()))
        return list(found[0]) if found and isinstance(found[0], list) else list(found)
    return list(answer[0][1])


def _entry(entry_id: Any, fields: Mapping[Any, Any], deliveries: int) -> Entry:
    of = {_text(key): value for key, value in fields.items()}
    body = of.get("body", b"")
    numbers = {name: _number(of.get(name)) for name in ("n", "count", "first")}
    whole = {"batch", "digest", "body"} <= of.keys() and numbers["n"] and numbers["count"]
    return Entry(
        id=_text(entry_id),
        batch_id=_text(of.get("batch", "")),
        number=numbers["n"],
        count=numbers["count"],
        first=numbers["first"],
        digest=_text(of.get("digest", "")),
        body=body if isinstance(body, bytes) else body.encode(),
        deliveries=deliveries,
        trouble=None if whole else "it is no chunk of a batch",
    )


def _number(value: Any) -> int:
    """A number from 1; 0 where it is none."""
    text = _text(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _ours(error: RedisError, batch_id: str | None) -> Unavailable | InboxFull:
    """Redis's failure in our words. The text names no address and no password."""
    if batch_id and isinstance(error, ResponseError) and "OOM command not allowed" in str(error):
        return InboxFull(batch_id)
    return Unavailable(f"Redis does not answer ({type(error).__name__})", batch_id)
