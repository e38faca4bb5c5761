"""What a message may say besides its body, from the call to the mailbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.post_kit import Post, opened
from worker.model import Message, State


@pytest.fixture
def post(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Post]:
    """Everything in one process."""
    simulated = {"send_as": "boss@contoso.com"}
    with opened(tmp_path, redis_url, migrated_url, simulator=simulated) as running:
        yield running


def test_every_field_of_a_message_reaches_the_mailbox(post: Post) -> None:
    """People with names, reply-to (many), from, importance, headers, unsubscribe, reference."""
    [found] = post.send(
        Message(
            ["ada@example.org", ("Bob Ü", "bob@example.org")], "Grüße", html="<p>x</p>",
            text="not carried: Graph takes one body", cc={"address": "c@example.org"},
            bcc=("Dee", "d@example.org"), reply_to=["help@contoso.com", ("Desk", "d@contoso.com")],
            from_=("The boss", "boss@contoso.com"), importance="low",
            headers={"x-order": "17", "X-Tenant": "Köln", "x-a": "1", "x-b": "2"},
            list_unsubscribe="<mailto:u@contoso.com>, <https://contoso.com/u?a=1>",
            reference="invoice 17",
        )
    )  # fmt: skip
    people = {
        name: [one["emailAddress"] for one in found[name]]
        for name in ("toRecipients", "ccRecipients", "bccRecipients", "replyTo")
    }
    assert people == {
        "toRecipients": [{"address": "ada@example.org"},
                         {"address": "bob@example.org", "name": "Bob Ü"}],
        "ccRecipients": [{"address": "c@example.org"}],
        "bccRecipients": [{"address": "d@example.org", "name": "Dee"}],
        "replyTo": [{"address": "help@contoso.com"},
                    {"address": "d@contoso.com", "name": "Desk"}],
    }  # fmt: skip
    assert found["from"]["emailAddress"] == {"address": "boss@contoso.com", "name": "The boss"}
    assert found["body"] == {"contentType": "html", "content": "<p>x</p>"}
    assert found["importance"] == "low"
    headers = {h["name"]: h["value"] for h in found["internetMessageHeaders"]}
    assert headers.pop("x-postroom-id")
    assert headers == {"x-order": "17", "X-Tenant": "Köln", "x-a": "1", "x-b": "2"}
    unsubscribe = {"id": "String 0x1045",
                   "value": "<mailto:u@contoso.com>, <https://contoso.com/u?a=1>"}  # fmt: skip
    assert unsubscribe in found["singleValueExtendedProperties"]


def test_what_is_not_to_be_kept_leaves_no_copy(post: Post) -> None:
    """`save_to_sent_items=False`: accepted, and not in the mailbox."""
    receipt = post.enqueue(Message("ada@example.org", "x", text="x", save_to_sent_items=False))
    post.ingest()
    post.deliver()
    assert post.message(receipt.batch_id)["state"] == State.SENT
    [entry] = post.simulator.ledger()
    assert entry["save_to_sent_items"] is False
    assert post.mails(receipt.batch_id) == []


def test_sending_as_whom_the_mailbox_may_not_is_the_message_s_fault(post: Post) -> None:
    """ErrorSendAsDenied fails the message, and the mailbox goes on."""
    given: dict[str, Any] = {"subject": "x", "text": "x"}
    receipt = post.enqueue(Message("a@example.org", from_="other@contoso.com", **given),
                           Message("b@example.org", **given))  # fmt: skip
    post.ingest()
    post.deliver()
    found = list(post.client.messages(receipt.batch_id))
    assert [(m["state"], m["error_code"]) for m in found] == [
        ("failed", "ErrorSendAsDenied"), ("sent", None)
    ]  # fmt: skip
