"""The catalogue of bad inputs, by number: each refused with code, place and reason, nothing kept.

The numbers are those of the list from which the door was built. Some of it does not stand here,
because the contract says otherwise. 25: a suppressed recipient is an outcome, not a refusal. 29:
any mailbox may send, and pools have names; the SMTP door has its list. 47: a template comes with
its batch. 79: a key is a choice. 82: a key belongs to a call, not to a message. 85, 86:
priorities are words, and doubt is a setting. 92: large content goes by reference. 97, 98:
how Redis is kept, and what a tenant has used, are shown by doctor and plan.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import SecretStr

from tests.post_kit import SENDER, Desk, close
from worker import runtime
from worker.cli import main
from worker.config import Settings
from worker.csvfile import CsvFile
from worker.model import (
    Attachment,
    IdempotencyConflict,
    InvalidMessages,
    Message,
    Problem,
    Template,
)
from worker.runtime import Runtime

GOOD: dict[str, Any] = {"to": "ann@example.com", "subject": "Hello", "text": "Dear Ann"}
TO_FILL: dict[str, Any] = {"to": "ann@example.com", "variables": {"name": "Ann"}}
TEMPLATE = Template("Hello {{ name }}", text="x")
SECRET = "hush~hush.0123456789"
JWT = "eyJhbGciOiJub25l.eyJzdWIiOiJhbm4i.c2ln"


@dataclass(frozen=True)
class Bad:
    """One input of the catalogue, and what is said of it."""

    number: float
    code: str
    path: str  #: the place; of a call's own arguments it is one of row 0
    says: str
    message: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


def at(number: float, to: Any, code: str, says: str, path: str = "to") -> Bad:
    """A bad recipient."""
    return Bad(number, code, path, says, {path.partition("[")[0]: to})


def attach(number: float, code: str, says: str, **given: Any) -> Bad:
    """A bad attachment."""
    one = {"name": "a.txt", "content": b"x"} | given
    if "path" in given:
        del one["content"]
    return Bad(number, code, "attachments[0]", says, {"attachments": [one]})


def values(number: float, code: str, says: str, given: Any, path: str = "variables.a") -> Bad:
    """Bad variables, of a message without template."""
    return Bad(number, code, path, says, {"variables": given})


def call(number: float, code: str, path: str, says: str, **given: Any) -> Bad:
    """A bad argument of the call."""
    return Bad(number, code, path, says, call=given)


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1)} if levels else 1


def in_days(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def in_the_gap() -> datetime:
    """02:30 of the next last Sunday of March in Berlin, which no clock there shows."""
    now = datetime.now(UTC)
    for year in (now.year, now.year + 1):
        last = datetime(year, 3, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
        sunday = last - timedelta(days=(last.weekday() + 1) % 7)
        if sunday > now + timedelta(days=1):
            return sunday
    raise AssertionError


RECIPIENTS = [
    at(1, [], "RCPT_NONE", "at least one recipient is needed in to, cc or bcc"),
    at(2, "", "ADDR_EMPTY", "address is empty"),
    at(4, "bob", "ADDR_NO_AT", 'has no "@"'),
    at(5, "a@b@c.com", "ADDR_SYNTAX", 'more than one "@"'),
    at(7, "bob@", "ADDR_DOMAIN", "domain is empty"),
    at(8, "bob@localhost", "ADDR_DOMAIN", "domain needs a dot"),
    at(10, "bob@ex ample.com", "ADDR_SPACE", "space inside the address"),
    at(11, "bob@example..com", "ADDR_DOMAIN", "empty label in the domain"),
    at(13, "b" * 65 + "@example.com", "ADDR_LOCAL_LEN", "65 characters, most is 64"),
    at(14, "b@" + "d" * 61 + ".example" * 24, "ADDR_LEN", "255 characters, most is 254"),
    at(16, "bob@example.com\r\nBcc: x@y.z", "CTRL_CHAR", "line break (header injection)"),
    at(17, "bob\x00@example.com", "CTRL_CHAR", "control character U+0000"),
    at(19, "bob@xn--a", "ADDR_IDNA", "domain is not valid IDNA2008"),
    at(19.1, "bob@xn--a.com", "ADDR_IDNA", "domain is not valid IDNA2008"),
    at(19.2, "bob@\u202eexample.com", "ADDR_IDNA", "domain is not valid IDNA2008"),
    at(20, "bob@ex\u0430mple.com", "ADDR_MIXED", "give the punycode form if this is meant"),
    at(22, "Bob <bob@example.com>", "ADDR_DISPLAY", "put the name into name="),
    at(22.1, '"bob smith"@example.com', "ADDR_SPACE", "space inside"),
    at(22.2, "bob(work)@example.com", "ADDR_SYNTAX", "is no address"),
    at(22.3, "b\u202eob@example.com", "ADDR_LOCAL", "must be plain ASCII"),
    at(23, ["a@example.com", "A@EXAMPLE.com"], "RCPT_DUP", "repeats recipient 1"),
    at(23.1, "ann@example.com", "RCPT_DUP", "repeats recipient 1", "cc"),
    at(23.2, ("Ann", "Ann@example.com"), "RCPT_DUP", "repeats recipient 1", "bcc"),
    at(23.3, [f"u{n}@example.com" for n in range(10_000)], "RCPT_MAX", "10000 recipients, most"),
    at(26, "ann@elsewhere.org", "RCPT_POLICY", "ALLOWED_DOMAINS: example.com"),
    at(31, ("Ann\r\nBcc: x@y.z", "ann@example.com"), "CTRL_CHAR", "name contains a line break"),
    at(32, ("Ann\u202e", "ann@example.com"), "BIDI", "text-direction override U+202E"),
    at(37.1, "bob\ud800@example.com", "UNICODE", "a lone surrogate at position 3"),
    at(38.1, b"bob@example.com", "TYPE", "bytes"),
    at(38.2, {"ann@example.com"}, "TYPE", "got set"),
    at(38.3, [["ann@example.com"]], "TYPE", "got list", "to[0]"),
]

TEXTS = [
    Bad(34, "CTRL_CHAR", "subject", "subject contains a line break", {"subject": "a\nBcc: b"}),
    Bad(35, "SUBJECT_LEN", "subject", "300 characters, most is 255", {"subject": "x" * 300}),
    Bad(37, "UNICODE", "text", "a lone surrogate at position 0", {"text": "\ud800"}),
    Bad(38, "TYPE", "subject", "expected text, got bytes", {"subject": b"Hello"}),
    Bad(40, "BODY_BOTH", "html", "give one of html/text or template",
        {"html": "x"}, {"template": TEMPLATE}),
    Bad(41, "BODY_LEN", "html", "is 5.0 MB, most is 1.0 MB", {"html": "x" * 5_000_000}),
    Bad(43, "CTRL_CHAR", "html", "U+0000", {"html": "a\x00b"}),
    call(44, "TYPE", "template", "expected a Template, got str", template="welcome"),
    Bad(46, "TPL_VAR_EXTRA", "variables", 'does not use naem (did you mean "name"?)',
        {"variables": {"name": "Ann", "naem": "Ann"}}, {"template": TEMPLATE}),
    values(49, "NUMBER", "nan is not valid JSON", {"a": float("nan")}),
    values(49.1, "NUMBER", "inf is not valid JSON", {"a": [float("inf")]}),
    values(49.2, "NUMBER", "give it as text", {"a": 10**5000}),
    values(50, "DEPTH", "deeper than 32 levels", nested(200), "variables" + ".a" * 32),
    values(94, "SECRET", "may not be part of a message", {"a": SecretStr("x")}),
    values(94.1, "TYPE", "object has no place in JSON", {"a": object()}),
    values(95, "SECRET_LIKE", "looks like a credential", {"a": JWT}),
    Bad(95.1, "SECRET_LIKE", "message", "Postroom's own settings", {"text": f"It is {SECRET}!"}),
    call(95.2, "SECRET_LIKE", "template.html", "Postroom's own settings",
         template=Template("s", html=f"<p>{SECRET}</p>")),
    Bad(88, "POLICY_SENT", "save_to_sent_items", "reconcile needs the copy in Sent Items",
        {"save_to_sent_items": False}),
    Bad(89, "FIELD", "message", 'did you mean "subject"?', {"subjct": "x"}),
    Bad(82, "FIELD", "message", "unknown field 'idempotency_key'", {"idempotency_key": "k"}),
    Bad(89.1, "TYPE", "save_to_sent_items", "true or false", {"save_to_sent_items": None}),
]  # fmt: skip

HEADERS = [
    Bad(52, "HDR_NAME", "headers", 'letters, digits and "-" only', {"headers": {"x-bad name": ""}}),
    Bad(52.1, "HDR_NAME", "headers", 'letters, digits and "-" only', {"headers": {"x-é": "1"}}),
    Bad(53, "CTRL_CHAR", "headers", "header value contains a line break",
        {"headers": {"x-a": "1\r\nBcc: b@c.d"}}),
    Bad(55, "HDR_MAX", "headers", "at most 4; Graph takes 5",
        {"headers": {f"x-{n}": "1" for n in range(5)}}),
    Bad(56, "HDR_RESERVED", "headers", "is reserved", {"headers": {"X-MS-Exchange-A": "1"}}),
    Bad(56.1, "HDR_RESERVED", "headers", "is reserved", {"headers": {"X-Postroom-Id": "1"}}),
    Bad(56.2, "HDR_DUP", "headers", "given twice", {"headers": {"x-a": "1", "X-A": "1"}}),
]  # fmt: skip

ATTACHMENTS = [
    attach(58, "ATT_PATH", "outside POSTROOM_ATTACHMENT_ROOT", path="/etc/hostname"),
    attach(58.1, "ATT_PATH", "below POSTROOM_ATTACHMENT_ROOT", path=r"C:\secret"),
    attach(58.2, "ATT_PATH", "below POSTROOM_ATTACHMENT_ROOT", path=r"\\host\x"),
    attach(58.3, "UNICODE", "a lone surrogate at position 1", path="a\ud800"),
    attach(59, "ATT_LINK", "links are not followed", path="link"),
    attach(61, "ATT_MISSING", "cannot be opened (ENOENT)", path="absent"),
    attach(62, "ATT_EMPTY", "is empty", content=b""),
    attach(62.1, "ATT_EMPTY", "is empty", path="empty"),
    Bad(64, "ATT_COUNT", "attachments", "300 attachments, most is 250",
        {"attachments": [Attachment("a", b"x")] * 300}),
    attach(65, "ATT_NAME", "file name holds '/'", name="a/b"),
    attach(65.1, "ATT_NAME", "control character U+0007", name="a\x07"),
    attach(65.2, "ATT_NAME", "U+202E", name="a\u202efdp.exe"),
    attach(67, "ATT_CTYPE", "contains a line break", content_type="text/html\r\nX: y"),
    attach(67.1, "ATT_CTYPE", "is no media type", content_type="foo"),
    attach(68, "ATT_CID", "1-200 visible characters", content_id=""),
    Bad(68.1, "ATT_CID", "attachments", "is used twice",
        {"attachments": [Attachment("a", b"x", content_id="c")] * 2}),
    *(attach(70 + n / 10, "ATT_SSRF", "nothing is fetched from a URL", path=f"http://{host}/")
      for n, host in enumerate(["169.254.169.254", "127.0.0.1", "[::1]", "10.0.0.1", "2130706433",
                                "localhost"])),
    attach(70.6, "FIELD", "unknown field 'url'", url="http://169.254.169.254/"),
    attach(71, "TYPE", "expected bytes, got str", content="no base64!"),
]  # fmt: skip

CALLS = [
    *(call(28 + n / 10, "MBX_SYNTAX", "sender", "must be an address (UPN) or a GUID", sender=given)
      for n, given in enumerate(["../admin", "a/b@example.com", "a?b@example.com",
                                 "a#b@example.com", "a%b@example.com"])),
    call(29, "POOL_UNKNOWN", "pool", "no pool 'nobody'", sender=None, pool="nobody"),
    call(29.1, "TARGET", "sender", "and not both", pool="staff"),
    call(73, "TIME_NAIVE", "send_at", "give a zone, e.g. ", send_at="2026-10-25T09:00"),
    call(74, "TIME_GAP", "send_at", "next valid is 03:30", send_at=in_the_gap()),
    call(76, "TIME_FAR", "send_at", "most is 366 days", send_at=in_days(5 * 365)),
    call(76.1, "TIME_FAR", "send_at", "most is 366 days ago", send_at="0001-01-01T00:00Z"),
    call(76.2, "TIME_PAST", "send_at", "leave it out to send now", send_at=in_days(-2)),
    call(77, "TIME_ORDER", "expires_at", "expires before it can be sent", send_at=in_days(2),
         expires_at=in_days(1)),
    call(77.1, "TIME_ORDER", "expires_at", "before it can be sent", expires_at=in_days(-1)),
    *(call(80 + n / 10, "KEY_SYNTAX", "idempotency_key", says, idempotency_key=given)
      for n, (given, says) in enumerate([("", "1-200 visible"), ("k" * 201, "most is 200"),
                                         (" k ", "no space at the ends"), ("k\x07", "U+0007"),
                                         (b"k", "expected text, got bytes")])),
    call(83, "KEY_PII", "idempotency_key", "personal data", idempotency_key="ann@example.com"),
    call(83.1, "KEY_PII", "idempotency_key", "personal data", idempotency_key="4111111111111111"),
    call(85, "TYPE", "priority", "expected text, got int", priority=99),
    call(85.1, "PRIO", "priority", "high, normal, bulk", priority="urgent"),
    call(86, "ON_INVALID", "on_invalid", "raise, skip", on_invalid=None),
    call(86.1, "ON_INVALID", "on_invalid", "raise, skip", on_invalid="maybe"),
    call(87.1, "MAX_FAILURES", "max_failures", "1 to 999999, or off", max_failures=10**5000),
    call(87.2, "TYPE", "by", "expected text, got bytes", by=b"ada"),
    call(87.3, "CTRL_CHAR", "by", "line break", by="ada\nroot"),
    call(87.4, "UNICODE", "by", "a lone surrogate", by="\udcff"),
    call(87.5, "TYPE", "session", "expected a Session or a Connection", session=False),
]  # fmt: skip

ALL = [*RECIPIENTS, *TEXTS, *HEADERS, *ATTACHMENTS, *CALLS]


@pytest.fixture
def rt(redis_url: str, tmp_path: Path) -> Iterator[Runtime]:
    """A producer whose settings forbid what settings can: other domains, links, its own secret."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc/hostname")
    (root / "empty").touch()
    running = Runtime(
        Settings(redis_url=redis_url, attachment_root=root, pools={"staff": [SENDER]},
                 allowed_domains="example.com", on_unknown="reconcile", client_secret=SECRET)
    )  # fmt: skip
    yield running
    close(running)


