"""Faults ordered through the control API: which there are, and which request meets one."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# kind -> (where it strikes, has the mail been accepted, details it takes with their defaults)
KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "status": (
        "graph",
        False,
        {"status": 503, "code": None, "message": None, "body": None, "headers": {}},
    ),
    "status_after": (
        "graph",
        True,
        {"status": 504, "code": None, "message": None, "body": None, "headers": {}},
    ),
    "throttle": ("graph", False, {"retry_after": None}),
    "unauthorized": ("graph", False, {"headers": {}}),
    "revoked": ("graph", False, {}),
    "reset_before_reading": ("unread", False, {}),
    "reset_before": ("graph", False, {}),
    "reset_after": ("graph", True, {}),
    "close_before": ("graph", False, {}),
    "close_after": ("graph", True, {}),
    "cut_in_status": ("graph", True, {}),
    "cut_after_status": ("graph", True, {}),
    "hang_before": ("graph", False, {"seconds": 3600.0}),
    "hang_after": ("graph", True, {"seconds": 3600.0}),
    "slow_body": ("graph", True, {"seconds": 1.0}),
    "garbage": ("graph", False, {}),
    "garbage_after": ("graph", True, {}),
    "accepted_retry_after": ("graph", True, {"retry_after": "10"}),
    "accept_late": ("graph", False, {"seconds": 0.0}),
    "cut_upload": ("range", False, {}),  # half of a range arrives, then a reset
    "token_status": ("token", False, {"status": 503, "body": None, "headers": {}}),
    "token_delay": ("token", False, {"seconds": 1.0}),
    "token_garbage": ("token", False, {}),
    "token_reset": ("token", False, {}),
}
OPERATIONS = ("send", "read", "draft", "upload", "any")
# Each detail's type, where given; None stands for "not given".
_TYPES: dict[str, tuple[type, ...]] = {
    "status": (int,),
    "code": (str,),
    "message": (str,),
    "body": (str, dict, list),
    "headers": (dict,),
    "seconds": (int, float),
    "retry_after": (int, float, str),
}


class FaultError(ValueError):
    """A fault that does not exist or cannot be; the text is one line for a person."""


@dataclass(slots=True)
class Fault:
    """One order: strikes `count` matching requests (0: all until cleared)."""

    kind: str
    count: int = 1
    probability: float = 1.0
    mailbox: str | None = None
    recipient: str | None = None
    operation: str = "send"
    detail: dict[str, Any] = field(default_factory=dict)
    struck: int = 0

    @property
    def where(self) -> str:
        """`token`, `graph`, or `unread`: before anything of the request is read."""
        return KINDS[self.kind][0]

    @property
    def accepts(self) -> bool:
        """The mail is accepted before the fault strikes."""
        return KINDS[self.kind][1]

    def meets(self, operation: str, mailbox: str, recipients: tuple[str, ...]) -> bool:
        """Is this request one of those the fault is for?"""
        return (
            self.operation in ("any", operation)
            and self.mailbox in (None, mailbox)
            and (self.recipient is None or self.recipient in recipients)
        )


def ordered(order: dict[str, Any]) -> Fault:
    """A fault from the control API's JSON.

    Raises:
        FaultError: unknown kind or detail, or a value that cannot be.
    """
    fields = dict(order)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise FaultError(f"kind: one of {', '.join(KINDS)}, not {kind!r}")
    fault = Fault(kind)
    fault.count = _whole("count", fields.pop("count", 1))
    fault.probability = _probability(fields.pop("probability", 1.0))
    fault.mailbox = _address("mailbox", fields.pop("mailbox", None))
    fault.recipient = _address("recipient", fields.pop("recipient", None))
    fault.operation = fields.pop("operation", "send")
    if fault.operation not in OPERATIONS:
        raise FaultError(f"operation: one of {', '.join(OPERATIONS)}, not {fault.operation!r}")
    if KINDS[kind][0] == "unread" and fault.recipient is not None:
        raise FaultError(f"recipient: {kind} strikes before recipients are read")
    fault.detail = KINDS[kind][2] | fields
    _check_detail(kind, fields)
    return fault


def _check_detail(kind: str, given: dict[str, Any]) -> None:
    known = KINDS[kind][2]
    for name, value in given.items():
        if name not in known:
            raise FaultError(f"{name}: {kind} takes {', '.join(known) or 'no detail'}")
        if value is None and known[name] is None:
            continue
        if isinstance(value, bool) or not isinstance(value, _TYPES[name]):
            raise FaultError(f"{name}: not a value for it: {value!r}")
    if not 200 <= given.get("status", 200) <= 599:
        raise FaultError(f"status: from 200 to 599, not {given['status']}")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FaultError(f"{name}: a whole number from 0 (no end) up, not {value!r}")
    return value


def _probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise FaultError(f"probability: from 0 to 1, not {value!r}")
    return float(value)


def _address(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise FaultError(f"{name}: an address, not {value!r}")
    return value.lower() if value else None


class Faults:
    """Orders that still stand, first come first struck."""

    def __init__(self, seed: int) -> None:
        self._standing: list[Fault] = []
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.struck: Counter[str] = Counter()

    def order(self, fault: Fault) -> None:
        """Let a fault stand."""
        self._standing.append(fault)

    def count(self, fault: Fault) -> None:
        """A fault strikes."""
        self.struck[fault.kind] += 1

    def clear(self) -> None:
        """Let none stand."""
        self._standing.clear()

    def strike(
        self, where: str, operation: str, mailbox: str = "", recipients: tuple[str, ...] = ()
    ) -> Fault | None:
        """The first standing fault that this request meets, counted as struck."""
        for fault in self._standing:
            if KINDS[fault.kind][0] != where:
                continue
            if where != "token" and not fault.meets(operation, mailbox, recipients):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            fault.struck += 1
            self.count(fault)
            if fault.struck == fault.count:
                self._standing.remove(fault)
            return fault
        return None
