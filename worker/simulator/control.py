"""The control API under /_simulator: faults, settings, figures and what was accepted."""

from __future__ import annotations

import json
import time
from typing import Any

from aiohttp import web

from worker.simulator.faults import FaultError, ordered
from worker.simulator.settings import SettingError
from worker.simulator.state import State


async def control(request: web.BaseRequest, state: State, path: list[str]) -> web.Response:
    """Answer /_simulator/...; a bad order gets 400 with one line."""
    try:
        body = await request.content.read()
        order = json.loads(body) if body else {}
    except ValueError:
        order = None
    if not isinstance(order, dict):
        return web.json_response({"error": "a JSON object is wanted"}, status=400)
    try:
        return _answer(request, state, path, order)
    except (FaultError, SettingError) as error:
        return web.json_response({"error": str(error)}, status=400)


def _answer(
    request: web.BaseRequest, state: State, path: list[str], order: dict[str, Any]
) -> web.Response:
    match request.method, path:
        case "GET", ["stats"]:
            return web.json_response(state.stats())
        case "GET", ["ledger"]:
            since = request.query.get("since", "0")
            if not since.isdecimal():
                raise SettingError(f"since: a whole number, not {since!r}")
            return web.Response(
                body=state.ledger.since(int(since)), content_type="application/json"
            )
        case "GET", ["requests"]:
            return web.json_response(list(state.requests))
        case "GET", ["mail", mailbox]:
            return web.json_response(state.mailboxes.stored(mailbox.lower(), time.time()))
        case "GET", ["settings"]:
            return web.json_response(_settings(state))
        case _:
            return _order(request.method, state, path, order)


def _order(method: str, state: State, path: list[str], order: dict[str, Any]) -> web.Response:
    match method, path:
        case "POST", ["faults"]:
            state.faults.order(ordered(order))
        case "DELETE", ["faults"]:
            state.faults.clear()
        case "POST", ["settings"]:
            state.settings = state.settings.changed(order)
            return web.json_response(_settings(state))
        case "POST", ["revoke-tokens"]:
            state.tokens.revoke()
        case _:
            return web.json_response({"error": f"no {method} {'/'.join(path)}"}, status=404)
    return web.json_response({})


def _settings(state: State) -> dict[str, Any]:
    names = state.settings.__dataclass_fields__
    return {name: getattr(state.settings, name) for name in names}
