"""Ingest: what cannot be read never stands in the way, and is lost from no count."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy

from tests.store_kit import Kit, opened, postgresql_only
from tests.support import clean_environment, wait_until
from worker import ingest as room
from worker.client import Client
from worker.config import Settings
from worker.inbox import ASIDE, STREAM, SUSPECTS
from worker.ingest import POISON, ingest
from worker.model import InboxFull, Message, State
from worker.runtime import Runtime
from worker.servers import RedisServer
from worker.store import Store, make_engine
from worker.tasks.work import run_ingest

SENDER = "notices@contoso.com"


@pytest.fixture
def rt(redis_url: str, migrated_url: str) -> Iterator[Runtime]:
    runtime = Runtime(Settings(redis_url=redis_url, database_url=migrated_url))
    yield runtime
    runtime.close()


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose reader died is read again at once."""
    monkeypatch.setattr(room, "IDLE_MS", 1)


def enqueue(rt: Runtime, count: int = 450) -> str:
    mails = [Message(f"u{n}@example.com", subject="s", text="x") for n in range(1, count + 1)]
    return Client(lambda: rt).enqueue(mails, sender=SENDER).batch_id


def rows(content: Any, recipients: int = 1) -> bytes:
    """The body of the second of three chunks, all of whose messages are the same."""
    return json.dumps([[n, recipients, "a@b.example", content] for n in range(201, 401)]).encode()


def take_in(rt: Runtime, store: Store | None = None) -> dict[str, int]:
    return ingest(
        rt.inbox, store or rt.store, consumer="test", max_age=timedelta(hours=1),
        wake=lambda _targets: None,
    )  # fmt: skip


def spoil(rt: Runtime, at: int, **fields: Any) -> None:
    """Replaces entry `at` of the stream by one with other fields; the order stays."""
    entries: Any = rt.redis.xrange(STREAM)
    rt.redis.delete(STREAM)
    for n, (_, old) in enumerate(entries):
        rt.redis.xadd(STREAM, {**old, **({k.encode(): v for k, v in fields.items()}
                                         if n == at else {})})  # fmt: skip
    rt.redis.xgroup_create(STREAM, "postroom", id="0")


def at_rest(rt: Runtime) -> bool:
    """Whether nothing waits in the inbox, nor is pending."""
    return rt.inbox.waiting() == 0 and pending(rt) == 0


def pending(rt: Runtime) -> int:
    """How many chunks are being taken in."""
    found: Any = rt.redis.xpending(STREAM, "postroom")
    return int(found["pending"])


@pytest.mark.parametrize(
    "body",
    [b"[[201, 1, null", b"\xff\xfe", b"{}", b"[]", b"[" * 100_000, b'[[201,1,"a",5]]',
     rows({"to": [{"address": "a@b.example"}]}, recipients=10**30), rows({}), rows({"to": [7]}),
     rows({"to": "a@b.example"}), rows({"to": [{"name": "Ann"}]})],
    ids=["cut", "bytes", "object", "empty", "deep", "shape", "too many recipients", "to nobody",
         "number", "text", "name"],
)  # fmt: skip
def test_a_chunk_that_cannot_be_read_ends_as_failed_rows(rt: Runtime, kit: Kit, body: bytes):
    """Each of its messages is one, at its place, with the reason on the audit; the batch is whole
    and the other chunks go.
    """
    assert_ends_as_failed(rt, kit, body, "it cannot be read")


@postgresql_only
def test_a_chunk_that_the_database_refuses_ends_as_failed_rows(rt: Runtime, kit: Kit):
    """PostgreSQL takes no NUL in a JSON: the one chunk with it ends, and the others go."""
    body = rows({"to": [{"address": "a@b.example"}], "text": "\0"})
    assert_ends_as_failed(rt, kit, body, "the database refuses what it holds")


def assert_ends_as_failed(rt: Runtime, kit: Kit, body: bytes, why: str) -> None:
    """The second of three chunks has this body."""
    batch = enqueue(rt)
    spoil(rt, 1, body=body)
    take_in(rt)

    status = kit.status(batch)
    assert (status["state"], status["counts"]["queued"]) == ("running", 250)
    assert status["counts"]["failed"] == 200
    rows = kit.sql("SELECT position, error_code FROM messages WHERE state = 'failed' ORDER BY 1")
    assert [row[0] for row in rows] == list(range(201, 401))
    assert {row[1] for row in rows} == {"Unreadable"}
    [event] = kit.sql("SELECT kind, why FROM events")
    assert event[0] == "unreadable"
    assert event[1].startswith(why)
    assert at_rest(rt)
    assert kit.retry(batch) == 0, "what has no content cannot be sent again"


