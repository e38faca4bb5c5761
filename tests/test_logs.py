"""Logs say what happened to which message and batch, and nothing of whom it went to."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import redis
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError

from tests.support import wait_until
from tests.test_flower import Flower
from tests.test_spine import Service, service, simulator_options
from worker.logs import ForPeople, ForPrograms, scrubbed
from worker.model import Message, Template
from worker.store import make_engine
from worker.store.schema import suppressions

__all__ = ["service", "simulator_options"]

SENDER = "notices1@contoso.com"
#: Words that must come out nowhere but in SQL, in the inbox and at Graph.
CANARIES = ("canary-to@example.org", "canary-subject", "canary-body", "canary-variable",
            "canary-secret")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no mail to ann.o'hara@example.org today", "no mail to (address) today"),
        ("Bearer eyJhbGciOi.eyJhdWQi.c2lnbmF0dXJl ends", "Bearer (token) ends"),
        ("redis://user:secret@host:6379/0 is gone", "redis://user:(password)@host:6379/0 is gone"),
        ("refused\nDETAIL:  Failing row contains (1, x)", "refused\nDETAIL: (not logged)"),
        ("message 1234: sent (accepted)", "message 1234: sent (accepted)"),
    ],
)
def test_what_libraries_say_is_logged_without_what_is_personal_or_secret(
    text: str, left: str
) -> None:
    """Addresses, tokens, passwords, rows; the rest stays as it is."""
    assert scrubbed(text) == left


@pytest.mark.parametrize("form", [ForPeople("%(message)s"), ForPrograms()])
@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"], indirect=True)
def test_a_traceback_of_the_database_shows_no_row(
    form: logging.Formatter, migrated_url: str
) -> None:
    """Both databases like to quote what they refuse."""
    engine = make_engine(migrated_url)
    row = {"address": "canary@example.org", "by": "test"}  # no time: refused
    try:
        with engine.begin() as connection:
            connection.execute(insert(suppressions).values(row))
    except DBAPIError:
        record = logging.LogRecord("x", 40, "", 0, "it broke off", None, sys.exc_info())
    engine.dispose()

    line = form.format(record)

    assert "IntegrityError" in line
    assert "NOT" in line or "null" in line, "what is wrong is still told"
    assert "canary" not in line


def test_a_line_for_programs_is_one_json_object_with_the_ids() -> None:
    """Time in UTC, level, text, and which message and batch it is about."""
    record = logging.LogRecord("worker.x", 20, "", 0, "message %s: sent", ("m1",), None)
    record.message_id, record.batch_id = "m1", "b1"

    line = ForPrograms().format(record)

    told = json.loads(line)
    assert line.count("\n") == 0
    assert told.pop("time").endswith("Z")
    assert told == {"level": "info", "logger": "worker.x", "text": "message m1: sent",
                    "message_id": "m1", "batch_id": "b1"}  # fmt: skip


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_no_canary_sings_in_logs_events_flower_redis_or_metrics(
    service: Service, tmp_path: Path, redis_client: redis.Redis
) -> None:
    """Recipient, subject, body, variable and secret of batches that went well and ill."""
    secret = CANARIES[-1]
    service.simulator.settings(client_secret=secret)
    service.environment |= {"POSTROOM_CLIENT_SECRET": secret, "POSTROOM_LOG_FORMAT": "json"}
    flower = Flower(service, tmp_path)
    worker = service.worker("one")
    wait_until(lambda: flower.call("/api/workers?status=true"), "Flower sees the worker", 60)
    rejected = "canary-to@example.org, canary-subject"  # Graph likes to quote as well
    service.simulator.fault("status", 1, status=400, code="ErrorInvalidRecipients",
                            message=rejected)  # fmt: skip
    service.simulator.fault("status_after", 1, status=504, message=rejected)

    sent = [Message("canary-to@example.org", variables={"word": "canary-variable"})] * 3
    template = Template("canary-subject {{ word }}", html="<p>canary-body {{ word }}</p>")
    batch = service.client.enqueue(sent, sender=SENDER, template=template, name="good").batch_id
    service.wait_for_end(batch)
    wait_until(
        lambda: [t for t in flower.tasks("postroom.finish") if t["state"] == "FAILURE"],
        "a batch ended with failures",
    )

    told = {
        "the worker's log": worker.tail(10_000_000),
        "Flower's tasks": json.dumps(flower.call("/api/tasks")),
        "Flower's workers": json.dumps(flower.call("/api/workers?refresh=true")),
        "Flower's metrics": flower.text("/metrics"),
        "Redis": "".join(dumped(redis_client)),
    }
    lines = [json.loads(line) for line in told["the worker's log"].splitlines() if line[:1] == "{"]
    assert {"message_id", "batch_id"} <= {key for line in lines for key in line}
    sings = [
        (place, word) for place, text in told.items() for word in CANARIES
        if word in text and not (place == "Redis" and word in ALLOWED_IN_REDIS)
    ]  # fmt: skip
    assert sings == []


#: A batch's head, its template with it, is remembered in Redis for an hour after its last chunk.
ALLOWED_IN_REDIS = ("canary-subject", "canary-body")


def dumped(client: redis.Redis) -> list[str]:
    """Everything that lies in Redis."""
    found = []
    for key in client.scan_iter():
        match client.type(key):
            case "string":
                value: object = client.get(key)
            case "hash":
                value = client.hgetall(key)
            case "stream":
                value = client.xrange(key)
            case "list":
                value = client.lrange(key, 0, -1)
            case "set":
                value = client.smembers(key)
            case other:
                assert other == "zset"
                value = client.zrange(key, 0, -1)
        found.append(f"{key} {value}\n")
    return found
