"""What the commands print: one JSON document for programs, plain tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.model import PostroomError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Where no terminal says how wide it is, no cell is to be cut.
WIDE = 250


class Failed(PostroomError):
    """A command failed. The text is its one line; `document` adds to what --json prints."""

    def __init__(self, text: str, **document: Any) -> None:
        self.document = document
        super().__init__(text)


def as_json(value: Any) -> str:
    """JSON in one line; times in ISO 8601 and UTC."""
    return _writable(json.dumps(value, default=plain, ensure_ascii=False))


def print_json(document: Any) -> None:
    """The one document of --json."""
    sys.stdout.write(as_json(document) + "\n")
    sys.stdout.flush()


def time_text(value: datetime | str | None) -> str:
    """A time for people: UTC to the second."""
    if value is None:
        return ""
    instant = datetime.fromisoformat(value) if isinstance(value, str) else value
    return instant.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def console(*, err: bool = False) -> Console:
    """Plain text where it is no terminal: no colours, no cutting. Values are never markup."""
    from rich.console import Console

    file = sys.stderr if err else sys.stdout
    terminal = file.isatty()
    return Console(
        file=file, width=None if terminal else WIDE, force_terminal=None if terminal else False,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table without frame, so that it can be copied and cut."""
    from rich.table import Table

    shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shown.add_row(*("" if cell is None else str(cell) for cell in row))
    _print(shown)


def pairs(values: Mapping[str, Any]) -> None:
    """One line a value, its name before it; what is None or empty is left out."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, show_header=False)
    for name, value in values.items():
        if value not in (None, "", []):
            shown.add_row(name, time_text(value) if isinstance(value, datetime) else str(value))
    _print(shown)


def _print(table: Table) -> None:
    """Without the blanks that fill up the last column."""
    shown = console()
    with shown.capture() as captured:
        shown.print(table)
    say("\n".join(line.rstrip() for line in captured.get().splitlines()))


def say(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"postroom: {_writable(' '.join(text.split()))}\n")
    sys.stderr.flush()


def _writable(text: str) -> str:
    """A file's name need not be UTF-8. In JSON this is the same text."""
    return text.encode(errors="backslashreplace").decode()


def plain(value: Any) -> Any:
    """A time as ISO 8601 in UTC; whatever else has no form in JSON as text."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value if value is None or isinstance(value, str | int | float) else str(value)


def write_array(rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON array, row by row: the document of --json in flat memory."""
    before = "["
    for row in rows:
        sys.stdout.write(f"{before}{as_json(row)}")
        before = ",\n"
    sys.stdout.write("[]\n" if before == "[" else "]\n")
