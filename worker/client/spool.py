"""The spool: checked messages laid aside in chunks, until all of them are known to be good."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_MESSAGES = 200
CHUNK_BYTES = 1024 * 1024

_HEAD = struct.Struct(">III32s")  # messages, position of the first, bytes, digest


class Spool:
    """Chunks, laid aside in order: memory stays flat, and `digest` covers every message."""

    def __init__(self, file: Any, identity: bytes) -> None:
        self._file = file
        self._rows: list[bytes] = []
        self._size = 0
        self.digest = hashlib.sha256(identity)
        self.chunks = 0
        self.messages = 0

    def add(self, row: bytes) -> None:
        """One message's JSON. A chunk is full at 200 messages or 1 MiB."""
        if self._rows and (
            len(self._rows) >= CHUNK_MESSAGES or self._size + len(row) > CHUNK_BYTES
        ):
            self.flush()
        self._rows.append(row)
        self._size += len(row)

    def flush(self) -> None:
        """Ends the chunk."""
        if not self._rows:
            return
        # Line breaks, not chunks: the digest must not depend on how large chunks are.
        self.digest.update(b"\n" + b"\n".join(self._rows))
        body = b"[" + b",".join(self._rows) + b"]"
        first = int(self._rows[0][1 : self._rows[0].index(b",")])  # a row begins with its position
        digest = hashlib.sha256(body).digest()
        self._file.write(_HEAD.pack(len(self._rows), first, len(body), digest))
        self._file.write(body)
        self.chunks += 1
        self.messages += len(self._rows)
        self._rows, self._size = [], 0

    def read(self) -> Iterator[Spooled]:
        """The chunks again, from the first."""
        self._file.seek(0)
        for number in range(1, self.chunks + 1):
            count, first, size, digest = _HEAD.unpack(self._file.read(_HEAD.size))
            yield Spooled(number, count, first, digest.hex(), self._file.read(size))


@dataclass(frozen=True, slots=True)
class Spooled:
    number: int
    count: int
    first: int  #: the position of its first message
    digest: str
    body: bytes
