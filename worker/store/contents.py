"""The store's part in attachments: each content once, in parts, however many messages share it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, func, select, update

from worker.model import PART, Part, parts_of
from worker.store.clock import now
from worker.store.schema import content_parts, contents
from worker.store.statements import insert_for
from worker.store.transactions import Transactions

#: Bytes of contents that a process remembers: a batch's logo is read once, not once a message.
REMEMBERED = 32 * 1024 * 1024


class Contents(Transactions):
    """Contents of attachments by their SHA-256. Safe for threads."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, bytes] = OrderedDict()

    def arrive(self, parts: Sequence[Part]) -> None:
        """Writes parts; what is there already stays as it is."""
        self._do(lambda connection: write(connection, parts))

    def read(self, sha256: str, start: int, length: int) -> bytes:
        """Bytes from `start` on: `length` of them, fewer where the content, or what has arrived
        of it, ends before.
        """
        first, last = start // PART, (start + length - 1) // PART
        c = content_parts.c
        with self._reading() as connection:
            rows = connection.execute(
                select(c.number, c.content)
                .where(c.sha256 == sha256, c.number.between(first, last))
                .order_by(c.number)
            ).all()
        found = bytearray()
        for expected, (number, content) in enumerate(rows, start=first):
            if number != expected:
                break
            found += content
        skipped = start - first * PART
        return bytes(found[skipped : skipped + length])

    def whole(self, sha256: str, size: int) -> bytes | None:
        """All of a small content; None where it has not arrived. The last ones are remembered."""
        with self._lock:
            if (known := self._known.get(sha256)) is not None:
                self._known.move_to_end(sha256)
                return known
        content = self.read(sha256, 0, size)
        if len(content) != size:
            return None
        with self._lock:
            self._known[sha256] = content
            while sum(map(len, self._known.values())) > REMEMBERED:
                self._known.popitem(last=False)
        return content

    def missing(self, wanted: Iterable[str]) -> set[str]:
        """Those of these contents of which not every part has arrived."""
        names = set(wanted)
        c, p = contents.c, content_parts.c
        there = select(func.count()).where(p.sha256 == c.sha256).scalar_subquery()
        with self._reading() as connection:
            whole = connection.execute(
                select(c.sha256).where(c.sha256.in_(names), there == c.parts)
            )
            return names - set(whole.scalars())


def write(connection: Connection, parts: Sequence[Part]) -> None:
    """Writes parts in the given transaction; what is there already stays as it is."""
    if not parts:
        return
    new = insert_for(connection.dialect.name)
    of = {part.sha256: part.size for part in parts}
    rows = [
        {"sha256": name, "size": size, "parts": parts_of(size)} for name, size in sorted(of.items())
    ]
    # What comes again is not old: a purge that looks now must leave it.
    again = {"index_elements": [contents.c.sha256], "set_": {"used_at": now()}}
    connection.execute(new(contents).values(used_at=now()).on_conflict_do_update(**again), rows)
    # By one content after the other: whoever writes the same ones waits, and nobody for nobody.
    there = sorted(parts, key=lambda part: (part.sha256, part.number))
    connection.execute(
        new(content_parts).on_conflict_do_nothing(),
        [{"sha256": p.sha256, "number": p.number, "content": p.content} for p in there],
    )


def used(connection: Connection, messages: Iterable[Mapping[str, Any]]) -> None:
    """Messages with these contents arrived: what they refer to is not old."""
    names = {a["sha256"] for content in messages for a in content.get("attachments", ())}
    if names:
        connection.execute(
            update(contents).where(contents.c.sha256.in_(names)).values(used_at=now())
        )
