"""Where the messages of `postroom send` come from: a CSV, JSON lines, standard input, or --to."""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.cli import output
from worker.model import InvalidMessages, Message, Problem

if TYPE_CHECKING:
    from worker.csvfile import CsvFile
    from worker.jsonlines import JsonLines

STDIN = Path("-")
STDIN_NAME = "standard input"


class Format(StrEnum):
    """What a file of messages is."""

    CSV = "csv"
    JSONL = "jsonl"


class One:
    """The message of --to."""

    name = "--to"

    def __init__(self, to: Sequence[str]) -> None:
        self._to = list(to)

    def __iter__(self) -> Iterator[Message]:
        yield Message(to=self._to if len(self._to) > 1 else self._to[0])

    def numbered(self) -> Iterator[tuple[int, Message]]:
        """No line: it stands on the command line."""
        return iter(())


@contextmanager
def opened(
    path: Path | None, to: Sequence[str], kind: Format | None, encoding: str,
    wanted: Collection[str],
) -> Iterator[Any]:  # fmt: skip
    """The messages, to be read more than once. Raises Failed."""
    if path is None:
        yield One(to)
    elif path == STDIN:
        with _kept() as kept:
            yield _open(kept, kind or Format.CSV, encoding, wanted, STDIN_NAME)
    else:
        if never_ends(path):
            why = f"{path}: is no regular file; give - and < {path}"
            raise output.Failed(f"nothing was sent: {why}")
        by_name = Format.JSONL if path.suffix.lower() in {".jsonl", ".ndjson"} else Format.CSV
        yield _open(path, kind or by_name, encoding, wanted, None)


def never_ends(path: Path) -> bool:
    """Whether it may be read for ever, and once only: a pipe or a device."""
    return path.exists() and not (path.is_file() or path.is_dir())


@contextmanager
def _kept() -> Iterator[Path]:
    """Standard input in a private file: problems are looked up in a second reading."""
    with tempfile.NamedTemporaryFile(prefix="postroom-") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        yield Path(file.name)


def _open(
    path: Path, kind: Format, encoding: str, wanted: Collection[str], name: str | None
) -> CsvFile | JsonLines:
    from worker.csvfile import CsvFile
    from worker.jsonlines import JsonLines

    try:
        if kind is Format.JSONL:
            return JsonLines(path, name=name)
        return CsvFile(path, encoding=encoding, wanted=wanted, name=name)
    except InvalidMessages as error:
        raise failed(name or path, error.problems) from None


def failed(of: object, problems: Sequence[Problem]) -> output.Failed:
    """What is wrong apart from rows, all in the one line."""
    whole = of.name if isinstance(of, Path) else str(of)
    told = "; ".join(
        f"{of if p.path == whole else p.path}: {p.detail} ({p.code})" for p in problems
    )
    shown = [{"row": p.row, "code": p.code, "path": p.path, "detail": p.detail} for p in problems]
    return output.Failed(f"nothing was sent: {told}", problems=shown)


def lines_of(source: Any, rows: Collection[int]) -> dict[int, int]:
    """row → line of these rows; reads the file up to the last of them."""
    numbered = enumerate(source.numbered(), start=1)
    upto = itertools.islice(numbered, max(rows, default=0))
    return {row: line for row, (line, _) in upto if row in rows}


def write_rejected(path: Path, source: Any, problems: Iterable[Problem]) -> int:
    """The refused rows as they were, to mend: a CSV with row, code and detail added, or the same
    as JSON lines; how many. In UTF-8, with the mark by which spreadsheets know it.
    """
    by_row: dict[int, list[Problem]] = {}
    for problem in problems:
        if problem.row:
            by_row.setdefault(problem.row, []).append(problem)
    from worker.csvfile import CsvFile

    try:
        if isinstance(source, CsvFile):
            _write_csv(path, source, by_row)
        else:
            _write_jsonl(path, source, by_row)
    except OSError as error:
        raise _unwritable(path, error) from None
    return len(by_row)


def require_writable(path: Path) -> None:
    """Raises Failed where `write_rejected` could not write: to be said before anything is sent."""
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> output.Failed:
    return output.Failed(f"--rejected {path}: cannot be written: {error.strerror}")


def _write_csv(path: Path, source: CsvFile, by_row: Mapping[int, Sequence[Problem]]) -> None:
    import csv

    with path.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        writer = csv.writer(file, delimiter=source.delimiter, lineterminator="\n")
        for row, fields in enumerate(source.raw()):
            if row == 0:
                writer.writerow([*fields, *ADDED])
            elif row in by_row:
                room = [""] * max(0, len(source.columns) - len(fields))
                writer.writerow([*fields, *room, row, *_told(by_row[row])])


def _write_jsonl(path: Path, source: JsonLines, by_row: Mapping[int, Sequence[Problem]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row, text in enumerate(source.texts(), start=1):
            if row in by_row:
                code, detail = _told(by_row[row])
                document = {"row": row, "code": code, "detail": detail, "line": text}
                file.write(output.as_json(document) + "\n")


#: What is added to the columns of a CSV of refused rows.
ADDED = ("row", "code", "detail")


def _told(problems: Sequence[Problem]) -> tuple[str, str]:
    return " ".join(p.code for p in problems), "; ".join(f"{p.path}: {p.detail}" for p in problems)
