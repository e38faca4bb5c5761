"""Plays an ordered fault on one request to Graph."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from worker.simulator.answers import AUTHENTICATE, CODES, GraphError, throttled
from worker.simulator.breakage import dribble, reset, send_raw, until_gone
from worker.simulator.exchange import Exchange
from worker.simulator.faults import Fault


async def strike(
    fault: Fault, exchange: Exchange, accept: Callable[[], None]
) -> web.StreamResponse:
    """Answer, or fail to, as the fault says; `accept` puts the mail into the ledger."""
    exchange.log["fault"] = fault.kind
    if fault.accepts:
        accept()
    if fault.kind in _ANSWERS:
        return _ANSWERS[fault.kind](fault, exchange)
    if fault.kind == "slow_body":
        exchange.done(202)
        return await dribble(exchange.request, exchange.headers(), fault.detail["seconds"])
    if fault.kind == "accept_late":
        _accept_late(fault, exchange, accept)
    if fault.kind in ("hang_before", "hang_after", "accept_late"):
        # What is late counts its seconds from when the client has gone.
        patience = 3600 if fault.kind == "accept_late" else fault.detail["seconds"]
        await until_gone(exchange.request, patience)
    return reset(exchange.request)


def _unauthorized(fault: Fault, exchange: Exchange) -> web.Response:
    headers = {"WWW-Authenticate": AUTHENTICATE} | fault.detail["headers"]
    text = "Access token has been revoked."
    return exchange.error(GraphError(401, "InvalidAuthenticationToken", text, headers))


def _revoked(_fault: Fault, exchange: Exchange) -> web.Response:
    """Every token issued so far ends, this request's with them."""
    exchange.state.tokens.revoke()
    headers = {"WWW-Authenticate": AUTHENTICATE}
    text = "Access token has been revoked."
    return exchange.error(GraphError(401, "InvalidAuthenticationToken", text, headers))


def _accepted_retry_after(fault: Fault, exchange: Exchange) -> web.Response:
    return exchange.answer(202, {"Retry-After": str(fault.detail["retry_after"])})


def _cut_after_status(_fault: Fault, exchange: Exchange) -> web.Response:
    return send_raw(exchange.request, b"HTTP/1.1 202 Accepted\r\n")


def _cut_in_status(_fault: Fault, exchange: Exchange) -> web.Response:
    return send_raw(exchange.request, b"HTTP/1.1 20")


def _close(_fault: Fault, exchange: Exchange) -> web.Response:
    return send_raw(exchange.request, b"")


def _garbage(_fault: Fault, exchange: Exchange) -> web.Response:
    return send_raw(exchange.request, b"\x00\x01 this is not HTTP \xff\r\n\r\n")


def _status(fault: Fault, exchange: Exchange) -> web.Response:
    detail = fault.detail
    status = detail["status"]
    headers = {name: str(value) for name, value in detail["headers"].items()}
    if detail["body"] is not None:
        return exchange.json(status, detail["body"], headers)
    if status < 400:
        return exchange.answer(status, headers)
    code = detail["code"] or CODES.get(status, "UnknownError")
    text = "Simulated fault." if detail["message"] is None else detail["message"]
    return exchange.error(GraphError(status, code, text, headers))


def _throttle(fault: Fault, exchange: Exchange) -> web.Response:
    """A 429 that closes the mailbox; a Retry-After given as text goes out as it is."""
    settings = exchange.state.settings
    wanted = fault.detail["retry_after"]
    if isinstance(wanted, str):
        code, text = "ApplicationThrottled", "Application is over its MailboxConcurrency limit."
        return exchange.error(GraphError(429, code, text, {"Retry-After": wanted}))
    seconds = settings.retry_after if wanted is None else float(wanted)
    if settings.retry_after_form not in ("absent", "nonsense"):
        exchange.state.limits.close(exchange.mailbox, seconds, time.monotonic())
    return exchange.error(throttled("MailboxConcurrency", seconds, settings))


_pending: set[asyncio.Task[None]] = set()


def _accept_late(fault: Fault, exchange: Exchange, accept: Callable[[], None]) -> None:
    """Accept in the background, so that the mailbox's slot is free once the client is gone."""

    async def later() -> None:
        await until_gone(exchange.request, 3600)
        await asyncio.sleep(fault.detail["seconds"])
        accept()

    task = asyncio.get_running_loop().create_task(later())
    _pending.add(task)
    task.add_done_callback(_pending.discard)


_ANSWERS: dict[str, Callable[[Fault, Exchange], web.Response]] = {
    "status": _status,
    "status_after": _status,
    "throttle": _throttle,
    "unauthorized": _unauthorized,
    "revoked": _revoked,
    "close_before": _close,
    "close_after": _close,
    "cut_in_status": _cut_in_status,
    "accepted_retry_after": _accepted_retry_after,
    "cut_after_status": _cut_after_status,
    "garbage": _garbage,
    "garbage_after": _garbage,
}
