"""Ingest: what lies in the inbox becomes rows in SQL, and only then leaves the inbox.

What cannot be read never stands in the way of the rest: of a known batch it becomes rows that
failed, and whatever else it is goes aside. Both are events.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from worker.inbox import Entry, Inbox
from worker.staging import addresses
from worker.store import Chunk, Head, Store
from worker.store.retrying import is_of_the_data, name_of

log = logging.getLogger(__name__)

#: How many chunks one transaction takes; each is up to 1 MiB of JSON, and ten times that in memory.
BLOCK = 5
#: A block whose reader was not heard of for so long is read by another, in milliseconds.
IDLE_MS = 10_000
#: A chunk with which so many readers ended without a word is not read again: it may be the chunk.
POISON = 3


def ingest(
    inbox: Inbox, store: Store, *, consumer: str, max_age: timedelta,
    wake: Callable[[Sequence[tuple[str, str]]], None], enough: Callable[[], bool] = lambda: False,
) -> dict[str, int]:  # fmt: skip
    """Reads the inbox until it is empty; `wake` is told the (kind, target) of what became whole.

    A crash before the commit leaves the block to the next reader; one after it makes the next
    reader write the same again, which changes nothing.
    """
    done = {"chunks": 0, "messages": 0, "batches": 0}
    while not enough():
        entries = inbox.read(consumer, BLOCK, IDLE_MS)
        if not entries:
            break
        block = [e for e in entries if e.deliveries <= 1]
        whole = _take_in(inbox, store, block, max_age, done) if block else []
        for entry in entries:
            if entry.deliveries > 1:
                whole += _take_suspect(inbox, store, entry, max_age, done)
        for head in whole:
            inbox.forget(head.id)
            log.info("batch %s: whole with %d messages", head.id, head.total,
                     extra={"batch_id": head.id})  # fmt: skip
        wake(sorted({(head.target_kind, head.target) for head in whole}))
        done["batches"] += len(whole)
    return done


def _take_suspect(
    inbox: Inbox, store: Store, entry: Entry, max_age: timedelta, done: dict[str, int]
) -> list[Head]:
    """A chunk that another reader had before: by itself, and not for ever."""
    tries = inbox.suspect(entry)
    why = f"{tries - 1} readers of it ended without a word" if tries > POISON else None
    try:
        return _take_in(inbox, store, [entry], max_age, done, why)
    finally:
        inbox.cleared(entry)


def _take_in(
    inbox: Inbox, store: Store, entries: Sequence[Entry], max_age: timedelta,
    done: dict[str, int], trouble: str | None = None,
) -> list[Head]:  # fmt: skip
    """Writes these chunks and takes them out of the inbox; the batches that became whole.

    `trouble`: why they are not to be read.
    """
    heads = {b: _head(inbox, b, max_age) for b in {e.batch_id for e in entries}}
    known = {batch_id: head for batch_id, head in heads.items() if head is not None}
    chunks = [_chunk(inbox, e, trouble) for e in entries if e.batch_id in known and not e.trouble]
    try:
        whole = store.arrive(known.values(), chunks) if chunks else []
    except (SQLAlchemyError, OverflowError) as error:
        if not is_of_the_data(error) or trouble:
            raise
        if len(entries) == 1:
            why = f"the database refuses what it holds ({name_of(error)})"
            return _take_in(inbox, store, entries, max_age, done, why)
        return [h for e in entries for h in _take_in(inbox, store, [e], max_age, done)]
    for entry in entries:
        if entry.trouble or entry.batch_id not in known:
            _set_aside(inbox, store, entry)
    inbox.done(entries)
    done["chunks"] += len(chunks)
    done["messages"] += sum(len(c.rows) for c in chunks)
    return whole


def _chunk(inbox: Inbox, entry: Entry, trouble: str | None) -> Chunk:
    """The chunk, or what is known of one that cannot be read."""
    if trouble is None:
        try:
            rows = json.loads(entry.body)
            _check(rows, entry.count)
            return Chunk(entry.batch_id, entry.number, entry.digest, rows)
        except (ValueError, RecursionError) as error:
            trouble = f"it cannot be read ({type(error).__name__})"
    log.error("batch %s: chunk %d with %d messages: %s; they end as failed",
              entry.batch_id, entry.number, entry.count, trouble)  # fmt: skip
    first = entry.first or _first(inbox, entry)
    positions = range(first, first + entry.count)
    return Chunk.lost(entry.batch_id, entry.number, entry.digest, positions, trouble)


def _check(rows: Any, count: int) -> None:
    """Raises ValueError where these are not the rows of a chunk."""
    right = isinstance(rows, list) and len(rows) == count and all(_is_row(row) for row in rows)
    if not right:
        raise ValueError("not the rows of a chunk")


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) == 4
        and type(row[0]) is type(row[1]) is int
        and 0 < row[0] < 2**31
        and 0 < row[1] < 2**15
        and (row[2] is None or isinstance(row[2], str))
        and isinstance(row[3], Mapping)
        and _goes_somewhere(row[3])
    )


def _goes_somewhere(content: Mapping[str, Any]) -> bool:
    """Whether recipients can be read from it: what comes later relies on them."""
    try:
        found = addresses(content)
    except (KeyError, TypeError):
        return False
    return bool(found) and all(isinstance(one, str) for one in found)


def _first(inbox: Inbox, entry: Entry) -> int:
    """The position of a chunk's first message, from the chunks before it."""
    known: Mapping[int, int] = (inbox.batch(entry.batch_id) or {"numbers": {}})["numbers"]
    return 1 + sum(count for number, count in known.items() if number < entry.number)


def _head(inbox: Inbox, batch_id: str, max_age: timedelta) -> Head | None:
    """The head of a batch; None where there is none that can be read."""
    try:
        known = inbox.head(str(uuid.UUID(batch_id)))
        return Head.of(batch_id, known, max_age) if known else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _set_aside(inbox: Inbox, store: Store, entry: Entry) -> None:
    """Keeps what belongs to no batch for a person to look at, and says so."""
    why = entry.trouble or "its batch's head is not known"
    log.error("inbox entry %s of batch %s: %s; set aside", entry.id, entry.batch_id[:64], why)
    inbox.set_aside(entry, why)
    try:
        batch_id = str(uuid.UUID(entry.batch_id))
    except ValueError:
        batch_id = None
    detail = {"entry": entry.id, "chunk": entry.number, "messages": entry.count}
    store.tell_unreadable(why, batch_id, detail)
