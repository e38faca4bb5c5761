"""Graph's mail endpoints: sendMail and the search of a mailbox.

https://learn.microsoft.com/graph/api/user-sendmail
https://learn.microsoft.com/graph/api/user-list-messages
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from worker.simulator import drafts
from worker.simulator.admission import admit, check_from, read_message
from worker.simulator.answers import ACCESS_DENIED, GraphError
from worker.simulator.breakage import reset
from worker.simulator.exchange import Exchange
from worker.simulator.faults import Fault
from worker.simulator.misfortune import strike
from worker.simulator.state import State
from worker.simulator.validation import recipients

Handler = Callable[[Exchange, list[str]], Awaitable[web.StreamResponse]]


async def graph(request: web.BaseRequest, state: State, path: list[str]) -> web.StreamResponse:
    """Answer /users/{mailbox}/...; path is what follows the version."""
    operation, handler = _handler(request.method, path)
    if handler is None:
        return web.json_response(
            {"error": {"code": "BadRequest", "message": "Resource not found for the segment."}},
            status=404 if path[:1] == ["users"] else 400,
        )
    mailbox = path[1].lower()
    exchange = Exchange(request, state, mailbox, operation)
    state.limits.arrive(mailbox)
    try:
        return await handler(exchange, path)
    except GraphError as error:
        return exchange.error(error)
    finally:
        state.limits.leave(mailbox)


def _handler(method: str, path: list[str]) -> tuple[str, Handler | None]:
    """What a request is to do, for permissions and faults, and who answers it."""
    match method, path:
        case "POST", ["users", _, "sendMail" | "sendmail" | "microsoft.graph.sendMail"]:
            return "send", _send
        case "GET", ["users", _, "messages"] | ["users", _, ("mailFolders" | "mailfolders"), _, _]:
            return "read", _search if path[-1] == "messages" else None
        case _, ["users", _, "messages", *rest]:
            return drafts.handler(method, rest)
        case _:
            return "read", None


async def _send(exchange: Exchange, _path: list[str]) -> web.StreamResponse:
    state = exchange.state
    chance = state.misfortune(accepts=True)
    unread = state.faults.strike("unread", "send", exchange.mailbox)
    if unread := state.befalls("unread", unread, chance):
        return _unread(exchange, unread)
    body = await exchange.request.content.read()
    admit(exchange, len(body))
    message, save = read_message(exchange, body)
    check_from(exchange.mailbox, message, state.settings)
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
    admit(exchange, 0)
    if not state.settings.mail_read:
        raise GraphError(403, "ErrorAccessDenied", ACCESS_DENIED)
    if latency := state.latency():
        await asyncio.sleep(latency)
    fault = state.faults.strike("graph", "read", exchange.mailbox)
    if fault := state.befalls("graph", fault, chance):
        return await strike(fault, exchange, lambda: None)
    folder = path[3] if len(path) > 3 else None
    found = state.mailboxes.search(exchange.mailbox, folder, query.get("$filter"), time.time())
    return exchange.json(200, _page(exchange, _in_order(found, query)))


def _in_order(found: list[dict[str, Any]], query: Mapping[str, str]) -> list[dict[str, Any]]:
    """The mails as `$orderby` says. What orders must stand first in the filter.

    https://learn.microsoft.com/graph/api/user-list-messages
    """
    match query.get("$orderby", "").lower().split():
        case []:
            return found
        case ["receiveddatetime", *way] if way in ([], ["asc"], ["desc"]):
            if not query.get("$filter", "receivedDateTime").lower().startswith("receiveddatetime"):
                text = "The restriction or sort order is too complex for this operation."
                raise GraphError(400, "InefficientFilter", text)
            return sorted(
                found, key=lambda mail: str(mail["receivedDateTime"]), reverse=way == ["desc"]
            )
        case _:
            raise GraphError(400, "BadRequest", "Invalid $orderby.")


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
