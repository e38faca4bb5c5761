"""Mails of Python's email package: what they say arrives as they said it."""

from __future__ import annotations

import email.policy
import os
from collections.abc import Iterator
from email.message import EmailMessage
from email.mime.image import MIMEImage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

import pytest

from tests.post_kit import SENDER, Post, attached, opened
from worker import mime
from worker.model import Attachment, InvalidMessages, Message

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
RTL = "שלום עולם, مرحبا بالعالم"
EMOJI = "Grüße 👩‍👩‍👧‍👦 🇺🇦 ½ „quoted“"
TABLE = ("<table>" + "".join(f"<tr><td>{n}</td><td>{n * n} €</td></tr>" for n in range(400))
         + "</table>")  # fmt: skip


@pytest.fixture
def post(tmp_path: Path, redis_url: str, migrated_url: str) -> Iterator[Post]:
    """Everything in one process."""
    with opened(
        tmp_path, redis_url, migrated_url, simulator={"send_as": "boss@contoso.com"}
    ) as running:
        yield running


def letter(subject: str = "News", text: str | None = "Hello\n", **headers: str) -> EmailMessage:
    """A mail; a header's underscores are hyphens."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = SENDER, "ada@example.org", subject
    for name, value in headers.items():
        mail[name.replace("_", "-")] = value
    if text is not None:
        mail.set_content(text)
    return mail


def rich(html: str, **headers: str) -> EmailMessage:
    """Text, HTML and an inline logo that the HTML refers to."""
    mail = letter(**headers)
    mail.add_alternative(html + '<img src="cid:logo@contoso">\n', subtype="html")
    whole: Any = mail.get_payload()
    whole[1].add_related(PNG, "image", "png", cid="<logo@contoso>", filename="logo.png")
    return mail


def with_file(mail: EmailMessage, content: bytes, kind: str, name: str) -> EmailMessage:
    """The mail with a file attached."""
    main, _, sub = kind.partition("/")
    mail.add_attachment(content, maintype=main, subtype=sub, filename=name)
    return mail


def with_mail(outer: EmailMessage, inner: EmailMessage) -> EmailMessage:
    """A mail with another one attached."""
    outer.add_attachment(inner)
    return outer


def legacy() -> Any:
    """As many programs still make them: not an EmailMessage."""
    mail = MIMEMultipart("related")
    mail["From"], mail["To"], mail["Subject"] = SENDER, "ada@example.org", "Größe"
    mail.attach(MIMEText('<p>ü</p><img src="cid:i">', "html", "iso-8859-15"))
    image = MIMEImage(PNG, "png", name="i.png")
    image["Content-ID"] = "<i>"
    mail.attach(image)
    return mail


def thirty() -> list[Any]:
    """Thirty mails as people send them."""
    many = ", ".join(f"Person {n} <person{n}@example.org>" for n in range(200))
    long = "x" * 5000 + "\n" + "wort " * 2000 + "\n"
    eight = letter(text=None)
    eight.set_content("latin: äöü\n", charset="latin-1", cte="8bit")
    return [
        letter(), letter(EMOJI), letter(RTL, RTL + "\n"), letter("Long", long),
        letter("Empty lines", "\n\n\nend\n\n"), letter("Dots", ".\n..\n.hidden\n"), eight,
        rich("<p>Hello</p>"), rich(TABLE), rich(f"<p dir=rtl>{RTL}</p>"), rich(f"<p>{EMOJI}</p>"),
        rich("<p>" + "long line " * 3000 + "</p>"), rich("<pre>\n\n  indented\n</pre>"),
        rich("<p>x</p>", Reply_To="Desk <desk@contoso.com>, help@contoso.com"),
        rich("<p>x</p>", Importance="high", X_Order="17", X_Tenant="Köln"),
        rich("<p>x</p>", List_Unsubscribe="<https://contoso.com/u?x=1>, <mailto:u@contoso.com>"),
        rich("<p>x</p>", Cc=many), letter("Bcc", Bcc="secret@example.org"),
        with_file(rich(TABLE), os.urandom(10 * 1024 * 1024), "application/zip", "all.zip"),
        with_file(rich("<p>x</p>"), b"%PDF\n\xe2\xe3", "application/pdf", "Rechnung für Ä.pdf"),
        with_file(letter(), b"a;b\r\n1;2\r\n", "text/csv", "list.csv"),
        with_file(letter(), EMOJI.encode(), "text/plain", f"{EMOJI[:8]}.txt"),
        with_file(with_file(letter(), b"1", "a/b", "1.bin"), b"2", "a/b", "2.bin"),
        with_file(letter("Only a scan", text=None), PNG, "image/png", "scan.png"),
        with_file(rich("<p>x</p>"), os.urandom(2_500_000), "image/jpeg", "photo.jpg"),
        with_file(letter(), b"BEGIN:VCALENDAR\r\nEND:VCALENDAR\r\n", "text/calendar", "i.ics"),
        with_mail(letter("Fwd"), letter("Inner")), legacy(),
        mime.parse(letter("Wire", EMOJI + "\r\nline\r\n").as_bytes(policy=email.policy.SMTP)),
        letter("x" * 250, "wide subject\n"),
    ]  # fmt: skip


def leaves(mail: Any) -> list[tuple[str, bytes]]:
    """Type and content of all parts that are no containers and not the bodies, by the email
    package's own reading."""
    parsed: Any = email.message_from_bytes(mail.as_bytes(), policy=email.policy.default)
    bodies = [parsed.get_body(("html",)), parsed.get_body(("plain",))]
    found, inside = [], set()
    for part in parsed.walk():
        if part.get_content_type() == "message/rfc822":
            inner = part.get_payload(0)
            inside |= {id(p) for p in inner.walk()}
            found.append((part.get_content_type(), inner.as_bytes()))
        elif not part.is_multipart() and part not in bodies and id(part) not in inside:
            found.append((part.get_content_type(), part.get_payload(decode=True)))
    return found


