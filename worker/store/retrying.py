"""Which database errors pass by themselves, and a patient second try for short transactions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

T = TypeVar("T")

#: SQLSTATE classes of PostgreSQL that say "later": connection, read-only standby, rollback,
#: resources, lock, operator, system.
PASSING = frozenset({"08", "25", "40", "53", "55", "57", "58"})
TRIES = 4


def is_passing(error: Exception) -> bool:
    """Whether the same transaction may succeed later: lost connections, deadlocks, full pools."""
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # a connection that broke before it could say, or SQLite
        text = str(error.orig)
        return type(error).__name__ in {"OperationalError", "InterfaceError"} and not (
            "no such" in text or "syntax" in text
        )
    return state[:2] in PASSING


def is_conflict(error: Exception) -> bool:
    """Deadlocks, serialization failures and lock waits: worth an immediate second try."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in {"40001", "40P01", "55P03"} or "database is locked" in str(error)


def is_of_the_data(error: Exception) -> bool:
    """Whether the database refuses the values themselves: no later try will be another's fault."""
    if isinstance(error, DataError | IntegrityError | OverflowError):
        return True
    # PostgreSQL: a program limit; SQLite: too deep; SQLAlchemy: what no column's type takes.
    orig = getattr(error, "orig", None)
    state = getattr(orig, "sqlstate", None) or ""
    return state.startswith("54") or str(orig) == "malformed JSON" or type(error) is StatementError


def patiently(work: Callable[[], T], *, chance: Callable[[], float]) -> T:
    """Runs a transaction again when it merely met another; other errors are raised."""
    for attempt in range(1, TRIES):
        try:
            return work()
        except DBAPIError as error:
            if not is_conflict(error):
                raise
            time.sleep(0.02 * 2**attempt * chance())
    return work()


def name_of(error: Exception) -> str:
    """An error's name for the log; never its text, which may hold values.

    PostgreSQL's have a class each (DiskFull, DeadlockDetected); SQLite's have a code.
    """
    if isinstance(error, PoolTimeoutError):
        return "all connections of the pool are taken"
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlite_errorname", None) or type(cause).__name__
