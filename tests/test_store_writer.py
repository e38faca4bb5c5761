"""The writer: many lanes share few transactions, and no lost connection loses or doubles."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError

from tests.store_kit import (
    LATER,
    SENT,
    Kit,
    opened,
    outcome_for,
    postgresql_only,
    to_claim,
    to_record,
)
from tests.support import wait_until
from worker.model import State, Verdict
from worker.store import ToRecord, Writer


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


async def claim_all(kit: Kit, ids: list[str], **fields: Any) -> dict[str, int]:
    """One lane a message, all at once, through one writer."""
    writer = Writer(kit.engine, kit.sending)
    found = await asyncio.gather(*(writer.claim([to_claim(i, **fields)]) for i in ids))
    await writer.close()
    return {one: fence for claim in found for one, fence in claim.items()}


async def record_all(kit: Kit, results: list[ToRecord]) -> list[bool]:
    """All outcomes at once, through one writer."""
    writer = Writer(kit.engine, kit.sending)
    done = await asyncio.gather(*(writer.record(result) for result in results))
    await writer.close()
    return done


def test_many_lanes_share_few_transactions(kit: Kit) -> None:
    """What gathers while a transaction runs goes into the next one."""
    head, ids = kit.batch(200)
    commits: list[Any] = []
    event.listen(kit.engine, "commit", commits.append)
    claims = asyncio.run(claim_all(kit, ids))
    results = [to_record(head, one, fence, SENT) for one, fence in claims.items()]
    ours = asyncio.run(record_all(kit, results))

    assert claims == dict.fromkeys(ids, 1)
    assert ours == [True] * 200
    assert len(commits) <= 6
    assert kit.status(head.id)["counts"]["sent"] == 200


def test_two_lanes_that_want_one_message_do_not_both_get_it(kit: Kit) -> None:
    """The lanes of a pool in one process share a transaction: still one of them wins."""
    _, ids = kit.batch(3)

    async def race() -> list[dict[str, int]]:
        writer = Writer(kit.engine, kit.sending)
        lanes = [[to_claim(i, mailbox=m) for i in ids] for m in ("a@x.org", "b@x.org")]
        found = await asyncio.gather(*(writer.claim(lane) for lane in lanes))
        await writer.close()
        return found

    assert asyncio.run(race()) == [dict.fromkeys(ids, 1), {}]
    assert {kit.message(i)["mailbox"] for i in ids} == {"a@x.org"}


def test_what_the_database_refuses_takes_nothing_else_along(kit: Kit) -> None:
    """One outcome that breaks a constraint fails alone; its neighbours are written."""
    head, ids = kit.batch(3)
    claims = kit.claim(ids)
    verdicts = [SENT, Verdict(State.UNKNOWN, doubt=False), LATER]
    results = [
        to_record(head, one, claims[one], verdict, outcome_for(SENT))
        for one, verdict in zip(ids, verdicts, strict=True)
    ]

    async def record() -> list[Any]:
        writer = Writer(kit.engine, kit.sending)
        done = await asyncio.gather(*map(writer.record, results), return_exceptions=True)
        await writer.close()
        return done

    done = asyncio.run(record())

    assert [done[0], done[2]] == [True, True]
    assert isinstance(done[1], SQLAlchemyError)
    assert [kit.message(i)["state"] for i in ids] == ["sent", "sending", "queued"]


def terminate(kit: Kit, raw: psycopg.Connection[Any]) -> None:
    """Kills the backend of a connection, and waits until it is gone."""
    pid = raw.info.backend_pid
    admin = create_engine(make_url(kit.url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("SELECT pg_terminate_backend(%s)", (pid,))
        wait_until(
            lambda: (
                not connection.exec_driver_sql(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)
                ).all()
            ),
            "the backend is gone",
        )
    admin.dispose()


def raw_of(connection: Any) -> psycopg.Connection[Any]:
    """The driver's own connection under SQLAlchemy's."""
    raw = connection.connection.dbapi_connection
    found: psycopg.Connection[Any] = getattr(raw, "driver_connection", raw)
    return found


def once_at(engine: Engine, name: str, strike: Any) -> list[Any]:
    """Lets `strike(connection)` happen at the first such event; gives what it struck."""
    struck: list[Any] = []

    def on_event(connection: Any, *_: Any) -> None:
        if not struck:
            struck.append(connection)
            strike(connection)

    event.listen(engine, name, on_event)
    return struck


def kill(kit: Kit) -> Any:
    """Kills the connection before its next statement."""
    return lambda connection: terminate(kit, raw_of(connection))


def lose_reply_to_commit(kit: Kit) -> Any:
    """The server commits, and then the connection breaks: the client sees COMMIT fail.

    The driver's own commit is carried out; a new transaction is begun under SQLAlchemy, and its
    server process killed, so that the COMMIT which SQLAlchemy sends gets no answer.
    """

    def strike(connection: Any) -> None:
        raw = raw_of(connection)
        raw.commit()
        raw.execute("SELECT 1")
        terminate(kit, raw)

    return strike


LOSSES = [("before_cursor_execute", kill), ("commit", kill), ("commit", lose_reply_to_commit)]
losses = pytest.mark.parametrize(
    ("when", "strike"), LOSSES, ids=["in a statement", "before COMMIT", "after COMMIT"]
)


@postgresql_only
@losses
def test_claims_survive_a_lost_connection(kit: Kit, when: str, strike: Any) -> None:
    """Every lane learns of its claim, and each message was claimed once."""
    _, ids = kit.batch(20)
    struck = once_at(kit.engine, when, strike(kit))
    claims = asyncio.run(claim_all(kit, ids))

    assert len(struck) == 1
    assert claims == dict.fromkeys(ids, 1)
    assert kit.sql("SELECT state, fence, attempts, count(*) FROM messages GROUP BY 1, 2, 3") == [
        ("sending", 1, 1, 20)
    ]


@postgresql_only
@losses
def test_outcomes_survive_a_lost_connection(kit: Kit, when: str, strike: Any) -> None:
    """Each is written once, with one audit row, and its lane hears that the claim was its own."""
    head, ids = kit.batch(20)
    claims = kit.claim(ids)
    struck = once_at(kit.engine, when, strike(kit))
    verdicts = [SENT, LATER] * 10
    ours = asyncio.run(
        record_all(
            kit, [to_record(head, i, claims[i], v) for i, v in zip(ids, verdicts, strict=True)]
        )
    )

    assert len(struck) == 1
    assert ours == [True] * 20
    assert kit.sql("SELECT late, count(*) FROM attempts GROUP BY 1") == [(False, 20)]
    counts = kit.status(head.id)["counts"]
    assert (counts["sent"], counts["queued"]) == (10, 10)


@postgresql_only
def test_after_a_lost_reply_nobody_gets_what_another_lane_has_in_flight(kit: Kit) -> None:
    """A stale wish of one lane, repeated after trouble, is not answered with another's claim."""
    _, [flying, free] = kit.batch(2)
    kit.claim([flying], mailbox="a@x.org")
    once_at(kit.engine, "commit", lose_reply_to_commit(kit))

    claims = asyncio.run(claim_all(kit, [flying, free], mailbox="b@x.org"))

    assert claims == {free: 1}
