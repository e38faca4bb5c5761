"""What an operator sees in Flower of a batch, and how it is sent again from there."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.support import free_port, wait_until
from tests.test_spine import POSTGRESQL, Service, service, simulator_options
from worker.model import Message
from worker.store.schema import events

__all__ = ["service", "simulator_options"]

SENDER = "notices1@contoso.com"
LOGIN = "operator:a-password-of-the-test"


class Flower:
    """A Flower of the service's own, asked over its API."""

    def __init__(self, service: Service, directory: Path) -> None:
        login = directory / "flower_login"
        login.write_text(LOGIN + "\n")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        service.processes.start(
            ["celery", "-A", "worker", "flower", f"--port={self.port}"],
            env=service.environment | {"POSTROOM_FLOWER_BASIC_AUTH_FILE": str(login)},
            log="flower",
        )
        wait_until(lambda: self.status("/healthcheck") == 200, "Flower answers", 60)

    def call(self, path: str, order: Any = None, *, login: str = LOGIN) -> Any:
        """An answer of the API."""
        data = None if order is None else json.dumps(order).encode()
        request = urllib.request.Request(self.url + path, data)
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def status(self, path: str) -> int:
        """The status of a page for somebody without a password; 0: nobody listens."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def text(self, path: str) -> str:
        """A page that needs no password."""
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return str(answer.read().decode())

    def tasks(self, name: str) -> list[dict[str, Any]]:
        """The tasks of this name that Flower has heard of."""
        return list(self.call(f"/api/tasks?taskname={name}").values())


@POSTGRESQL
def test_a_batch_with_failures_shows_as_a_failed_task_and_is_retried_through_the_api(
    service: Service, tmp_path: Path
) -> None:
    """Name, counts and the command are its text; the retry leaves an event."""
    flower = Flower(service, tmp_path)
    service.worker("one")
    wait_until(lambda: flower.call("/api/workers?status=true"), "Flower sees the worker", 60)
    service.simulator.fault("status", 0, status=400, code="ErrorInvalidRecipients",
                            recipient="bad@example.org")  # fmt: skip

    batch = service.client.enqueue(
        [Message(to, "News", text="Hello") for to in ("good@example.org", "bad@example.org")],
        sender=SENDER, name="news of May",
    ).batch_id  # fmt: skip
    service.wait_for_end(batch)

    [ended] = wait_until(
        lambda: [t for t in flower.tasks("postroom.finish") if t["state"] == "FAILURE"],
        "the batch's end shows as a failure",
    )
    said = f"news of May: 1 sent, 1 failed; to send again: postroom batch retry {batch}"
    assert said in ended["exception"]
    assert any(
        SENDER in t["args"] and "'sent': 1" in t["result"] for t in flower.tasks("postroom.deliver")
    )
    service.simulator.clear_faults()
    flower.call("/api/task/async-apply/postroom.retry_batch", {"args": [batch]})
    wait_until(lambda: service.counts(batch)["sent"] == 2, "the retried message is sent")
    wait_until(
        lambda: [t for t in flower.tasks("postroom.finish") if t["state"] == "SUCCESS"],
        "the batch's second end shows as a success",
    )
    [event] = service.rows(select(events).where(events.c.kind == "retry"))
    assert (event.by, str(event.batch_id)) == ("flower", batch)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_flower_asks_for_a_password_and_listens_on_the_loopback_only(
    service: Service, tmp_path: Path
) -> None:
    """By default, with the login from a file; a wrong one opens nothing."""
    flower = Flower(service, tmp_path)
    assert flower.status("/workers") == 401
    assert flower.status("/api/workers") == 401
    with pytest.raises(urllib.error.HTTPError) as refused:
        flower.call("/api/workers", login="operator:wrong")
    refused.value.close()
    assert flower.call("/api/workers") == {}
    flower.url = f"http://127.0.0.2:{flower.port}"
    assert flower.status("/healthcheck") == 0
