"""The whole way of a message in one process, on real parts: enqueue, ingest, lane, simulator."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from worker.client import Client
from worker.config import Settings
from worker.deliver import Deps, Lane, Rules
from worker.ingest import ingest
from worker.model import Message, Receipt
from worker.runtime import Runtime
from worker.simulator import Simulator
from worker.store.schema import messages

SENDER = "notices@contoso.com"


class Desk:
    """Enqueues, and takes in what was enqueued."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.client = Client(lambda: runtime)

    def enqueue(self, *given: Message, **arguments: Any) -> Receipt:
        """One batch to the sender's mailbox."""
        return self.client.enqueue(list(given), **{"sender": SENDER} | arguments)

    def ingest(self) -> None:
        """Takes in what waits in Redis."""
        rt = self.runtime
        rt.parts.drain(rt.name, rt.store.contents.arrive)
        ingest(rt.inbox, rt.store, consumer=rt.name, max_age=rt.settings.max_age,
               wake=lambda *_: None)  # fmt: skip


class Post(Desk):
    """Works the sender's mailbox too, when asked to."""

    def __init__(self, simulator: Simulator, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.simulator = simulator

    def deliver(self, mailbox: str = SENDER) -> dict[str, Any]:
        """Works a mailbox until nothing is due, or it has to wait."""
        rt, s = self.runtime, self.runtime.settings
        rules = Rules(
            lease=s.lease, request_timeout=s.request_timeout,
            max_attempts=s.max_attempts, on_unknown=s.on_unknown,
        )  # fmt: skip
        deps = Deps(
            store=rt.store, writer=rt.writer, gate=rt.gate, graph=rt.graph, tokens=rt.tokens,
            rules=rules, pools=rt.pools, worker=rt.name, stop=rt.stop,
        )  # fmt: skip
        found: dict[str, Any] = rt.call(Lane(deps, mailbox).run())
        return found

    def send(self, *given: Message, **arguments: Any) -> list[dict[str, Any]]:
        """Enqueues, takes in, delivers; gives the mailbox's mails in the order of the rows."""
        receipt = self.enqueue(*given, **arguments)
        self.ingest()
        self.deliver()
        return self.mails(receipt.batch_id)

    def mails(self, batch_id: str) -> list[dict[str, Any]]:
        """What the simulator's mailbox holds of a batch, in the order of its rows."""
        by_marker = {marker_of(mail): mail for mail in self.simulator.mail(SENDER)}
        return [by_marker[m["id"]] for m in self.client.messages(batch_id) if m["id"] in by_marker]

    def message(self, batch_id: str) -> dict[str, Any]:
        """The only message of a batch, with its attempts."""
        with self.runtime.store.engine.connect() as connection:
            [found] = connection.execute(
                select(messages.c.id).where(messages.c.batch_id == batch_id)
            ).scalars()
        message = self.runtime.store.message(found)
        assert message is not None
        return message


def marker_of(mail: dict[str, Any]) -> str:
    """The message's id that a mail carries."""
    [marker] = [
        p["value"]
        for p in mail["singleValueExtendedProperties"]
        if p["id"].endswith("Name PostroomId")
    ]
    return str(uuid.UUID(marker))


def attached(mail: dict[str, Any]) -> list[tuple[str, str, bytes, str | None]]:
    """The attachments of a mail: name, type, content, content id."""
    return [
        (a["name"], a["contentType"], base64.b64decode(a["contentBytes"]),
         a["contentId"] if a.get("isInline") else None)
        for a in mail.get("attachments", ())
    ]  # fmt: skip


@contextmanager
def opened(directory: Path, redis_url: str, database_url: str, **changes: Any) -> Iterator[Post]:
    """A post with settings of its own; `simulator`: a mapping of the simulator's."""
    options = changes.pop("simulator", {})
    with Simulator(directory / "simulator", **options) as simulator:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in simulator.environment().items():
                patch.setenv(name, value)
            settings = Settings.from_env(redis_url=redis_url, database_url=database_url, **changes)
        runtime = Runtime(settings)
        try:
            yield Post(simulator, runtime)
        finally:
            close(runtime)


def close(runtime: Runtime) -> None:
    """Ends a runtime whose process goes on."""
    runtime.close()
    runtime.redis.close()
