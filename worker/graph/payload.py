"""The JSON of sendMail, made of a message's content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from worker.model import MARKER_HEADER, MARKER_NAME

#: The extended property by which a sent message is found again. Never change its GUID.
MARKER_PROPERTY = f"String {{d5b1f3f0-5c0e-4a53-9a0f-7d1c6c2e8b4a}} Name {MARKER_NAME}"
#: PidTagListUnsubscribe: Graph refuses this header among internetMessageHeaders.
#: https://learn.microsoft.com/office/client-developer/outlook/mapi/pidtaglistunsubscribe-canonical-property
_LIST_UNSUBSCRIBE = "String 0x1045"


def payload(
    content: Mapping[str, Any], *, message_id: str, subject: str, html: str | None, text: str | None
) -> bytes:
    """The JSON of sendMail for one message, with its marker.

    `content`: `to`, `cc`, `bcc`, `reply_to` (lists of {"address", "name"?}), `from` (one of
    these), `importance`, `headers` (name to value; the marker makes one more of Graph's five),
    `list_unsubscribe`, `save_to_sent_items` (default true). Graph takes one body: HTML wins.
    https://learn.microsoft.com/graph/api/user-sendmail
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
    document = {
        "message": {k: v for k, v in message.items() if v is not None and v != []},
        "saveToSentItems": bool(content.get("save_to_sent_items", True)),
    }
    # A lone surrogate has no UTF-8; a question mark must not stop a lane.
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _recipients(of: Sequence[Mapping[str, str]] | None) -> list[dict[str, Any]]:
    return [_recipient(one) for one in of or ()]


def _recipient(one: Mapping[str, str]) -> dict[str, Any]:
    address = {"address": one["address"]}
    if one.get("name"):
        address["name"] = one["name"]
    return {"emailAddress": address}
