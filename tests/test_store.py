"""The tables refuse the impossible, and SQLite serves several processes at once."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import CheckConstraint, NullPool, create_engine, insert, make_url, text
from sqlalchemy.exc import IntegrityError

from tests.store_kit import SENT, Kit, opened, sqlite_only, to_claim, to_record
from worker.model import InvalidSettings, State
from worker.store import Writer, make_engine, upgrade
from worker.store.schema import metadata

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def test_a_database_without_an_encoding_serves_as_well(postgres_server: str) -> None:
    """initdb in a container without a locale makes SQL_ASCII, which answers in bytes."""
    admin = create_engine(postgres_server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(
            "CREATE DATABASE plain ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' "
            "TEMPLATE template0"
        )
    url = make_url(postgres_server).set(database="plain").render_as_string(hide_password=False)
    try:
        upgrade(url)
        with opened(url) as kit:
            head, [one] = kit.batch(name="Zürich")
            assert kit.status(head.id)["name"] == "Zürich"
            assert kit.message(one)["state"] == State.QUEUED
    finally:
        with admin.connect() as connection:
            connection.exec_driver_sql("DROP DATABASE plain WITH (FORCE)")


#: Constraint → what it must refuse: of a message (whole otherwise), or of another table.
REFUSED: dict[str, list[dict[str, Any]]] = {
    "ck_messages_state": [{"state": "lost"}],
    "ck_messages_lease_with_sending": [
        {"lease_until": NOW},
        {"state": State.SENDING, "mailbox": "a@x.org", "token_ends_at": NOW},
        {"state": State.SENT, "sent_at": NOW, "lease_until": NOW},
    ],
    "ck_messages_claim_is_whole": [
        {"state": State.SENDING, "lease_until": NOW, "mailbox": "a@x.org"},
        {"state": State.SENDING, "lease_until": NOW, "token_ends_at": NOW},
    ],
    "ck_messages_sent_at_with_sent": [{"state": State.SENT}, {"sent_at": NOW}],
    "ck_messages_doubt_never_ends_as_not_sent": [
        {"doubt": True, "state": state} for state in ("failed", "cancelled", "expired")
    ],
    "ck_messages_unknown_is_doubt": [{"state": State.UNKNOWN}],
    "ck_batches_target_kind": [{"target_kind": "person"}],
    "ck_batches_finished_when_sealed": [{"finished_at": NOW, "sealed_at": None}],
    "ck_attempts_outcome": [{"outcome": "lost"}],
    "ck_bounces_kind": [{"kind": "odd"}],
    "ck_mailboxes_suspended_whole": [{"suspended_at": NOW}, {"suspended_reason": "403"}],
}


@pytest.mark.parametrize(
    ("name", "values"), [(name, values) for name, cases in REFUSED.items() for values in cases]
)
def test_a_constraint_refuses_what_its_name_says(
    kit: Kit, name: str, values: dict[str, Any]
) -> None:
    """By name: the database is the last one to say no, and says which rule it was."""
    head, [one] = kit.batch()

    with pytest.raises(IntegrityError, match=name):
        _break(kit, name.split("_")[1], head.id, one, values)
    assert kit.message(one)["state"] == "queued"


def _break(kit: Kit, table: str, batch_id: str, message_id: str, values: dict[str, Any]) -> None:
    if table == "messages":
        kit.put(message_id, **values)
    elif table == "batches":
        kit.set_batch(batch_id, **values)
    else:
        whole: dict[str, dict[str, Any]] = {
            "attempts": {"message_id": message_id, "fence": 1, "batch_id": batch_id,
                         "mailbox": "a@x.org", "recipients": 1, "at": NOW},
            "bounces": {"message_id": message_id, "report_id": "r", "batch_id": batch_id,
                        "mailbox": "a@x.org", "at": NOW},
            "mailboxes": {"address": "a@x.org"},
        }  # fmt: skip
        with kit.engine.begin() as connection:
            connection.execute(insert(metadata.tables[table]).values(**whole[table] | values))


def test_every_constraint_is_tried() -> None:
    """A new CHECK without a case above fails here."""
    named = {
        str(constraint.name)
        for table in metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, CheckConstraint)
    }

    assert {name if name.startswith("ck_") else f"ck_?_{name}" for name in named} == set(REFUSED)


@pytest.mark.parametrize("url", ["mysql://localhost/x", "nonsense", "oracle://h/x"])
def test_another_database_is_refused_in_words(url: str) -> None:
    """With what is allowed, and without the URL: it may hold a password."""
    with pytest.raises(InvalidSettings, match="postgresql"):
        make_engine(url)


def _work(url: str, head: Any, ids: list[str]) -> None:
    """A process of its own: claims and records, a few at a time."""

    async def run(kit: Kit) -> None:
        writer = Writer(kit.engine, kit.sending)
        for at in range(0, len(ids), 2):
            kit.store.look("notices@contoso.com", {}, {}, 8)
            claims = await writer.claim([to_claim(i) for i in ids[at : at + 2]])
            for one, fence in claims.items():
                await writer.record(to_record(head, one, fence, SENT))
            kit.store.finish_batches()
        await writer.close()

    with opened(url) as kit:
        asyncio.run(run(kit))


@sqlite_only
def test_sqlite_serves_two_processes_at_once(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    """No "database is locked", however they mix: each message is claimed and recorded once."""
    head, ids = kit.batch(100)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(kit.url, head, ids)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)

    assert [worker.exitcode for worker in workers] == [0, 0]
    assert kit.status(head.id)["counts"]["sent"] == 100
    assert kit.sql("SELECT late, count(*) FROM attempts GROUP BY 1") == [(False, 100)]


def test_many_may_open_a_new_sqlite_file_at_once(tmp_path: Path) -> None:
    """Whoever comes first makes it a file with a write-ahead log; nobody is told that it is locked.

    Without patience about one in eight of these openings fails.
    """

    def opens(path: Path, together: Barrier) -> int:
        engine = make_engine(f"sqlite:///{path}")
        together.wait()
        with engine.connect() as connection:
            found = connection.execute(text("SELECT 1")).scalar_one()
        engine.dispose()
        return int(found)

    with ThreadPoolExecutor(4) as pool:
        for number in range(25):
            together = Barrier(4)
            path = tmp_path / f"{number}.db"
            assert [f.result() for f in [pool.submit(opens, path, together)
                                         for _ in range(4)]] == [1] * 4  # fmt: skip
