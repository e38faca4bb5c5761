"""The database's own clock, as SQL: what lies in SQL is compared with the database's time only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, TypeDecorator
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.expression import FunctionElement


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime. PostgreSQL: timestamptz. SQLite: ISO text with microseconds."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class now(FunctionElement[datetime]):
    """The database's time at the start of this statement."""

    type = Instant()
    inherit_cache = True


class after(FunctionElement[datetime]):
    """The database's time plus so many seconds: `after(seconds)`."""

    type = Instant()
    inherit_cache = True

    def __init__(self, seconds: ColumnElement[Any]) -> None:
        super().__init__(seconds)


@compiles(now, "postgresql")
def _now_postgresql(_element: now, _compiler: Any, **_kw: Any) -> str:
    # Not now(): the start of the transaction may lie behind a lock wait. Not clock_timestamp():
    # a volatile function keeps the planner from using an index.
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: Any, **_kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(after, "postgresql")
def _after_postgresql(element: after, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + make_interval(secs => CAST({seconds} AS double precision)))"


@compiles(after, "sqlite")
def _after_sqlite(element: after, compiler: Any, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"
