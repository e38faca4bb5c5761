"""The arguments of one enqueue call, apart from its messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import TypeAdapter, ValidationError

from worker.checks.addresses import mailbox
from worker.checks.text import Refused, line, shown
from worker.model import Priority, Problem

FAR = timedelta(days=366)
#: Without an end of its own, what was due longer ago would expire before it is sent.
PAST = timedelta(days=1)

_DATETIME = TypeAdapter(datetime)
#: Arguments that say how the call is made, and are nothing of the batch.
_NEVER_NONE = ("on_invalid", "by")
_TASK = re.compile(r"[A-Za-z_][\w.-]{0,199}\Z", re.ASCII)
_MAIL = re.compile(r"[^@\s<>]+@[^@\s<>]+\.[^@\s<>]+\Z")
_COUNT = re.compile(r"\d{1,6}", re.ASCII)
_CARD = re.compile(r"[3-6]\d{12,18}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """Checked arguments. Times are in UTC."""

    target_kind: str = "mailbox"
    target: str = ""
    name: str | None = None
    priority: int = Priority.NORMAL
    send_at: datetime | None = None
    expires_at: datetime | None = None
    on_finished: str | None = None
    max_failures: int | None = None
    ignore_suppressions: bool = False  #: a legal notice goes to everyone

    def header(self) -> dict[str, Any]:
        """What makes two calls the same, besides template and messages; as JSON."""
        heedless = {"ignore_suppressions": True} if self.ignore_suppressions else {}
        return heedless | {
            "target_kind": self.target_kind, "target": self.target, "priority": int(self.priority),
            "send_at": self.send_at.isoformat() if self.send_at else None,
            "expires_at": self.expires_at.isoformat() if self.expires_at else None,
        }  # fmt: skip


def check_key(key: object) -> list[Problem]:
    """What is wrong with an idempotency key: 1 to 200 visible characters, no personal data."""
    try:
        text = line(key, 200, "KEY_SYNTAX", "key")
    except Refused as refused:
        return [Problem(0, "KEY_SYNTAX", "idempotency_key", refused.detail)]
    if not text or text != text.strip() or not text.isprintable():
        detail = "1-200 visible characters, no space at the ends"
        return [Problem(0, "KEY_SYNTAX", "idempotency_key", detail)]
    if _MAIL.match(text) or (_CARD.match(text) and _luhn(text)):
        detail = "key looks like personal data; it is stored in audit and logs"
        return [Problem(0, "KEY_PII", "idempotency_key", detail)]
    return []


def check_call(
    given: Mapping[str, Any], *, now: datetime, known_pool: Callable[[str], bool]
) -> tuple[Call, list[Problem]]:
    """`given`: sender, pool, name, priority, send_at, expires_at, on_invalid, on_finished,
    max_failures, ignore_suppressions, by.
    """
    good: dict[str, Any] = {}
    problems: list[Problem] = []
    checks: dict[str, Callable[[Any], Any]] = {
        "name": lambda v: line(v, 200, "NAME_LEN", "name"),
        "priority": _priority,
        "send_at": lambda v: _instant(v, now),
        "expires_at": lambda v: _instant(v, now),
        "on_finished": _task,
        "on_invalid": _mode,
        "max_failures": _max_failures,
        "ignore_suppressions": _yes_or_no,
        "by": lambda v: line(v, 200, "NAME_LEN", "by"),
    }
    for path, check in checks.items():
        try:
            absent = given.get(path) is None and (path not in given or path not in _NEVER_NONE)
            good[path] = None if absent else check(given.get(path))
        except Refused as refused:
            problems.append(Problem(0, refused.code, path, refused.detail))
    for path in _NEVER_NONE:
        good.pop(path, None)
    try:
        good["target_kind"], good["target"] = _target(given, known_pool)
    except Refused as refused:
        problems.append(Problem(0, refused.code, refused.path, refused.detail))
    problems += _order(good.get("send_at"), good.get("expires_at"), now)
    if problems:
        return Call(), problems
    good["priority"] = Priority.NORMAL if good["priority"] is None else good["priority"]
    good["ignore_suppressions"] = bool(good["ignore_suppressions"])
    return Call(**good), []


def _target(given: Mapping[str, Any], known_pool: Callable[[str], bool]) -> tuple[str, str]:
    sender, pool = given.get("sender"), given.get("pool")
    if (sender is None) == (pool is None):
        raise Refused("TARGET", "give sender= or pool=, and not both", "sender")
    if sender is not None:
        try:
            return "mailbox", mailbox(sender)
        except Refused as refused:
            raise Refused(refused.code, refused.detail, "sender") from None
    try:
        name = line(pool, 200, "POOL_UNKNOWN", "pool")
    except Refused as refused:
        raise Refused(refused.code, refused.detail, "pool") from None
    if not known_pool(name):
        raise Refused("POOL_UNKNOWN", f"no pool {shown(name)}", "pool")
    return "pool", name


def _priority(value: object) -> Priority:
    if isinstance(value, Priority):
        return value
    try:
        return Priority.named(line(value, 20, "PRIO"))
    except ValueError:
        raise Refused("PRIO", f"{shown(value)} is not one of high, normal, bulk") from None


def _mode(value: object) -> str:
    if not isinstance(value, str) or value not in {"raise", "skip"}:
        raise Refused("ON_INVALID", f"{shown(value)} is not one of raise, skip")
    return str(value)


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused("TYPE", f"expected true or false, got {shown(value)}")
    return value


def _task(value: object) -> str:
    if not isinstance(value, str) or not _TASK.match(value):
        raise Refused("TASK_NAME", f"{shown(value)} is not the name of a Celery task")
    return value


def _max_failures(value: object) -> int:
    """A number, or its text as a command line has it; `off` is 0."""
    if isinstance(value, str):
        value = 0 if value == "off" else int(value) if _COUNT.fullmatch(value) else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 999_999:
        raise Refused("MAX_FAILURES", f"{shown(value)}: give 1 to 999999, or off")
    return value


def _instant(value: object, now: datetime) -> datetime:
    """An aware datetime or its ISO form, in UTC."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, datetime):
        raise Refused("TYPE", f"expected a datetime or ISO text, got {type(value).__name__}")
    if value.utcoffset() is None:
        raise Refused("TIME_NAIVE", "give a zone, e.g. 2026-10-25T09:00+02:00")
    try:
        instant = value.astimezone(UTC)
        back = instant.astimezone(value.tzinfo)
    except (OverflowError, ValueError):
        raise Refused("TIME_FAR", "the year is out of range") from None
    if back.replace(tzinfo=None, fold=0) != value.replace(tzinfo=None, fold=0):
        raise Refused(
            "TIME_GAP",
            f"{value:%H:%M} does not exist on that day there; next valid is {back:%H:%M}",
        )
    if instant - now > FAR:
        raise Refused("TIME_FAR", "most is 366 days ahead")
    if now - instant > FAR:
        raise Refused("TIME_FAR", "most is 366 days ago")
    return instant


def _parsed(text: str) -> datetime:
    # A bare number would be taken as seconds since 1970.
    if re.match(r"\d{4}-\d\d-\d\d[T ]", text, re.ASCII):
        try:
            return _DATETIME.validate_python(text)
        except ValidationError:
            pass
    raise Refused("TIME_SYNTAX", f"{shown(text)}: give e.g. 2026-10-25T09:00+02:00")


def _order(send_at: datetime | None, expires_at: datetime | None, now: datetime) -> list[Problem]:
    if expires_at is not None and expires_at <= max(send_at or now, now):
        return [Problem(0, "TIME_ORDER", "expires_at", "expires before it can be sent")]
    if send_at is not None and expires_at is None and now - send_at > PAST:
        detail = "was more than a day ago; leave it out to send now, or give expires_at"
        return [Problem(0, "TIME_PAST", "send_at", detail)]
    return []


def _luhn(digits: str) -> bool:
    doubled = (int(d) * 2 if n % 2 else int(d) for n, d in enumerate(reversed(digits)))
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0
