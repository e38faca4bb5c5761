"""With a large backlog the frequent statements use their indexes (PostgreSQL)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event

from tests.store_kit import MAILBOX, SENT, Kit, opened, postgresql_only, to_record
from worker.model import State
from worker.store import chores
from worker.store.doubt import looks
from worker.store.finding import Wanted
from worker.store.statements import due_queues

pytestmark = postgresql_only

QUEUED = 50_000
BATCHES = 2_000  # finished ones beside it, and their queues, as after some months

FILL = """
    INSERT INTO batches (id, digest, target_kind, target, priority, options, chunks, total,
                         created_at, sealed_at, finished_at)
    SELECT gen_random_uuid(), 'd', 'mailbox', 'm' || n, 1, '{}', 1, 20, now(), now(), now()
    FROM generate_series(1, :batches) AS n;
    INSERT INTO queues (id, batch_id, target_kind, target, priority)
    SELECT gen_random_uuid(), id, target_kind, target, priority FROM batches
    WHERE finished_at IS NOT NULL;
    INSERT INTO messages (id, batch_id, queue_id, position, recipient, recipients, state, due_at,
                          deadline_at, sent_at)
    SELECT gen_random_uuid(), q.batch_id, q.id, n, q.target || n || '@example.com', 1, 'sent',
           now() - n * interval '1 hour', now(), now()
    FROM queues AS q, generate_series(1, 20) AS n WHERE q.batch_id <> :batch;
    INSERT INTO messages (id, batch_id, queue_id, position, recipients, content, state, due_at,
                          deadline_at)
    SELECT gen_random_uuid(), :batch, :queue, n, 1, '{"to": "somebody"}', 'queued',
           now() - interval '1 hour', now() + interval '1 day'
    FROM generate_series(2, :queued) AS n;
    UPDATE messages SET state = 'sending', mailbox = 'm', lease_until = now() - interval '1 hour',
           token_ends_at = now() WHERE position BETWEEN 100 AND 110 AND batch_id = :batch;
    UPDATE messages SET state = 'unknown', doubt = true,
           look_at = CASE WHEN position < 210 THEN now() END
    WHERE position BETWEEN 200 AND 10000 AND batch_id = :batch
"""


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        head, _ = kit.batch(1)
        values = {"batches": BATCHES, "batch": head.id, "queue": head.queue_id, "queued": QUEUED}
        for statement in FILL.split(";"):
            kit.sql(statement, **{k: v for k, v in values.items() if f":{k}" in statement})
        with kit.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")
        yield kit


@pytest.fixture
def unready(migrated_url: str) -> Iterator[Kit]:
    """The same rows just after they came in: the statistics are those of a few sent messages."""
    with opened(migrated_url) as kit:
        head, _ = kit.batch(20)
        kit.sql("UPDATE messages SET state = 'sent', sent_at = now()")
        with kit.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ALTER TABLE messages SET (autovacuum_enabled = false)")
            connection.exec_driver_sql("ANALYZE")
        values = {"batch": head.id, "queue": head.queue_id, "queued": QUEUED, "batches": 1}
        for statement in FILL.split(";"):
            kit.sql(statement, **{k: v for k, v in values.items() if f":{k}" in statement})
        yield kit


def plans(kit: Kit, work: Callable[[Any], object]) -> list[dict[str, Any]]:
    """The nodes of the plans of all statements that `work(connection)` runs."""
    with kit.engine.connect() as connection:
        found = plans_of(kit, lambda: work(connection))
        connection.rollback()
        return found


def plans_of(kit: Kit, work: Callable[[], object]) -> list[dict[str, Any]]:
    """The same for what `work` runs on connections of its own."""
    said: list[tuple[str, Any]] = []

    def note(_c: Any, _cur: Any, statement: str, parameters: Any, _ctx: Any, many: bool) -> None:
        if not many:  # inserting rows needs no index to be found
            said.append((statement, parameters))

    event.listen(kit.engine, "before_cursor_execute", note)
    work()
    event.remove(kit.engine, "before_cursor_execute", note)
    with kit.engine.connect() as connection:
        found = [
            connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {one}", values).scalar_one()
            for one, values in said
        ]
    assert found
    return [node for one in found for node in nodes(one[0]["Plan"])]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's node and all below it."""
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def indexes(found: list[dict[str, Any]]) -> set[str]:
    """The indexes that are used; none of the large tables is read from end to end."""
    whole = {n["Relation Name"] for n in found if n["Node Type"] == "Seq Scan"}
    assert whole & {"messages", "queues", "batches"} == set()
    return {n["Index Name"] for n in found if "Index Name" in n}


def a_batch(kit: Kit) -> tuple[str, str]:
    """The running batch and its queue."""
    [row] = kit.sql("SELECT batch_id, id FROM queues WHERE next_due_at IS NOT NULL")
    return str(row[0]), str(row[1])


