"""Entra, the credential, the token's roles, and which mailboxes the application may send from.

Whether it may is asked without sending: a mail without any recipient goes to sendMail. Graph
refuses it in the name of access (403) or of the mail (400), and nobody could receive it. On a
real tenant this order has not been tried yet; `--send` proves it.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import assert_never
from urllib.parse import urlsplit

import httpx
import jwt
from cryptography.x509 import load_pem_x509_certificate
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker.doctor.lane import Busy, borrowed
from worker.doctor.values import Check, Visit, failed, passed, skipped, warned
from worker.doctor.words import explain
from worker.graph import payload
from worker.model import (
    Accepted,
    Blame,
    Blocked,
    InvalidSettings,
    NotSent,
    OnUnknown,
    Outcome,
    Rejected,
    Throttled,
    Unknown,
)
from worker.tokens import Token, TokenRefused

#: A certificate that ends within this time is worth a word.
SOON = timedelta(days=30)
_SCOPE = "docs/entra-setup.md, step 5"
_PATIENCE = "; changes take up to two hours"
#: Text of Graph where a policy of Exchange keeps the application out; for people only.
_POLICY = "RAOP"


def entra(visit: Visit) -> Iterator[Check]:
    """Name resolution, TLS and proxy: does the sign-in service answer?"""
    settings = visit.rt.settings
    host = urlsplit(settings.authority).netloc
    try:
        answer = httpx.get(
            f"{settings.authority}/common/discovery/instance",
            params={"api-version": "1.1"},
            verify=_trust(settings.ca_bundle),
            timeout=10,
        )
    except (httpx.HTTPError, OSError) as error:
        yield failed("entra", *explain(type(error).__name__, str(error), host))
        return
    with suppress(ValueError):  # no date, or none that can be read
        date = parsedate_to_datetime(answer.headers.get("date", ""))
        visit.microsofts_clock = date.timestamp() - _now()
    yield passed("entra", f"{host} answers")


def certificate(visit: Visit) -> Iterator[Check]:
    """When the certificate ends; of a secret only Entra knows."""
    name = "certificate"
    try:
        pem = visit.rt.settings.certificate_pem()
    except InvalidSettings:
        pem = None
    if pem is None:
        yield skipped(name, "none is set; when a secret ends, only Entra's portal shows")
        return
    try:
        ends = load_pem_x509_certificate(pem).not_valid_after_utc
    except ValueError:
        yield failed(name, "it cannot be read", "put private key and certificate into one PEM")
        return
    left = ends - datetime.fromtimestamp(_now(), UTC)
    if left < timedelta(0):
        yield failed(
            name,
            f"it ended on {ends:%Y-%m-%d}",
            "make a new one and upload it (docs/entra-setup.md, step 4)",
        )
    elif left < SOON:
        yield warned(
            name,
            f"it ends on {ends:%Y-%m-%d}, in {left.days} days",
            "make a new one and upload it beside the old (docs/entra-setup.md, step 4)",
        )
    else:
        yield passed(name, f"it is good until {ends:%Y-%m-%d}")


def credential(visit: Visit) -> Iterator[Check]:
    """Does Entra give a token? Asked afresh, whatever the workers were told before."""
    name = "credential"
    try:
        visit.token = visit.rt.tokens.fresh()
    except InvalidSettings as error:
        yield skipped(name, str(error))
    except TokenRefused as refused:
        meaning, fix = explain(
            refused.code, refused.detail, urlsplit(visit.rt.settings.authority).netloc
        )
        yield failed(name, f"{meaning} ({refused.code}){_until(visit)}", fix)
    else:
        minutes = round(visit.token.left.total_seconds() / 60)
        yield passed(name, f"Entra gave a token for {minutes} minutes")


def _until(visit: Visit) -> str:
    """How long the workers go on with the token that they have: why nothing shows elsewhere yet."""
    try:
        ends = visit.rt.tokens.shared_until()
    except RedisError:
        ends = None
    return f"; the workers send with the token they share until {ends:%H:%MZ}" if ends else ""


def roles(visit: Visit) -> Iterator[Check]:
    """What the token says it may. Read for people only: a token is opaque to its bearer.

    https://learn.microsoft.com/entra/identity-platform/access-tokens
    """
    name = "roles"
    if visit.token is None:
        yield skipped(name, "there is no token")
        return
    try:
        claims = jwt.decode(visit.token.value, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        yield warned(name, "the token cannot be read", "nothing: let --mailbox prove what it may")
        return
    told = claims.get("roles")
    told = told if isinstance(told, list) else []
    visit.roles = frozenset(one for one in told if isinstance(one, str))
    shown = ", ".join(sorted(visit.roles)) or "none"
    if "Mail.Send" not in visit.roles:
        yield warned(
            name,
            f"the token carries no Mail.Send ({shown}): right with RBAC for "
            "Applications, else the consent is missing",
            "let --mailbox prove it; without RBAC grant admin consent "
            "(docs/entra-setup.md, step 3)",
        )
        return
    reads = visit.roles & {"Mail.Read", "Mail.ReadWrite"}
    if visit.rt.settings.on_unknown is OnUnknown.RECONCILE and not reads:
        yield warned(
            name,
            f"{shown}; ON_UNKNOWN=reconcile needs Mail.Read",
            "add the application permission Mail.Read (docs/entra-setup.md, step 2)",
        )
        return
    yield passed(name, shown)


def mailbox(visit: Visit) -> Iterator[Check]:
    """A mailbox that the application must be able to send from."""
    name = "mailbox"
    if visit.mailbox is None:
        yield skipped(name, "not asked for: --mailbox ADDRESS")
        return
    asked = _ask(visit, name, visit.mailbox)
    if isinstance(asked, Check):
        yield asked
        return
    visit.admitted = _admits(asked)
    yield inside(visit.mailbox, asked)


def outside(visit: Visit) -> Iterator[Check]:
    """A mailbox that must be refused: proof that the application's scope holds."""
    name = "outside"
    if visit.outside is None:
        yield skipped(name, "not asked for: --outside ADDRESS (a mailbox that must be refused)")
        return
    asked = _ask(visit, name, visit.outside)
    yield asked if isinstance(asked, Check) else refused(visit.outside, asked)