def body_of(mail: Any) -> tuple[str, str]:
    """What Graph is to show, by the email package's own reading."""
    parsed: Any = email.message_from_bytes(mail.as_bytes(), policy=email.policy.default)
    part = parsed.get_body(("html", "plain"))
    if part is None:
        return ("text", "\n")
    kind = "html" if part.get_content_type() == "text/html" else "text"
    return (kind, part.get_content().replace("\r\n", "\n"))


def test_thirty_real_looking_mails_come_out_as_they_went_in(post: Post) -> None:
    """Tables, emoji, right-to-left, long lines, 10 MB, inline logos, many recipients, headers."""
    mails = thirty()
    assert len(mails) == 30
    for mail in mails:
        receipt = post.client.send_message(mail)
        assert (receipt.accepted, receipt.rejected) == (1, ())
        post.ingest()
        post.deliver()
        [found] = post.mails(receipt.batch_id)

        # Python's own writing of long headers loses spaces: what was given is what counts.
        parsed: Any = mail if isinstance(mail, EmailMessage) else mime.parse(mail.as_bytes())
        assert found["subject"] == str(parsed["subject"])
        assert (found["body"]["contentType"], found["body"]["content"]) == body_of(mail)
        there = attached(found)
        assert [(kind, content) for _, kind, content, _ in there] == leaves(mail)
        for header, field in (("to", "toRecipients"), ("cc", "ccRecipients"),
                              ("bcc", "bccRecipients"), ("reply-to", "replyTo")):  # fmt: skip
            wanted = [a for h in parsed.get_all(header, []) for a in h.addresses]
            people = [one["emailAddress"] for one in found.get(field, ())]
            assert [p["address"] for p in people] == [a.addr_spec for a in wanted]
            assert [p.get("name", "") for p in people] == [a.display_name for a in wanted]
        headers = {h["name"]: h["value"] for h in found["internetMessageHeaders"]}
        for name, value in parsed.items():
            assert not name.lower().startswith("x-") or headers[name] == value
        assert found.get("importance") == parsed["importance"]
    assert len(post.simulator.ledger()) == 30


