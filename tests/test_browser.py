"""What an operator sees of a batch, in a real browser: Debian's Chromium, driven by Playwright.

With TEST_PICTURES=1 it writes the screenshots of docs/pictures anew.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from tests.support import clean_environment, wait_until
from tests.test_flower import LOGIN, SENDER, Flower
from tests.test_spine import (
    MAILBOXES,
    POSTGRESQL,
    TEMPLATE,
    Service,
    service,
    simulator_options,
    some_messages,
)
from worker.model import Message

__all__ = ["service", "simulator_options"]

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
NAME, _, PASSWORD = LOGIN.partition(":")
VIEW = {"width": 1500, "height": 700}
POSTROOM = Path(sys.executable).with_name("postroom")
BAD = Message("bad@example.org", variables={"name": "Bad"})
#: How rich goes back to the first line of what it shows, to draw it anew.
_BACK = re.compile(r"\r?(?:\x1b\[(?:2K|1A))+")


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
    """Watch a batch on the terminal, log in, see its lanes, find what failed and why, send it
    again, read its report.
    """
    flower = Flower(service, tmp_path)
    service.worker("one")
    wait_until(lambda: flower.call("/api/workers?status=true"), "Flower sees the worker", 60)
    assert flower.status("/workers") == 401, "nobody gets in without the password"
    page = browser.new_page(
        http_credentials={"username": NAME, "password": PASSWORD}, viewport=VIEW
    )

    service.simulator.fault("status", 0, status=400, code="ErrorInvalidRecipients",
                            recipient="bad@example.org")  # fmt: skip
    running = service.client.enqueue(
        chain(some_messages(2000), repeat(BAD, 3)), pool="notices", template=TEMPLATE,
        name="invoices of May",
    ).batch_id  # fmt: skip
    failed = service.client.enqueue(
        [Message(to, "News", text="Hello") for to in ("good@example.org", "bad@example.org")],
        sender=SENDER, name="news of May",
    ).batch_id  # fmt: skip

    assert "invoices of May: running, 2,003 messages" in on_terminal(page, service, running)

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
    report = report_of(page, service, running, tmp_path / "report.html")
    assert "Exchange does not accept an address" in report

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
    page.close()


def shown(page: Any, flower: Flower, search: str = "") -> str:
    """The text of Flower's list of tasks, loaded anew."""
    page.goto(f"{flower.url}/tasks")
    page.wait_for_selector("#tasks-table tbody tr")
    if search:
        with page.expect_response(lambda response: "datatable" in response.url):
            page.fill("#tasks-table_filter input", search)
    return str(page.inner_text("#tasks-table"))


def watched(service: Service, batch: str) -> Text:
    """What `batch watch` shows on a terminal when some hundreds are sent."""
    terminal, its = pty.openpty()
    size = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "12"}
    child = subprocess.Popen(
        [POSTROOM, "batch", "watch", batch], stdin=its, stdout=its, stderr=its,
        env=clean_environment() | service.environment | size,
    )  # fmt: skip
    os.close(its)
    told, end = "", time.monotonic() + 30
    while not re.search(r"sent +\S+ [4-9]\d\d\b.* to go", last_frame(told).plain, re.DOTALL):
        assert time.monotonic() < end, told
        told += os.read(terminal, 65536).decode()
    child.terminate()
    child.wait()
    os.close(terminal)
    return last_frame(told)


def last_frame(told: str) -> Text:
    """What stands on the terminal after all that was written to it."""
    return Text.from_ansi(_BACK.split(told.replace("\r\n", "\n"))[-1])


def on_terminal(page: Any, service: Service, batch: str) -> str:
    """The text that a terminal shows; its colours and letters are drawn by the browser."""
    frame = watched(service, batch)
    console = Console(file=io.StringIO(), width=80, record=True, force_terminal=True)
    console.print(frame)
    page.set_content(console.export_html(inline_styles=True))
    page.set_viewport_size({"width": 760, "height": 130})
    picture(page, "batch-watch")
    page.set_viewport_size(VIEW)
    return frame.plain


def report_of(page: Any, service: Service, batch: str, path: Path) -> str:
    """The text of the page that `batch report` writes."""
    subprocess.run(
        [POSTROOM, "batch", "report", batch, "--html", path],
        env=clean_environment() | service.environment, check=True,
    )  # fmt: skip
    page.set_viewport_size({"width": 800, "height": 600})
    page.goto(path.as_uri())
    picture(page, "report", full_page=True)
    page.set_viewport_size(VIEW)
    return str(page.inner_text("main"))


def picture(page: Any, name: str, **how: Any) -> None:
    """For the documents, where they are to be made anew."""
    if os.environ.get("TEST_PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        page.screenshot(path=str(PICTURES / f"{name}.png"), **how)
