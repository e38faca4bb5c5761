"""Drafts and upload sessions: how a message too large for one request comes into a mailbox.

https://learn.microsoft.com/graph/outlook-large-attachments
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from worker.graph.payload import MARKER_PROPERTY, as_json, attachment_item
from worker.graph.wire import Reply, Wire

#: The id that is given then still names the message when it moves to Sent Items.
#: https://learn.microsoft.com/graph/outlook-immutable-id
_HEADERS = {"Content-Type": "application/json", "Prefer": 'IdType="ImmutableId"'}
#: A draft comes back with its body; so much of it is read.
_DRAFT_BYTES = 8 * 1024 * 1024
_PAGE_BYTES = 256 * 1024
_NUMBER = re.compile(r"\d{1,12}")

Url = Callable[[str, str], str]


class Drafts:
    """Requests about drafts, each sent at most once. None of them but `send` sends a mail.

    Every call takes the bearer token and the deadline of `Wire.ask`.
    """

    def __init__(self, wire: Wire, url: Url) -> None:
        self._wire = wire
        self._url = url

    async def create(self, mailbox: str, message: bytes, token: str, deadline: float) -> Reply:
        """201 with the draft (see `text_of`). https://learn.microsoft.com/graph/api/user-post-messages"""
        return await self._wire.ask(
            "POST", self._url(mailbox, "messages"), body=message, token=token, deadline=deadline,
            headers=_HEADERS, wants=_DRAFT_BYTES,
        )  # fmt: skip

    async def find(self, mailbox: str, message_id: str, token: str, deadline: float) -> Reply:
        """200 with the mails that carry the marker (see `values`). Needs a permission to read."""
        marked = f"ep/id eq '{MARKER_PROPERTY}' and ep/value eq '{message_id}'"
        wanted = quote(f"singleValueExtendedProperties/any(ep: {marked})", safe="()/:'")
        return await self._get(mailbox, f"messages?$filter={wanted}&$select=id,isDraft", token,
                               deadline)  # fmt: skip

    async def look(self, mailbox: str, draft_id: str, token: str, deadline: float) -> Reply:
        """200 with `isDraft`, or 404. https://learn.microsoft.com/graph/api/message-get"""
        return await self._get(mailbox, f"{_at(draft_id)}?$select=isDraft", token, deadline)

    async def attachments(self, mailbox: str, draft_id: str, token: str, deadline: float) -> Reply:
        """200 with the attachments that the draft holds (see `values`)."""
        path = f"{_at(draft_id)}/attachments?$select=size&$top=500"
        return await self._get(mailbox, path, token, deadline)

    async def attach(
        self, mailbox: str, draft_id: str, attachment: Mapping[str, Any], token: str,
        deadline: float,
    ) -> Reply:  # fmt: skip
        """201. `attachment`: a `file_attachment` of up to 3 MB."""
        return await self._post(
            mailbox, f"{_at(draft_id)}/attachments", as_json(attachment), token, deadline
        )

    async def open_session(
        self, mailbox: str, draft_id: str, reference: Mapping[str, Any], token: str,
        deadline: float,
    ) -> Reply:  # fmt: skip
        """201 with `uploadUrl`. https://learn.microsoft.com/graph/api/attachment-createuploadsession"""
        body = as_json({"AttachmentItem": attachment_item(reference)})
        path = f"{_at(draft_id)}/attachments/createUploadSession"
        return await self._post(mailbox, path, body, token, deadline)

    async def upload(
        self, url: str, content: bytes, start: int, total: int, deadline: float
    ) -> Reply:
        """One range: 200 with what is expected next (see `next_start`), 201 after the last.

        The address is authenticated by itself: the token must not go there.
        """
        span = f"bytes {start}-{start + len(content) - 1}/{total}"
        headers = {"Content-Type": "application/octet-stream", "Content-Range": span}
        return await self._wire.ask(
            "PUT", url, body=content, deadline=deadline, headers=headers,
            wants=_PAGE_BYTES,
        )  # fmt: skip

    async def upload_status(self, url: str, deadline: float) -> Reply:
        """200 with what is expected next, 404 where the session is over."""
        return await self._wire.ask("GET", url, body=b"", deadline=deadline, wants=_PAGE_BYTES)

    async def send(self, mailbox: str, draft_id: str, token: str, deadline: float) -> Reply:
        """202. The one call that sends. https://learn.microsoft.com/graph/api/message-send"""
        return await self._post(mailbox, f"{_at(draft_id)}/send", b"", token, deadline)

    async def delete(self, mailbox: str, draft_id: str, token: str, deadline: float) -> Reply:
        """204. https://learn.microsoft.com/graph/api/message-delete"""
        return await self._wire.ask(
            "DELETE", self._url(mailbox, _at(draft_id)), body=b"", token=token,
            deadline=deadline, headers=_HEADERS,
        )  # fmt: skip

    async def _get(self, mailbox: str, path: str, token: str, deadline: float) -> Reply:
        return await self._wire.ask(
            "GET", self._url(mailbox, path), body=b"", token=token, deadline=deadline,
            headers=_HEADERS, wants=_PAGE_BYTES,
        )  # fmt: skip

    async def _post(
        self, mailbox: str, path: str, body: bytes, token: str, deadline: float
    ) -> Reply:
        return await self._wire.ask(
            "POST", self._url(mailbox, path), body=body, token=token, deadline=deadline,
            headers=_HEADERS, wants=_PAGE_BYTES,
        )  # fmt: skip


def _at(draft_id: str) -> str:
    return f"messages/{quote(draft_id, safe='')}"


def document(reply: Reply) -> Mapping[str, Any]:
    """The JSON object of a good answer; empty where it is none."""
    try:
        found = json.loads(reply.content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def text_of(reply: Reply, name: str) -> str | None:
    """A text in a good answer, as `id` or `uploadUrl`: what can stand in an address."""
    value = document(reply).get(name)
    if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
        return None
    return value


def values(reply: Reply) -> list[Mapping[str, Any]] | None:
    """The objects of a collection; None where the answer is no collection, or not all of it."""
    page = document(reply)
    found = page.get("value")
    if not isinstance(found, list) or page.get("@odata.nextLink"):
        return None
    return [one for one in found if isinstance(one, dict)]


def next_start(reply: Reply) -> int | None:
    """The first byte that an upload session expects next: "3276800", "0-" and "5-9" occur."""
    ranges = document(reply).get("nextExpectedRanges")
    first = ranges[0] if isinstance(ranges, list) and ranges else None
    number = _NUMBER.match(first) if isinstance(first, str) else None
    return int(number[0]) if number else None


def safe_url(url: str) -> bool:
    """Whether contents may be sent to this address."""
    try:
        return urlsplit(url).scheme == "https"
    except ValueError:
        return False
