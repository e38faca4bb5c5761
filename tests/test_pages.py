"""The page about a batch: true to SQL, whole in itself, and safe to open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.store_kit import Kit, answer, opened, to_record
from worker.client import Client
from worker.config import Settings
from worker.model import Accepted, NotFound, State, Throttled, Verdict
from worker.pages import report
from worker.runtime import Runtime

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


@pytest.fixture
def kit(migrated_url: str) -> Iterator[Kit]:
    with opened(migrated_url) as kit:
        yield kit


@pytest.fixture
def client(migrated_url: str, redis_url: str) -> Iterator[Client]:
    runtime = Runtime(Settings(database_url=migrated_url, redis_url=redis_url))
    yield Client(lambda: runtime)
    runtime.close()


class Page(HTMLParser):
    """What would be loaded or run, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "link", "img", "iframe", "object"} or {"src", "href"} & given.keys():
            self.loads.append(tag)
        self.loads += [name for name in given if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_tells_totals_reasons_and_what_held_the_speed(kit: Kit, client: Client) -> None:
    """In plain words, with the numbers of SQL; whatever the batch is called, nothing runs."""
    name = "<script>alert(1)</script>May"
    head, ids = kit.batch(6, name=name)
    slow = Verdict(State.QUEUED, timedelta(0))
    throttled = Throttled(answer(status=429, retry_after=timedelta(seconds=30)))
    kit.record(to_record(head, ids[0], kit.claim([ids[0]])[ids[0]], slow, throttled))
    for one in ids[:3]:
        sent = Accepted(answer(status=202, duration=timedelta(seconds=0.5)))
        kit.record(to_record(head, one, kit.claim([one])[one], Verdict(State.SENT), sent))
    kit.put(ids[3], state=State.FAILED, error_code="ErrorInvalidRecipients")
    kit.put(ids[4], state=State.UNKNOWN, doubt=True, error_code="LeaseExpired")
    kit.put(ids[5], state=State.SUPPRESSED, error_code="Suppressed")

    page = client.report(head.id)

    found = Page(page)
    assert found.loads == []
    assert "<script>" not in page
    text = " ".join(found.text.split())
    for told in ("6 messages", "3 sent", "1 failed", "1 not known", name,
                 "Exchange does not accept an address of this message.",
                 "The recipient is not to be written to.",
                 "slow down 1 times in 4 requests, for 30 seconds",
                 "1 mailbox with 4 requests at a time each, answered in 0.50 seconds",
                 "at most 480 messages a minute"):  # fmt: skip
        assert told in text, told
    assert len(re.findall(r'<rect class="bar"', page)) >= 1
    with pytest.raises(NotFound):
        client.report("6f0b1f0e-5b0c-5a54-9d0e-0a3d2f1c7b66")


def test_a_batch_of_which_nothing_was_sent_has_a_page_too(kit: Kit, client: Client) -> None:
    """No division by nothing."""
    head, _ = kit.batch(1)

    assert "Nothing has been sent yet" in client.report(head.id)


def test_a_long_run_is_drawn_with_few_bars() -> None:
    """Their heights are averages, and none leaves the picture."""
    minutes = [(NOW + timedelta(minutes=n), n % 7) for n in range(0, 1000, 2)]
    chart: dict[str, Any] = report.bars(minutes)

    assert len(chart["bars"]) <= report.BARS
    assert chart["span"] == 9
    for bar in chart["bars"]:
        assert 0 <= bar["y"] <= report.HEIGHT
        assert bar["x"] + bar["width"] <= report.WIDTH + 1
    assert sum(b["height"] > 0 for b in chart["bars"]) == len(chart["bars"])
    assert report.bars([])["bars"] == []