def refused(rt: Runtime, messages: Any, **arguments: Any) -> tuple[Problem, ...]:
    """What is wrong with a call; none of it is in Redis, and each problem is a short line."""
    with pytest.raises(InvalidMessages) as caught:
        Desk(rt).client.enqueue(messages, **{"sender": SENDER} | arguments)
    assert rt.redis.dbsize() == 0
    for problem in caught.value.problems:
        assert str(problem).isprintable()
        assert len(str(problem)) < 300
    return caught.value.problems


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: f"{bad.number:g}-{bad.code}")
def test_each_input_of_the_catalogue_is_refused_in_its_place(rt: Runtime, bad: Bad) -> None:
    """One problem each, in the second row or in the call, with what is allowed."""
    good = TO_FILL if "template" in bad.call else GOOD
    [problem] = refused(rt, [good, {**good, **bad.message}], **bad.call)

    where = (2 if bad.message else 0, bad.code, bad.path)
    assert (problem.row, problem.code, problem.path) == where
    assert bad.says in problem.detail
    for given in (SECRET, JWT, "b" * 65, "x" * 65):
        assert given not in str(problem)


@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
def test_all_that_is_wrong_with_a_call_and_its_rows_comes_together(
    rt: Runtime, on_invalid: str
) -> None:
    """Key, arguments, template and rows: whoever mends them needs one try."""
    found = refused(
        rt, [{"to": "bob"}, {"to": "ann@example.com", "importance": 5}], on_invalid=on_invalid,
        sender="../admin", idempotency_key="", priority="urgent", template={"subject": "x"},
    )  # fmt: skip
    assert [(p.row, p.code) for p in found] == [
        (0, "KEY_SYNTAX"), (0, "PRIO"), (0, "MBX_SYNTAX"), (0, "BODY_NONE"), (1, "ADDR_NO_AT"),
        (2, "IMPORTANCE"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (5, (0, "TYPE", "messages")), (b"x", (0, "TYPE", "messages")),
        (GOOD, (0, "TYPE", "messages")), ([], (0, "EMPTY", "messages")),
        ([None], (1, "TYPE", "message")), ([[GOOD]], (1, "TYPE", "message")),
        ([GOOD | {"to ": "x"}], (1, "FIELD", "message")),
        ([{**GOOD, "to": None}], (1, "RCPT_NONE", "to")),
        ([{**GOOD, "attachments": None}], (1, "TYPE", "attachments")),
        ([{**GOOD, "attachments": (a for a in "ab")}], (1, "TYPE", "attachments")),
        ([{**GOOD, "headers": None}], (1, "TYPE", "headers")),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_in_its_place(rt: Runtime, messages: Any, where: Any) -> None:
    """Whatever a program may pass by mistake."""
    assert [(p.row, p.code, p.path) for p in refused(rt, messages)] == [where]


def test_46_a_csv_may_have_columns_that_the_template_does_not_use(
    rt: Runtime, tmp_path: Path
) -> None:
    """They are left out; its names go by the template's, whatever their case."""
    (tmp_path / "rows.csv").write_text("to,city,NAME\nann@example.com,Rome,Ann\n")
    rows = CsvFile(tmp_path / "rows.csv")
    Desk(rt).client.enqueue(rows, sender=SENDER, template=TEMPLATE)
    inbox: Any = rt.redis.xrange("postroom:inbox")
    [[_, fields]] = inbox
    assert json.loads(fields[b"body"])[0][3]["variables"] == {"name": "Ann"}


def test_91_a_batch_that_is_whole_takes_nothing_more(redis_url: str, migrated_url: str) -> None:
    """Its id is a key whose content is known: nothing is added, in Redis or in SQL."""
    rt = Runtime(Settings(redis_url=redis_url, database_url=migrated_url))
    desk = Desk(rt)
    batch = desk.enqueue(Message(**GOOD)).batch_id
    desk.ingest()
    rt.redis.flushdb()

    with pytest.raises(IdempotencyConflict, match=batch):
        desk.enqueue(Message(**GOOD), Message(**GOOD), idempotency_key=batch)

    assert rt.redis.dbsize() == 0
    assert desk.client.status(batch)["total"] == 1
    close(rt)


def test_an_export_gives_no_spreadsheet_a_formula(
    redis_url: str, migrated_url: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What an address may begin with, a cell may not; the address itself may follow."""
    rt = Runtime(Settings(redis_url=redis_url, database_url=migrated_url))
    desk = Desk(rt)
    people = [f"{sign}1+HYPERLINK@example.com" for sign in "=+-"] + ["ann@example.com"]
    batch = desk.enqueue(*(Message(**GOOD | {"to": one}) for one in people)).batch_id
    desk.ingest()
    monkeypatch.setattr(sys, "argv", ["postroom", "batch", "export", batch, "--format", "csv"])
    monkeypatch.setattr(runtime, "_current", rt)

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [row["to"] for row in rows] == [*(f"'{one}" for one in people[:3]), people[3]]


# ---- the same through the command line ----------------------------------------------------------

Send = Callable[..., tuple[int, str, str]]


@pytest.fixture
def send(
    rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Send:  # fmt: skip
    """`postroom send`: exit status, standard output, standard error; nothing reached Redis."""
    body = tmp_path / "body.txt"
    body.write_text("Dear {{ name }}")
    usual = {"--sender": SENDER, "--subject": "x", "--text": str(body)}

    def run(*words: object, **changes: object) -> tuple[int, str, str]:
        options = usual | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        flat = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
        monkeypatch.setattr(sys, "argv", ["postroom", "send", *map(str, words), *flat])
        mine = Runtime(rt.settings)
        monkeypatch.setattr(runtime, "_current", mine)
        with pytest.raises(SystemExit) as ended:
            main()
        close(mine)
        assert rt.redis.dbsize() == 0
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    return run


def one_line(done: tuple[int, str, str]) -> str:
    """What a refused command says, on one short line."""
    status, _, said = done
    assert status == 1, done
    assert said.startswith("postroom: ")
    assert said.count("\n") == 1
    assert len(said) < 600
    return said


def test_a_csv_says_of_its_cells_what_the_call_says(send: Send, tmp_path: Path) -> None:
    """Every address of the catalogue that a file can hold, in one go, each under its row."""
    cells = [bad for bad in RECIPIENTS if bad.path == "to" and isinstance(bad.message["to"], str)
             and "\ud800" not in bad.message["to"]]  # fmt: skip
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["to", "name"], *([b.message["to"], "Ann"] for b in cells)])

    status, out, _ = send(tmp_path / "rows.csv", "--json")

    assert status == 1
    found = json.loads(out)["problems"]
    assert [(p["row"], p["code"]) for p in found] == [(n, b.code) for n, b in enumerate(cells, 1)]
    assert all("b" * 65 not in p["detail"] for p in found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty (CSV_EMPTY)"), (b"to,name\n", "has a header and no rows (CSV_EMPTY)"),
        (b"to,Name,name\na@example.com,x,y\n", "'name' is there twice (CSV_COLUMNS)"),
        (b"mail,name\na@example.com,x\n", "no column `to`; it has 'mail', 'name' (CSV_COLUMNS)"),
        (b"to,name\na@example.com\n", "too few fields: 1, the header has 2 (CSV_FIELDS)"),
        (b"to,name\na@example.com,x,y\n", "too many fields: 3, the header has 2 (CSV_FIELDS)"),
        (b"to,name\na@example.com,a\x00b\n", "control character U+0000 (CTRL_CHAR)"),
        (b"to,na\x00me\na@example.com,b\n", "\"name\" is missing (TPL_VAR_MISSING)"),
        ("to,name\na@example.com,b\n".encode("utf-16"), "name the encoding"),
        (b'to,name\na@example.com,"b\n', "unexpected end of data (CSV_SYNTAX)"),
        (b"to,name\na@example.com,J\xfcrgen\n", "name the encoding"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "name the encoding"),
    ],
)  # fmt: skip
def test_a_csv_that_is_none_is_refused_in_one_line(
    send: Send, tmp_path: Path, content: bytes, says: str
) -> None:
    """What is wrong, and where; the same from standard input needs no test of its own."""
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert says in one_line(send(path))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_is_no_file_is_refused_in_one_line(send: Send, tmp_path: Path, suffix: str) -> None:
    """Nothing there, a directory, a pipe that nobody writes, a name that is no text."""
    (tmp_path / f"directory.{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    assert "No such file" in one_line(send(tmp_path / f"absent.{suffix}"))
    assert "Is a directory" in one_line(send(tmp_path / f"directory.{suffix}"))
    assert "is no regular file" in one_line(send(tmp_path / f"pipe.{suffix}"))
    assert "No such file" in one_line(send(f"\udcff.{suffix}", "--json"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"send_at": "2026-10-25T09:00"}, "send_at: give a zone"),
        ({"send_at": "tomorrow"}, "give e.g. 2026-10-25T09:00+02:00 (TIME_SYNTAX)"),
        ({"expires_at": "2020-01-01T00:00Z"}, "(TIME_FAR)"),
        ({"sender": "../admin"}, "sender: '../admin': a mailbox must be"),
        ({"idempotency_key": ""}, "(KEY_SYNTAX)"),
        ({"name": "a\nb"}, "name: name contains a line break"), ({"by": "\udcff"}, "(UNICODE)"),
        ({"max_failures": "-1"}, "give 1 to 999999, or off"),
        ({"on_finished": "rm -rf"}, "is not the name of a Celery task"),
        ({"encoding": "utf-9"}, "is no encoding of text"),
        ({"encoding": "\udcff"}, "is no encoding of text"),
        ({"text": "absent.txt"}, "--text absent.txt: cannot be read: No such file"),
        ({"subject": "{{ name"}, "(TPL_SYNTAX)"), ({"subject": "\udcff"}, "lone surrogate"),
        ({"attach": "absent.pdf"}, "--attach absent.pdf: cannot be read"),
        ({"attach": "/dev/zero"}, "--attach /dev/zero: is no regular file"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_in_one_line(
    send: Send, tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    """The same words as the call's; with --dry-run as well."""
    path = tmp_path / "rows.csv"
    path.write_text("to,name\nann@example.com,Ann\n")
    for more in ([], ["--dry-run"]):
        assert says in one_line(send(path, *more, **changes))
