"""Flower as an operator sees it, in a real browser: Debian's Chromium, driven by Playwright.

With TEST_PICTURES=1 it writes the screenshots of docs/pictures anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from tests.test_flower import LOGIN, SENDER, Flower
from tests.test_spine import MAILBOXES, POSTGRESQL, Service, service, simulator_options
from worker.model import Message

__all__ = ["service", "simulator_options"]

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
NAME, _, PASSWORD = LOGIN.partition(":")


@pytest.fixture
def browser() -> Iterator[Any]:
    """Fails where there is no Chromium: only `./dev test all` runs what needs it."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    assert program, "apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.whole
@pytest.mark.parametrize("simulator_options", [{"latency_ms": "200"}])
@POSTGRESQL
def test_an_operator_sees_the_lanes_finds_the_failed_batch_and_retries_it(
    service: Service, tmp_path: Path, browser: Any
) -> None:
    """Log in, watch a running batch, find what failed and why, send it again."""
    flower = Flower(service, tmp_path)
    service.worker("one")
    wait_until(lambda: flower.call("/api/workers?status=true"), "Flower sees the worker", 60)
    assert flower.status("/workers") == 401, "nobody gets in without the password"
    context = browser.new_context(
        http_credentials={"username": NAME, "password": PASSWORD},
        viewport={"width": 1500, "height": 700},
    )
    page = context.new_page()

    running = service.enqueue(1500)
    service.simulator.fault("status", 0, status=400, code="ErrorInvalidRecipients",
                            recipient="bad@example.org")  # fmt: skip
    failed = service.client.enqueue(
        [Message(to, "News", text="Hello") for to in ("good@example.org", "bad@example.org")],
        sender=SENDER, name="news of May",
    ).batch_id  # fmt: skip

    def lanes() -> set[str]:
        page.goto(f"{flower.url}/tasks")
        page.wait_for_selector("#tasks-table tbody tr")
        text = page.inner_text("#tasks-table")
        return {mailbox for mailbox in MAILBOXES if mailbox in text and "postroom.deliver" in text}

    assert wait_until(lambda: len(lanes()) == len(MAILBOXES), "the lanes of all mailboxes show", 60)
    service.wait_for_end(failed)
    wait_until(
        lambda: lanes() and "'sent': " in page.inner_text("#tasks-table"), "what became of it"
    )
    picture(page, "flower-lanes")
    service.wait_for_end(running)

    wait_until(
        lambda: "news of May" in shown(page, flower, "state:FAILURE"),
        "the failed batch is found",
        60,
    )
    text = page.inner_text("#tasks-table")
    assert f"postroom batch retry {failed}" in text
    assert not re.search(r"(good|bad|person\d+)@example\.org|Hello", text), "nobody is named"
    picture(page, "flower-failed-batch")

    service.simulator.clear_faults()
    flower.call("/api/task/async-apply/postroom.retry_batch", {"args": [failed]})  # as curl would
    wait_until(lambda: service.counts(failed)["sent"] == 2, "the retried message is sent")
    context.close()


def shown(page: Any, flower: Flower, search: str = "") -> str:
    """The text of Flower's list of tasks, loaded anew."""
    page.goto(f"{flower.url}/tasks")
    page.wait_for_selector("#tasks-table tbody tr")
    if search:
        with page.expect_response(lambda response: "datatable" in response.url):
            page.fill("#tasks-table_filter input", search)
    return str(page.inner_text("#tasks-table"))


def picture(page: Any, name: str) -> None:
    """For the documents, where they are to be made anew."""
    if os.environ.get("TEST_PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        page.screenshot(path=str(PICTURES / f"{name}.png"))
