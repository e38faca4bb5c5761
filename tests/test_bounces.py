"""Bounces: what reports say, and what follows from one that came back for a message of ours."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.concurrency.thread import TaskPool

from tests import doors_kit
from tests.store_kit import MAILBOX, SENT, Kit, outcome_for, to_record
from tests.test_cli import Command, postroom
from worker import Client
from worker.bounces import Deps, read_bounces
from worker.cli.steps import steps
from worker.config import Settings
from worker.exporter import Exporter
from worker.graph import Reply, payload, reports
from worker.graph.reports import read
from worker.meanings.bounces import Kind, kind_of
from worker.model import Accepted, Answer
from worker.runtime import Runtime
from worker.simulator import Simulator
from worker.tasks.ticker import Ticker
from worker.visit import Visitor

__all__ = ["postroom"]

ANN, BOB = "ann@gone.example", "bob@example.org"
ONE = str(uuid.UUID(int=1))
EXCHANGE = "MicrosoftExchange329e71ec88ae4615bbc36ab6ce41109e@contoso.onmicrosoft.com"
NOW = "2026-11-26T09:00:00Z"
#: Of a batch with nothing else to mend.
STATUS = {"batch_id": ONE, "target": MAILBOX, "state": "running", "counts": Counter()}


# ---- what a report says ----------------------------------------------------------------------


def a_mail(text: str, **changes: Any) -> dict[str, Any]:
    """A report in Graph's shape, which quotes the headers of message ONE."""
    quoted = (
        f"{text}\r\nOriginal message headers:\r\nTo: x@else.example\r\nx-postroom-id: {ONE}\r\n"
    )
    sender = {"emailAddress": {"address": EXCHANGE}}
    known = {"id": "R1", "receivedDateTime": NOW, "from": sender,
             "body": {"contentType": "text", "content": quoted}}  # fmt: skip
    return known | changes


@pytest.mark.parametrize(
    ("text", "code", "kind"),
    [
        ("Remote Server returned '550 5.1.1 RESOLVER.ADR.RecipNotFound'", "5.1.1", Kind.HARD),
        ("Remote Server returned '550 5.1.10 RecipientNotFound'", "5.1.10", Kind.HARD),
        ("at 10.1.1.5 said: 550-5.1.1 no such user", "5.1.1", Kind.HARD),
        ("550 #5.4.310 DNS domain gone.example does not exist", "5.4.310", Kind.HARD),
        ("552 5.2.2 mailbox full", "5.2.2", Kind.SOFT),
        ("550 5.2.2 STOREDRV.Submission; SubmissionQuotaExceeded", "5.2.2", Kind.QUOTA),
        ("'550 5.1.90 Your message can't be sent'", "5.1.90", Kind.QUOTA),
        ("550 5.7.233 tenant external recipient rate limit", "5.7.233", Kind.QUOTA),
        ("550 5.1.0 Sender denied", "5.1.0", Kind.SOFT),
        ("550 5.7.1 refused as spam", "5.7.1", Kind.SOFT),
        ("Status: 4.4.7", "4.4.7", Kind.SOFT),
        ("It came back.", None, Kind.SOFT),
    ],
)
def test_a_report_is_about_the_address_the_sender_or_this_mail_alone(
    text: str, code: str | None, kind: Kind
) -> None:
    """By its code; 5.2.2 is either's, and the text tells whose."""
    found = read(a_mail(text), MAILBOX)

    assert (found.message_id, found.code, found.kind) == (ONE, code, kind)


def test_a_code_alone_never_says_that_the_sender_is_full() -> None:
    """Where nothing is said of sending, it is the recipient's mailbox."""
    assert kind_of("5.2.2") is Kind.SOFT
    assert kind_of(None) is Kind.SOFT


def test_a_report_is_matched_in_html_and_by_its_own_headers_too() -> None:
    """Not every server quotes as Exchange does."""
    html = f"<p>550 5.1.1</p><b>X-Postroom-Id:</b>&nbsp;<span>{ONE.upper()}</span>"
    own = [{"name": "x-postroom-id", "value": ONE}]

    in_html = read(a_mail("", body={"contentType": "html", "content": html}), MAILBOX)
    in_headers = read(a_mail("", body=None, internetMessageHeaders=own), MAILBOX)
    of_others = read(a_mail("", body={"content": "x-postroom-id: 7"}), MAILBOX)

    assert (in_html.message_id, in_html.code) == (ONE, "5.1.1")
    assert in_headers.message_id == ONE
    assert of_others.message_id is None


