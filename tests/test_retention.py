"""What is forgotten when, in small steps, and what stays for the audit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import insert, text, update

from tests.store_kit import (
    FAILED,
    IN_DOUBT,
    SENT,
    Kit,
    opened,
    postgresql_only,
    to_record,
)
from tests.test_cli import Command, document, postroom
from worker.model import Part, State, Verdict
from worker.store import Head, retention
from worker.store.retention import pseudonym
from worker.store.schema import contents, events

__all__ = ["postroom"]

KEEP = pseudonym("key")
MONTH = 30 * 86400.0


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def end(kit: Kit, head: Head, ids: Sequence[str], verdict: Verdict) -> None:
    """Claims messages and lets them come to this end."""
    fences = kit.claim(ids)
    kit.record(*(to_record(head, one, fences[one], verdict) for one in ids))


def ago(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def finished(
    kit: Kit, total: int, days: int, verdict: Verdict = SENT, **fields: Any
) -> tuple[Head, list[str]]:
    """A batch whose messages came to this end, finished so many days ago."""
    head, ids = kit.batch(total, **fields)
    end(kit, head, ids, verdict)
    kit.set_batch(head.id, created_at=ago(days), finished_at=ago(days))
    return head, ids


def test_contents_and_addresses_go_and_the_audit_stays(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State, attempts, codes, request ids: all that says what happened. In steps."""
    monkeypatch.setattr(retention, "STEP", 2)
    old, ids = finished(kit, 5, 31, template={"subject": "Dear {{ name }}"})
    _, others = finished(kit, 2, 29)
    before = kit.message(ids[0])

    done = kit.store.retention.purge_content(MONTH, KEEP)

    assert done == {"batches": 1, "messages": 5, "attachments": 0}
    rows = kit.sql("SELECT content, recipient, state FROM messages WHERE batch_id = :b", b=old.id)
    assert {row.content for row in rows} == {None}
    assert {row.state for row in rows} == {"sent"}
    left = {KEEP(f"user{n}@example.com") for n in range(1, 6)}
    assert {row.recipient for row in rows} == left
    after = kit.message(ids[0])
    assert after["attempts"] == before["attempts"]
    assert kit.sql("SELECT template FROM batches WHERE id = :b", b=old.id)[0].template is None
    assert all(kit.message(one)["to"].startswith("user") for one in others)
    assert kit.store.retention.purge_content(MONTH, KEEP)["batches"] == 0, "once is enough"


def test_what_has_lost_its_content_is_not_queued_again(kit: Kit) -> None:
    """A retry of a purged batch leaves its messages where they are."""
    old, ids = finished(kit, 2, 31, FAILED)
    kit.store.retention.purge_content(MONTH, KEEP)
    assert kit.retry(old.id) == 0
    assert kit.message(ids[0])["state"] == State.FAILED


def test_without_a_key_nothing_is_left_of_an_address(kit: Kit) -> None:
    """A hash that anybody can make for every address is no protection."""
    _, ids = finished(kit, 1, 31)
    kit.store.retention.purge_content(MONTH, pseudonym(None))
    assert kit.message(ids[0])["to"] is None


def test_an_attachment_goes_when_only_purged_batches_can_have_used_it(kit: Kit) -> None:
    """One that a batch of today may refer to stays, however old it is."""
    for name, age in (("a" * 64, 40), ("b" * 64, 0)):
        kit.store.contents.arrive([Part(name, 3, 0, b"abc")])
        with kit.engine.begin() as c:
            c.execute(update(contents).where(contents.c.sha256 == name).values(used_at=ago(age)))
    running, _ = kit.batch(1)
    kit.set_batch(running.id, created_at=ago(50))
    assert kit.store.retention.purge_content(MONTH, KEEP)["attachments"] == 0
    kit.set_batch(running.id, created_at=ago(1))
    assert kit.store.retention.purge_content(MONTH, KEEP)["attachments"] == 1
    assert [row.sha256 for row in kit.sql("SELECT sha256 FROM contents")] == ["b" * 64]
    assert [row.sha256 for row in kit.sql("SELECT sha256 FROM content_parts")] == ["b" * 64]


