"""What the commands open, and what each failure of it is called."""

from __future__ import annotations

import getpass
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.meanings import START
from worker.model import NotFound, PostroomError, Unavailable

if TYPE_CHECKING:
    from worker.runtime import Runtime
    from worker.store import Store

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
By = Annotated[str | None, typer.Option(help="Who does it [default: the login name].")]
Why = Annotated[str | None, typer.Option(help="Why; it stands in the event.")]

DOCTOR = "what to do: postroom doctor"
NO_WORKER = f"no worker is running; start one: {START}"


@contextmanager
def runtime() -> Iterator[Runtime]:
    """The doors of this process, closed at the end. Raises InvalidSettings."""
    from worker.runtime import current

    rt = current()
    try:
        yield rt
    finally:
        rt.close()


@contextmanager
def migrated() -> Iterator[Runtime]:
    """As `runtime`, its database there and up to date. Raises InvalidSettings, Failed."""
    with runtime() as rt:
        require_tables(rt.store, rt.settings.db_schema or None)
        yield rt


def require_tables(store: Store, schema: str | None) -> None:
    """Raises Failed where the database is not migrated, Unavailable where it does not answer."""
    from worker.store import newest_revision, revision

    at, wanted = revision(store.engine, schema), newest_revision()
    if at != wanted:
        is_at = f"is at revision {at}, not {wanted}" if at else "is not migrated"
        raise output.Failed(f"the database {is_at}; run: postroom db upgrade")


def upgrade_tables(rt: Runtime) -> str:
    """Brings the tables up to date; their revision. Raises InvalidSettings, Unavailable."""
    from worker.store import newest_revision, revision, upgrade

    schema = rt.settings.db_schema or None
    revision(rt.store.engine, schema)  # says in our words that the database does not answer
    upgrade(rt.settings.require_database_url(), schema)
    return newest_revision()


def workers(rt: Runtime) -> int | None:
    """How many workers run; None where Redis does not answer, which is said."""
    from redis.exceptions import RedisError

    from worker import report

    try:
        return report.workers(rt.redis)
    except RedisError as error:
        output.warn(f"Redis does not answer ({type(error).__name__}): nothing is sent, and whether "
                    f"a worker runs is not known; {DOCTOR}")  # fmt: skip
        return None


def an_id(text: str, what: str) -> str:
    """A UUID in its usual form. Raises NotFound: nothing has an id of another form."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise NotFound(f"no {what} {text!r}: an id is a UUID") from None


def start_of(text: str) -> datetime | timedelta:
    """A time with its zone, or how long ago."""
    from worker.config import duration

    try:
        return duration(text)
    except ValueError:
        pass
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        instant = None
    if instant is None or instant.utcoffset() is None:
        raise typer.BadParameter(
            f"{text!r}: give a time with its zone, e.g. 2026-10-25T09:00+02:00, or 90min, 2h, 3d",
            param_hint="--since",
        )
    return instant


def login() -> str:
    """The login name, or the number of the user where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def explain(error: Exception) -> str | None:
    """What is wrong, in one line without values that may be secret; None: it is a bug."""
    if isinstance(error, PostroomError):
        said = _as_options(str(error), getattr(error, "batch_id", None))
        return f"{said}; {DOCTOR}" if isinstance(error, Unavailable) else said
    if isinstance(error, UnicodeEncodeError):  # a shell hands on any bytes
        return "an argument is not UTF-8"
    from redis.exceptions import RedisError
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    if isinstance(error, RedisError):
        return f"Redis does not answer ({type(error).__name__}); {DOCTOR}"
    if isinstance(error, DBAPIError | PoolTimeoutError):
        return f"the database refused ({type(getattr(error, 'orig', None) or error).__name__})"
    return None


def _as_options(text: str, batch_id: str | None) -> str:
    """What says how to call again in Python, as the command is called again."""
    return text.replace(f"idempotency_key={batch_id!r}", f"--idempotency-key {batch_id}")
