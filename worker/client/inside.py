"""Enqueue inside the application's own transaction: what ingest would write, written at once."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, select
from sqlalchemy.exc import SQLAlchemyError

from worker.client.keeper import Keeper
from worker.client.spool import Spool
from worker.inbox import Batch
from worker.model import IdempotencyConflict, InvalidMessages, Problem, Unavailable
from worker.store import Chunk, Head, arrivals, contents
from worker.store.clock import now
from worker.store.retrying import is_passing, name_of
from worker.store.schema import pools

if TYPE_CHECKING:
    from worker.runtime import Runtime


class InSchema:
    """The application's connection, on which our statements find our tables.

    The schema goes with each statement: a connection's own options would change the application's
    statements as well.
    """

    def __init__(self, connection: Connection, schema: str | None, batch_id: str) -> None:
        self._connection = connection
        self._options = {"schema_translate_map": {None: schema}} if schema else {}
        self._batch_id = batch_id
        self.dialect = connection.dialect

    def execute(self, statement: Any, parameters: Any = None) -> Any:
        """As the connection's. Raises Unavailable where the database does not answer."""
        try:
            return self._connection.execute(statement, parameters, execution_options=self._options)
        except SQLAlchemyError as error:
            if not is_passing(error):
                raise
            what = f"the database does not answer ({name_of(error)})"
            raise Unavailable(what, self._batch_id) from error


class Inside:
    """The way through the application's own transaction: no Redis, no commit of ours."""

    def __init__(self, rt: Runtime, session: object, batch_id: str) -> None:
        """Raises InvalidMessages where this is no session."""
        self._rt = rt
        schema = rt.settings.db_schema or None
        ours = InSchema(_connection_of(session), schema, batch_id)
        self._connection = cast("Connection", ours)

    def now(self) -> datetime:
        """The database's time."""
        found: datetime = self._connection.execute(select(now())).scalar_one()
        return found

    def knows_pool(self, name: str) -> bool:
        """Whether the settings or SQL know this pool."""
        if name in self._rt.settings.pools:
            return True
        there = select(pools.c.name).where(pools.c.name == name).limit(1)
        return self._connection.execute(there).first() is not None

    def append(self, batch: Batch, spool: Spool, keeper: Keeper) -> tuple[int, int]:
        """Writes what is not there yet: (accepted, duplicates). Raises IdempotencyConflict."""
        known = {"head": json.loads(batch.head), "digest": batch.digest, "chunks": batch.chunks,
                 "messages": batch.messages}  # fmt: skip
        head = Head.of(batch.id, known, self._rt.settings.max_age)
        # Locks the batch: of two transactions with one key the second waits, and finds it all.
        arrivals.arrive(self._connection, [head], [])
        seen = arrivals.seen(self._connection, batch.id)
        if seen is None or seen.digest != batch.digest:
            raise IdempotencyConflict(batch.id)
        if len(seen.chunks) < spool.chunks:
            for part in keeper.parts():
                contents.write(self._connection, [part])
        accepted = duplicates = 0
        for chunk in spool.read():
            if chunk.number in seen.chunks:
                duplicates += chunk.count
                continue
            rows = json.loads(chunk.body)
            whole = Chunk(batch.id, chunk.number, chunk.digest, rows)
            arrivals.arrive(self._connection, [head], [whole])
            accepted += chunk.count
        return accepted, duplicates


def _connection_of(session: object) -> Connection:
    if isinstance(session, Connection):
        return session
    from sqlalchemy.orm import Session, scoped_session  # 6 MB that a worker does not need

    if isinstance(session, Session | scoped_session):
        found: Connection = session.connection()
        return found
    detail = f"expected a Session or a Connection of SQLAlchemy, got {type(session).__name__}"
    if hasattr(session, "sync_session"):
        detail += "; inside run_sync, give its sync_session"
    raise InvalidMessages([Problem(0, "TYPE", "session", detail)])
