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
from worker.simulator.validation import check_message


def read_mime(body: bytes) -> dict[str, Any]:
    """The message in Graph's shape.

    Raises:
        GraphError: 400, not base64 or without recipients.
    """
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
    for field, name in (("toRecipients", "to"), ("ccRecipients", "cc"), ("bccRecipients", "bcc")):
        message[field] = _people(parsed, name)
    if sender := _people(parsed, "from"):
        message["from"] = sender[0]
    check_message(message)
    # Any number of x- headers may stand in MIME: added after the check of the JSON form's rule.
    if headers := [
        {"name": name, "value": str(value)}
        for name, value in parsed.items()
        if name.lower().startswith("x-")
    ]:
        message["internetMessageHeaders"] = headers
    return message


def _people(parsed: EmailMessage, header: str) -> list[dict[str, Any]]:
    values = [str(value) for value in parsed.get_all(header, [])]
    return [
        {"emailAddress": {"address": address, "name": name}}
        for name, address in getaddresses(values)
        if address
    ]
