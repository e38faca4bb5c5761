"""Rejections in a row pause a batch: one bad template must not fail fifty thousand messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select

from tests.store_kit import AGAIN, FAILED, SENT, Kit, answer, opened, to_record
from tests.support import wait_until
from tests.test_cli import Command, html, postroom, rows, said
from tests.test_spine import MAILBOXES, POSTGRESQL, Service, service, simulator_options
from worker.config import Settings
from worker.model import Message, Rejected
from worker.store.schema import attempts, events
from worker.store.sending import Sending

__all__ = ["html", "postroom", "rows", "service", "simulator_options"]  # fixtures

BAD = Rejected(answer(status=400, code="ErrorInvalidRecipients", detail="no such address"))


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        kit.sending = Sending(kit.engine.dialect.name, max_failures=3)
        yield kit


class Batch:
    """A batch whose messages get one outcome after another."""

    def __init__(self, kit: Kit, total: int, **fields: Any) -> None:
        self.kit = kit
        self.head, ids = kit.batch(total, **fields)
        self.ids = iter(ids)

    def results(self, outcomes: str) -> list[Any]:
        """s: sent, r: rejected, a: to be tried again."""
        words = {"s": (SENT, None), "r": (FAILED, BAD), "a": (AGAIN, Rejected(BAD.answer, True))}
        done = []
        for letter in outcomes:
            one, (verdict, outcome) = next(self.ids), words[letter]
            fence = self.kit.claim([one])[one]
            done.append(to_record(self.head, one, fence, verdict, outcome))
        return done

    def get(self, outcomes: str) -> str:
        """Records each in a transaction of its own; the state of the batch then."""
        for result in self.results(outcomes):
            self.kit.record(result)
        return str(self.kit.status(self.head.id)["state"])

    def told(self) -> list[Any]:
        with self.kit.engine.connect() as c:
            return list(c.execute(select(events).where(events.c.batch_id == self.head.id)))


def test_so_many_rejections_in_a_row_pause_the_batch(kit: Kit) -> None:
    """The status says why: how many, and what Graph said last. What is queued stays queued."""
    batch = Batch(kit, 5)
    assert batch.get("rr") == "running"
    assert batch.get("r") == "paused"

    status = kit.status(batch.head.id)
    assert status["paused_reason"] == (
        "3 messages in a row were rejected; the last: ErrorInvalidRecipients: no such address"
    )
    assert status["counts"]["queued"] == 2
    [event] = batch.told()
    assert (event.kind, event.by, event.detail["rejections"]) == ("pause", "postroom", 3)
    assert kit.look() is None


@pytest.mark.parametrize("outcomes", ["rrsrr", "rrsrrsrr", "ssssss", "arara"])
def test_an_acceptance_between_starts_the_count_anew(kit: Kit, outcomes: str) -> None:
    """A list with a few bad addresses is a list with a few bad addresses; a repeat is none."""
    assert Batch(kit, 12).get(outcomes) == "running"


@pytest.mark.parametrize(("outcomes", "state"), [("rrsr", "running"), ("srrr", "paused")])
def test_the_order_counts_within_one_transaction(kit: Kit, outcomes: str, state: str) -> None:
    """Outcomes of many lanes share a transaction."""
    batch = Batch(kit, 5)
    kit.record(*batch.results(outcomes))

    assert kit.status(batch.head.id)["state"] == state


def test_an_outcome_recorded_twice_counts_once(kit: Kit) -> None:
    """The reply to a COMMIT was lost."""
    batch = Batch(kit, 5)
    [result] = batch.results("r")
    for _ in range(4):
        kit.record(result)

    assert kit.status(batch.head.id)["state"] == "running"


@pytest.mark.parametrize(("own", "state"), [(0, "running"), (5, "running"), (4, "paused")])
def test_a_batch_may_have_its_own_limit(kit: Kit, own: int, state: str) -> None:
    """Given with `enqueue`; 0 is never."""
    assert Batch(kit, 9, options={"max_failures": own}).get("rrrr") == state


def test_where_nothing_is_rejected_no_statement_is_added(kit: Kit) -> None:
    """The count costs nothing on the way of a message that is accepted."""
    from sqlalchemy import event

    batch = Batch(kit, 5)
    seen: list[str] = []
    results = batch.results("ss")
    event.listen(kit.engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    kit.record(*results)

    assert not [statement for statement in seen if statement.startswith("UPDATE batches")]
    assert [statement.split()[0] for statement in seen if "BEGIN" not in statement] == [
        "UPDATE", "WITH" if "WITH" in seen[-1] else "INSERT",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), [("off", 0), ("0", 0), ("7", 7), (None, 50)])
def test_the_setting_may_be_off(
    monkeypatch: pytest.MonkeyPatch, text: str | None, number: int
) -> None:
    """`off` and 0 are the same."""
    if text is not None:
        monkeypatch.setenv("POSTROOM_MAX_FAILURES", text)

    assert Settings.from_env().max_failures == number


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_wrong_limit_is_refused_in_one_line(postroom: Command, rows: Any, html: Any) -> None:
    """Before anything is enqueued, also by a dry run."""
    words = ("send", rows, "--sender", MAILBOXES[0], "--subject", "x", "--html", html)

    for more in ((), ("--dry-run",)):
        line = said(postroom(*words, "--max-failures", "many", *more))
        assert "max_failures: 'many': give 1 to 999999, or off" in line


@POSTGRESQL
def test_a_bad_batch_is_paused_by_real_workers_before_much_of_it_failed(service: Service) -> None:
    """Every message is refused: its limit and what was in flight fail, and no more."""
    service.simulator.fault("status", 0, status=400, code="ErrorInvalidParameter")
    for name in ("one", "two"):
        service.worker(name)
    batch = service.client.enqueue(
        [Message(f"p{n}@example.org", subject="x", text="x") for n in range(400)],
        pool="notices", max_failures=10,
    ).batch_id  # fmt: skip

    wait_until(lambda: service.client.status(batch)["state"] == "paused", "the batch pauses")
    wait_until(lambda: service.counts(batch)["sending"] == 0, "what is in flight ends")

    status = service.client.status(batch)
    assert "messages in a row were rejected; the last: Error" in status["paused_reason"]
    assert 10 <= status["counts"]["failed"] <= 10 + 4 * len(MAILBOXES)
    assert len(service.rows(select(attempts.c.at))) == status["counts"]["failed"]
    assert status["counts"]["queued"] == 400 - status["counts"]["failed"]
