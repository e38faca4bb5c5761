"""What `postroom send` takes beside a CSV, and what it gives back to mend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import clean_environment
from worker.checks import Rules, check
from worker.csvfile import CsvFile
from worker.jsonlines import MOST_LINE, JsonLines
from worker.model import InvalidMessages, Problem

SENDER = "notices@contoso.com"
POSTROOM = str(Path(sys.executable).with_name("postroom"))

Send = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def send(redis_url: str) -> Send:
    """`postroom send --json`, with a Redis of the test's own and nothing else."""

    def run(*words: object, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [POSTROOM, "send", "--sender", SENDER, "--json", *(str(word) for word in words)],
            env=clean_environment() | {"POSTROOM_REDIS_URL": redis_url}, input=given,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    return run


def document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def inbox(client: redis.Redis) -> list[Any]:
    """All rows that lie in the inbox."""
    entries: Any = client.xrange("postroom:inbox")
    return [row for _, fields in entries for row in json.loads(fields["body"])]


def test_one_message_needs_no_csv(send: Send, redis_client: redis.Redis):
    """Its text from standard input, its time and its end with their zones."""
    day, end = (datetime.now(UTC).date() + timedelta(days=n) for n in (30, 60))
    done = send("--to", "ann@fabrikam.com", "--to", "bob@fabrikam.com", "--subject", "Hello",
                "--text", "-", "--send-at", f"{day}T00:00Z", "--expires-at",
                f"{end}T00:00+01:00", "--ignore-suppressions", "--by", "ada",
                given="Dear both")  # fmt: skip
    batch_id = document(done)["batch_id"]

    [row] = inbox(redis_client)
    assert [one["address"] for one in row[3]["to"]] == ["ann@fabrikam.com", "bob@fabrikam.com"]
    head = json.loads(str(redis_client.hget(f"postroom:batch:{batch_id}", "head")))
    assert head["template"] == {"subject": "Hello", "text": "Dear both"}
    assert head["send_at"] == f"{day}T00:00:00+00:00"
    assert head["expires_at"] == f"{end - timedelta(days=1)}T23:00:00+00:00"
    assert (head["ignore_suppressions"], head["by"]) == (True, "ada")


def test_json_lines_from_standard_input_bring_their_own_bodies(
    send: Send, redis_client: redis.Redis, tmp_path: Path
):
    """The bad lines are left out, and come back as JSON lines to mend."""
    lines = [{"to": "ann@fabrikam.com", "subject": "a", "text": "x", "from": "boss@contoso.com"},
             {"to": "bob", "subject": "b", "text": "x"}]  # fmt: skip
    given = "".join(json.dumps(line) + "\n" for line in lines) + "{nonsense\n\n"

    found = document(send("-", "--format", "jsonl", "--skip-invalid", "--rejected",
                          tmp_path / "bad.jsonl", given=given))  # fmt: skip

    assert found["accepted"] == 1
    assert [(p["row"], p["code"]) for p in found["rejected"]] == [(2, "ADDR_NO_AT"),
                                                                  (3, "JSON_SYNTAX")]  # fmt: skip
    [row] = inbox(redis_client)
    assert row[3]["from"] == {"address": "boss@contoso.com"}
    back = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [one["row"] for one in back] == [2, 3]
    assert json.loads(back[0]["line"]) == lines[1]


def test_refused_rows_come_back_as_a_csv_to_mend(
    send: Send, redis_client: redis.Redis, tmp_path: Path
):
    """The columns as they were, with row, code and detail; the mended file is taken as it is."""
    rows, bad, body = tmp_path / "rows.csv", tmp_path / "bad.csv", tmp_path / "body.txt"
    rows.write_text("To;Name\na@fabrikam.com;Änn\nbob;=Bob\nc@fabrikam.com\n", encoding="utf-8")
    body.write_text("Dear {{ name }}")
    words = (rows, "--subject", "x", "--text", body, "--rejected", bad)

    assert send(*words).returncode == 1
    assert redis_client.dbsize() == 0

    assert bad.read_bytes().startswith(b"\xef\xbb\xbf")
    header, first, second = bad.read_text(encoding="utf-8-sig").splitlines()
    assert header == "To;Name;row;code;detail"
    assert first.startswith("bob;=Bob;2;ADDR_NO_AT;")
    assert second.startswith("c@fabrikam.com;;3;CSV_FIELDS;")
    bad.write_text(bad.read_text(encoding="utf-8-sig").replace("bob;", "bob@fabrikam.com;"))
    assert len(list(CsvFile(bad, wanted={"name"}))) == 2


def test_a_dry_run_makes_a_page_of_the_first_rows_and_sends_nothing(
    send: Send, redis_client: redis.Redis, tmp_path: Path
):
    """The bodies stand in frames in which no script runs."""
    rows, body, page = tmp_path / "rows.csv", tmp_path / "body.html", tmp_path / "page.html"
    rows.write_text("to,name\n" + "".join(f"p{n}@fabrikam.com,<b>{n}\n" for n in range(9)))
    body.write_text("<script>alert(1)</script><p>Dear {{ name }}</p>")

    found = document(send(rows, "--subject", "For {{ name }}", "--html", body, "--dry-run",
                          "--preview", page))  # fmt: skip

    assert found["rows"] == 9
    assert [one["subject"] for one in found["first"]] == ["For <b>0", "For <b>1", "For <b>2"]
    written = page.read_text()
    assert "first 3 of 9 rows" in written
    assert written.count('sandbox=""') == 3
    assert "<script>" not in written
    assert redis_client.dbsize() == 0


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"[1]", "TYPE"), (b"{", "JSON_SYNTAX"), (b'{"to": "\xff"}', "JSON_ENCODING"),
        (b'{"to": ' + b"[" * 100_000, "JSON_SYNTAX"), (b'{"a": ' + b"9" * 5000, "JSON_SYNTAX"),
        (b'{"to": "' + b"x" * MOST_LINE + b'"}', "JSON_LEN"),
    ],
    ids=["list", "open", "latin", "deep", "digits", "long"],
)  # fmt: skip
def test_a_line_that_is_no_message_is_a_problem_of_its_own(tmp_path: Path, line: bytes, code: str):
    """The next line is read all the same."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"to": "a@b.com"}\n\n' + line + b'\n{"to": "c@d.com"}')
    first, bad, last = JsonLines(path)

    assert (first, last) == ({"to": "a@b.com"}, {"to": "c@d.com"})
    assert isinstance(bad, Problem)
    assert (bad.row, bad.code, bad.path) == (2, code, "line 3")


def test_a_file_without_a_line_is_refused(tmp_path: Path):
    """And one that is not there."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \n")
    for one, code in ((path, "JSON_EMPTY"), (tmp_path / "absent", "JSON_FILE")):
        with pytest.raises(InvalidMessages) as caught:
            list(JsonLines(one))
        assert [p.code for p in caught.value.problems] == [code]


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda of: st.lists(of) | st.dictionaries(st.text() | st.sampled_from(["to", "from"]), of),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_line_raises_anything_else(tmp_path: Path, line: bytes):
    """Whatever the bytes: a mapping that the door can judge, a problem, or InvalidMessages."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(line)
    try:
        found = list(JsonLines(path))
    except InvalidMessages:
        return
    for row, one in enumerate(found, start=1):
        check(row, one, Rules())
