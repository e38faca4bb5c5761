"""Graph's mail endpoints: sendMail and the search of a mailbox.

https://learn.microsoft.com/graph/api/user-sendmail
https://learn.microsoft.com/graph/api/user-list-messages
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from worker.simulator.answers import (
    ACCESS_DENIED,
    AUTHENTICATE,
    OUT_OF_SCOPE,
    GraphError,
    throttled,
)
from worker.simulator.breakage import reset
from worker.simulator.exchange import Exchange
from worker.simulator.faults import Fault
from worker.simulator.mime import read_mime
from worker.simulator.misfortune import strike
from worker.simulator.settings import Settings
from worker.simulator.state import State
from worker.simulator.validation import LARGEST_BODY, read_send, recipients

Handler = Callable[[Exchange, list[str]], Awaitable[web.StreamResponse]]


async def graph(request: web.BaseRequest, state: State, path: list[str]) -> web.StreamResponse:
    """Answer /users/{mailbox}/...; path is what follows the version."""
    handler = _handler(request.method, path)
    if handler is None:
        return web.json_response(
            {"error": {"code": "BadRequest", "message": "Resource not found for the segment."}},
            status=404 if path[:1] == ["users"] else 400,
        )
    mailbox = path[1].lower()
    exchange = Exchange(request, state, mailbox, "send" if handler is _send else "read")
    state.limits.arrive(mailbox)
    try:
        return await handler(exchange, path)
    except GraphError as error:
        return exchange.error(error)
    finally:
        state.limits.leave(mailbox)


def _handler(method: str, path: list[str]) -> Handler | None:
    match method, path:
        case "POST", ["users", _, "sendMail" | "sendmail" | "microsoft.graph.sendMail"]:
            return _send
        case "GET", ["users", _, "messages"] | ["users", _, ("mailFolders" | "mailfolders"), _, _]:
            return _search if path[-1] == "messages" else None
        case _:
            return None


async def _send(exchange: Exchange, _path: list[str]) -> web.StreamResponse:
    state = exchange.state
    chance = state.misfortune(accepts=True)
    unread = state.faults.strike("unread", "send", exchange.mailbox)
    if unread := state.befalls("unread", unread, chance):
        return _unread(exchange, unread)
    body = await exchange.request.content.read()
    _admit(exchange, len(body))
    message, save = _message(exchange, body)
    _check_from(exchange.mailbox, message, state.settings)
    addresses = tuple(address.lower() for address in recipients(message))
    if latency := state.latency():
        await asyncio.sleep(latency)

    def accept() -> None:
        state.accept(exchange.mailbox, message, save, exchange.ids)

    fault = state.faults.strike("graph", "send", exchange.mailbox, addresses)
    if fault := state.befalls("graph", fault, chance):
        return await strike(fault, exchange, accept)
    accept()
    return exchange.answer(202)


def _unread(exchange: Exchange, fault: Fault) -> web.Response:
    """A reset before anything of the request is read."""
    exchange.log["fault"] = fault.kind
    return reset(exchange.request)


async def _search(exchange: Exchange, path: list[str]) -> web.StreamResponse:
    state, query = exchange.state, exchange.request.query
    state.counts["read"] += 1
    chance = state.misfortune(accepts=False)
    if unread := state.befalls("unread", None, chance):
        return _unread(exchange, unread)
    _admit(exchange, 0)
    if not state.settings.mail_read:
        raise GraphError(403, "ErrorAccessDenied", ACCESS_DENIED)
    if latency := state.latency():
        await asyncio.sleep(latency)
    fault = state.faults.strike("graph", "read", exchange.mailbox)
    if fault := state.befalls("graph", fault, chance):
        return await strike(fault, exchange, lambda: None)
    folder = path[3] if len(path) > 3 else None
    found = state.mailboxes.search(exchange.mailbox, folder, query.get("$filter"), time.time())
    return exchange.json(200, _page(exchange, found))


def _page(exchange: Exchange, found: list[dict[str, Any]]) -> dict[str, Any]:
    request, query = exchange.request, exchange.request.query
    top = _count(query.get("$top", "10"), least=1)
    skip = _count(query.get("$skip", "0"), least=0)
    names = [name.strip() for name in query.get("$select", "").split(",") if name.strip()]
    expanded = "singleValueExtendedProperties" in query.get("$expand", "")
    page: dict[str, Any] = {
        "@odata.context": f"{exchange.state.base}/v1.0/$metadata#users/messages",
        "value": [_selected(mail, names, expanded) for mail in found[skip : skip + top]],
    }
    if len(found) > skip + top:
        following = urlencode({**query, "$skip": str(skip + top)})
        page["@odata.nextLink"] = f"{exchange.state.base}{request.path}?{following}"
    return page


def _selected(mail: dict[str, Any], names: list[str], expanded: bool) -> dict[str, Any]:
    # Extended properties come only when $expand asks for them.
    hidden = "singleValueExtendedProperties"
    wanted = {*names, "id"} if names else set(mail) - {hidden}
    if expanded:
        wanted.add(hidden)
    return {name: value for name, value in mail.items() if name in wanted}


def _count(text: str, *, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= 1000:
        raise GraphError(400, "BadRequest", f"Invalid value '{text}' for $top or $skip.")
    return int(text)


def _admit(exchange: Exchange, size: int) -> None:
    """Token, permission, mailbox, limits: in this order, as Graph asks."""
    state, settings, mailbox = exchange.state, exchange.state.settings, exchange.mailbox
    refusal = state.tokens.refusal(exchange.request.headers.get("Authorization", ""))
    if refusal:
        headers = {"WWW-Authenticate": AUTHENTICATE}
        raise GraphError(401, "InvalidAuthenticationToken", refusal, headers)
    if exchange.operation == "send" and not settings.mail_send:
        raise GraphError(403, "ErrorAccessDenied", ACCESS_DENIED)
    _check_mailbox(mailbox, settings)
    now = exchange.log["monotonic"]
    limit = state.limits.check(mailbox, size, now, settings)
    if limit:
        exchange.log["too_early"] = limit.too_early
        if settings.retry_after_form not in ("absent", "nonsense"):
            state.limits.close(mailbox, limit.seconds, time.monotonic())
        raise throttled(limit.limit, limit.seconds, settings)
    if size > LARGEST_BODY:
        raise GraphError(413, "RequestEntityTooLarge", "The request is larger than 4MB.")


def _check_mailbox(mailbox: str, settings: Settings) -> None:
    known = settings.mailboxes
    exists = mailbox in known if known else mailbox.rpartition("@")[2] in settings.domains
    if mailbox in settings.out_of_scope:
        raise GraphError(403, "ErrorAccessDenied", OUT_OF_SCOPE)
    if not exists or mailbox.startswith("@"):
        raise GraphError(404, "ErrorInvalidUser", f"The requested user '{mailbox}' is invalid.")


def _message(exchange: Exchange, body: bytes) -> tuple[dict[str, Any], bool]:
    kind = exchange.request.content_type
    if kind == "application/json":
        return read_send(body)
    if kind == "text/plain":
        return read_mime(body), True
    raise GraphError(415, "UnsupportedMediaType", f"Content-Type '{kind}' is not supported.")


def _check_from(mailbox: str, message: dict[str, Any], settings: Settings) -> None:
    for name in ("from", "sender"):
        person = (message.get(name) or {}).get("emailAddress") or {}
        address = str(person.get("address") or mailbox).lower()
        if address != mailbox and address not in settings.send_as:
            text = (
                "The user account which was used to submit this request does not have "
                "the right to send mail on behalf of the specified sending account."
            )
            raise GraphError(403, "ErrorSendAsDenied", text)
