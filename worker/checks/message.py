"""One message: from what an application gave to its content, or to all of its problems."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from worker.checks.addresses import MOST_RECIPIENTS, one_person, recipients
from worker.checks.attachments import IN_REQUEST, Keep, attachments
from worker.checks.text import Refused, body, line, shown
from worker.checks.values import headers, variables
from worker.model import Message, Problem
from worker.staging import RCPT_POLICY, stranger

MOST_SUBJECT = 255  # characters
MOST_BODY = 1_000_000  # bytes in UTF-8
#: What is said of it; never which.
GIVEN_AWAY = "holds a secret of Postroom's own settings"
MOST_ITEM = 3_000_000  # bytes as JSON; Graph takes requests of up to 4 MB
FIELDS = tuple(f.name for f in dataclasses.fields(Message))

_LINKS = re.compile(
    r"<(?:https?://|mailto:)[!-;=?-~]+>(?:\s*,\s*<(?:https?://|mailto:)[!-;=?-~]+>)*"
)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """What the call says about all of its messages."""

    template: bool = False  #: bodies and, where a message gives none, subjects come from it
    needs_sent_copy: bool = False  #: doubt is settled by the copy in Sent Items
    keep: Keep | None = None  #: where the contents of attachments go; None: nowhere
    allowed_domains: frozenset[str] = frozenset()  #: if any, mail goes to these alone
    secrets: tuple[str, ...] = ()  #: of our own settings: no message may hold one


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """A message as it goes into the inbox: `row` is [position, recipients, primary, content]."""

    row: bytes
    content: Mapping[str, Any]


class _Row:
    """Collects the content of one row and its problems."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.content: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def refuse(self, code: str, path: str, detail: str) -> None:
        self.problems.append(Problem(self.number, code, path, detail))

    def take(self, path: str, check: Callable[[], Any], key: str | None = None) -> None:
        """Keeps what `check` gives unless it is empty."""
        try:
            value = check()
        except Refused as refused:
            self.refuse(refused.code, path + refused.path, refused.detail)
        else:
            if value:
                self.content[key or path] = value


def check(number: int, given: object, rules: Rules) -> Checked | list[Problem]:
    """The message of input row `number` (from 1), checked and serialised, or what is wrong."""
    if isinstance(given, Problem):  # a reader, as that of CSVs, could not make a message of it
        return [dataclasses.replace(given, row=number)]
    row = _Row(number)
    message = _message(row, given)
    if message is None:
        return row.problems
    count = _recipients(row, message, rules)
    _subject_and_body(row, message, rules)
    if message.variables or type(message.variables) is not dict:
        row.take("variables", lambda: variables(message.variables))
    _rest(row, message, rules)
    if row.problems:
        return row.problems
    content = row.content
    primary = (content.get("to") or content.get("cc") or content["bcc"])[0]["address"]
    text = _encode([number, count, primary, content])
    data = text.encode()
    if len(data) > MOST_ITEM:
        size = f"is {len(data) / 1e6:.1f} MB, most is {MOST_ITEM / 1e6:.0f} MB"
        return [Problem(number, "ITEM_SIZE", "message", size)]
    if any(secret in text for secret in _as_json(rules.secrets)):
        return [Problem(number, "SECRET_LIKE", "message", GIVEN_AWAY)]
    return Checked(data, content)


@lru_cache(1)
def _as_json(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """As they would stand in a row."""
    return tuple(_encode(secret)[1:-1] for secret in secrets)


def _message(row: _Row, given: object) -> Message | None:
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping):
        row.refuse("TYPE", "message", f"expected a Message or a mapping, got {shown(given)}")
        return None
    unknown = [key for key in given if key not in FIELDS]
    for key in unknown:
        close = difflib.get_close_matches(str(key)[:64], FIELDS, 1)
        hint = f' (did you mean "{close[0]}"?)' if close else ""
        row.refuse("FIELD", "message", f"unknown field {shown(key)}{hint}")
    return None if unknown else Message(**{"to": None, **given})


