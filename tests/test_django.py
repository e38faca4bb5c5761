"""Django's e-mail backend, by the rules that Django's own backends are tested for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.conf import settings as django_settings
from django.core import mail
from django.core.mail import (
    EmailMessage,
    EmailMultiAlternatives,
    get_connection,
    mail_admins,
    send_mail,
    send_mass_mail,
)

from tests.post_kit import SENDER, Post, attached, opened
from worker import runtime
from worker.django import EmailBackend
from worker.model import InvalidMessages, Unavailable


@pytest.fixture
def database_kind() -> str:
    """One of them is enough here."""
    return "sqlite"


@pytest.fixture(scope="module", autouse=True)
def _django() -> None:
    """Django, set up as an application does it."""
    if not django_settings.configured:
        django_settings.configure(
            EMAIL_BACKEND="worker.django.EmailBackend", DEFAULT_FROM_EMAIL=SENDER,
            SERVER_EMAIL=SENDER, ADMINS=[("Ops", "ops@contoso.com")], EMAIL_SUBJECT_PREFIX="[x] ",
            USE_TZ=True,
        )  # fmt: skip
        django.setup()


@pytest.fixture
def post(
    tmp_path: Path, redis_url: str, migrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Post]:
    """Everything in one process, which is the one that Django's backend finds."""
    with opened(tmp_path, redis_url, migrated_url) as running:
        monkeypatch.setattr(runtime, "_current", running.runtime)
        yield running


def arrived(post: Post) -> list[dict[str, Any]]:
    """The mails of the mailbox, in the order in which they were sent."""
    post.ingest()
    post.deliver()
    return sorted(post.simulator.mail(SENDER), key=lambda found: str(found["subject"]))


def message(subject: str = "News", **fields: Any) -> EmailMessage:
    """A mail as an application makes it."""
    return EmailMessage(**{"subject": subject, "body": "Hello", "to": ["ada@example.org"]} | fields)


def test_send_mail_and_send_mass_mail_count_what_they_sent(post: Post) -> None:
    """As with SMTP: how many mails were taken; HTML goes as the body."""
    assert send_mail("1", "text", None, ["ada@example.org"], html_message="<p>html</p>") == 1
    many = [(f"{n}", "text", SENDER, [f"p{n}@example.org"]) for n in (2, 3)]
    assert send_mass_mail(many) == 2
    mail_admins("4", "text")
    found = arrived(post)
    assert [m["subject"] for m in found] == ["1", "2", "3", "[x] 4"]
    assert found[0]["body"] == {"contentType": "html", "content": "<p>html</p>"}
    assert found[1]["body"] == {"contentType": "text", "content": "text"}


def test_a_whole_mail_arrives_as_it_was(post: Post) -> None:
    """Alternatives, attachments, headers, reply-to, cc and bcc, names, Unicode."""
    one = EmailMultiAlternatives(
        "Grüße", "text", f"Neues <{SENDER}>", ["Ada Ü <ada@example.org>"], bcc=["b@example.org"],
        cc=["c@example.org"], reply_to=["Desk <desk@contoso.com>"],
        headers={"X-Order": "17", "List-Unsubscribe": "<https://contoso.com/u>"},
    )  # fmt: skip
    one.attach_alternative("<p>ü</p>", "text/html")
    one.attach("bericht.txt", "Grüße", "text/plain")
    one.attach("a.bin", b"\x00\xff", "application/octet-stream")
    assert one.send() == 1
    [found] = arrived(post)
    assert found["subject"] == "Grüße"
    assert found["body"] == {"contentType": "html", "content": "<p>ü</p>"}
    to = found["toRecipients"][0]["emailAddress"]
    assert to == {"address": "ada@example.org", "name": "Ada Ü"}
    assert found["bccRecipients"][0]["emailAddress"]["address"] == "b@example.org"
    assert found["ccRecipients"][0]["emailAddress"]["address"] == "c@example.org"
    assert found["replyTo"][0]["emailAddress"] == {"address": "desk@contoso.com", "name": "Desk"}
    assert found["from"]["emailAddress"]["name"] == "Neues"
    assert {"name": "X-Order", "value": "17"} in found["internetMessageHeaders"]
    assert [(name, content) for name, _, content, _ in attached(found)] == [
        ("bericht.txt", "Grüße".encode()), ("a.bin", b"\x00\xff")
    ]  # fmt: skip


def test_nothing_to_send_is_no_error(post: Post) -> None:
    """No messages, and a message to nobody: 0."""
    assert get_connection().send_messages([]) == 0
    assert get_connection().send_messages([message(to=[])]) == 0
    assert message(to=[]).send() == 0
    assert arrived(post) == []


def test_a_connection_is_opened_once_and_may_be_shared(post: Post) -> None:
    """`open` says whether it opened; a with block keeps it; close may come twice."""
    with get_connection() as connection:
        assert connection.open() is False
        assert connection.send_messages([message("1"), message("2")]) == 2
        assert connection.open() is False
    connection.close()
    connection.close()
    assert connection.open() is True
    assert [m["subject"] for m in arrived(post)] == ["1", "2"]


def test_errors_are_raised_or_stay_silent(post: Post) -> None:
    """`fail_silently` counts what went, and says nothing of the rest."""
    bad, good = message(to=["nobody"]), message("good")
    with pytest.raises(InvalidMessages):
        message(to=["nobody"]).send()
    assert bad.send(fail_silently=True) == 0
    assert get_connection(fail_silently=True).send_messages([bad, good]) == 1
    with pytest.raises(ValueError, match="Header values"):
        message("a\nb").send()
    assert [m["subject"] for m in arrived(post)] == ["good"]


def test_a_service_that_is_away_is_an_error(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unavailable, or nothing but a count of 0."""
    monkeypatch.setenv("POSTROOM_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr(runtime, "_current", None)
    with pytest.raises(Unavailable):
        message().send()
    assert message().send(fail_silently=True) == 0


def test_the_same_message_id_is_the_same_mail(post: Post) -> None:
    """An application that gives its own Message-ID may send twice, and sends once."""
    twice: dict[str, Any] = {"headers": {"Message-ID": "<17@contoso.com>"}}
    assert message(**twice).send() == message(**twice).send() == 1
    assert message().send() == 1
    assert len(arrived(post)) == 2


def test_threads_share_a_connection(post: Post) -> None:
    """As Django asks of its backends."""
    connection = get_connection()
    connection.open()
    threads = [
        threading.Thread(target=connection.send_messages, args=([message(f"{n}")],))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(arrived(post)) == 8


def test_the_sender_may_be_named_in_the_settings(post: Post) -> None:
    """Then From is whom it sends as."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(django_settings, "POSTROOM_SENDER", SENDER, raising=False)
        connection = get_connection()
    assert isinstance(connection, EmailBackend)
    post.simulator.settings(send_as="boss@contoso.com")
    connection.send_messages([message(from_email="boss@contoso.com")])
    [found] = arrived(post)
    assert found["from"]["emailAddress"]["address"] == "boss@contoso.com"


def test_importing_worker_does_not_import_django() -> None:
    """Nor aiosmtpd: applications pay for what they use."""
    code = ("import sys, worker; worker.Client, worker.Message; import worker.client; "
            "print([m for m in ('django', 'aiosmtpd') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)  # fmt: skip
    assert done.stdout.strip() == "[]"
    assert mail
