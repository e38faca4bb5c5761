"""The ledger: one line for each accepted mail, in the file before the answer goes out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Ledger:
    """Append-only rows, in memory as lines and in `ledger.jsonl`.

    A row is handed to the operating system before `append` returns, without fsync: it survives
    a SIGKILL of the simulator, not a loss of power. A directory used before is continued.
    """

    def __init__(self, path: Path) -> None:
        self.lines: list[bytes] = read_lines(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for line in self.lines:  # without a half line that a full disk may have left
            os.write(self._file, line)

    def append(self, row: dict[str, Any]) -> None:
        """Number the row and write it."""
        row["n"] = len(self.lines) + 1
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        os.write(self._file, line)
        self.lines.append(line)

    def since(self, n: int) -> bytes:
        """Rows after number n, as a JSON array."""
        return b"[" + b",".join(self.lines[max(n, 0) :]) + b"]"

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_lines(path: Path) -> list[bytes]:
    """The whole lines of a ledger file; none if there is no file."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
