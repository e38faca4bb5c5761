"""--attach: files that go with every mail of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker.cli import output
from worker.cli.source import never_ends
from worker.model import Attachment, Message, Problem

Row = Message | Mapping[str, Any] | Problem


def attached(rows: Iterable[Row], paths: Sequence[Path] | None) -> Iterable[Row]:
    """The rows with these files, which are read at once. Raises Failed where one cannot be sent."""
    files = [_read(path) for path in paths or ()]
    return _with(rows, files) if files else rows


def _with(rows: Iterable[Row], files: Sequence[Attachment]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Message):
            yield replace(row, attachments=[*row.attachments, *files])
        elif isinstance(row, Mapping):
            yield {**row, "attachments": [*(row.get("attachments") or ()), *files]}
        else:
            yield row


def _read(path: Path) -> Attachment:
    from worker.checks import Refused, check_size

    if never_ends(path):
        raise output.Failed(f"--attach {path}: is no regular file")
    try:
        if path.is_file():
            check_size(path.stat().st_size)
        return Attachment(path.name, path.read_bytes())
    except Refused as refused:
        reason = refused.detail
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
    raise output.Failed(f"--attach {path}: {reason}")