def test_an_inline_image_keeps_its_content_id_and_a_file_its_name(post: Post) -> None:
    """The HTML's cid: finds the image; a name with umlauts stays."""
    mail = with_file(rich("<p>x</p>"), b"%PDF", "application/pdf", "Rechnung für Ä.pdf")
    receipt = post.client.send_message(mail)
    post.ingest()
    post.deliver()
    [found] = post.mails(receipt.batch_id)
    assert attached(found) == [
        ("logo.png", "image/png", PNG, "logo@contoso"),
        ("Rechnung für Ä.pdf", "application/pdf", b"%PDF", None),
    ]


def test_the_same_mail_again_adds_nothing(post: Post) -> None:
    """Message-ID is the key; without one, every call is another mail."""
    mail = letter(Message_ID="<17@contoso.com>")
    first, again = post.client.send_message(mail), post.client.send_message(mail)
    assert (first.accepted, again.accepted, again.duplicates) == (1, 0, 1)
    assert again.batch_id == first.batch_id
    assert (
        post.client.send_message(letter()).batch_id != post.client.send_message(letter()).batch_id
    )


def test_the_envelope_decides_who_is_written_to() -> None:
    """Who stands in the head alone is not; who stands in the envelope alone is a blind copy."""
    mail = letter(Cc="bob@example.org, carol@example.org")
    found = mime.message_of(mail, recipients=["ADA@example.org", "bob@example.org", "x@y.org"])
    assert (found.to, found.cc, found.bcc) == (
        [("", "ada@example.org")], [("", "bob@example.org")], [("", "x@y.org")]
    )  # fmt: skip


def test_from_is_the_mailbox_or_whom_it_sends_as() -> None:
    """Another address than the mailbox's, or a name, is said to Graph."""
    assert mime.message_of(letter(), mailbox=SENDER).from_ is None
    assert mime.message_of(letter(), mailbox="other@contoso.com").from_ == ("", SENDER)
    named = letter(text="x")
    named.replace_header("From", f"News <{SENDER}>")
    assert mime.message_of(named, mailbox=SENDER).from_ == ("News", SENDER)


@pytest.mark.parametrize("kind", ["multipart/signed", "application/pkcs7-mime"])
def test_a_sealed_mail_is_refused(kind: str) -> None:
    """A signature would not survive; it is better to say so than to send it broken."""
    mail = letter()
    mail.replace_header("Content-Type", kind)
    with pytest.raises(InvalidMessages, match="MIME_SEALED"):
        mime.message_of(mail)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\n\n", b"garbage", b"Subject: =?utf-8?q?=ff?=\n\nx", b"Subject: \xff\xfe\n\n\xff",
        b"Content-Type: text/plain; charset=klingon\n\nx", b"Content-Type: multipart/mixed\n\nx",
        b"Content-Type: multipart/mixed; boundary=a\n\n--a\n\n--a", b"To: @@@,<>,\n\nx",
        b"Content-Transfer-Encoding: base64\n\n%%%", b"Content-Type: message/rfc822\n\nSubject: x",
        b'Content-Disposition: attachment; filename="../../etc/passwd"\n\nx',
        b"X-A: 1\r\n\tfolded\r\n\r\nx", b"Content-ID: <>\nContent-Type: image/png\n\nx",
    ],
)  # fmt: skip
def test_a_broken_mail_becomes_a_message_or_a_problem(raw: bytes) -> None:
    """Whatever comes over the wire: a Message for the door to judge, never a traceback."""
    found = mime.message_of(mime.parse(raw), recipients=["ada@example.org"])
    assert isinstance(found, Message)
    assert all(isinstance(a, Attachment) and "/" not in a.name for a in found.attachments)
    assert found.subject