def inside(address: str, outcome: Outcome) -> Check:
    """What the answer says of a mailbox that must be in the scope."""
    name, answer = "mailbox", outcome.answer
    if _admits(outcome):
        return passed(name, f"{address}: the application may send from it; nothing was sent")
    if not _is_mailboxes_fault(outcome):
        return cannot_tell(name, address, outcome)
    if answer.status == 404:
        return failed(
            name,
            f"{address}: there is no such mailbox ({answer.code})",
            "correct the address, or give the user a licence with Exchange",
        )
    if _POLICY in (answer.detail or ""):
        return failed(
            name,
            f"{address} is outside the application's scope ({answer.code})",
            f"in Exchange: Add-DistributionGroupMember GROUP -Member {address}, with the group of "
            f"the policy ({_SCOPE}){_PATIENCE}",
        )
    return failed(
        name,
        f"{address}: access is denied ({answer.code})",
        "grant Mail.Send with admin consent, or by RBAC for Applications "
        f"(docs/entra-setup.md, steps 2 to 5){_PATIENCE}",
    )


def refused(address: str, outcome: Outcome) -> Check:
    """What the answer says of a mailbox that must not be."""
    name, answer = "outside", outcome.answer
    if _admits(outcome):
        return failed(
            name,
            f"{address} is not refused: the application may send in its name",
            f"restrict the application's mailboxes ({_SCOPE}), and with RBAC take the tenant-wide "
            f"consent away{_PATIENCE}",
        )
    if not _is_mailboxes_fault(outcome):
        return cannot_tell(name, address, outcome)
    if answer.status == 404:
        return warned(
            name,
            f"{address}: there is no such mailbox, which proves nothing",
            "name one that exists and must be refused",
        )
    return passed(name, f"{address} is refused, as it must be ({answer.code})")


def _admits(outcome: Outcome) -> bool:
    """Whether it is the mail that Graph minds, not its sender. A redirect, or a "no such method" of
    somebody else on the way, says nothing.
    """
    rejected = isinstance(outcome, Rejected) and outcome.answer.status in {400, 413, 422}
    return rejected or isinstance(outcome, Accepted)


def _is_mailboxes_fault(outcome: Outcome) -> bool:
    return isinstance(outcome, Blocked) and outcome.blame is Blame.MAILBOX


def cannot_tell(name: str, address: str, outcome: Outcome) -> Check:
    """An answer that says nothing about the mailbox itself."""
    answer = outcome.answer
    said = f"{answer.status or ''} {answer.code or ''}".strip()
    match outcome:
        case Blocked():
            return failed(
                name,
                f"Graph refuses the token ({said})",
                "make POSTROOM_GRAPH_URL and POSTROOM_AUTHORITY name the same cloud",
            )
        case NotSent():
            return failed(
                name,
                f"Graph cannot be reached ({said}: {answer.detail})",
                "check name resolution, firewall and proxy to POSTROOM_GRAPH_URL",
            )
        case Throttled():
            return warned(
                name, f"{address} is being throttled ({said})", "run it again in a minute"
            )
        case Unknown() | Accepted() | Rejected():
            return warned(
                name, f"{address}: Graph gave no clear answer ({said})", "run it again in a minute"
            )
    assert_never(outcome)


def _ask(visit: Visit, name: str, address: str) -> Outcome | Check:
    """What Graph says to a mail without a recipient, or why it was not asked."""
    if visit.token is None:
        return skipped(name, "there is no token")
    if not visit.redis_works:
        return skipped(name, "not without Redis: the mailbox's limits hold for the doctor too")
    body = payload(
        {"save_to_sent_items": False},
        message_id="doctor",
        subject="Postroom doctor",
        html=None,
        text="",
    )
    try:
        return visit.rt.call(
            borrowed(visit.rt, address.lower(), lambda: post(visit, address, body))
        )
    except Busy as busy:
        return warned(name, f"{address}: {busy}", "run it again when the mailbox is idle")
    except RedisError as error:
        return skipped(name, f"Redis does not answer ({type(error).__name__})")
    except (InvalidSettings, SQLAlchemyError):
        return skipped(name, "the gate needs the database, to know what was sent lately")


async def post(visit: Visit, address: str, body: bytes) -> Outcome:
    """One sendMail with the visit's token."""
    token: Token | None = visit.token
    assert token is not None  # noqa: S101  (told to mypy: nobody asks without one)
    deadline = time.monotonic() + visit.rt.settings.request_timeout.total_seconds()
    return await visit.rt.graph.send(address, body, token.value, deadline=deadline)


def _trust(bundle: Path | None) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=str(bundle)) if bundle else True


def _now() -> float:
    return time.time()  # noqa: TID251  (certificates and HTTP dates are held against this clock)
