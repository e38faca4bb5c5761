"""Who may do what, and how much of it: asked of every request before anything else."""

from __future__ import annotations

import time
from typing import Any

from worker.simulator.answers import (
    ACCESS_DENIED,
    AUTHENTICATE,
    OUT_OF_SCOPE,
    GraphError,
    throttled,
)
from worker.simulator.exchange import Exchange
from worker.simulator.mime import read_mime
from worker.simulator.settings import Settings
from worker.simulator.validation import LARGEST_BODY, read_send


def admit(exchange: Exchange, size: int) -> None:
    """Token, permission, mailbox, limits: in this order, as Graph asks.

    Raises:
        GraphError: as the service refuses it.
    """
    state, settings = exchange.state, exchange.state.settings
    refusal = state.tokens.refusal(exchange.request.headers.get("Authorization", ""))
    if refusal:
        headers = {"WWW-Authenticate": AUTHENTICATE}
        raise GraphError(401, "InvalidAuthenticationToken", refusal, headers)
    if not _permitted(exchange.operation, settings):
        raise GraphError(403, "ErrorAccessDenied", ACCESS_DENIED)
    _check_mailbox(exchange.mailbox, settings)
    check_limits(exchange, size)


def check_limits(exchange: Exchange, size: int) -> None:
    """The mailbox's limits and the largest request.

    Raises:
        GraphError: 429 or 413.
    """
    state, settings, mailbox = exchange.state, exchange.state.settings, exchange.mailbox
    now = exchange.log["monotonic"]
    limit = state.limits.check(mailbox, size, now, settings)
    if limit:
        exchange.log["too_early"] = limit.too_early
        if settings.retry_after_form not in ("absent", "nonsense"):
            state.limits.close(mailbox, limit.seconds, time.monotonic())
        raise throttled(limit.limit, limit.seconds, settings)
    if size > LARGEST_BODY:
        raise GraphError(413, "RequestEntityTooLarge", "The request is larger than 4MB.")


def _permitted(operation: str, settings: Settings) -> bool:
    """https://learn.microsoft.com/graph/permissions-reference"""
    match operation:
        case "send":
            return settings.mail_send
        case "draft":
            return settings.mail_read_write
        case _:
            return settings.mail_read or settings.mail_read_write


def _check_mailbox(mailbox: str, settings: Settings) -> None:
    known = settings.mailboxes
    exists = mailbox in known if known else mailbox.rpartition("@")[2] in settings.domains
    if mailbox in settings.out_of_scope:
        raise GraphError(403, "ErrorAccessDenied", OUT_OF_SCOPE)
    if not exists or mailbox.startswith("@"):
        raise GraphError(404, "ErrorInvalidUser", f"The requested user '{mailbox}' is invalid.")


def read_message(exchange: Exchange, body: bytes) -> tuple[dict[str, Any], bool]:
    """Message and saveToSentItems of a sendMail request."""
    kind = exchange.request.content_type
    if kind == "application/json":
        return read_send(body)
    if kind == "text/plain":
        return read_mime(body), True
    raise GraphError(415, "UnsupportedMediaType", f"Content-Type '{kind}' is not supported.")


def check_from(mailbox: str, message: dict[str, Any], settings: Settings) -> None:
    """Refuse a `from` that this mailbox may not use."""
    for name in ("from", "sender"):
        person = (message.get(name) or {}).get("emailAddress") or {}
        address = str(person.get("address") or mailbox).lower()
        if address != mailbox and address not in settings.send_as:
            text = (
                "The user account which was used to submit this request does not have "
                "the right to send mail on behalf of the specified sending account."
            )
            raise GraphError(403, "ErrorSendAsDenied", text)
