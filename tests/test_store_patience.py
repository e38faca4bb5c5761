"""A database that says nothing: nobody waits for it for ever, and the next statement goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from tests.proxy import Proxy, before_postgres
from tests.support import wait_until
from worker.servers import PostgresServer
from worker.store import make_engine
from worker.store.engine import IDLE

PATIENCE = 1.0


@pytest.fixture
def line(own_postgres: PostgresServer) -> Iterator[Proxy]:
    """The way to a PostgreSQL, which may break."""
    with before_postgres(own_postgres) as proxy:
        yield proxy


def engine_on(line: Proxy) -> Engine:
    url = f"postgresql+psycopg://postgres@127.0.0.1:{line.port}/postgres"
    return make_engine(url, pool_size=1, patience=PATIENCE)


def test_a_statement_whose_answer_is_swallowed_is_given_up(line: Proxy) -> None:
    """The connection is thrown away, and the next one answers once the line is mended."""
    engine = engine_on(line)
    with engine.connect() as c:
        c.execute(text("SELECT 1"))
        line.half_open()
        with pytest.raises(OperationalError, match="no answer within 1 seconds"):
            c.execute(text("SELECT 2"))
    line.heal()

    with engine.connect() as c:
        assert c.execute(text("SELECT 3")).scalar() == 3
    engine.dispose()


def test_a_connection_that_went_dead_in_the_pool_is_replaced(line: Proxy) -> None:
    """It stood idle when the line broke: whoever takes it next waits a moment, and has another."""
    engine = engine_on(line)
    with engine.connect() as c:
        c.execute(text("SELECT 1"))
    put_back = time.monotonic()
    line.half_open()
    line.heal()
    wait_until(lambda: time.monotonic() > put_back + IDLE, "the connection lies idle")

    began = time.monotonic()
    with engine.connect() as c:
        assert c.execute(text("SELECT 2")).scalar() == 2
    assert time.monotonic() - began >= PATIENCE
    engine.dispose()


def test_a_statement_that_is_answered_in_time_may_take_long(line: Proxy) -> None:
    """Large answers come in many pieces; each statement has its own time."""
    engine = engine_on(line)
    with engine.connect() as c:
        for _ in range(4):
            c.execute(text("SELECT pg_sleep(0.4)"))
        rows = c.execute(text("SELECT repeat('x', 1000) FROM generate_series(1, 5000)")).all()
    assert len(rows) == 5000
    engine.dispose()
