"""Ingest: what lies in the inbox becomes rows in SQL, and only then leaves the inbox."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta

from worker.inbox import Entry, Inbox
from worker.store import Chunk, Head, Store

log = logging.getLogger(__name__)

#: How many chunks one transaction takes.
BLOCK = 20
#: A block whose reader was not heard of for so long is read by another, in milliseconds.
IDLE_MS = 10_000


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
        heads = {e.batch_id: _readable_head(inbox, e.batch_id, max_age) for e in entries}
        known = {batch_id: head for batch_id, head in heads.items() if head is not None}
        read = {e.id: _readable(e) for e in entries if e.batch_id in known}
        lost = [e for e in entries if read.get(e.id) is None]
        for entry in lost:
            log.error("batch %s: chunk %d cannot be read, or came without its head; set aside",
                      entry.batch_id, entry.number)  # fmt: skip
        chunks = [chunk for chunk in read.values() if chunk is not None]
        whole = store.arrive(known.values(), chunks) if chunks else []
        inbox.done([e for e in entries if e not in lost])
        for head in whole:
            inbox.forget(head.id)
            log.info("batch %s: whole with %d messages", head.id, head.total,
                     extra={"batch_id": head.id})  # fmt: skip
        wake(sorted({(head.target_kind, head.target) for head in whole}))
        done["chunks"] += len(chunks)
        done["messages"] += sum(len(c.rows) for c in chunks)
        done["batches"] += len(whole)
        if lost and len(lost) == len(entries):
            break
    return done


def _readable(entry: Entry) -> Chunk | None:
    """The chunk; None where it is not JSON: one bad block must not keep the others."""
    try:
        return Chunk(entry.batch_id, entry.number, entry.digest, json.loads(entry.body))
    except (ValueError, RecursionError):
        return None


def _readable_head(inbox: Inbox, batch_id: str, max_age: timedelta) -> Head | None:
    try:
        known = inbox.batch(batch_id)
        return Head.of(batch_id, known, max_age) if known else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
