"""The door's checks: every bad input of a kind has its code, its place and its reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from worker import checks
from worker.checks import Checked, Rules
from worker.model import Message, Problem

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
GOOD: dict[str, Any] = {"to": "ann@example.com", "subject": "Hello", "text": "Dear Ann"}


def problems(rules: Rules | None = None, **fields: Any) -> list[Problem]:
    found = checks.check(7, Message(**{**GOOD, **fields}), rules or Rules())
    return found if isinstance(found, list) else []


def codes(**fields: Any) -> list[str]:
    return [p.code for p in problems(**fields)]


def content(**fields: Any) -> dict[str, Any]:
    found = checks.check(7, Message(**{**GOOD, **fields}), Rules())
    assert isinstance(found, Checked), found
    return dict(json.loads(found.row)[3])


def test_a_good_message_becomes_its_position_its_cost_its_address_and_its_content():
    """The row in the inbox is what ingest writes: nothing more, and no default."""
    found = checks.check(
        3,
        Message(to=[("Ann", "ann@example.com"), "bob@example.com"], cc={"address": "c@example.com"},
                subject="Grüße 🎉", html="<p>x</p>", from_="boss@example.com", reference="r-1",
                headers={"x-tag": "1"}, importance="high", save_to_sent_items=False,
                reply_to="desk@example.com", list_unsubscribe="<https://example.com/u?a=1>"),
        Rules(),
    )  # fmt: skip
    assert isinstance(found, Checked)
    assert json.loads(found.row) == [3, 3, "ann@example.com", {
        "to": [{"address": "ann@example.com", "name": "Ann"}, {"address": "bob@example.com"}],
        "cc": [{"address": "c@example.com"}], "subject": "Grüße 🎉", "html": "<p>x</p>",
        "from": {"address": "boss@example.com"}, "reference": "r-1", "headers": {"x-tag": "1"},
        "importance": "high", "save_to_sent_items": False,
        "reply_to": [{"address": "desk@example.com"}],
        "list_unsubscribe": "<https://example.com/u?a=1>",
    }]  # fmt: skip
    assert content() == {"to": [{"address": "ann@example.com"}], "subject": "Hello",
                         "text": "Dear Ann"}  # fmt: skip


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("", "ADDR_EMPTY"), ("   ", "ADDR_EMPTY"), ("bob", "ADDR_NO_AT"),
        ("a@b@c.com", "ADDR_SYNTAX"), ("a@example.com, b@example.com", "ADDR_SYNTAX"),
        ("bob@", "ADDR_DOMAIN"), ("bob@localhost", "ADDR_DOMAIN"),
        ("bob@ex ample.com", "ADDR_SPACE"), (" bob@example.com", "ADDR_SPACE"),
        ("bob@example..com", "ADDR_DOMAIN"), ("bob@-example.com", "ADDR_DOMAIN"),
        ("b" * 65 + "@example.com", "ADDR_LOCAL_LEN"),
        ("b@" + ".".join(["a" * 60] * 4) + ".example.com", "ADDR_LEN"),
        ("bob@example.com\r\nBcc: x@y.z", "CTRL_CHAR"), ("bob@example.com\n", "CTRL_CHAR"),
        ("bob\x00@example.com", "CTRL_CHAR"), ("bob\ud800@example.com", "UNICODE"),
        ("bob@xn--a.com", "ADDR_IDNA"), ("bob@ex\u0430mple.com", "ADDR_MIXED"),
        ("Bob <bob@example.com>", "ADDR_DISPLAY"), ("böb@example.com", "ADDR_LOCAL"),
        ("bob.@example.com", "ADDR_SYNTAX"), (".bob@example.com", "ADDR_SYNTAX"),
        ('"bob"@example.com', "ADDR_SYNTAX"), ("bob@[127.0.0.1]", "ADDR_DOMAIN"),
        ("@example.com", "ADDR_SYNTAX"), (b"bob@example.com", "TYPE"), (7, "TYPE"),
        ({"address": "bob@example.com", "nmae": "Bob"}, "FIELD"),
        ({"name": "Bob"}, "TYPE"), (("Bob", "bob"), "ADDR_NO_AT"),
        (("ann@example.com", "bob@example.com"), "RCPT_PAIR"),
        (("Bob\r\nBcc: x", "bob@example.com"), "CTRL_CHAR"),
        (("Bob\u202egnp", "bob@example.com"), "BIDI"),
        (("B" * 256, "bob@example.com"), "NAME_LEN"),
    ],
)  # fmt: skip
def test_a_bad_recipient_is_refused_with_its_code(address: Any, code: str):
    """In every place where a recipient may stand."""
    for path in ("to", "cc", "bcc", "reply_to"):
        for given_as in (address, [address]):
            assert codes(**{path: given_as}) == [code], (path, given_as)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("to", [], "RCPT_NONE"), ("to", None, "RCPT_NONE"),
        ("to", ["a@example.com", "A@EXAMPLE.com"], "RCPT_DUP"),
        ("cc", "ann@example.com", "RCPT_DUP"),
        ("to", [f"u{n}@example.com" for n in range(501)], "RCPT_MAX"),
        ("from_", "boss", "ADDR_NO_AT"),
        ("subject", None, "SUBJECT_NONE"), ("subject", "", "SUBJECT_NONE"),
        ("subject", "a\nb", "CTRL_CHAR"), ("subject", "a\u2028b", "CTRL_CHAR"),
        ("subject", "x" * 256, "SUBJECT_LEN"), ("subject", "\ud800", "UNICODE"),
        ("subject", b"Hello", "TYPE"), ("text", None, "BODY_NONE"), ("text", "", "BODY_NONE"),
        ("text", "a\x00b", "CTRL_CHAR"), ("html", "\x1b[0m", "CTRL_CHAR"),
        ("html", "x" * 1_000_001, "BODY_LEN"), ("html", "ü" * 500_001, "BODY_LEN"),
        ("html", b"<p>", "TYPE"), ("text", 5, "TYPE"), ("html", "a\udfff", "UNICODE"),
        ("variables", {"a": float("nan")}, "NUMBER"), ("variables", {"a": [-1e999]}, "NUMBER"),
        ("variables", {"a": 2**70}, "NUMBER"), ("variables", {"a": b"x"}, "TYPE"),
        ("variables", {"a": {1: 2}}, "TYPE"), ("variables", [], "TYPE"), ("variables", 5, "TYPE"),
        ("variables", {"a": NOW}, "TYPE"), ("variables", {"a": "\x00"}, "CTRL_CHAR"),
        ("variables", {"a\x00": "b"}, "CTRL_CHAR"), ("variables", {"a": "\udc80"}, "UNICODE"),
        ("variables", {"a": SecretStr("hush")}, "SECRET"),
        ("variables", {"a": "eyJhbGciOiJub25l.eyJzdWIiOiJhbm4i.c2ln"}, "SECRET_LIKE"),
        ("variables", {"a": list(range(10_001))}, "VAR_COUNT"),
        ("headers", {"x-bad name": "1"}, "HDR_NAME"), ("headers", {"x-é": "1"}, "HDR_NAME"),
        ("headers", {"Subject": "1"}, "HDR_NAME"), ("headers", {"x-a\n": "1"}, "HDR_NAME"),
        ("headers", {"x-a": "1\r\nBcc: b"}, "CTRL_CHAR"), ("headers", {"x-a": 1}, "TYPE"),
        ("headers", {f"x-{n}": "1" for n in range(5)}, "HDR_MAX"),
        ("headers", {"X-MS-Exchange-Organization-SCL": "-1"}, "HDR_RESERVED"),
        ("headers", {"X-Postroom-Id": "1"}, "HDR_RESERVED"),
        ("headers", {"x-a": "1", "X-A": "2"}, "HDR_DUP"), ("headers", "x-a: 1", "TYPE"),
        ("importance", "urgent", "IMPORTANCE"), ("importance", [], "IMPORTANCE"),
        ("list_unsubscribe", "https://example.com", "UNSUB_SYNTAX"),
        ("list_unsubscribe", "<javascript:x>", "UNSUB_SYNTAX"),
        ("save_to_sent_items", "no", "TYPE"), ("reference", "r" * 201, "REF_LEN"),
    ],
)  # fmt: skip
def test_a_bad_field_is_refused_with_its_code(field: str, value: Any, code: str):
    """One bad field gives one problem, in its place."""
    found = problems(**{field: value})
    assert [p.code for p in found] == [code]
    assert found[0].row == 7
    assert found[0].path.startswith(field) or code == "BODY_NONE"


def test_json_nested_too_deeply_is_refused_and_32_levels_are_not():
    """The deepest that passes, and one more; a value that holds itself ends as well."""

    def nested(levels: int) -> Any:
        return {"a": nested(levels - 1)} if levels else 1

    assert content(variables=nested(32))["variables"] == nested(32)
    assert codes(variables=nested(33)) == ["DEPTH"]
    round_and_round: dict[str, Any] = {}
    round_and_round["a"] = [round_and_round, round_and_round]
    assert codes(variables=round_and_round) in (["DEPTH"], ["VAR_COUNT"])


def test_the_longest_that_is_allowed_passes():
    """Limits are the last good value, not the first bad one."""
    local = "b" * 64
    domain = ".".join(["d" * 61] * 3 + ["com"])
    assert len(f"{local}@{domain}") == 254
    assert content(to=f"{local}@{domain}")["to"] == [{"address": f"{local}@{domain}"}]
    assert content(subject="x" * 255, html="x" * 1_000_000)["subject"] == "x" * 255
    assert len(content(to=[f"u{n}@example.com" for n in range(500)])["to"]) == 500


def test_an_international_domain_goes_out_in_ascii():
    """Graph gets the form that every mail server knows."""
    expected = [{"address": "ann@xn--bcher-kva.example.com"}]
    assert content(to="ann@bücher.example.com")["to"] == expected


def test_all_problems_of_a_message_come_together():
    """Nobody mends a list one error at a time."""
    assert codes(to="bob", subject="a\nb", html="\x00", headers={"y": "1"}) == [
        "ADDR_NO_AT", "CTRL_CHAR", "CTRL_CHAR", "HDR_NAME",
    ]  # fmt: skip


def test_a_recipient_outside_the_allowed_domains_is_refused_in_its_place():
    """Each of them; the reason names what is allowed."""
    rules = Rules(allowed_domains=frozenset({"example.com"}))
    found = problems(rules, to="ann@EXAMPLE.com", cc=["b@example.org", "c@sub.example.com"])

    assert [(p.code, p.path) for p in found] == [("RCPT_POLICY", "cc")] * 2
    assert "ALLOWED_DOMAINS: example.com" in found[0].detail


def test_a_misspelt_field_is_named_with_what_was_meant():
    """A mapping is as good as a Message, as long as each of its fields is known."""
    found = checks.check(1, {**GOOD, "subjct": "x"}, Rules())
    assert isinstance(found, list)
    assert [p.code for p in found] == ["FIELD"]
    assert 'did you mean "subject"?' in found[0].detail
    assert isinstance(checks.check(1, GOOD, Rules()), Checked)


def test_a_template_and_a_body_exclude_each_other():
    """Which of the two should be sent cannot be known."""
    assert [p.code for p in problems(Rules(template=True), html="x")] == ["BODY_BOTH"]
    assert problems(Rules(template=True), text=None, subject=None) == []


def test_reconcile_needs_the_copy_in_sent_items():
    """Without the copy there is nothing to find, and doubt would be taken for absence."""
    found = problems(Rules(needs_sent_copy=True), save_to_sent_items=False)
    assert [p.code for p in found] == ["POLICY_SENT"]


LONG = st.text(min_size=200, max_size=400)


@given(LONG)
def test_no_value_is_echoed_beyond_64_characters(text: str):
    """A problem goes into logs and terminals: no long value, and nothing that is not printable."""
    fields: list[dict[str, Any]] = [
        {"to": text}, {"to": {text: 1}}, {"importance": text}, {"headers": {text: "1"}},
        {"variables": {text: NOW}},
    ]  # fmt: skip
    for bad in fields:
        for problem in problems(**bad):
            assert text[:65] not in f"{problem.path} {problem.detail}"
            assert f"{problem.path}{problem.detail}".isprintable()
            assert len(problem.path) < 100


# ---- the call -----------------------------------------------------------------------------------


def call_codes(**fields: Any) -> list[tuple[str, str]]:
    known = {"sender": "a@example.com", **fields}
    _, found = checks.check_call(known, now=NOW, known_pool=lambda name: name == "staff")
    return [(p.code, p.path) for p in found]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"sender": None}, ("TARGET", "sender")), ({"pool": "staff"}, ("TARGET", "sender")),
        ({"sender": "../admin"}, ("MBX_SYNTAX", "sender")),
        ({"sender": "a/b@example.com"}, ("MBX_SYNTAX", "sender")),
        ({"sender": "a?b@example.com"}, ("MBX_SYNTAX", "sender")),
        ({"sender": 5}, ("TYPE", "sender")),
        ({"sender": None, "pool": "nobody"}, ("POOL_UNKNOWN", "pool")),
        ({"sender": None, "pool": 5}, ("TYPE", "pool")),
        ({"name": "a\nb"}, ("CTRL_CHAR", "name")), ({"priority": "urgent"}, ("PRIO", "priority")),
        ({"priority": 9}, ("TYPE", "priority")),
        ({"on_invalid": "maybe"}, ("ON_INVALID", "on_invalid")),
        ({"on_invalid": []}, ("ON_INVALID", "on_invalid")),
        ({"ignore_suppressions": "yes"}, ("TYPE", "ignore_suppressions")),
        ({"on_finished": "not a task"}, ("TASK_NAME", "on_finished")),
        ({"send_at": "2026-11-24T09:00"}, ("TIME_NAIVE", "send_at")),
        ({"send_at": datetime(2026, 11, 24)}, ("TIME_NAIVE", "send_at")),  # noqa: DTZ001
        ({"send_at": "tomorrow"}, ("TIME_SYNTAX", "send_at")),
        ({"send_at": "1764000000"}, ("TIME_SYNTAX", "send_at")),
        ({"send_at": 5}, ("TYPE", "send_at")),
        ({"send_at": NOW + timedelta(days=367)}, ("TIME_FAR", "send_at")),
        ({"send_at": datetime.max.replace(tzinfo=ZoneInfo("America/Lima"))},
         ("TIME_FAR", "send_at")),
        ({"send_at": datetime(2027, 3, 28, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))},
         ("TIME_GAP", "send_at")),
        ({"expires_at": NOW}, ("TIME_ORDER", "expires_at")),
        ({"send_at": NOW + timedelta(hours=2), "expires_at": NOW + timedelta(hours=1)},
         ("TIME_ORDER", "expires_at")),
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused_with_its_code(fields: dict[str, Any], expected: Any):
    """Arguments of the call are row 0."""
    assert call_codes(**fields) == [expected]


def test_a_good_call_is_taken_in_utc_and_in_lower_case():
    """Two spellings of one mailbox must not become two lanes."""
    call, found = checks.check_call(
        {"sender": "Notices@Contoso.com", "send_at": "2026-11-24T09:00+02:00", "priority": "bulk"},
        now=NOW, known_pool=lambda name: False,
    )  # fmt: skip
    assert found == []
    assert call.target == "notices@contoso.com"
    assert call.send_at == datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
    assert call_codes(sender="6F0B1F0E-5B0C-5A54-9D0E-0A3D2F1C7B66") == []


@pytest.mark.parametrize(
    ("key", "code"),
    [("", "KEY_SYNTAX"), (" a", "KEY_SYNTAX"), ("a" * 201, "KEY_SYNTAX"), ("a\nb", "KEY_SYNTAX"),
     (5, "KEY_SYNTAX"), ("ann@example.com", "KEY_PII"), ("4111111111111111", "KEY_PII")],
)  # fmt: skip
def test_a_bad_key_is_refused(key: Any, code: str):
    """The key stands in logs and in the audit."""
    assert [p.code for p in checks.check_key(key)] == [code]


@pytest.mark.parametrize("key", ["a", "order 17 of May", "<abc.1@example.com>", "1700000000000000"])
def test_a_usual_key_passes(key: str):
    """Message-IDs and counters are what people have."""
    assert checks.check_key(key) == []
