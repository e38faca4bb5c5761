"""Upload sessions: ranges in order, at an address that is authenticated by itself.

https://learn.microsoft.com/graph/outlook-large-attachments
"""

from __future__ import annotations

import base64
import re
import time
import uuid
from typing import Any

from aiohttp import web

from worker.simulator.admission import check_limits
from worker.simulator.answers import GraphError
from worker.simulator.breakage import reset
from worker.simulator.drafts import act, instant
from worker.simulator.exchange import Exchange
from worker.simulator.state import State, Upload

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


async def upload(request: web.BaseRequest, state: State, path: list[str]) -> web.StreamResponse:
    """Answer a request to an upload session: AttachmentSessions/{id}."""
    session = path[-1] if len(path) == 2 else ""
    found = state.uploads.get(session)
    if found is None:
        return web.json_response({"error": {"code": "ErrorItemNotFound"}}, status=404)
    exchange = Exchange(request, state, found.mailbox, "upload")
    state.limits.arrive(found.mailbox)
    try:
        return await _answer(exchange, found, session)
    except GraphError as error:
        return exchange.error(error)
    finally:
        state.limits.leave(found.mailbox)


async def _answer(exchange: Exchange, found: Upload, session: str) -> web.StreamResponse:
    body = await exchange.request.content.read()
    check_limits(exchange, len(body))
    _check_session(exchange, found, session)

    def forget() -> tuple[int, Any, dict[str, str]]:
        exchange.state.uploads.pop(session, None)
        return 204, None, {}

    match exchange.request.method:
        case "PUT":
            return await _put(exchange, found, session, body)
        case "GET":
            return await act(exchange, lambda: (200, _status(found), {}))
        case "DELETE":
            return await act(exchange, forget)
        case method:
            raise GraphError(405, "BadRequest", f"{method} is not allowed here.")


def _check_session(exchange: Exchange, found: Upload, session: str) -> None:
    if "Authorization" in exchange.request.headers:
        text = "The address is authenticated by itself; an Authorization header is not allowed."
        raise GraphError(401, "InvalidAuthenticationToken", text)
    if time.time() >= found.ends:
        exchange.state.uploads.pop(session, None)
        raise GraphError(404, "ErrorItemNotFound", "The upload session has expired.")


async def _put(exchange: Exchange, found: Upload, session: str, body: bytes) -> web.StreamResponse:
    begin, end, total = _range(exchange.request.headers.get("Content-Range", ""))
    if total != found.item["size"] or end - begin + 1 != len(body) or end >= total:
        raise GraphError(400, "InvalidContentRange", "Content-Range does not fit the content.")
    if begin != len(found.received):
        text = f"The next expected range begins at {len(found.received)}."
        raise GraphError(416, "InvalidRange", text)
    state = exchange.state
    if cut := state.faults.strike("range", "upload", exchange.mailbox):
        exchange.log["fault"] = cut.kind
        found.received += body[: len(body) // 2]
        return reset(exchange.request)

    def effect() -> tuple[int, Any, dict[str, str]]:
        found.received += body
        if len(found.received) < total:
            return 200, _status(found) | {"nextExpectedRanges": [str(len(found.received))]}, {}
        state.uploads.pop(session, None)
        return 201, None, {"Location": _attach(exchange, found)}

    return await act(exchange, effect)


def _range(text: str) -> tuple[int, int, int]:
    if not (match := _RANGE.match(text)):
        raise GraphError(400, "InvalidContentRange", f"{text[:60]!r} is no content range.")
    return int(match[1]), int(match[2]), int(match[3])


def _status(found: Upload) -> dict[str, Any]:
    ranges = [f"{len(found.received)}-"]
    return {"expirationDateTime": instant(found.ends), "nextExpectedRanges": ranges}


def _attach(exchange: Exchange, found: Upload) -> str:
    item = found.item
    attachment = {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "id": f"AAMkATT{uuid.uuid4().hex}=",
        "name": item["name"],
        "contentType": item.get("contentType") or "application/octet-stream",
        "contentId": item.get("contentId"),
        "isInline": bool(item.get("isInline")),
        "size": item["size"],
        "contentBytes": base64.b64encode(found.received).decode(),
    }
    found.mail.content.setdefault("attachments", []).append(attachment)
    base = f"{exchange.state.base}/v1.0/users/{found.mailbox}/messages/{found.mail.row['id']}"
    return f"{base}/attachments/{attachment['id']}"