def _recipients(row: _Row, message: Message, rules: Rules) -> int:
    """Takes all addresses; how many the message counts as (reply_to counts for nothing)."""
    seen: dict[str, int] = {}
    before = len(row.problems)
    for path in ("to", "cc", "bcc"):
        for one in _addresses(row, message, path):
            nth = len(seen) + 1
            first = seen.setdefault(one["address"].lower(), nth)
            if first != nth:
                row.refuse("RCPT_DUP", path, f"{shown(one['address'])} repeats recipient {first}")
            if stranger(one["address"], rules.allowed_domains):
                _not_allowed(row, path, one["address"], rules.allowed_domains)
    if not seen and len(row.problems) == before:
        row.refuse("RCPT_NONE", "to", "at least one recipient is needed in to, cc or bcc")
    if len(seen) > MOST_RECIPIENTS:
        row.refuse("RCPT_MAX", "to", f"{len(seen)} recipients, most is {MOST_RECIPIENTS}")
    _addresses(row, message, "reply_to")
    return len(seen)


def _not_allowed(row: _Row, path: str, address: str, allowed: frozenset[str]) -> None:
    known = ", ".join(sorted(allowed)[:5])
    detail = f"{shown(address.rpartition('@')[2])} is not allowed here (ALLOWED_DOMAINS: {known})"
    row.refuse(RCPT_POLICY, path, detail)


def _addresses(row: _Row, message: Message, path: str) -> list[dict[str, str]]:
    given = getattr(message, path)
    if given == ():
        return []
    good, bad = recipients(given, path)
    row.problems += [Problem(row.number, b.code, b.path, b.detail) for b in bad]
    if good:
        row.content[path] = good
    return good


def _subject_and_body(row: _Row, message: Message, rules: Rules) -> None:
    subject, html, text = message.subject, message.html, message.text
    if subject is not None:
        row.take("subject", lambda: line(subject, MOST_SUBJECT, "SUBJECT_LEN", "subject"))
    if rules.template:
        if html is not None or text is not None:
            row.refuse("BODY_BOTH", "html", "give one of html/text or template")
        return
    if _empty(subject):
        row.refuse("SUBJECT_NONE", "subject", "a subject is needed")
    if _empty(html) and _empty(text):
        row.refuse("BODY_NONE", "html", "give html, text or a template")
    row.take("html", lambda: html if html is None else body(html, MOST_BODY, "BODY_LEN"))
    row.take("text", lambda: text if text is None else body(text, MOST_BODY, "BODY_LEN"))


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _rest(row: _Row, message: Message, rules: Rules) -> None:
    if message.from_ is not None:
        row.take("from_", lambda: one_person(message.from_), "from")
    if message.headers or type(message.headers) is not dict:
        row.take("headers", lambda: headers(message.headers))
    if message.importance is not None:
        row.take("importance", lambda: _importance(message.importance))
    if message.list_unsubscribe is not None:
        row.take("list_unsubscribe", lambda: _links(message.list_unsubscribe))
    if message.reference is not None:
        row.take("reference", lambda: line(message.reference, 200, "REF_LEN", "reference"))
    if message.save_to_sent_items is not True:
        _unsaved(row, message.save_to_sent_items, rules)
    if message.attachments != ():
        _attachments(row, message.attachments, rules.keep)


def _importance(value: object) -> str:
    if not isinstance(value, str) or value not in {"low", "normal", "high"}:
        raise Refused("IMPORTANCE", f"{shown(value)} is not one of low, normal, high")
    return value


def _links(value: object) -> str:
    text = line(value, 900, "UNSUB_LEN", "list_unsubscribe")
    if not _LINKS.fullmatch(text):
        raise Refused("UNSUB_SYNTAX", "give <https://...> or <mailto:...>, several with commas")
    return text


def _unsaved(row: _Row, value: object, rules: Rules) -> None:
    if value is not False:
        row.refuse("TYPE", "save_to_sent_items", f"expected true or false, got {shown(value)}")
    elif rules.needs_sent_copy:
        row.refuse("POLICY_SENT", "save_to_sent_items", "reconcile needs the copy in Sent Items")
    else:
        row.content["save_to_sent_items"] = False


def _attachments(row: _Row, value: object, keep: Keep | None) -> None:
    if keep is None:
        row.refuse("ATT_UNSUPPORTED", "attachments", "attachments have no place here")
        return
    good, bad = attachments(value, keep)
    row.problems += [Problem(row.number, b.code, b.path, b.detail) for b in bad]
    if good:
        row.content["attachments"] = good
    if sum(a["size"] for a in good) > IN_REQUEST and "save_to_sent_items" in row.content:
        # https://learn.microsoft.com/graph/api/message-send has no such parameter.
        detail = "attachments above 3 MB go by a draft, which Graph always keeps in Sent Items"
        row.refuse("SAVE_DRAFT", "save_to_sent_items", detail)