def test_the_audit_goes_whole_and_leaves_the_younger_alone(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch, messages, attempts, events: no row of the old one is left anywhere."""
    monkeypatch.setattr(retention, "STEP", 2)
    old, _ = finished(kit, 5, 401, FAILED)
    with kit.engine.begin() as c:
        c.execute(insert(events).values(at=ago(401), kind="x", batch_id=old.id, by="test"))
    young, _ = finished(kit, 3, 399)

    done = kit.store.retention.purge_audit(400 * 86400.0)

    assert done == {"batches": 1, "messages": 5, "events": 1}
    for table in ("batches", "messages", "attempts", "events", "chunks", "queues"):
        column = "id" if table == "batches" else "batch_id"
        assert not kit.sql(f"SELECT 1 FROM {table} WHERE {column} = :b", b=old.id), table
    assert len(kit.sql("SELECT 1 FROM messages WHERE batch_id = :b", b=young.id)) == 3


def test_a_person_is_erased_wherever_they_stand(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """First recipient, copy, in any spelling; what is queued is cancelled, doubt stays doubt."""
    monkeypatch.setattr(retention, "STEP", 2)
    mine, other = "ann@example.org", "bob@example.org"
    head, ids = kit.batch(6)
    to = {0: mine, 1: "Ann@Example.org", 2: other, 3: other, 4: mine, 5: mine}
    for n, one in enumerate(ids):
        content: dict[str, Any] = {"to": [{"address": to[n]}]}
        if n == 2:
            content["cc"] = [{"address": mine}]
        kit.put(one, recipient=to[n], content=content)
    end(kit, head, [ids[0]], SENT)
    end(kit, head, [ids[4]], IN_DOUBT)
    kit.claim([ids[5]])

    done = kit.store.retention.erase(mine, KEEP, by="dpo", why="request 7")

    assert done == {"erased": 4, "cancelled": 2, "left": 1}
    found = kit.sql("SELECT id, state, recipient, content FROM messages")
    rows = {str(row.id): row for row in found}
    assert [rows[one].state for one in ids] == [
        "sent", "cancelled", "cancelled", "queued", "unknown", "sending",
    ]  # fmt: skip
    left = [rows[one].recipient for one in ids[:5]]
    assert left == [KEEP(mine), KEEP(mine), other, other, KEEP(mine)]
    assert [rows[one].content is None for one in ids] == [True, True, True, False, True, False]
    [event] = kit.sql("SELECT * FROM events WHERE kind = 'erase'")
    assert mine not in json.dumps(event._asdict(), default=str)
    assert (event.by, event.why) == ("dpo", "request 7")


def test_a_pseudonym_is_the_same_for_every_spelling_and_different_for_every_key() -> None:
    """And itself again when it is asked twice."""
    one, two = pseudonym("one"), pseudonym("two")
    assert one("Ann@Example.org ") == one("ann@example.org") != two("ann@example.org")
    assert one(str(one("ann@example.org"))) == one("ann@example.org")
    assert "ann" not in str(one("ann@example.org"))


def test_purge_and_erase_are_commands(postroom: Command, kit: Kit) -> None:
    """With a document for programs and one line for people; a wrong span is wrong usage."""
    finished(kit, 2, 31)
    done = document(postroom("purge", "--content-after", "30d", "--audit-after", "400d", "--json"))
    assert done == {"content": {"batches": 1, "messages": 2, "attachments": 0},
                    "audit": {"batches": 0, "messages": 0, "events": 0}}  # fmt: skip
    erased = postroom("erase", "--recipient", "ann@example.org", "--why", "request 7")
    assert erased.stdout == "0 messages erased, 0 of them cancelled\n"
    for words in (["purge"], ["purge", "--content-after", "soon"], ["erase", "--recipient", "ann"]):
        assert postroom(*words).returncode == 2


@postgresql_only
def test_the_applications_role_cannot_change_what_has_happened(kit: Kit, migrated_url: str) -> None:
    """What is only ever added to, attempts, bounces, events: docs/security.md's roles hold it."""
    from tests.test_docs import ROOT, blocks

    [roles] = blocks(ROOT / "docs" / "security.md", "sql")
    name = f"app_{kit.head(1).id[:8]}"
    for statement in roles.replace("postroom_app", name).split(";"):
        if statement.strip():
            kit.sql(statement.replace(":", r"\:"))
    finished(kit, 1, 31, FAILED)
    engine = sqlalchemy.create_engine(migrated_url)
    try:
        for statement in ("UPDATE attempts SET code = 'x'", "DELETE FROM attempts",
                          "UPDATE events SET by = 'x'", "DELETE FROM events", "TRUNCATE attempts",
                          "UPDATE bounces SET code = 'x'", "DELETE FROM bounces",
                          "DROP TABLE events"):  # fmt: skip
            with engine.connect() as connection:
                connection.execute(text(f"SET ROLE {name}"))
                with pytest.raises(sqlalchemy.exc.ProgrammingError, match=r"permission|owner"):
                    connection.execute(text(statement))
        with engine.begin() as connection:
            connection.execute(text(f"SET ROLE {name}"))
            connection.execute(text("UPDATE messages SET error_code = 'x'"))
            connection.execute(text("INSERT INTO events (at, kind, by) VALUES (now(), 'x', 'y')"))
    finally:
        engine.dispose()
        kit.sql(f"DROP OWNED BY {name}")
        kit.sql(f"DROP ROLE {name}")
