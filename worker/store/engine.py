"""The way to the database: engine, transactions, migrations."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.string import TextLoader
from sqlalchemy import (
    Column,
    Engine,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, InvalidatePoolError, OperationalError
from sqlalchemy.pool import QueuePool

from worker.model import InvalidSettings, Unavailable
from worker.store.patience import PATIENCE, limit

log = logging.getLogger(__name__)

#: How long a transaction may wait before it is given up and tried again.
POSTGRES_OPTIONS = (
    "-c statement_timeout=8000 -c lock_timeout=3000"
    " -c idle_in_transaction_session_timeout=15000 -c timezone=UTC"
    " -c client_encoding=utf8"  # a database in SQL_ASCII would answer in bytes
    " -c jit=off"  # to compile a statement takes longer than any of ours
)

#: A connection that nobody used for so long is asked whether it still lives, in seconds.
IDLE = 1.0

#: How long SQLite waits for its one lock, in seconds.
SQLITE_TIMEOUT = 15

#: A connection whose other end is gone without a word is given up within about 15 seconds.
POSTGRES_LIFE = {
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,  # milliseconds
}


def make_engine(
    url: str, schema: str | None = None, pool_size: int = 5, patience: float | None = PATIENCE
) -> Engine:
    """An engine for PostgreSQL or SQLite. Raises InvalidSettings on any other URL.

    `patience`: seconds that a statement may take; None: as long as it likes, for migrations.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidSettings(
            "DATABASE_URL is not a database URL: postgresql+psycopg://user:"
            "password@host/name or sqlite:////path/file.db"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=5,
            hide_parameters=True,
            pool_use_lifo=True,
            connect_args={"options": POSTGRES_OPTIONS, "connect_timeout": 2} | POSTGRES_LIFE,
        )
        _leave_ids_as_texts(engine)
        _ping_the_idle(engine)
        _leave_the_read_only(engine)
        if patience is not None:
            limit(engine, patience)
    elif backend == "sqlite":
        engine = create_engine(
            parsed,
            poolclass=QueuePool,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=5,
            hide_parameters=True,
            connect_args={"timeout": SQLITE_TIMEOUT, "check_same_thread": False},
        )
        _make_sqlite_safe(engine)
    else:
        raise InvalidSettings(f"DATABASE_URL: {backend} is not one of postgresql, sqlite")
    return engine.execution_options(schema_translate_map={None: schema}) if schema else engine


def _leave_ids_as_texts(engine: Engine) -> None:
    """psycopg would make an object of each UUID, and SQLAlchemy a text of the object."""

    @event.listens_for(engine, "connect")
    def _load(connection: Any, _record: Any) -> None:
        connection.adapters.register_loader("uuid", TextLoader)


def _ping_the_idle(engine: Engine) -> None:
    """As pool_pre_ping, but not for a connection that was in use a moment ago.

    A ping takes as long as a short statement, and the writer's connection is always in use.
    """

    @event.listens_for(engine, "checkin")
    def _note(_connection: Any, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ping(connection: Any, record: Any, _proxy: Any) -> None:
        if time.monotonic() < record.info.get("idle_since", math.inf) + IDLE:
            return
        try:
            engine.dialect.do_ping(connection)
        except psycopg.Error as error:
            raise InvalidatePoolError from error  # the pool connects anew


def _leave_the_read_only(engine: Engine) -> None:
    """A server that only reads is no longer the one to write to: after a failover the name leads
    elsewhere, and a connection that is kept would lead to the old one for ever.
    """

    @event.listens_for(engine, "handle_error")
    def _note(context: Any) -> None:
        if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
            context.is_disconnect = True


def _make_sqlite_safe(engine: Engine) -> None:
    """WAL, a sync at each commit, and writers that queue up instead of failing half-way.

    BEGIN IMMEDIATE: a deferred transaction that reads first and writes later fails with "database
    is locked" at once, whatever the timeout.
    """

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        _switch_to_wal(cursor)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        reads = connection.get_execution_options().get("reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _switch_to_wal(cursor: Any) -> None:
    """Tried again where others do the same to a new file: there SQLite says "locked" at once,
    whatever the timeout. https://www.sqlite.org/wal.html#sometimes_queries_return_sqlite_busy_in_wal_mode
    """
    end = time.monotonic() + SQLITE_TIMEOUT
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def revision(engine: Engine, schema: str | None) -> str | None:
    """The revision that the database is at; None where it has none of our tables.

    Raises Unavailable.
    """
    version = Table("postroom_version", MetaData(), Column("version_num", String(32)))
    try:
        if not inspect(engine).has_table(version.name, schema=schema):
            return None
    except OperationalError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise Unavailable(f"the database does not answer: {reason}") from None
    with engine.execution_options(reads=True).connect() as connection:
        return connection.execute(select(version.c.version_num)).scalar()


def newest_revision() -> str:
    """The revision that this code works with."""
    from alembic.script import ScriptDirectory

    return str(ScriptDirectory(str(migrations_directory())).get_current_head())


def migrations_directory() -> Path:
    """Where the migrations lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def upgrade(url: str, schema: str | None = None, revision: str = "head") -> None:
    """Brings the database's schema up to `revision`. Safe to call at once from several places."""
    from alembic import command

    command.upgrade(alembic_config(url, schema), revision)


def alembic_config(url: str, schema: str | None = None) -> Any:
    """Alembic's configuration without a file: script location, address and schema."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_directory()))
    config.attributes["url"] = url
    config.attributes["schema"] = schema
    return config
