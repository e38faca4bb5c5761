"""postroom plan: when a batch would end, reckoned by the limits' own arithmetic."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from tests.store_kit import SENT, Kit, opened, to_record
from tests.test_cli import SENDER, Command, document, engine, html, postroom, rows, said
from worker.limits import Book, Cost, Limit, Limits, Rate, Used, Window
from worker.plan import Sender, Typical, forecast

__all__ = ["engine", "html", "postroom", "rows"]  # fixtures

DAY = timedelta(hours=24)
ONE = Typical(seconds=0.4, size=1000, external=0.0)


def sender(used: int = 0, **rates: str) -> Sender:
    """A mailbox with these limits, whose windows hold `used`, ended just now."""
    parsed = {name: Rate.parse(rate) for name, rate in rates.items()}
    limits = Limits(slots=4, reserve_high=0, **parsed)
    windows = {Limit(name): Window(rate.span_ms) for name, rate in parsed.items() if rate}
    for window in windows.values():
        window.add(0, used)
    return Sender(limits, windows)


def seconds(senders: list[Sender], count: int, one: Typical = ONE) -> tuple[float, Limit]:
    end = forecast(senders, count, one)
    assert end.after is not None
    return end.after.total_seconds(), end.limit


def test_without_a_window_the_requests_at_once_bind() -> None:
    """A thousand at four at once and 0.4 s each: 100 s."""
    took, limit = seconds([sender()], 1000)
    assert (round(took), limit) == (100, Limit.SLOTS)


def test_a_day_more_for_what_is_beyond_the_limit_of_a_day() -> None:
    """9,500 go today, 500 tomorrow; of two mailboxes none waits."""
    took, limit = seconds([sender(recipients="9500/24h")], 10_000)
    assert DAY.total_seconds() < took < DAY.total_seconds() * 1.05
    assert limit is Limit.RECIPIENTS

    took, limit = seconds([sender(recipients="9500/24h") for _ in range(2)], 10_000)
    assert took == pytest.approx(500, rel=0.1)
    assert limit is Limit.SLOTS


def test_what_is_used_already_counts() -> None:
    """Where all of today's is gone, the first goes in a day."""
    took, limit = seconds([sender(9500, recipients="9500/24h")], 1)
    assert took == pytest.approx(DAY.total_seconds(), rel=0.001)
    assert limit is Limit.RECIPIENTS


def test_the_tenants_window_is_one_for_all_mailboxes() -> None:
    """Ten mailboxes do not get ten times what the tenant may send outside."""
    senders = [sender(external="1000/24h") for _ in range(10)]
    for other in senders:
        other.windows = senders[0].windows
    all_outside = Typical(seconds=0.4, size=1000, external=1.0)

    took, limit = seconds(senders, 2500, all_outside)

    assert 2 * DAY.total_seconds() < took < 2.1 * DAY.total_seconds()
    assert limit is Limit.EXTERNAL


def test_no_mailbox_and_a_message_that_never_fits_never_end() -> None:
    """It is said, and not reckoned for ever."""
    assert forecast([], 1, ONE).after is None
    huge = Typical(seconds=0.4, size=2_000_000, external=0.0)
    end = forecast([sender(upload="1MB/5min")], 1, huge)
    assert (end.after, end.limit) == (None, Limit.UPLOAD)


@given(count=st.integers(1, 400), amount=st.integers(5, 60), span=st.sampled_from([10, 60, 600]))
def test_a_plan_agrees_with_the_gate_that_it_foretells(count: int, amount: int, span: int) -> None:
    """The gate's own book, asked message by message, ends within a few percent of it."""
    limits = Limits(slots=1, reserve_high=0, requests=Rate(amount, timedelta(seconds=span)))
    took, _ = seconds([Sender(limits, {Limit.REQUESTS: Window(span * 1000)})], count)

    book, now = Book(limits), 0
    for n in range(count):
        while not (leave := book.ask(now, [(str(n), Cost())], until=now + 9**9, high=False)).count:
            assert leave.wait
            now += leave.wait
        now += 400
        book.give_back(now, str(n), age=0, used=Used.ALL)

    assert math.isclose(took, now / 1000, rel_tol=0.05, abs_tol=max(2.0, span * 0.05))


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_the_command_says_when_what_binds_and_what_is_used(
    postroom: Command, engine: Engine, migrated_url: str
) -> None:
    """From the settings, the mailbox's own limits, what was sent and what waits before it."""
    with opened(migrated_url) as kit:
        _some_sent(kit, 3)
        kit.batch(2)
    document(postroom("mailbox", "set", SENDER, "--recipient-rate", "100/24h", "--json"))

    words = ("plan", "--count", 120, "--sender", SENDER, "--external", 5)
    found = document(postroom(*words, "--json"))

    assert (found["count"], found["ahead"], found["limit"]) == (120, 2, "recipients")
    assert DAY.total_seconds() * 0.99 < found["seconds"] < DAY.total_seconds() * 1.05
    assert datetime.fromisoformat(found["ends_at"]).tzinfo is not None
    assert found["used"][SENDER]["recipients"] == {"used": 3, "limit": "100/24h"}
    assert "licences^0.7" in found["notes"][0]
    text = postroom(*words).stdout
    assert "waits for  recipients" in text.replace("   ", "  ")


def _some_sent(kit: Kit, count: int) -> None:
    for _ in range(count):
        head, one, fence = kit.claimed()
        kit.record(to_record(head, one, fence, SENT))


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_plan_without_a_mailbox_that_can_send_says_never(postroom: Command) -> None:
    """All are suspended, or there is no such pool."""
    document(postroom("mailbox", "suspend", SENDER, "--json"))

    found: Any = document(postroom("plan", "--count", 5, "--sender", SENDER, "--json"))

    assert (found["seconds"], found["ends_at"], found["suspended"]) == (None, None, [SENDER])
    assert "no pool 'nowhere'" in said(postroom("plan", "--count", 5, "--pool", "nowhere"))
