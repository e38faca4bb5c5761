"""postroom mailbox and postroom pool: what operators see and set, while all is running."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, select

from tests.test_cli import SENDER, Command, document, engine, html, postroom, rows, said, send_three
from worker.deliver.standing import Standing
from worker.store import Store
from worker.store.schema import events

__all__ = ["engine", "html", "postroom", "rows"]  # fixtures

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def told(engine: Engine) -> list[tuple[Any, ...]]:
    with engine.connect() as c:
        found = c.execute(select(events).order_by(events.c.id))
        return [(e.kind, e.mailbox, e.by, e.why) for e in found]


def listed(postroom: Command, mailbox: str) -> dict[str, Any]:
    [one] = [one for one in document(postroom("mailbox", "list", "--json"))
             if one["mailbox"] == mailbox]  # fmt: skip
    return dict(one)


def test_a_suspension_is_listed_with_its_reason_and_told(postroom: Command, engine: Engine) -> None:
    """By whom and why; again changes nothing; a resume ends it."""
    words = (SENDER.upper(), "--by", "ann", "--why", "complaints")
    first = document(postroom("mailbox", "suspend", *words, "--json"))
    again = document(postroom("mailbox", "suspend", *words, "--json"))

    assert first == {"mailbox": SENDER, "state": "suspended", "changed": True}
    assert again["changed"] is False
    one = listed(postroom, SENDER)
    assert (one["state"], one["code"]) == ("suspended", "Suspended")
    assert one["reason"] == "suspended by ann: complaints"
    assert "suspended by ann: complaints" in postroom("mailbox", "list").stdout
    assert document(postroom("mailbox", "resume", SENDER, "--by", "bob", "--json"))["changed"]
    assert listed(postroom, SENDER)["state"] == "ready"
    assert told(engine) == [
        ("suspend", SENDER, "ann", "complaints"), ("resume", SENDER, "bob", None),
    ]  # fmt: skip


def test_limits_of_one_mailbox_are_set_and_taken_back(postroom: Command, engine: Engine) -> None:
    """A lane finds them with its mailbox."""
    set_ = ("mailbox", "set", SENDER, "--json")
    done = document(postroom(*set_, "--recipient-rate", "5000/24h", "--concurrency", "2"))
    assert done["limits"] == {"concurrency": 2, "recipient_rate": "5000/24h"}
    standing = Standing.of(Store(engine), SENDER)
    assert standing.limits == {"slots": 2, "recipients": "5000/24h"}

    done = document(postroom(*set_, "--recipient-rate", "default", "--upload-rate", "off"))

    assert done["limits"] == {"concurrency": 2, "upload_rate": "off"}
    assert listed(postroom, SENDER)["limits"] == done["limits"]
    assert [kind for kind, *_ in told(engine)] == ["limit", "limit"]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--recipient-rate", "many", "recipient_rate 'many': give a rate such as"),
        ("--request-rate", "0/min", "request_rate '0/min': the amount of a rate is from 1"),
        ("--concurrency", "5", "concurrency '5': Graph allows 1 to 4; or default"),
    ],
)
def test_a_wrong_limit_is_refused_in_one_line(
    postroom: Command, engine: Engine, option: str, value: str, line: str
) -> None:
    """What, and what is allowed; nothing is kept."""
    assert line in said(postroom("mailbox", "set", SENDER, option, value))
    assert told(engine) == []


def test_a_pool_is_made_and_changed_while_running(postroom: Command, engine: Engine) -> None:
    """It is listed beside those of the settings, and its mailboxes are listed with it."""
    document(postroom("pool", "set", "news", "b@x.org", "A@x.org", "--json", "--why", "new"))
    done = document(postroom("pool", "set", "news", "c@x.org", "a@x.org", "--json"))

    assert done == {"pool": "news", "mailboxes": ["a@x.org", "c@x.org"]}
    assert document(postroom("pool", "list", "--json")) == [
        {"pool": "five", "mailboxes": ["a@contoso.com", "b@contoso.com"], "from": "settings"},
        {"pool": "news", "mailboxes": ["a@x.org", "c@x.org"], "from": "database"},
    ]
    assert listed(postroom, "a@x.org")["pools"] == ["news"]
    assert [(kind, why) for kind, _, _, why in told(engine)] == [("pool", "new"), ("pool", None)]


def test_all_suspensions_end_with_one_command(postroom: Command) -> None:
    """After a quota of the tenant every mailbox is suspended."""
    for mailbox in ("a@contoso.com", "b@contoso.com"):
        postroom("mailbox", "suspend", mailbox)

    assert postroom("mailbox", "resume", "--all").stdout == (
        "a@contoso.com: ready\nb@contoso.com: ready\n"
    )
    assert document(postroom("mailbox", "resume", "--all", "--json")) == []
    assert "give one mailbox, or --all" in postroom("mailbox", "resume").stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("pool", "set", "five", "a@x.org"), "pool five stands in POSTROOM_POOLS: change it there"),
        (("pool", "set", "news", "nobody"), "'nobody': a mailbox must be an address (UPN) or"),
        (("pool", "set", " ", "a@x.org"), "the pool's name is empty"),
        (("mailbox", "suspend", "x@y/z"), "a mailbox must be an address (UPN) or a GUID"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    postroom: Command, engine: Engine, words: Any, line: str
) -> None:
    """Nothing is changed, and no event says that it was."""
    assert line in said(postroom(*words))
    assert told(engine) == []


def test_a_batch_of_an_empty_pool_says_so(
    postroom: Command, rows: Any, html: Any, engine: Engine
) -> None:
    """Its pool was taken out of the settings: the messages wait, and the status says for what."""
    words = ("send", rows, "--pool", "five", "--subject", "Hello", "--html", html, "--json")
    batch_id = document(postroom(*words))["batch_id"]

    status = document(postroom("batch", "status", batch_id, "--json", POOLS="{}"))

    [one] = status["blocked"]
    assert (one["mailbox"], one["code"]) == (None, "PoolEmpty")
    assert one["reason"].startswith("Pool five has no mailbox.")
    assert "Pool five has no mailbox." in postroom("batch", "status", batch_id, POOLS="{}").stdout


def test_a_mailbox_that_was_lately_sent_from_is_listed(
    postroom: Command, rows: Any, html: Any, redis_url: str, engine: Engine
) -> None:
    """Though nothing else is known of it."""
    from tests.test_cli import arrive

    send_three(postroom, rows, html)
    arrive(redis_url, engine)

    one = listed(postroom, SENDER)
    assert (one["state"], one["pools"], one["limits"]) == ("ready", [], {})
