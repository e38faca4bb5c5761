"""Drafts: made, given attachments, looked at, sent.

https://learn.microsoft.com/graph/api/user-post-messages
https://learn.microsoft.com/graph/api/message-send
https://learn.microsoft.com/graph/outlook-large-attachments
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from worker.simulator.admission import admit, check_from
from worker.simulator.answers import GraphError
from worker.simulator.breakage import reset
from worker.simulator.exchange import Exchange
from worker.simulator.mail import Mail
from worker.simulator.mime import read_mime_draft
from worker.simulator.misfortune import strike
from worker.simulator.state import Upload
from worker.simulator.validation import (
    check_attachment,
    check_draft,
    check_item,
    check_recipients,
    read_json,
    recipients,
)

#: Status, body and headers of a good answer; calling it makes the change.
Effect = Callable[[], tuple[int, Any, dict[str, str]]]
Handler = Callable[[Exchange, list[str]], Awaitable[web.StreamResponse]]


def handler(method: str, path: list[str]) -> tuple[str, Handler | None]:
    """What is to be done and who answers; `path` is what follows `messages`."""
    of_one = path[1:] if path else ["messages"]
    return _HANDLERS.get((method, "/".join(of_one)), ("draft", None))


async def act(
    exchange: Exchange, effect: Effect, addresses: tuple[str, ...] = ()
) -> web.StreamResponse:
    """Do it and say so, unless a fault strikes before or after."""
    state = exchange.state
    if latency := state.latency():
        await asyncio.sleep(latency)
    chance = state.misfortune(accepts=True)
    ordered = state.faults.strike("graph", exchange.operation, exchange.mailbox, addresses)
    if fault := state.befalls("graph", ordered, chance):
        return await strike(fault, exchange, lambda: _quietly(effect))
    status, body, headers = effect()
    if body is None:
        return exchange.answer(status, headers)
    return exchange.json(status, body, headers)


def _quietly(effect: Effect) -> None:
    effect()


async def _read(exchange: Exchange) -> bytes:
    body = await exchange.request.content.read()
    admit(exchange, len(body))
    return body


async def _create(exchange: Exchange, _path: list[str]) -> web.StreamResponse:
    if exchange.state.faults.strike("unread", "draft", exchange.mailbox):
        return reset(exchange.request)
    body = await _read(exchange)
    if exchange.request.content_type == "text/plain":
        message = read_mime_draft(body)
    else:
        message = read_json(body)
        check_draft(message)
    check_from(exchange.mailbox, message, exchange.state.settings)
    prefer = exchange.request.headers.get("Prefer", "")
    immutable = 'idtype="immutableid"' in prefer.lower().replace(" ", "")
    for one in message.get("attachments") or ():
        _complete(one)

    def effect() -> tuple[int, Any, dict[str, str]]:
        mail = exchange.state.draft(exchange.mailbox, message, exchange.ids, immutable=immutable)
        return 201, _resource(mail), {}

    addresses = tuple(a.lower() for a in recipients(message))
    return await act(exchange, effect, addresses)


async def _send(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    await _read(exchange)
    state = exchange.state
    mail = _draft_of(exchange, path)
    check_recipients(mail.content)

    def effect() -> tuple[int, Any, dict[str, str]]:
        if _is_draft(mail):
            state.release(exchange.mailbox, mail, exchange.ids)
        return 202, None, {}

    return await act(exchange, effect, tuple(a.lower() for a in recipients(mail.content)))


async def _get(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    await _read(exchange)
    mail = exchange.state.mailboxes.find(exchange.mailbox, path[3])
    found = _selected(_resource(mail), exchange)
    return await act(exchange, lambda: (200, found, {}))


async def _delete(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    await _read(exchange)
    mailboxes = exchange.state.mailboxes
    mail = mailboxes.find(exchange.mailbox, path[3])

    def effect() -> tuple[int, Any, dict[str, str]]:
        mailboxes.delete(exchange.mailbox, mail)
        return 204, None, {}

    return await act(exchange, effect)


async def _list(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    await _read(exchange)
    mail = exchange.state.mailboxes.find(exchange.mailbox, path[3])
    found = [_selected(one, exchange) for one in mail.content.get("attachments") or ()]
    return await act(exchange, lambda: (200, {"value": found}, {}))


async def _attach(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    attachment = read_json(await _read(exchange))
    mail = _draft_of(exchange, path)
    check_attachment(attachment)
    _complete(attachment)
    _check_size(exchange, mail, attachment["size"])

    def effect() -> tuple[int, Any, dict[str, str]]:
        mail.content.setdefault("attachments", []).append(attachment)
        return 201, attachment, {}

    return await act(exchange, effect)


async def _open_session(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    item = check_item(read_json(await _read(exchange)))
    mail = _draft_of(exchange, path)
    _check_size(exchange, mail, item["size"])
    state = exchange.state

    def effect() -> tuple[int, Any, dict[str, str]]:
        session = secrets.token_urlsafe(16)
        ends = time.time() + state.settings.upload_lifetime
        state.uploads[session] = Upload(exchange.mailbox, mail, item, ends)
        # The address itself is the leave to write: https://learn.microsoft.com/graph/outlook-large-attachments
        url = f"{state.base}/outlook/AttachmentSessions/{session}?authtoken={secrets.token_hex(8)}"
        return 201, {
            "@odata.context": f"{state.base}/v1.0/$metadata#microsoft.graph.uploadSession",
            "uploadUrl": url,
            "expirationDateTime": instant(ends),
            "nextExpectedRanges": ["0-"],
        }, {}  # fmt: skip

    return await act(exchange, effect)


def instant(seconds: float) -> str:
    """A time as Graph writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _is_draft(mail: Mail) -> bool:
    return mail.sent_at == float("inf")


def _draft_of(exchange: Exchange, path: list[str]) -> Mail:
    mail = exchange.state.mailboxes.find(exchange.mailbox, path[3])
    if not _is_draft(mail):
        # Not documented; expected, because no draft of that id is there any more.
        text = "The specified object was not found in the store."
        raise GraphError(404, "ErrorItemNotFound", text)
    return mail


def _check_size(exchange: Exchange, mail: Mail, size: int) -> None:
    there = sum(one["size"] for one in mail.content.get("attachments") or ())
    if there + size > exchange.state.settings.message_limit:
        text = "The message exceeds the maximum supported size."
        raise GraphError(413, "ErrorMessageSizeExceeded", text)


def _complete(attachment: dict[str, Any]) -> None:
    """What the service adds to an attachment."""
    attachment["id"] = f"AAMkATT{uuid.uuid4().hex}="
    attachment["size"] = len(base64.b64decode(attachment.get("contentBytes") or ""))


def _resource(mail: Mail) -> dict[str, Any]:
    found = mail.resource(time.time())
    found["hasAttachments"] = bool(found.pop("attachments", None))
    return found


def _selected(resource: dict[str, Any], exchange: Exchange) -> dict[str, Any]:
    names = [n.strip() for n in exchange.request.query.get("$select", "").split(",") if n.strip()]
    if not names:
        return resource
    return {name: value for name, value in resource.items() if name in {*names, "id"}}


#: What follows the message's id; `messages` where there is none.
_HANDLERS: dict[tuple[str, str], tuple[str, Handler]] = {
    ("POST", "messages"): ("draft", _create),
    ("POST", "send"): ("send", _send),
    ("GET", ""): ("read", _get),
    ("DELETE", ""): ("draft", _delete),
    ("GET", "attachments"): ("read", _list),
    ("POST", "attachments"): ("draft", _attach),
    ("POST", "attachments/createUploadSession"): ("draft", _open_session),
}
