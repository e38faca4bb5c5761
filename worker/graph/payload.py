"""The JSON of requests to Graph, made of a message's content."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker.model import MARKER_HEADER, MARKER_NAME

#: The extended property by which a sent message is found again. Never change its GUID.
MARKER_PROPERTY = f"String {{d5b1f3f0-5c0e-4a53-9a0f-7d1c6c2e8b4a}} Name {MARKER_NAME}"
#: PidTagListUnsubscribe: Graph refuses this header among internetMessageHeaders.
#: https://learn.microsoft.com/office/client-developer/outlook/mapi/pidtaglistunsubscribe-canonical-property
_LIST_UNSUBSCRIBE = "String 0x1045"

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def payload(
    content: Mapping[str, Any], *, message_id: str, subject: str, html: str | None,
    text: str | None, attachments: Sequence[Mapping[str, Any]] = (),
) -> bytes:  # fmt: skip
    """The JSON of sendMail for one message; see `message_of`. `attachments`: `file_attachment`s.

    https://learn.microsoft.com/graph/api/user-sendmail
    """
    message = message_of(content, message_id=message_id, subject=subject, html=html, text=text)
    if attachments:
        message["attachments"] = list(attachments)
    save = bool(content.get("save_to_sent_items", True))
    return as_json({"message": message, "saveToSentItems": save})


def file_attachment(reference: Mapping[str, Any], content: bytes) -> dict[str, Any]:
    """An attachment of up to 3 MB with its content. `reference`: name, type, content_id.

    https://learn.microsoft.com/graph/api/resources/fileattachment
    """
    found = {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": reference["name"],
        "contentType": reference["type"],
        "contentBytes": base64.b64encode(content).decode("ascii"),
    }
    return found | _inline(reference)


def attachment_item(reference: Mapping[str, Any]) -> dict[str, Any]:
    """What an upload session is told of its attachment.

    https://learn.microsoft.com/graph/api/resources/attachmentitem
    """
    found = {
        "attachmentType": "file",
        "name": reference["name"],
        "contentType": reference["type"],
        "size": reference["size"],
    }
    return found | _inline(reference)


def _inline(reference: Mapping[str, Any]) -> dict[str, Any]:
    if "content_id" not in reference:
        return {}
    return {"contentId": reference["content_id"], "isInline": True}


def as_json(document: Mapping[str, Any]) -> bytes:
    """Compact JSON. A lone surrogate has no UTF-8; a question mark must not stop a lane."""
    return _COMPACT.encode(document).encode(errors="replace")


def message_of(
    content: Mapping[str, Any], *, message_id: str, subject: str, html: str | None, text: str | None
) -> dict[str, Any]:
    """Graph's message resource for one message, with its marker and without attachments.

    `content`: `to`, `cc`, `bcc`, `reply_to` (lists of {"address", "name"?}), `from` (one of
    these), `importance`, `headers` (name to value; the marker makes one more of Graph's five),
    `list_unsubscribe`. Graph takes one body: HTML wins, and Exchange makes the text part of it.
    https://learn.microsoft.com/graph/api/resources/message
    """
    body = ("html", html) if html is not None else ("text", text or "")
    properties = [{"id": MARKER_PROPERTY, "value": message_id}]
    if content.get("list_unsubscribe"):
        properties.append({"id": _LIST_UNSUBSCRIBE, "value": content["list_unsubscribe"]})
    headers = {**(content.get("headers") or {}), MARKER_HEADER: message_id}
    sender = content.get("from")
    message = {
        "subject": subject,
        "body": {"contentType": body[0], "content": body[1]},
        "toRecipients": _recipients(content.get("to")),
        "ccRecipients": _recipients(content.get("cc")),
        "bccRecipients": _recipients(content.get("bcc")),
        "replyTo": _recipients(content.get("reply_to")),
        "from": _recipient(sender) if sender else None,
        "importance": content.get("importance"),
        "internetMessageHeaders": [{"name": n, "value": v} for n, v in headers.items()],
        "singleValueExtendedProperties": properties,
    }
    # Graph refuses some empty arrays (https://github.com/microsoftgraph/msgraph-sdk-dotnet/issues/2208).
    return {k: v for k, v in message.items() if v is not None and v != []}


def _recipients(of: Sequence[Mapping[str, str]] | None) -> list[dict[str, Any]]:
    return [_recipient(one) for one in of or ()]


def _recipient(one: Mapping[str, str]) -> dict[str, Any]:
    address = {"address": one["address"]}
    if one.get("name"):
        address["name"] = one["name"]
    return {"emailAddress": address}
