"""JSON lines, read as a stream: one message for each line, in the fields of `Message`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from worker.model import InvalidMessages, Problem

#: Bytes of one line: more than any message that is accepted.
MOST_LINE = 8_000_000


class JsonLines:
    """The messages of a file of JSON lines; blank lines count for nothing.

    Iterating gives for each row a mapping, or a Problem where the line cannot be read; its path
    names the line. `from` is as good as `from_`. Raises InvalidMessages where the file as a whole
    cannot be read.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.name

    def __iter__(self) -> Iterator[dict[str, Any] | Problem]:
        for _, found in self.numbered():
            yield found

    def numbered(self) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
        """(line, what it says); rows and lines count from 1."""
        for row, (line, text) in enumerate(self._lines(), start=1):
            yield line, _message(row, line, text)

    def texts(self) -> Iterator[str]:
        """The text of every row."""
        return (text.decode(errors="replace").strip() for _, text in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        rows = 0
        try:
            with self.path.open("rb") as file:
                if file.read(3) != b"\xef\xbb\xbf":
                    file.seek(0)
                for number, text in enumerate(_split(file), start=1):
                    if text.strip():
                        rows += 1
                        yield number, text
        except OSError as error:
            detail = f"cannot be read: {error.strerror or type(error).__name__}"
            raise InvalidMessages([Problem(0, "JSON_FILE", self.name, detail)]) from None
        if not rows:
            raise InvalidMessages([Problem(0, "JSON_EMPTY", self.name, "holds no message")])


def _split(file: Any) -> Iterator[bytes]:
    """Lines; of one that is too long only its beginning is kept, a byte more than is allowed."""
    while text := file.readline(MOST_LINE + 1):
        rest = text
        while len(rest) > MOST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MOST_LINE + 1)
        yield text


def _message(row: int, line: int, text: bytes) -> dict[str, Any] | Problem:
    where = f"line {line}"
    if len(text) > MOST_LINE:
        return Problem(row, "JSON_LEN", where, f"is longer than {MOST_LINE / 1e6:.0f} MB")
    try:
        found = json.loads(text.decode())
    except UnicodeDecodeError as error:
        return Problem(row, "JSON_ENCODING", where, f"is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return Problem(row, "JSON_SYNTAX", where, f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
        return Problem(row, "JSON_SYNTAX", where, f"cannot be read ({type(error).__name__})")
    if not isinstance(found, dict):
        detail = f"expected an object with the fields of a message, got {type(found).__name__}"
        return Problem(row, "TYPE", where, detail)
    if "from" in found and "from_" not in found:
        found["from_"] = found.pop("from")
    return found
