"""`postroom batch watch` on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from worker.cli import watch
from worker.model import State

FOUND: dict[str, Any] = {
    "batch_id": "b", "name": "[b]May", "state": "running", "total": 1500,
    "counts": {str(s): 0 for s in State} | {"sent": 1200, "queued": 299, "failed": 1},
    "rate_per_minute": 90, "eta": 200, "limit": "requests",
    "blocked": [{"mailbox": "a@contoso.com", "reason": "it is full", "code": "x", "since": None}],
}  # fmt: skip


def test_the_picture_has_a_bar_for_each_state_that_occurs_and_says_what_binds():
    """Names are never markup; what does not occur is left out."""
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(watch.picture(FOUND))
    text = console.export_text()

    for told in ("[b]May: running, 1,500 messages", "1,200", "90 a minute, 3 min 20 s to go",
                 "bound by: requests", "blocked: a@contoso.com: it is full"):  # fmt: skip
        assert told in text
    assert "suppressed" not in text


def test_it_looks_until_the_batch_has_ended(monkeypatch: pytest.MonkeyPatch):
    """And gives the last look."""
    looks = iter([FOUND, FOUND, {**FOUND, "state": "finished", "eta": None, "limit": None}])
    pauses: list[None] = []
    monkeypatch.setattr("sys.stdout", io.StringIO())

    found = watch.live(lambda: next(looks), lambda: pauses.append(None))

    assert found["state"] == "finished"
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("seconds", "told"), [(5, "5 s"), (200, "3 min 20 s"), (3600, "1 h 00 min")]
)
def test_times_are_told_for_people(seconds: int, told: str):
    """No one counts in thousands of seconds."""
    assert watch.left(seconds) == told
