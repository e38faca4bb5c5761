"""Non-delivery reports in an Inbox: how they are asked for, and what one tells.

A report names our message by the header `x-postroom-id`, in the headers of the original that it
quotes, or in its own. Only reports are asked for: nobody's letters are read.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from worker.graph.wire import Reply
from worker.meanings.bounces import Kind, kind_of
from worker.model import Answer, Blame, Blocked

#: A page of reports; each quotes the headers of its original, and perhaps some of its text.
TOP, PAGE_BYTES = 20, 4 * 1024 * 1024
#: So much of one report is looked through.
REPORT = 256 * 1024
HEADERS = {"Prefer": 'IdType="ImmutableId", outlook.body-content-type="text"'}
#: PidTagMessageClass, and the class that Exchange gives to every report that a mail went nowhere.
#: https://learn.microsoft.com/openspecs/exchange_server_protocols/ms-oxorept/
CLASS, NON_DELIVERY = "String 0x001A", "REPORT.IPM.Note.NDR"

_MARKER = re.compile(
    r"x-postroom-id\s*:\s*([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?![0-9a-f-])", re.IGNORECASE
)
_CODE = re.compile(r"(?<![\d.])([45]\.\d{1,3}\.\d{1,3})(?![\d.])")
_SAID = re.compile(r"(?<!\d)[45]\d\d[ -]#?([45]\.\d{1,3}\.\d{1,3})(?![\d.])")
_ADDRESS = re.compile(r"[^\s<>()'\":;,\[\]]+@[^\s<>()'\":;,\[\]]+")
_TAG = re.compile(r"<[^<>]{0,2000}>")
_SUBMISSION = re.compile(r"submission ?quota|submission limit|sending limit", re.IGNORECASE)
#: Who writes Exchange's own reports: nobody outside can use these names at the sender's domain
#: without failing Exchange's check of forged senders, which keeps its finds out of the Inbox.
_EXCHANGE = re.compile(r"(postmaster|microsoftexchange[0-9a-f]{32})@(.+)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Bounced:
    """One report about one of our messages, or about some other mail."""

    report_id: str
    received: datetime
    message_id: str | None  #: None: it names none of ours
    code: str | None = None
    kind: Kind = Kind.SOFT
    own: bool = False  #: Exchange itself wrote it, not a server of others
    named: frozenset[str] = frozenset()  #: addresses that it speaks of, before what it quotes


@dataclass(frozen=True, slots=True)
class Reports:
    """What a page showed, oldest first."""

    answer: Answer
    found: tuple[Bounced, ...] = ()
    following: str | None = None  #: the address of the next page
    forbidden: bool = False  #: the mailbox may not be read
    trouble: bool = False


def search(since: datetime) -> str:
    """The path below the mailbox. The order's property must stand first in the filter.

    https://learn.microsoft.com/graph/api/user-list-messages#using-filter-and-orderby-in-the-same-query
    """
    moment = since.strftime("%Y-%m-%dT%H:%M:%SZ")
    marked = f"ep/id eq '{CLASS}' and ep/value eq '{NON_DELIVERY}'"
    clause = f"receivedDateTime ge {moment} and singleValueExtendedProperties/any(ep: {marked})"
    wanted = quote(clause, safe="()/:'")
    return (
        f"mailFolders/inbox/messages?$filter={wanted}&$orderby=receivedDateTime&$top={TOP}"
        "&$select=id,receivedDateTime,from,internetMessageHeaders,body"
    )


def seen(reply: Reply, mailbox: str) -> Reports:
    """What one page proves."""
    answer = reply.answer
    if answer.status != 200:
        outcome = reply.outcome
        barred = isinstance(outcome, Blocked) and outcome.blame is Blame.MAILBOX
        return Reports(answer, forbidden=barred, trouble=not barred)
    try:
        page = json.loads(reply.content)
        mails, following = list(page["value"]), page.get("@odata.nextLink")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Reports(answer, trouble=True)
    found = []
    for mail in mails:
        # One that is no message resource must not hide the others, nor what comes after them.
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            found.append(read(mail, mailbox))
    return Reports(answer, tuple(found), following if isinstance(following, str) else None)


def read(mail: Mapping[str, Any], mailbox: str) -> Bounced:
    """What a report tells. Raises ValueError, KeyError, TypeError or AttributeError where it is
    no message resource.
    """
    received = datetime.fromisoformat(mail["receivedDateTime"])
    if received.tzinfo is None:
        received = received.replace(tzinfo=UTC)  # as all times of Graph are
    text = _text(mail.get("body") or {})
    own_headers = "\n".join(
        f"{one['name']}: {one['value']}" for one in mail.get("internetMessageHeaders") or ()
    )
    marker = _MARKER.search(text) or _MARKER.search(own_headers)
    if marker is None:
        return Bounced(mail["id"], received, None)
    told = text[: _quoted(text)]
    code = _SAID.search(told) or _CODE.search(told)
    sender = ((mail.get("from") or {}).get("emailAddress") or {}).get("address") or ""
    return Bounced(
        mail["id"], received, marker[1].lower(), code[1] if code else None,
        kind_of(code[1] if code else None, submission=bool(_SUBMISSION.search(told))),
        _is_exchange(sender, mailbox),
        frozenset(one.lower().strip(".") for one in _ADDRESS.findall(told)),
    )  # fmt: skip


def _text(body: Mapping[str, Any]) -> str:
    text = str(body.get("content") or "")[:REPORT]
    if str(body.get("contentType") or "").lower() == "html":
        text = html.unescape(_TAG.sub(" ", text))
    return text


def _quoted(text: str) -> int:
    """Where the original's headers begin: what stands there is its sender's, and no finding."""
    begin = re.search(r"original message headers|^received:", text, re.IGNORECASE | re.MULTILINE)
    marker = _MARKER.search(text)
    ends = [found.start() for found in (begin, marker) if found]
    return min(ends, default=len(text))


def _is_exchange(sender: str, mailbox: str) -> bool:
    found = _EXCHANGE.match(sender)
    if found is None:
        return False
    domain = found[2].lower()
    return domain == mailbox.rpartition("@")[2].lower() or domain.endswith(".onmicrosoft.com")
