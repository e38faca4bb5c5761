"""One request to Graph: what is known of it, and how its answer is made."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from worker.simulator.answers import DIAGNOSTIC, GraphError, error_body
from worker.simulator.state import State


@dataclass(slots=True)
class Exchange:
    """A request and its entry in the request log, made when it arrived."""

    request: web.BaseRequest
    state: State
    mailbox: str
    operation: str
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    client_request_id: str = ""
    log: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client_request_id = self.request.headers.get("client-request-id", "")
        self.log = {
            "time": time.time(),
            "monotonic": time.monotonic(),
            "mailbox": self.mailbox,
            "operation": self.operation,
            "status": None,
            "request_id": self.request_id,
            "fault": None,
            "too_early": False,
        }
        self.state.requests.append(self.log)

    @property
    def ids(self) -> tuple[str, str]:
        """Graph's id of the request and the client's."""
        return self.request_id, self.client_request_id

    def headers(self) -> dict[str, str]:
        """The headers of every answer."""
        return {
            "request-id": self.request_id,
            "client-request-id": self.client_request_id or self.request_id,
            "x-ms-ags-diagnostic": DIAGNOSTIC,
        }

    def done(self, status: int) -> None:
        """Note the status that goes out."""
        self.log["status"] = status
        self.state.statuses[str(status)] += 1

    def answer(self, status: int, headers: dict[str, str] | None = None) -> web.Response:
        """An answer without a body."""
        self.done(status)
        return web.Response(status=status, headers=self.headers() | (headers or {}))

    def json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> web.Response:
        """An answer with a body; text goes out as it is, JSON or not."""
        self.done(status)
        every = self.headers() | (headers or {})
        if isinstance(body, str):
            return web.Response(status=status, text=body, headers=every)
        return web.json_response(body, status=status, headers=every)

    def error(self, error: GraphError) -> web.Response:
        """Graph's error shape."""
        body = error_body(
            error.code, error.message, self.request_id, self.client_request_id or self.request_id
        )
        return self.json(error.status, body, error.headers)
