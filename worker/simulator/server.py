"""The HTTPS server: one origin for Entra, Graph and the control API."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from aiohttp import web

from worker.simulator import entra
from worker.simulator.breakage import reset
from worker.simulator.control import control
from worker.simulator.graph import graph
from worker.simulator.settings import Settings
from worker.simulator.state import State
from worker.simulator.tls import server_context
from worker.simulator.uploads import upload


class Server:
    """Routes requests by their path."""

    def __init__(self, state: State) -> None:
        self.state = state

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        # Split before decoding, so that a %2F inside a mailbox stays inside. Microsoft's SDK
        # writes /v1.0//users, and Graph takes it.
        raw = request.raw_path.partition("?")[0].split("/")
        path = [unquote(part) for part in raw if part]
        match path:
            case [("v1.0" | "beta"), *rest]:
                return await graph(request, self.state, rest)
            case [("outlook" | "_simulator"), *rest]:
                other = upload if path[0] == "outlook" else control
                return await other(request, self.state, rest)
            case ["msi", "token"]:
                return self._identity(request)
            case ["common", "discovery", "instance"] | [_, "v2.0", ".well-known", _]:
                return self._discovery(path[0])
            case [tenant, "oauth2", "v2.0", "token"] if request.method == "POST":
                return await self._token(request, tenant)
            case _:
                return web.json_response({"error": {"code": "ResourceNotFound"}}, status=404)

    def _discovery(self, tenant: str) -> web.Response:
        if tenant == "common":
            return web.json_response(entra.instances(self.state.base, self.state.settings))
        try:
            found = entra.discovery(self.state.base, tenant, self.state.settings)
        except entra.EntraError as error:
            return web.json_response(error.body(""), status=error.status)
        return web.json_response(found)

    async def _token(self, request: web.BaseRequest, tenant: str) -> web.Response:
        state = self.state
        state.counts["token_requests"] += 1
        form = dict(parse_qsl((await request.content.read()).decode("utf-8", "replace")))
        fault = state.faults.strike("token", "token")
        match fault.kind if fault else None:
            case "token_reset":
                return reset(request)
            case "token_garbage":
                return web.Response(text="<html>Service unavailable</html>")
            case "token_status" if fault:
                return _token_status(fault.detail)
            case "token_delay" if fault:
                await asyncio.sleep(fault.detail["seconds"])
        return self._grant(tenant, form, request.headers.get("client-request-id", ""))

    def _identity(self, request: web.BaseRequest) -> web.Response:
        """The identity endpoint of Azure's App Service.
        https://learn.microsoft.com/azure/app-service/overview-managed-identity
        """
        state = self.state
        state.counts["token_requests"] += 1
        header = request.headers.get("X-IDENTITY-HEADER")
        if not state.settings.identity_header or header != state.settings.identity_header:
            return web.json_response({"statusCode": 401, "message": "Unauthorized"}, status=401)
        state.counts["tokens_issued"] += 1
        ends = int(time.time()) + state.settings.token_lifetime
        return web.json_response(
            {"access_token": state.tokens.issue(state.settings), "expires_on": str(ends),
             "resource": request.query.get("resource"), "token_type": "Bearer"}
        )  # fmt: skip

    def _grant(self, tenant: str, form: dict[str, str], correlation_id: str) -> web.Response:
        state = self.state
        try:
            entra.grant(state.base, tenant, form, state.settings)
        except entra.EntraError as error:
            return web.json_response(error.body(correlation_id), status=error.status)
        state.counts["tokens_issued"] += 1
        lifetime = state.settings.token_lifetime
        answer = {"token_type": "Bearer", "expires_in": lifetime, "ext_expires_in": lifetime}
        return web.json_response(answer | {"access_token": state.tokens.issue(state.settings)})


def _token_status(detail: dict[str, Any]) -> web.Response:
    body, status, headers = detail["body"], detail["status"], detail["headers"]
    if isinstance(body, str):
        return web.Response(text=body, status=status, headers=headers)
    default = entra.EntraError("temporarily_unavailable", 90033, "A transient error has occurred.")
    return web.json_response(body or default.body(""), status=status, headers=headers)


async def serve(
    directory: Path,
    settings: Settings,
    port: int = 0,
    *,
    ready: Callable[[str], None] | None = None,
    until_stdin_closes: bool = False,
) -> None:
    """Serve until SIGTERM, SIGINT or, where asked for, the end of standard input.

    Raises:
        OSError: the port is taken, or the directory cannot be written.
    """
    state = State(directory, settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_stdin_closes:
        loop.add_reader(sys.stdin.fileno(), _read_until_closed, loop, stop)
    runner = web.ServerRunner(
        web.Server(Server(state).handle, access_log=None, keepalive_timeout=600),
        shutdown_timeout=0.2,
    )
    await runner.setup()
    context = server_context(directory)
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context, backlog=1024)
    try:
        await site.start()
        state.base = f"https://127.0.0.1:{runner.addresses[0][1]}"
        _write_address(directory, state.base)
        gc.freeze()
        if ready is not None:
            ready(state.base)
        await stop.wait()
    finally:
        await runner.cleanup()
        state.ledger.close()


def _read_until_closed(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        stop.set()


def _write_address(directory: Path, address: str) -> None:
    unfinished = directory / "address.new"
    unfinished.write_text(address)
    unfinished.replace(directory / "address")


def run(
    directory: Path,
    settings: Settings,
    port: int,
    ready: Callable[[str], None],
    until_stdin_closes: bool,
) -> None:
    """`serve` in an event loop of its own; an interrupt ends it without a trace."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(
            serve(directory, settings, port, ready=ready, until_stdin_closes=until_stdin_closes)
        )