def test_rows_left_out_at_the_door_do_not_shift_what_was_lost(rt: Runtime, kit: Kit):
    """The places are those of the input, whatever was refused before them."""
    mails: list[Any] = [{"to": "bob"}] * 5
    mails += [Message(f"u{n}@example.com", subject="s", text="x") for n in range(405)]
    client = Client(lambda: rt)
    batch = client.enqueue(mails, sender=SENDER, on_invalid="skip").batch_id
    spoil(rt, 1, body=b"nonsense")
    take_in(rt)

    counts = kit.status(batch)["counts"]
    assert (counts["queued"], counts["failed"]) == (205, 200)
    [[first, last]] = kit.sql("SELECT min(position), max(position) FROM messages"
                              " WHERE state = 'failed'")  # fmt: skip
    assert (first, last) == (206, 405)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "fields",
    [{"something": "else"}, {"batch": "x", "n": "1", "count": "z", "digest": "d", "body": "[]"},
     {"batch": b"\xff", "n": "1", "count": "1", "digest": "d", "body": "[]"},
     {"batch": "6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66", "n": "1", "count": "1", "digest": "d",
      "body": '[[1,1,"a",{}]]'}],
    ids=["foreign", "numbers", "bytes", "headless"],
)  # fmt: skip
def test_what_belongs_to_no_batch_goes_aside(rt: Runtime, kit: Kit, fields: Any):
    """It is kept for a person to look at, is on the audit once, and is never read again."""
    rt.redis.xadd(STREAM, fields)
    batch = enqueue(rt, 3)
    take_in(rt)
    take_in(rt)

    assert kit.status(batch)["counts"]["queued"] == 3
    assert at_rest(rt)
    assert rt.redis.xlen(ASIDE) == 1
    [event] = kit.sql("SELECT kind, batch_id FROM events")
    assert event[0] == "unreadable"


READER = """
import os, signal, sys
from datetime import timedelta
import worker.ingest
from worker.config import Settings
from worker.runtime import Runtime
from worker.store import Store

class Deadly(Store):
    def arrive(self, heads, chunks):
        os.kill(os.getpid(), signal.SIGKILL)

worker.ingest.IDLE_MS = 1
rt = Runtime(Settings.from_env())
worker.ingest.ingest(rt.inbox, Deadly(rt.store.engine), consumer="dies",
                     max_age=timedelta(hours=1), wake=lambda _: None)
"""


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_chunk_that_takes_its_readers_down_is_quarantined(
    rt: Runtime, kit: Kit, impatient: None, redis_url: str, migrated_url: str
):
    """Real readers die of it, the first and three more: then it is read no more, and failed."""
    batch = enqueue(rt, 2)
    environment = clean_environment() | {
        "POSTROOM_REDIS_URL": redis_url, "POSTROOM_DATABASE_URL": migrated_url,
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }  # fmt: skip
    for _ in range(POISON + 1):
        died = subprocess.run([sys.executable, "-c", READER], env=environment, check=False)
        assert died.returncode == -signal.SIGKILL
    other = enqueue(rt, 3)
    wait_until(lambda: take_in(rt)["chunks"] or at_rest(rt), "both are read")

    wait_until(lambda: at_rest(rt) or take_in(rt), "nothing is left")
    assert kit.status(batch)["counts"]["failed"] == 2
    assert "ended without a word" in kit.sql("SELECT why FROM events")[0][0]
    assert kit.status(other)["counts"]["queued"] == 3
    assert not rt.redis.exists(SUSPECTS)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_database_that_is_away_makes_no_chunk_a_suspect(
    rt: Runtime, kit: Kit, impatient: None, tmp_path: Path
):
    """However often it is read in vain: the reader lives, so it was not the chunk."""
    batch = enqueue(rt, 2)
    away = Store(make_engine(f"sqlite:///{tmp_path}/absent/x.db"))
    for _ in range(POISON + 3):
        with pytest.raises(Exception, match="unable to open"):
            wait_until(lambda: take_in(rt, away)["chunks"], "it is read again")

    wait_until(lambda: take_in(rt)["chunks"], "it is read")
    assert kit.status(batch)["counts"] | {"queued": 0} == dict.fromkeys(map(str, State), 0)
    assert kit.status(batch)["counts"]["queued"] == 2


def test_the_inbox_is_full_well_before_redis_is(tmp_path: Path):
    """Gates, tokens and tasks still have room, and nothing of the refused chunk was kept."""
    with RedisServer(tmp_path / "small", maxmemory="24mb") as server:
        rt = Runtime(Settings(redis_url=server.url))
        large = [Message("a@example.com", subject="s", text="x" * 100_000)] * 400
        with pytest.raises(InboxFull) as caught:
            Client(lambda: rt).enqueue(large, sender=SENDER)

        info: Any = rt.redis.info("memory")
        assert 0.5 * info["maxmemory"] < info["used_memory"] < 0.9 * info["maxmemory"]
        known = rt.inbox.batch(caught.value.batch_id)
        assert known is not None
        assert len(known["numbers"]) == rt.inbox.waiting() < known["chunks"]
        rt.redis.set("other", "y" * 1_000_000)
        rt.close()


def test_redis_may_forbid_info(own_redis: RedisServer):
    """Then its own refusal must do."""
    with redis.Redis.from_url(own_redis.url) as connection:
        connection.execute_command("ACL", "SETUSER", "default", "-info")
    rt = Runtime(Settings(redis_url=own_redis.url))
    assert enqueue(rt, 3)
    assert rt.inbox.waiting() == 1
    rt.close()


@postgresql_only
def test_one_thread_takes_in_for_all_of_its_process(rt: Runtime, kit: Kit) -> None:
    """The second does not wait, and what it was rung for is not left to the next tick."""
    batches = [enqueue(rt, 3)]
    with ThreadPoolExecutor() as pool:
        with kit.engine.begin() as connection:
            connection.execute(sqlalchemy.text("LOCK TABLE messages IN EXCLUSIVE MODE"))
            first = pool.submit(run_ingest, rt)
            wait_until(lambda: pending(rt), "a block in work")
            batches.append(enqueue(rt, 3))
            assert run_ingest(rt) == {}
        first.result(timeout=20)

    assert at_rest(rt)
    totals = [(kit.store.batch_status(b) or {}).get("counts", {}).get("queued") for b in batches]
    assert totals == [3, 3]
