"""From a MIME mail to a message: its bodies, inline images and attachments as they were.

Graph takes one body, up to four headers of one's own and a few well-known ones; what else stands
in a mail's head (In-Reply-To, Auto-Submitted and the like) has no place there and is left out.
https://learn.microsoft.com/graph/api/resources/message
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import mimetypes
from collections.abc import Iterable, Iterator
from email.message import EmailMessage
from email.message import Message as AnyMail
from email.utils import getaddresses
from typing import Any

from worker.model import MARKER_HEADER, Attachment, InvalidMessages, Message, Problem

#: Kept by mail programs for themselves, or said by other fields of a message.
_NOISE = frozenset({
    "x-mailer", "x-mimeole", "x-msmail-priority", "x-priority", "x-originating-ip",
    "x-unsent", "x-sender", "x-receiver",
})  # fmt: skip
_NOT_OURS = ("x-ms-", "x-microsoft-", MARKER_HEADER)
_SEALED = frozenset({
    "multipart/signed", "multipart/encrypted", "application/pkcs7-mime", "application/x-pkcs7-mime",
})  # fmt: skip
_IMPORTANCE = {"high": "high", "low": "low", "urgent": "high", "non-urgent": "low",
               "1": "high", "2": "high", "4": "low", "5": "low"}  # fmt: skip
_LONGEST_KEY = 200
_NO_SUBJECT = "(no subject)"


def parse(content: bytes) -> EmailMessage:
    """A mail as it came over a wire."""
    found: EmailMessage = email.message_from_bytes(content, policy=email.policy.default)
    return found


def message_of(
    mail: AnyMail, *, mailbox: str | None = None, recipients: Iterable[str] | None = None
) -> Message:
    """The message that says what the mail says. Raises InvalidMessages.

    `mailbox`: the one that sends; where the mail's From is another, it becomes `from_`.
    `recipients`: the envelope's, who alone are written to; those that the head does not name are
    blind copies.
    """
    if not isinstance(mail, EmailMessage):
        mail = parse(mail.as_bytes())
    _refuse_sealed(mail)
    html, text = _body(mail, "html"), _body(mail, "plain")
    people = {name: _people(mail, name) for name in ("to", "cc", "bcc")}
    if recipients is not None:
        _keep_to_envelope(people, list(recipients))
    return Message(
        to=people["to"], cc=people["cc"], bcc=people["bcc"], reply_to=_people(mail, "reply-to"),
        from_=_from(mail, mailbox), subject=_plain(mail["subject"] or "") or _NO_SUBJECT,
        html=html, text=text if text or html else "\n",
        attachments=list(_attachments(mail, html or "")), headers=_headers(mail),
        list_unsubscribe=_plain(mail["list-unsubscribe"] or "") or None,
        importance=_importance(mail),
    )  # fmt: skip


def sender_of(mail: AnyMail) -> str | None:
    """The address of From; None where there is none."""
    return next((address for _, address in getaddresses([str(mail["from"] or "")])), None) or None


def key_of(mail: AnyMail, *more: str) -> str | None:
    """An idempotency key of the Message-ID and of what else makes it the same mail."""
    given = _plain(mail["message-id"] or "").strip()
    if not given:
        return None
    if not more and len(given) <= _LONGEST_KEY and given.isprintable() and given.startswith("<"):
        return given
    digest = hashlib.sha256("\n".join((given, *more)).encode("utf-8", "replace"))
    return f"message-id:{digest.hexdigest()}"


# ---- the head -----------------------------------------------------------------------------------


def _people(mail: AnyMail, header: str) -> list[tuple[str, str]]:
    values = [_plain(value) for value in mail.get_all(header, [])]
    return [(_plain(name), address) for name, address in getaddresses(values) if address]


def _keep_to_envelope(people: dict[str, list[tuple[str, str]]], envelope: list[str]) -> None:
    wanted = {address.lower(): address for address in envelope}
    for name, known in people.items():
        people[name] = [(n, a) for n, a in known if wanted.pop(a.lower(), None) is not None]
    people["bcc"] += [("", address) for address in wanted.values()]


def _from(mail: AnyMail, mailbox: str | None) -> tuple[str, str] | None:
    people = _people(mail, "from")
    if not people:
        return None
    name, address = people[0]
    return (name, address) if name or address.lower() != (mailbox or address).lower() else None


def _headers(mail: AnyMail) -> dict[str, str]:
    found = {}
    for name, value in mail.items():
        lower = name.lower()
        if lower.startswith("x-") and lower not in _NOISE and not lower.startswith(_NOT_OURS):
            found[name] = " ".join(_plain(value).split())
    return found


def _importance(mail: AnyMail) -> str | None:
    for header in ("importance", "x-priority", "priority"):
        word = _plain(mail[header] or "").strip().lower().partition(" ")[0]
        if word in _IMPORTANCE:
            return _IMPORTANCE[word]
    return None


def _plain(value: Any) -> str:
    """A header's text; bytes that nobody said the encoding of are taken for UTF-8."""
    return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---- the parts ----------------------------------------------------------------------------------


def _refuse_sealed(mail: AnyMail) -> None:
    sealed = next((p.get_content_type() for p in mail.walk() if p.get_content_type() in _SEALED),
                  None)  # fmt: skip
    if sealed:
        detail = f"{sealed}: Graph would break the seal of a signed or encrypted mail"
        raise InvalidMessages([Problem(1, "MIME_SEALED", "message", detail)])


def _body(mail: EmailMessage, kind: str) -> str | None:
    part: Any = mail.get_body((kind,))
    if part is None:
        return None
    try:
        found = part.get_content()
    except (LookupError, ValueError):  # an encoding that Python does not know
        found = part.get_payload(decode=True).decode("utf-8", "replace")
    text = str(found).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text.replace("\r\n", "\n")


def _attachments(mail: EmailMessage, html: str) -> Iterator[Attachment]:
    bodies = [mail.get_body((kind,)) for kind in ("html", "plain")]
    seen: set[str] = set()
    for number, part in enumerate(_leaves(mail, bodies), start=1):
        content_id = _plain(part["content-id"] or "").strip().strip("<>")
        inline = part.get_content_disposition() == "inline" or f"cid:{content_id}" in html
        here = content_id if content_id and inline and content_id not in seen else None
        seen.add(content_id)
        yield Attachment(
            _name(part, number), _content(part), part.get_content_type(), content_id=here
        )


def _leaves(part: Any, bodies: list[Any]) -> Iterator[Any]:
    """What is neither a container nor a body; a mail inside the mail is one piece."""
    if any(part is body for body in bodies):
        return
    if part.get_content_maintype() != "multipart" or not part.is_multipart():
        yield part
        return
    for inner in part.get_payload():
        yield from _leaves(inner, bodies)


def _content(part: AnyMail) -> bytes:
    if part.is_multipart():  # message/rfc822: a list of one mail
        inner: Any = part.get_payload(0)
        return bytes(inner.as_bytes())
    content: Any = part.get_payload(decode=True)
    return bytes(content or b"")


def _name(part: AnyMail, number: int) -> str:
    given = " ".join(_plain(part.get_filename() or "").split())
    clean = "".join("_" if c in "/\\" or not c.isprintable() else c for c in given)
    if clean.strip(". "):
        return clean
    kind = part.get_content_type()
    suffix = ".eml" if kind == "message/rfc822" else mimetypes.guess_extension(kind) or ".bin"
    return f"attachment-{number}{suffix}"