def test_the_frequent_statements_use_their_indexes(kit: Kit) -> None:
    """Peek, claim, the look for queues, and the sweep's chores: none grows with the backlog."""
    _, queue = a_batch(kit)
    ids = [str(row[0]) for row in kit.sql("SELECT id FROM messages WHERE state = 'queued' LIMIT 4")]

    peek = plans(kit, lambda c: kit.sending.peek(c, queue, count=64, share=0, shares=1))
    claim = plans(kit, lambda c: kit.claim_in(c, ids))
    asked = {"mailbox": MAILBOX, "pools": ["news"]}
    look = plans(kit, lambda c: c.execute(due_queues("postgresql"), asked))
    leases = plans(kit, lambda c: chores.end_leases(c, resend=False, max_attempts=6))
    correct = plans(kit, lambda c: chores.correct_queue(c, queue, 0))
    due = plans(kit, lambda c: looks.take(c, 32, 60.0, 60.0))

    assert "ix_messages_due" in indexes(peek)
    assert "Sort" not in {n["Node Type"] for n in peek if n.get("Plan Rows", 0) > 1000}
    assert "pk_messages" in indexes(claim)
    assert "ix_queues_next" in indexes(look)
    assert "ix_messages_leases" in indexes(leases)
    assert "ix_messages_due" in indexes(correct)
    assert "ix_messages_looks" in indexes(due)


def test_claims_find_their_rows_by_id_even_before_the_statistics_know_of_them(
    unready: Kit,
) -> None:
    """Right after a large ingest PostgreSQL takes "queued" for rare: it read the whole backlog for
    each claim, seconds long, until the next ANALYZE.
    """
    ids = [str(row[0]) for row in unready.sql("SELECT id FROM messages WHERE position < 20")]

    assert ways_to_messages(unready, ids) == {"pk_messages"}


def test_claims_find_their_rows_by_id_among_a_few_thousand(migrated_url: str) -> None:
    """A table that is read from end to end in some milliseconds: still each claim would do so."""
    with opened(migrated_url) as kit:
        _, ids = kit.batch(8000)
        kit.sql("ANALYZE messages")

        assert ways_to_messages(kit, ids[:2]) == {"pk_messages"}


def ways_to_messages(kit: Kit, ids: list[str]) -> set[str]:
    """The indexes by which claims of these and the record of the first find their messages."""
    claim = plans(kit, lambda c: kit.claim_in(c, ids))
    result = to_record(kit.head(1), ids[0], 1, SENT)
    record = plans(kit, lambda c: kit.sending.record(c, [result]))
    reads = [n for n in [*claim, *record] if "_messages" in n.get("Index Name", "")
             or (n["Node Type"] == "Seq Scan" and n["Relation Name"] == "messages")]  # fmt: skip
    return {n.get("Index Name", "none: read from end to end") for n in reads}


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (Wanted(to="Somebody@example.com"), "ix_messages_recipient"),
        (Wanted(to="somebody@example.com", pseudonym="hmac:0"), "ix_messages_recipient"),
        (Wanted(state=State.FAILED), "ix_messages_ended"),
        (Wanted(state=State.SUPPRESSED), "ix_messages_ended"),
        (Wanted(code="ErrorInvalidRecipients"), "ix_messages_code"),
        (Wanted(state=State.SENT), "ix_messages_when"),
        (Wanted(state=State.QUEUED), None),
        (Wanted(state=State.SENDING), None),
        (Wanted(to="somebody@example.com", state=State.SENT), "ix_messages_recipient"),
    ],
)
def test_a_page_of_messages_is_found_through_an_index(
    kit: Kit, wanted: Wanted, index: str | None
) -> None:
    """However many messages there are, the first page and the next cost the same."""
    [[due]] = kit.sql("SELECT now() - interval '10 hours'")
    for after in (None, f"{due.isoformat()}/{uuid.uuid4()}"):
        found = plans_of(kit, partial(kit.store.finding.messages, wanted, 50, after))

        assert indexes(found) >= ({index} if index else set())
    batch, _ = a_batch(kit)
    within = plans_of(kit, lambda: kit.store.finding.messages(Wanted(batch_id=batch), 50, "40000"))
    assert "ix_messages_batch_position" in indexes(within)


def test_the_newest_batches_are_found_through_an_index(kit: Kit) -> None:
    """Thousands of older ones are not looked at."""
    kit.sql("UPDATE batches SET created_at = now() - random() * interval '100 days'")
    kit.sql("ANALYZE batches")

    found = plans_of(kit, lambda: kit.store.finding.batches(20))

    used = {n.get("Index Name") for n in found if n.get("Relation Name") == "batches"}
    assert used == {"ix_batches_created"}


def test_the_end_of_batches_is_found_through_indexes(kit: Kit) -> None:
    """Only batches that are not finished are looked at, and their queues' first message."""
    assert "ix_batches_unfinished" in indexes(plans(kit, chores.finish_batches))


def test_deadlines_cost_nothing_while_none_has_passed(kit: Kit) -> None:
    """The queues say when the next one is; messages are not read."""
    found = plans(kit, chores.end_deadlines)

    assert "messages" not in {n.get("Relation Name") for n in found}


def test_states_are_written_into_the_statements(kit: Kit) -> None:
    """As a parameter a state would hide the partial index from a plan kept for all values."""
    said: list[str] = []
    event.listen(
        kit.engine, "before_cursor_execute", lambda _c, _cur, statement, *_: said.append(statement)
    )
    _, queue = a_batch(kit)
    with kit.engine.connect() as connection:
        kit.sending.peek(connection, queue, count=1, share=0, shares=1)
        kit.claim_in(connection, [str(uuid.uuid4())])
        chores.end_leases(connection, resend=False, max_attempts=6)

    assert sum("state = 'queued'" in s for s in said) == 2
    assert any("state = 'sending'" in s for s in said)
