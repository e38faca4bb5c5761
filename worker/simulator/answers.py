"""Graph's error shape and the headers of its answers.

https://learn.microsoft.com/graph/errors
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from worker.simulator.settings import Settings

DIAGNOSTIC = (
    '{"ServerInfo":{"DataCenter":"Simulator","Slice":"E","Ring":"5",'
    '"ScaleUnit":"001","RoleInstance":"SIM0000001"}}'
)
AUTHENTICATE = (
    'Bearer realm="", authorization_uri="https://login.microsoftonline.com/common/oauth2/authorize"'
    ', client_id="00000003-0000-0000-c000-000000000000"'
)
ACCESS_DENIED = "Access is denied. Check credentials and try again."
OUT_OF_SCOPE = (
    "Access to OData is disabled: [RAOP] : "
    "Blocked by tenant configured AppOnly AccessPolicy settings."
)
THROTTLED = {
    "MailboxConcurrency": (
        "ApplicationThrottled",
        "Application is over its MailboxConcurrency limit.",
    ),
    "MailboxRequestRate": ("TooManyRequests", "Please retry again later."),
    "MailboxUpload": ("TooManyRequests", "Please retry again later."),
    "Retry-After": ("ApplicationThrottled", "Application is over its limit; wait for Retry-After."),
}
# What Graph answers when nobody said which code; the names are those of its errors page.
CODES = {
    400: "BadRequest",
    401: "InvalidAuthenticationToken",
    403: "ErrorAccessDenied",
    404: "ErrorInvalidUser",
    408: "RequestTimeout",
    413: "RequestEntityTooLarge",
    429: "TooManyRequests",
    500: "ErrorInternalServerError",
    502: "BadGateway",
    503: "ErrorServerBusy",
    504: "UnknownError",
    507: "ErrorQuotaExceeded",
    509: "BandwidthLimitExceeded",
}


class GraphError(Exception):
    """A refusal by Graph: status, code and text as they go over the wire."""

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def error_body(code: str, message: str, request_id: str, client_request_id: str) -> dict[str, Any]:
    """The JSON of an error."""
    inner = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "request-id": request_id,
        "client-request-id": client_request_id,
    }
    return {"error": {"code": code, "message": message, "innerError": inner}}


def retry_after(seconds: float, settings: Settings) -> dict[str, str]:
    """The header of a 429, in the form that is set; never shorter than the wait is."""
    whole = max(1, math.ceil(seconds))
    match settings.retry_after_form:
        case "absent":
            return {}
        case "fraction":
            return {"Retry-After": f"{math.ceil(max(seconds, 0.001) * 1000) / 1000:.3f}"}
        case "nonsense":
            return {"Retry-After": "soon"}
        case "date":
            # Dates know whole seconds only.
            end = datetime.now(UTC) + timedelta(seconds=seconds)
            end = end.replace(microsecond=0) + timedelta(seconds=1)
            return {"Retry-After": format_datetime(end, usegmt=True)}
        case _:
            return {"Retry-After": str(whole)}


def throttled(limit: str, seconds: float, settings: Settings) -> GraphError:
    """The 429 for a limit."""
    code, message = THROTTLED[limit]
    return GraphError(429, code, message, retry_after(seconds, settings))