def test_what_the_quoted_original_says_is_no_finding() -> None:
    """Its headers name all its recipients, and whatever its sender wrote."""
    found = read(a_mail(f"{ANN}\r\n550 5.1.1 not found"), MAILBOX)

    assert found.named == {ANN}


@pytest.mark.parametrize(
    ("sender", "own"),
    [(EXCHANGE, True), ("postmaster@contoso.com", True), ("postmaster@evil.example", False),
     ("mailer-daemon@contoso.com", False), ("", False)],
)  # fmt: skip
def test_only_exchange_itself_is_believed_about_the_sender(sender: str, own: bool) -> None:
    """A recipient knows the id in the mail, and could write a report about it."""
    mail = a_mail("550 5.1.90", **{"from": {"emailAddress": {"address": sender}}})

    assert read(mail, MAILBOX).own is own


# ---- what follows ----------------------------------------------------------------------------


@dataclass
class World:
    """One process's doors, and a hand that sends."""

    runner: asyncio.Runner
    deps: Deps
    simulator: Simulator
    kit: Kit
    redis: redis.Redis

    def send(self, *to: str) -> tuple[Any, str]:
        """A message that was really sent to these; its batch's head and its id."""
        content = {"to": [{"address": one} for one in to]}
        head, [one] = self.kit.batch()
        self.kit.put(one, content=content)
        fence = self.kit.claim([one])[one]
        body = payload(content, message_id=one, subject="News", html=None, text="Hello")
        token = self.deps.visitor.tokens.get().value
        deadline = time.monotonic() + 60
        sending = self.deps.graph.send(MAILBOX, body, token, deadline=deadline)
        outcome = self.runner.run(sending)
        assert isinstance(outcome, Accepted), outcome
        self.kit.record(to_record(head, one, fence, SENT, outcome))
        return head, one

    def read(self, **changes: Any) -> dict[str, int]:
        """One round, for which all mailboxes are due."""
        for key in self.redis.scan_iter("postroom:bounces:read:*"):
            self.redis.delete(key)
        return self.again(**changes)

    def again(self, **changes: Any) -> dict[str, int]:
        """The next round."""
        return self.runner.run(read_bounces(replace(self.deps, **changes)))

    def asked(self) -> int:
        """How many requests reading cost."""
        return sum(r["operation"] == "read" for r in self.simulator.requests())

    def events(self, kind: str) -> list[Any]:
        return list(self.kit.sql("SELECT * FROM events WHERE kind = :kind", kind=kind))


