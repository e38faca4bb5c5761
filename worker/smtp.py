"""A door for whatever speaks SMTP: 250 is said only after the message is durably enqueued.

Message-ID, sender and the envelope's recipients together are the idempotency key, so that a mail
that is sent again after a lost answer adds nothing. https://www.rfc-editor.org/rfc/rfc5321
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from worker import checks, mime
from worker.client import Client
from worker.model import (
    IdempotencyConflict,
    InboxFull,
    InvalidMessages,
    InvalidSettings,
    PostroomError,
    Unavailable,
)

log = logging.getLogger(__name__)

#: Codes of problems that are about size.
_SIZES = frozenset({"ATT_SIZE", "ATT_TOTAL", "ATT_COUNT", "BODY_LEN", "ITEM_SIZE"})
MOST_RECIPIENTS = 500
#: Seconds that a stop waits for the mails that are being taken.
GRACE = 10.0
_LONGEST_LINE = 400  # characters of an answer, well below what SMTP allows


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may come in, and with how much."""

    senders: Collection[str]  #: addresses, and domains as @contoso.com
    size_limit: int  #: bytes of a mail
    user: str | None = None
    password: str | None = None
    certificate: Path | None = None  #: PEM with key and certificates: then TLS is required

    def allows(self, address: str) -> bool:
        """Whether this address may send."""
        lower = address.lower()
        domain = "@" + lower.rpartition("@")[2]
        return bool({lower, domain} & {one.lower() for one in self.senders})


class Handler:
    """What aiosmtpd asks at each step of a mail."""

    def __init__(self, client: Client, rules: Rules) -> None:
        self._client = client
        self._rules = rules
        self._taking = 0

    async def idle(self) -> None:
        """Waits for the mails that are being taken, and for their answers; not for ever."""
        for _ in range(int(GRACE / 0.1)):
            await asyncio.sleep(0.1)
            if not self._taking:
                return

    async def handle_MAIL(
        self, _server: Any, _session: Session, envelope: Envelope, address: str,
        options: list[str],
    ) -> str:  # fmt: skip
        """The envelope's sender; an empty one is that of a notice about a mail."""
        if address and not self._rules.allows(address):
            return "550 5.7.1 this sender is not among POSTROOM_SMTP_SENDERS"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 OK"

    async def handle_RCPT(
        self, _server: Any, _session: Session, envelope: Envelope, address: str,
        options: list[str],
    ) -> str:  # fmt: skip
        """One recipient."""
        if len(envelope.rcpt_tos) >= MOST_RECIPIENTS:
            return f"452 4.5.3 at most {MOST_RECIPIENTS} recipients"
        try:
            checks.address(address)
        except checks.Refused as refused:
            return _line(f"501 5.1.3 {refused.detail}")
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(self, _server: Any, _session: Session, envelope: Envelope) -> str:
        """The mail itself: 250 once it lies in the inbox."""
        self._taking += 1
        try:
            return await asyncio.to_thread(self._take, envelope)
        finally:
            self._taking -= 1

    async def handle_exception(self, error: Exception) -> str:
        """A bug is said in the log; the client may come again."""
        log.error("the SMTP door broke off", exc_info=error)
        return "451 4.3.0 something went wrong here; try again later"

    def _take(self, envelope: Envelope) -> str:
        content: Any = envelope.content
        mail = mime.parse(content)
        sender = mime.sender_of(mail) or envelope.mail_from or ""
        if not self._rules.allows(sender):
            return "550 5.7.1 the address in From is not among POSTROOM_SMTP_SENDERS"
        recipients = list(dict.fromkeys(envelope.rcpt_tos))
        key = mime.key_of(mail, sender.lower(), *sorted(r.lower() for r in recipients))
        try:
            receipt = self._client.send_message(
                mail, sender=sender, recipients=recipients, idempotency_key=key
            )
        except PostroomError as error:
            return _answer(error)
        return f"250 2.0.0 OK: enqueued as {receipt.batch_id}"


def _answer(error: PostroomError) -> str:
    """SMTP's code for what the door says. https://www.rfc-editor.org/rfc/rfc3463"""
    match error:
        case Unavailable() | InboxFull():
            log.warning("a mail is put off: %s", error)
            return "451 4.3.0 the mail cannot be kept now; try again later"
        case InvalidMessages(problems=problems):
            told = "; ".join(f"{p.path}: {p.detail} ({p.code})" for p in problems[:3])
            size = any(p.code in _SIZES for p in problems)
            return _line(f"552 5.3.4 {told}" if size else f"554 5.6.0 {told}")
        case IdempotencyConflict():
            return "554 5.6.0 another mail with this Message-ID was taken before"
        case _:
            log.error("a mail cannot be taken: %s", error)
            return "451 4.3.5 the service is not set up; try again later"


def _line(text: str) -> str:
    """One line of ASCII."""
    return " ".join(text.split())[:_LONGEST_LINE].encode("ascii", "replace").decode()


class Server:
    """Serves until it is stopped. Raises InvalidSettings, OSError."""

    def __init__(self, client: Client, rules: Rules, host: str, port: int) -> None:
        _check(rules, host)
        self._handler = Handler(client, rules)
        self._rules = rules
        self._host, self._port = host, port
        self._tls = _tls(rules.certificate)

    async def run(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """`ready` is told the port; mails that are being taken when it stops are finished."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._session, self._host, self._port)
        ready(server.sockets[0].getsockname()[1])
        try:
            await stop.wait()
        finally:
            server.close()
            await self._handler.idle()

    def _session(self) -> SMTP:
        rules = self._rules
        return SMTP(
            self._handler, data_size_limit=rules.size_limit, enable_SMTPUTF8=True,
            ident="Postroom", tls_context=self._tls, require_starttls=self._tls is not None,
            auth_required=rules.user is not None, auth_require_tls=self._tls is not None,
            authenticator=self._authenticate, loop=asyncio.get_running_loop(),
        )  # fmt: skip

    def _authenticate(
        self, _server: Any, _session: Session, _envelope: Envelope, _mechanism: str, data: Any
    ) -> AuthResult:
        rules = self._rules
        if not isinstance(data, LoginPassword) or rules.user is None or rules.password is None:
            return AuthResult(success=False, handled=False)
        good = hmac.compare_digest(data.login, rules.user.encode())
        good &= hmac.compare_digest(data.password, rules.password.encode())
        return AuthResult(success=good, handled=False)


def _check(rules: Rules, host: str) -> None:
    if not rules.senders:
        raise InvalidSettings(
            "POSTROOM_SMTP_SENDERS is not set: the mailboxes that may send, or domains as "
            "@contoso.com, with commas"
        )
    if (rules.user is None) != (rules.password is None):
        raise InvalidSettings("set POSTROOM_SMTP_USER and POSTROOM_SMTP_PASSWORD, or neither")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and (rules.user is None or rules.certificate is None):
        raise InvalidSettings(
            f"{host} can be reached from elsewhere: set POSTROOM_SMTP_USER, POSTROOM_SMTP_PASSWORD "
            "and POSTROOM_SMTP_CERTIFICATE_FILE"
        )


def _tls(certificate: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidSettings(f"POSTROOM_SMTP_CERTIFICATE_FILE cannot be used: {reason}") from None
    return context
