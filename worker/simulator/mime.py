"""sendMail's other form: the whole mail as MIME in base64.

https://learn.microsoft.com/graph/outlook-send-mime-message
"""

from __future__ import annotations

import base64
import binascii
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import getaddresses
from typing import Any

from worker.simulator.answers import GraphError
from worker.simulator.validation import check_draft, check_recipients

_PEOPLE = {
    "toRecipients": "to",
    "ccRecipients": "cc",
    "bccRecipients": "bcc",
    "replyTo": "reply-to",
}


def read_mime(body: bytes) -> dict[str, Any]:
    """The message in Graph's shape.

    Raises:
        GraphError: 400, not base64 or without recipients.
    """
    message = read_mime_draft(body)
    check_recipients(message)
    return message


def read_mime_draft(body: bytes) -> dict[str, Any]:
    """As `read_mime`, but without recipients it is a draft all the same."""
    try:
        raw = base64.b64decode(b"".join(body.split()), validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if not raw:
        raise GraphError(
            400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content."
        )
    parsed = message_from_bytes(raw, _class=EmailMessage, policy=policy.default)
    part = parsed.get_body(("html", "plain"))
    message: dict[str, Any] = {
        "subject": str(parsed["subject"] or ""),
        "body": {
            "contentType": "html" if part and part.get_content_subtype() == "html" else "text",
            "content": part.get_content() if part else "",
        },
    }
    for field, name in _PEOPLE.items():
        message[field] = _people(parsed, name)
    if attachments := [_attachment(p) for p in parsed.walk() if _is_attached(p, parsed)]:
        message["attachments"] = attachments
    if sender := _people(parsed, "from"):
        message["from"] = sender[0]
    check_draft(message)
    # Any number of x- headers may stand in MIME: added after the check of the JSON form's rule.
    if headers := [
        {"name": name, "value": str(value)}
        for name, value in parsed.items()
        if name.lower().startswith("x-")
    ]:
        message["internetMessageHeaders"] = headers
    return message


def _is_attached(part: Any, whole: EmailMessage) -> bool:
    """Neither a container nor one of the bodies."""
    bodies = (whole.get_body(("html",)), whole.get_body(("plain",)))
    return not part.is_multipart() and not any(part is body for body in bodies)


def _attachment(part: Any) -> dict[str, Any]:
    content = part.get_payload(decode=True) or b""
    found = {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": part.get_filename() or "attachment",
        "contentType": part.get_content_type(),
        "contentBytes": base64.b64encode(content).decode(),
        "isInline": part.get_content_disposition() == "inline",
    }
    content_id = str(part["content-id"] or "").strip("<> ")
    return found | ({"contentId": content_id} if content_id else {})


def _people(parsed: EmailMessage, header: str) -> list[dict[str, Any]]:
    values = [str(value) for value in parsed.get_all(header, [])]
    return [
        {"emailAddress": {"address": address, "name": name}}
        for name, address in getaddresses(values)
        if address
    ]
