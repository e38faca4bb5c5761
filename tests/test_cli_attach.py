"""postroom send --attach: files that go with every mail of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.test_cli import (
    Command,
    document,
    html,
    postroom,
    rows,
    said,
    send_three,
)

__all__ = ["html", "postroom", "rows"]
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@SQLITE
def test_files_go_with_every_mail_of_a_batch(
    postroom: Command, rows: Path, html: Path, tmp_path: Path, redis_url: str
) -> None:
    """Two files for three rows: six references, two contents."""
    report, terms = tmp_path / "report.pdf", tmp_path / "terms.txt"
    report.write_bytes(b"%PDF")
    terms.write_bytes(b"terms")
    found = send_three(postroom, rows, html, "--attach", report, "--attach", terms)
    assert found["accepted"] == 3
    with redis.Redis.from_url(redis_url) as client:
        entries: Any = client.xrange("postroom:inbox")
        assert client.xlen("postroom:parts") == 2
    sent = [row[3]["attachments"] for _, f in entries for row in json.loads(f[b"body"])]
    assert [[a["name"] for a in one] for one in sent] == [["report.pdf", "terms.txt"]] * 3


@SQLITE
def test_a_file_that_cannot_go_is_one_line(
    postroom: Command, rows: Path, html: Path, tmp_path: Path
) -> None:
    """Absent, a directory, empty: named, and nothing is sent; a dry run says it too."""
    (tmp_path / "empty").touch()
    words = ("send", rows, "--sender", "a@contoso.com", "--subject", "x", "--html", html)
    for path, reason in (("absent", "No such file"), (".", "Is a directory")):
        line = said(postroom(*words, "--attach", tmp_path / path))
        assert "--attach" in line
        assert reason in line
    for more in ((), ("--dry-run",)):
        assert "empty" in said(postroom(*words, "--attach", tmp_path / "empty", *more))
    shown = postroom(*words, "--attach", html, "--dry-run", "--json")
    assert document(shown)["rows"] == 3