@pytest.fixture
def world(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[World]:
    kit, bounces = Kit(migrated_url), f"{ANN}=5.1.1,over.example=5.1.90,tenant.example=5.7.233"
    with doors_kit.opened(tmp_path, redis_url, bounces=bounces) as doors, closing(kit.store):
        visitor = Visitor(doors.gate, doors.tokens, kit.store.mailboxes, doors_kit.TIMEOUT)
        deps = Deps(kit.store, doors.graph, visitor, doors.ours, False, Event())
        yield World(doors.runner, deps, doors.simulator, kit, doors.redis)


def test_a_message_that_came_back_stays_sent_and_counts_as_bounced_once(world: World) -> None:
    """However often its report is read, by whatever worker, with its mark or without."""
    head, one = world.send(ANN)
    world.send(BOB)

    assert world.read() == {"hard": 1}
    assert world.read() == {}
    world.redis.flushall()
    assert world.read() == {}

    status = world.kit.status(head.id)
    assert status["counts"]["sent"] == 1
    assert status["bounced"] == 1
    found = world.kit.message(one)
    [bounce] = found["bounces"]
    assert [row["bounced"] for row in world.kit.store.export(head.id)] == ["5.1.1"]
    assert (found["state"], bounce["kind"], bounce["code"]) == ("sent", "hard", "5.1.1")
    assert world.kit.store.mailboxes.suspended([MAILBOX]) == []
    assert list(world.kit.store.suppressions.all()) == []


def test_a_mailbox_is_read_once_in_minutes_by_one_worker_of_all(world: World) -> None:
    """One request, whatever the number of messages; none where nothing was sent."""
    assert world.read() == {}
    assert world.asked() == 0
    for _ in range(3):
        world.send(ANN)

    assert world.again() == {"hard": 3}
    assert world.again() == {}

    assert world.asked() == 1


def test_more_reports_than_a_page_holds_are_all_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page, each a request through the gate; what one round leaves, the next one reads."""
    monkeypatch.setattr("worker.graph.reports.TOP", 2)
    for _ in range(5):
        world.send(ANN)

    assert world.read() == {"hard": 5}
    assert world.asked() == 3


def test_a_mailbox_that_may_not_be_read_costs_one_request_an_hour(world: World) -> None:
    """Sending goes on; nothing is suspended for it."""
    world.send(ANN)
    world.simulator.settings(mail_read=False)

    assert world.read() == {}
    assert world.again() == {}

    assert world.asked() == 1
    assert 3000 < world.redis.ttl(f"postroom:bounces:read:{MAILBOX}") <= 3600
    assert world.kit.store.mailboxes.suspended([MAILBOX]) == []


def test_a_throttled_reading_cools_the_mailbox_and_comes_again(world: World) -> None:
    """The gate keeps the next reading back, which costs no request."""
    world.send(ANN)
    world.simulator.fault("throttle", operation="read", retry_after=60)

    assert world.read() == {}
    assert world.read() == {}
    assert world.asked() == 1

    for key in world.redis.scan_iter("postroom:{*"):
        world.redis.delete(key)
    world.simulator.settings(limits=False)
    assert world.read() == {"hard": 1}


@pytest.mark.parametrize("odd", [{}, None, 7, {"id": "x", "receivedDateTime": "yesterday"},
    {"id": "x", "receivedDateTime": "2026-11-28T08:00:00Z", "internetMessageHeaders": [{}]},
    {"id": "x", "receivedDateTime": "2026-11-28T08:00:00Z", "body": 7}], ids=repr)  # fmt: skip
def test_a_report_that_cannot_be_read_hides_no_other(odd: Any) -> None:
    """It would stand there for days, and nothing behind it would ever be read."""
    quoted = f"x-postroom-id: {uuid.UUID(int=7)}"
    good = {"id": "g", "receivedDateTime": "2026-11-28T08:01:00", "body": {"content": quoted}}
    page = json.dumps({"value": [odd, good]}).encode()

    found = reports.seen(Reply(Answer(status=200), content=page), MAILBOX).found

    [one] = [report for report in found if report.message_id]
    assert (one.message_id, one.received.tzinfo) == (str(uuid.UUID(int=7)), UTC)


def test_a_page_that_proves_nothing_changes_nothing(world: World) -> None:
    """An error, nonsense, or a page that is to be read elsewhere: the next round begins there."""
    world.send(ANN)
    foreign = {"value": [], "@odata.nextLink": "https://evil.example/v1.0/users/x/messages"}
    for status, body in ((500, None), (200, {"value": [{"id": "R1"}]}), (200, foreign)):
        world.simulator.fault("status", operation="read", status=status, body=body)
        assert world.read() == {}
    assert world.asked() == 3

    assert world.read() == {"hard": 1}


def test_bounces_go_with_the_audit_of_their_batch(world: World) -> None:
    """They are as old as what they tell of."""
    head, _ = world.send(ANN)
    assert world.read() == {"hard": 1}
    world.kit.set_batch(head.id, finished_at=datetime.now(UTC) - timedelta(days=2))

    world.kit.store.retention.purge_audit(86400.0)

    assert world.kit.sql("SELECT * FROM bounces") == []


def test_a_quota_suspends_the_mailbox_until_an_operator_resumes_it(world: World) -> None:
    """Graph goes on accepting what is never delivered: an accepted mail proves nothing."""
    world.send("cid@over.example")

    assert world.read() == {"quota": 1}

    [blocked] = world.kit.store.mailboxes.suspended([MAILBOX])
    assert blocked["code"] == "5.1.90"
    assert "too many recipients in 24 hours" in blocked["reason"]
    assert "postroom mailbox resume" in blocked["reason"]
    assert len(world.events("suspend")) == 1
    assert steps(STATUS | {"blocked": [blocked]}) == [
        (f"postroom mailbox resume {MAILBOX}", "when Exchange lets it send again")
    ]
    seen = world.kit.store.mailboxes.seen(MAILBOX)
    assert (seen.suspended, seen.probe_in) == (True, None)
    assert world.kit.store.mailboxes.resume(MAILBOX, by="ann", why=None)
    assert world.read() == {}
    assert world.kit.store.mailboxes.suspended([MAILBOX]) == []


def test_a_quota_of_the_tenant_suspends_all_mailboxes(world: World) -> None:
    """No other mailbox may send either: a pool would go on through its other members."""
    world.kit.store.mailboxes.set_pool("notices", [MAILBOX, "other@contoso.com"])
    world.send("dan@tenant.example")

    assert world.read() == {"quota": 1}

    found = world.kit.store.mailboxes.suspended([MAILBOX, "other@contoso.com"])
    assert [one["code"] for one in found] == ["5.7.233", "5.7.233"]
    assert len(world.events("suspend")) == 2
    assert steps(STATUS | {"blocked": found}) == [
        ("postroom mailbox resume --all", "when Exchange lets it send again")
    ]


def test_a_bad_address_is_suppressed_where_that_is_wanted(world: World) -> None:
    """Only the one that the report names; laid to `bounces`."""
    world.send(ANN, BOB)

    assert world.read(suppress_hard=True) == {"hard": 1}

    [entry] = world.kit.store.suppressions.all()
    assert (entry["address"], entry["by"], entry["reason"]) == (ANN, "bounces", "bounced: 5.1.1")
    [event] = world.events("suppress")
    assert event.by == "bounces"


def test_a_report_about_what_another_mailbox_sent_is_ignored(world: World) -> None:
    """A message may have been tried from several; each of them tells of its own."""
    head, one = world.send(ANN)
    theirs = "UPDATE attempts SET mailbox = 'other@contoso.com' WHERE message_id = :id"
    world.kit.sql(theirs, id=one)
    world.send(BOB)

    assert world.read() == {}
    assert world.kit.status(head.id)["bounced"] == 0


def test_a_report_that_comes_late_is_found_when_it_is_there(world: World) -> None:
    """Reports of the same minutes are read again."""
    world.send(ANN)
    assert world.read() == {"hard": 1}
    world.simulator.settings(bounce_seconds=3600)
    world.send(ANN)
    assert world.read() == {}
    world.simulator.settings(bounce_seconds=0)
    world.send(ANN)

    assert world.read() == {"hard": 1}


def test_all_mailboxes_that_sent_lately_are_read(world: World) -> None:
    """Neither those that never sent, nor those that did so long ago."""
    for n in range(3):
        head, [one] = world.kit.batch()
        mailbox = f"m{n}@contoso.com"
        fence = world.kit.claim([one], mailbox=mailbox)[one]
        told = to_record(head, one, fence, SENT, outcome_for(SENT))
        world.kit.record(replace(told, mailbox=mailbox))
    old = datetime.now(UTC) - timedelta(days=6)
    world.kit.sql("UPDATE attempts SET at = :old WHERE mailbox = 'm1@contoso.com'", old=old)

    assert world.kit.store.bounces.senders() == ["m0@contoso.com", "m2@contoso.com"]


# ---- what it shows ---------------------------------------------------------------------------


def test_what_a_worker_read_is_shown_wherever_one_looks(
    world: World, redis_url: str, migrated_url: str, monkeypatch: pytest.MonkeyPatch,
    postroom: Command,
) -> None:  # fmt: skip
    """In status, story, page and metrics; the ticker reads by itself, unless BOUNCES is off."""
    for name, value in world.simulator.environment().items():
        monkeypatch.setenv(name, value)
    head, one = world.send(ANN)
    settings = Settings.from_env(redis_url=redis_url, database_url=migrated_url)
    with closing(Runtime(settings.model_copy(update={"bounces": "off"}))) as rt:
        assert ticks(rt) is None
    with closing(Runtime(settings)) as rt:
        reading = ticks(rt)
        assert reading is not None
        assert reading.result(20) == {"hard": 1}
        rt.meters.flush()
        told = {family.name: family for family in Exporter(rt).collect()}
        page = Client(lambda: rt).report(head.id)

    assert [(s.labels, s.value) for s in told["postroom_bounces"].samples] == [
        ({"kind": "hard"}, 1)
    ]
    assert "<b>1</b>bounced, of those sent" in page
    assert re.search(r"^bounced +1$", postroom("batch", "status", head.id).stdout, re.MULTILINE)
    story = postroom("message", "show", one).stdout
    assert re.search(rf"bounced \(hard\) +{MAILBOX} +5\.1\.1", story)


def ticks(rt: Runtime) -> Future[dict[str, int]] | None:
    """A worker's ticker when it is time to read; what it began."""
    ticker = Ticker(SimpleNamespace(pool_cls=TaskPool, concurrency=1))
    ticker._bounces(rt)
    assert ticker._reading.now is None, "not at once"
    ticker._read_at = 0.0
    ticker._bounces(rt)
    return ticker._reading.now
