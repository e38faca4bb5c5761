"""What a check says, and what the checks of one visit know of each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.runtime import Runtime
    from worker.tokens import Token


#: Where Flower listens if nobody says otherwise.
FLOWER = "http://127.0.0.1:5555"


class Status(StrEnum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"  #: it works, and there is something to know or to improve
    FAIL = "fail"  #: it cannot work like this
    SKIP = "skip"  #: not made: not asked for, or it stands on another that failed
    OPEN = "open"  #: a question about Microsoft's side that this run could not answer


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: what is so, and the one thing to do about it."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(slots=True)
class Visit:
    """One run: what was asked for, and what the checks so far found."""

    rt: Runtime
    mailbox: str | None = None
    outside: str | None = None
    send: bool = False
    flower: str = ""
    redis_works: bool = False
    tables_work: bool = False
    token: Token | None = None
    roles: frozenset[str] | None = None  #: None: the token could not be read
    admitted: bool = False  #: the mailbox may be sent from
    microsofts_clock: float | None = None  #: its time minus ours, seconds


def passed(name: str, detail: str) -> Check:
    """It is as it should be."""
    return Check(name, Status.OK, detail)


def warned(name: str, detail: str, fix: str) -> Check:
    """It works, but."""
    return Check(name, Status.WARN, detail, fix)


def failed(name: str, detail: str, fix: str) -> Check:
    """It cannot work like this."""
    return Check(name, Status.FAIL, detail, fix)


def skipped(name: str, detail: str) -> Check:
    """It was not checked."""
    return Check(name, Status.SKIP, detail)
