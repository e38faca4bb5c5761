"""What operators look up: batches and messages, page by page; and whom not to write to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.store_kit import Kit, opened
from tests.support import clean_environment
from worker.client import Client
from worker.config import Settings
from worker.model import InvalidMessages, NotFound, State
from worker.runtime import Runtime
from worker.store.retention import pseudonym

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


@pytest.fixture
def client(migrated_url: str) -> Iterator[Client]:
    runtime = Runtime(Settings(database_url=migrated_url))
    yield Client(lambda: runtime)
    runtime.close()


def failed(kit: Kit, message_id: str, code: str, hours: int) -> None:
    kit.put(message_id, state=State.FAILED, error_code=code, due_at=NOW - timedelta(hours=hours))


def ids(found: dict[str, Any]) -> list[str]:
    return [one["id"] for one in found["messages"]]


def test_batches_are_found_by_state_name_time_and_sender(kit: Kit, client: Client) -> None:
    """Each filter alone, and all together; the newest comes first, with counts."""
    old = datetime.now(UTC) - timedelta(days=30)
    first, _ = kit.batch(2, name="Invoices of May", created_at=old)
    second, _ = kit.batch(1, name="100%_done", target="News", target_kind="pool")
    third, _ = kit.batch(3, name=None, target="other@contoso.com")
    kit.set_batch(first.id, finished_at=old)
    kit.set_batch(second.id, paused_at=old)
    half = kit.head(2, chunks=2)
    kit.store.arrive([half], [])

    def found(**filters: Any) -> list[str]:
        return [one["batch_id"] for one in client.batches(**filters)]

    assert found() == [half.id, third.id, second.id, first.id]
    assert found(limit=1) == [half.id]
    assert [found(state=s) for s in ("open", "running", "paused", "finished", "cancelled")] == [
        [half.id], [third.id], [second.id], [first.id], [],
    ]  # fmt: skip
    assert found(name="invoices") == [first.id]
    assert found(name="%_D") == [second.id]
    assert found(since=timedelta(days=7), sender="Other@contoso.com") == [third.id]
    assert found(since=datetime.now(UTC) - timedelta(days=31), state="finished") == [first.id]
    assert client.batches(sender="other@contoso.com")[0]["counts"]["queued"] == 3


def test_wrong_filters_are_refused_with_what_is_allowed(client: Client) -> None:
    """As all bad input: code, place, reason."""
    for wrong, code in (
        (lambda: client.batches(state="done"), "STATE"),
        (lambda: client.batches(since=datetime(2026, 1, 1)), "TIME_NAIVE"),  # noqa: DTZ001
        (lambda: client.find(state="Sent!"), "STATE"),
        (lambda: client.find(to="a@b.com", after="yesterday"), "AFTER"),
        (lambda: client.find(batch_id="6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66", after="x"), "AFTER"),
    ):
        with pytest.raises(InvalidMessages) as caught:
            wrong()
        assert [p.code for p in caught.value.problems] == [code]
    with pytest.raises(NotFound):
        client.find(batch_id="7e")


def test_messages_are_found_by_recipient_state_code_and_batch(kit: Kit, client: Client) -> None:
    """What was due last comes first; of one batch, in the order of its input."""
    head, [one, two, three] = kit.batch(3)
    _, [other] = kit.batch(1)
    failed(kit, one, "ErrorInvalidRecipients", hours=3)
    failed(kit, three, "RCPT_POLICY", hours=1)
    kit.put(two, state=State.SUPPRESSED, error_code="Suppressed", due_at=NOW)

    assert ids(client.find(to="USER1@example.com")) == [other, one]
    assert ids(client.find(to="user1@example.com", state="failed")) == [one]
    assert ids(client.find(state="failed")) == [three, one]
    assert ids(client.find(state="suppressed")) == [two]
    assert ids(client.find(code="RCPT_POLICY")) == [three]
    assert ids(client.find(batch_id=head.id.upper())) == [one, two, three]
    assert ids(client.find(batch_id=head.id, state="failed")) == [one, three]
    assert ids(client.find(to="nobody@example.com")) == []


def test_a_purged_message_is_found_by_its_recipient_with_the_key_alone(
    kit: Kit, migrated_url: str
) -> None:
    """The address is gone, what happened is not: its keyed hash leads there, in any spelling."""
    old, [one, _] = kit.batch(2)
    _, [new] = kit.batch(1)
    for message_id in (one, new):
        failed(kit, message_id, "X", hours=1 + (message_id == one))
    kit.set_batch(old.id, finished_at=NOW)
    kit.store.retention.purge_content(0, pseudonym("key"))

    def found(key: str | None) -> list[str]:
        runtime = Runtime(Settings(database_url=migrated_url, secret_key=key))
        listed = ids(Client(lambda: runtime).find(to="USER1@example.com"))
        runtime.close()
        return listed

    assert found("key") == found("newer,key") == [new, one]
    assert found("other") == found(None) == [new]


def test_pages_follow_each_other_without_gap_or_repeat(kit: Kit, client: Client) -> None:
    """Also among messages that were due at the same moment."""
    head, every = kit.batch(25)
    for message_id in every:
        failed(kit, message_id, "X", hours=1)

    for filters, ordered in (({"code": "X"}, False), ({"batch_id": head.id}, True)):
        seen: list[str] = []
        after = None
        pages = 0
        while True:
            page = client.find(limit=10, after=after, **filters)
            seen += ids(page)
            pages += 1
            if (after := page["next"]) is None:
                break
        assert pages == 3
        assert sorted(seen) == sorted(every)
        assert (seen == every) is ordered


def test_suppressions_are_checked_all_together_and_kept_in_one_form(client: Client) -> None:
    """Nothing is added where one is wrong; an international domain is one address."""
    with pytest.raises(InvalidMessages) as caught:
        client.suppress(["ann@example.com", "bob", "c@@example.com"])
    assert [(p.row, p.code) for p in caught.value.problems] == [(2, "ADDR_NO_AT"),
                                                                (3, "ADDR_SYNTAX")]  # fmt: skip
    assert list(client.suppressions()) == []
    given: list[Any] = ["Ann@Example.com", ("bob@bücher.example.com", "bounced"), "ann@example.com"]

    assert client.suppress(given, reason="left", by="ada") == {"added": 2, "known": 0}
    assert client.suppress("ann@example.com") == {"added": 0, "known": 1}
    assert [(s["address"], s["reason"]) for s in client.suppressions()] == [
        ("ann@example.com", "left"), ("bob@xn--bcher-kva.example.com", "bounced"),
    ]  # fmt: skip
    assert client.unsuppress(["bob@BÜCHER.example.com", "x@example.com"]) == {
        "removed": 1, "unknown": 1,
    }  # fmt: skip


def test_the_commands_say_what_the_methods_do(
    kit: Kit, migrated_url: str, redis_url: str, tmp_path: Path
) -> None:
    """suppress import, add, list and remove; message find page by page; batch list's filters."""
    head, _ = kit.batch(3)
    people = tmp_path / "left.csv"
    people.write_text("Email;Reason\nAnn@example.com;left\nbob@example.com;\n")
    settings = {"POSTROOM_DATABASE_URL": migrated_url, "POSTROOM_REDIS_URL": redis_url}

    def run(*words: object) -> Any:
        done = subprocess.run(
            [Path(sys.executable).with_name("postroom"), *map(str, words), "--json"],
            env=clean_environment() | settings, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        return json.loads(done.stdout)

    assert run("suppress", "import", people, "--by", "ada") == {"added": 2, "known": 0}
    assert run("suppress", "add", "ann@example.com") == {"added": 0, "known": 1}
    assert run("suppress", "remove", "BOB@example.com") == {"removed": 1, "unknown": 0}
    [one] = run("suppress", "list")
    assert [one[key] for key in ("address", "reason", "by")] == ["ann@example.com", "left", "ada"]
    assert "ADDR_NO_AT" in run("suppress", "add", "nobody")["error"]
    first = run("message", "find", "--batch", head.id, "--limit", "2")
    rest = run("message", "find", "--batch", head.id, "--after", first["next"])
    assert [m["position"] for m in first["messages"] + rest["messages"]] == [1, 2, 3]
    assert rest["next"] is None
    assert [b["batch_id"] for b in run("batch", "list", "--since", "7d", "--name", "june")] == [
        head.id
    ]
