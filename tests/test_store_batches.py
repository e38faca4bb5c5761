"""What people see: counts, exports, one message's story, pools."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from tests.store_kit import FAILED, SENT, Kit, chunk, opened, to_record
from worker.model import State
from worker.store import batches


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


def test_a_status_names_every_state_and_adds_up(kit: Kit) -> None:
    """Each message is in exactly one state."""
    head, ids = kit.batch(4)
    claims = kit.claim(ids[:3])
    kit.record(to_record(head, ids[0], claims[ids[0]], SENT))
    kit.record(to_record(head, ids[1], claims[ids[1]], FAILED))

    status = kit.store.batch_status(head.id)

    assert status is not None
    assert set(status["counts"]) == {str(state) for state in State}
    assert sum(status["counts"].values()) == status["arrived"] == status["total"] == 4
    assert {s: n for s, n in status["counts"].items() if n} == {
        "queued": 1, "sending": 1, "sent": 1, "failed": 1,
    }  # fmt: skip
    assert status["rate_per_minute"] == 1


def test_a_batch_that_is_not_known_has_no_status(kit: Kit) -> None:
    """Nor has a message; both are for the caller to say in words."""
    unknown = "00000000-0000-4000-8000-000000000000"

    assert kit.store.batch_status(unknown) is None
    assert kit.store.message(unknown) is None


@pytest.mark.parametrize(
    ("times", "state"),
    [
        ({"paused_at": None}, "running"),
        ({"sealed_at": None}, "open"),
        ({"paused_at": 1}, "paused"),
        ({"finished_at": 1}, "finished"),
        ({"cancelled_at": 1}, "cancelled"),
        ({"cancelled_at": 1, "paused_at": 1, "finished_at": 1}, "cancelled"),
    ],
)
def test_the_state_of_a_batch_follows_from_its_four_times(
    kit: Kit, times: dict[str, int | None], state: str
) -> None:
    """Cancelled wins over all, open over paused and finished."""
    head, _ = kit.batch()
    kit.set_batch(head.id, **{k: datetime.now(UTC) if v else None for k, v in times.items()})

    assert kit.status(head.id)["state"] == state


def test_the_newest_batches_are_listed_first(kit: Kit) -> None:
    """At most as many as asked for."""
    at = datetime.now(UTC)
    ids = [kit.batch(created_at=at - timedelta(minutes=n))[0].id for n in (3, 1, 2)]

    assert [b["batch_id"] for b in kit.store.finding.batches(2)] == [ids[1], ids[2]]


def test_an_export_gives_every_row_in_the_order_of_the_input(kit: Kit) -> None:
    """Over more than one page, and without holding a connection while the reader is busy."""
    total = batches.PAGE + 5
    head = kit.head(total, chunks=2)
    kit.store.arrive([head], [chunk(head, 2, range(900, total + 1)), chunk(head, 1, range(1, 900))])
    rows = kit.store.export(head.id)
    first = next(iter(rows))
    in_use = kit.engine.pool.checkedout()  # type: ignore[attr-defined]

    assert in_use == 0
    assert (first["position"], first["to"], first["state"]) == (1, "user1@example.com", "queued")
    assert [first["position"], *(r["position"] for r in rows)] == list(range(1, total + 1))


def test_a_pool_is_replaced_as_a_whole(kit: Kit) -> None:
    """None deletes it; other pools stay."""
    kit.store.mailboxes.set_pool("news", ["b@x.org", "a@x.org", "a@x.org"])
    kit.store.mailboxes.set_pool("offers", ["c@x.org"])
    kit.store.mailboxes.set_pool("news", ["d@x.org", "a@x.org"])
    assert kit.store.mailboxes.pools() == {"news": ["a@x.org", "d@x.org"], "offers": ["c@x.org"]}

    kit.store.mailboxes.set_pool("news", [])
    assert kit.store.mailboxes.pools() == {"offers": ["c@x.org"]}
