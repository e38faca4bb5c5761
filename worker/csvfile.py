"""CSV files as people have them, read as a stream: one message for each row of data.

Comma, semicolon or tab; with or without a byte order mark; the header in any case. The column `to`
is the recipient, the others are template variables; those that the template does not ask for are
left out.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TextIO

from worker.model import InvalidMessages, Message, Problem

#: Characters in one field: as long as a body may be.
MOST_FIELD = 1_000_000
_FIRST_LINE = 64 * 1024

#: What `surrogateescape` leaves in place of bytes that the encoding does not know.
_UNDECODED = re.compile("[\udc80-\udcff]")


class CsvFile:
    """The messages of a CSV. Raises InvalidMessages (row 0) where the file as a whole is wrong.

    Iterating gives for each row a Message, or a Problem where the row cannot be read; its path
    names the line. `enqueue` takes both. `wanted`: the template's variables; a column goes by
    such a name whatever its case, and others are left out. None: all columns are variables.
    """

    def __init__(
        self, path: Path, *, encoding: str = "utf-8-sig", wanted: Collection[str] | None = None,
        name: str | None = None,
    ) -> None:  # fmt: skip
        """`name`: what it is called in problems, where that is not the path's."""
        self.path = path
        self.name = name or path.name
        self.encoding = _codec(encoding)
        self._wanted = {name.casefold(): name for name in wanted or ()}
        self._all = wanted is None
        header = next((row for _, row in self._read() if any(f.strip() for f in row)), None)
        if header is None:
            raise _refused("CSV_EMPTY", self.name, "is empty")
        self.columns = self._columns(header)
        self._variables = [name for name in self.columns if self._is_variable(name)]

    def wanting(self, names: Collection[str]) -> CsvFile:
        """The same file for a template that asks for these variables."""
        return CsvFile(self.path, encoding=self.encoding, wanted=names, name=self.name)

    def __iter__(self) -> Iterator[Message | Problem]:
        for _, found in self.numbered():
            yield found

    def numbered(self) -> Iterator[tuple[int, Message | Problem]]:
        """(line at which the row begins, what the row says); rows and lines count from 1."""
        row, before_header = 0, True
        for line, fields in self._read():
            if not any(f.strip() for f in fields):
                continue
            if before_header:
                before_header = False
                continue
            row += 1
            yield line, self._message(row, line, fields)
        if not row:
            raise _refused("CSV_EMPTY", self.name, "has a header and no rows")

    def raw(self) -> Iterator[list[str]]:
        """The header's fields, then those of every row, as they stand in the file."""
        return (fields for _, fields in self._read() if any(f.strip() for f in fields))

    def line_of(self, row: int) -> int | None:
        """The line at which `row` begins, None past the end. Reads the file up to there."""
        found = enumerate(self.numbered(), start=1)
        return next((line for n, (line, _) in found if n == row), None)

    def _message(self, row: int, line: int, fields: list[str]) -> Message | Problem:
        if len(fields) != len(self.columns):
            few = "few" if len(fields) < len(self.columns) else "many"
            detail = f"too {few} fields: {len(fields)}, the header has {len(self.columns)}"
            return Problem(row, "CSV_FIELDS", f"line {line}", detail)
        if any(not f.isascii() and _UNDECODED.search(f) for f in fields):
            return Problem(row, "CSV_ENCODING", f"line {line}", self._not_decoded())
        found = dict(zip(self.columns, fields, strict=True))
        to = found["to"].strip()
        return Message(to=to, variables={name: found[name] for name in self._variables})

    def _is_variable(self, name: str) -> bool:
        if self._all:
            return name not in {"", "to"}
        return name in self._wanted.values()

    def _columns(self, header: list[str]) -> list[str]:
        names = [_plain(name) for name in header]
        if any(_UNDECODED.search(name) for name in names):
            raise _refused("CSV_ENCODING", "line 1", self._not_decoded())
        known = {"to": "to", **self._wanted}
        columns = [known.get(name.casefold(), name) for name in names]
        if "to" not in columns:
            shown = ", ".join(ascii(c[:32]) for c in columns[:8])
            raise _refused("CSV_COLUMNS", self.name, f"no column `to`; it has {shown}")
        twice = next((c for c in columns if c and columns.count(c) > 1), None)
        if twice is not None:
            detail = f"the column {twice[:48]!a} is there twice"
            raise _refused("CSV_COLUMNS", self.name, detail)
        return columns

    def _not_decoded(self) -> str:
        name = self.encoding.removesuffix("-sig")
        return f"is not {name}; name the encoding, e.g. --encoding windows-1252"

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        """(line at which it begins, fields) for every row, blank ones and the header too."""
        reader, line = None, 1
        try:
            with self.path.open(
                encoding=self.encoding, errors="surrogateescape", newline=""
            ) as file:
                csv.field_size_limit(MOST_FIELD)
                self.delimiter = _delimiter(file)
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                for fields in reader:
                    yield line, fields
                    line = reader.line_num + 1
        except csv.Error as error:
            raise _refused("CSV_SYNTAX", f"line {line}", str(error)[:200]) from None
        except UnicodeError:
            raise _refused("CSV_ENCODING", f"after line {line}", self._not_decoded()) from None
        except OSError as error:
            detail = f"cannot be read: {error.strerror or type(error).__name__}"
            raise _refused("CSV_FILE", self.name, detail) from None


#: A name in quotes, which may hold what else parts them.
_QUOTED = re.compile(r'"[^"]*"?')


def _delimiter(file: TextIO) -> str:
    """What parts the header into the most columns; the file stands at its start again."""
    header = file.readline(_FIRST_LINE)
    while header and not header.strip():
        header = file.readline(_FIRST_LINE)
    file.seek(0)
    return max(",;\t", key=_QUOTED.sub("", header).count)


def _plain(name: str) -> str:
    return name.strip().removeprefix("\ufeff")


def _codec(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):  # no such name; or no text that could be one
        name = ""
    if not name or name in {"base64", "bz2", "hex", "quopri", "rot13", "uu", "zlib"}:
        raise _refused("CSV_ENCODING", "encoding", f"{encoding[:48]!a} is no encoding of text")
    # Excel writes a byte order mark before UTF-8, and calls it UTF-8.
    return "utf-8-sig" if name == "utf-8" else name


def _refused(code: str, path: str, detail: str) -> InvalidMessages:
    return InvalidMessages([Problem(0, code, path, detail)])
