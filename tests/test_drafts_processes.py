"""Uploads under fire: workers that are stopped and killed in the middle of one."""

from __future__ import annotations

import base64
import os
import signal
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import select

from tests.support import wait_until
from tests.test_spine import POSTGRESQL, Service, service
from worker.model import Attachment, Message
from worker.store.schema import messages

__all__ = ["service"]
LARGE = os.urandom(20_000_000)  # six ranges


@pytest.fixture
def simulator_options() -> dict[str, Any]:
    """Slow enough to be met in the middle."""
    return {"latency_ms": "300"}


@POSTGRESQL
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_ends_while_it_uploads_leaves_no_doubt(
    service: Service, number: signal.Signals
) -> None:
    """Nothing was sent, and everybody knows: another worker goes on with the same draft."""
    first = service.worker("one")
    batch = service.client.enqueue(
        Message("ada@example.org", "Film", text="x", attachments=[Attachment("film", LARGE)]),
        sender="notices1@contoso.com",
    ).batch_id
    wait_until(lambda: count(service, "upload") >= 2, "an upload is under way", 60)

    first.signal(number)
    wait_until(lambda: not first.running, "the worker ended", 60)
    service.worker("two")

    assert service.wait_for_end(batch, 90) == Counter(sent=1)
    [row] = service.rows(select(messages.c.doubt, messages.c.tries))
    assert (row.doubt, row.tries) == (False, 0)
    assert len(service.simulator.ledger()) == 1
    [mail] = service.simulator.mail("notices1@contoso.com")
    assert mail["isDraft"] is False
    assert [base64.b64decode(a["contentBytes"]) for a in mail["attachments"]] == [LARGE]
    assert count(service, "draft") == 2, "one draft, one upload session"


def count(service: Service, operation: str) -> int:
    """How many requests of a kind the simulator saw."""
    return sum(r["operation"] == operation for r in service.simulator.requests())
