"""Mailboxes: what was accepted or drafted, where it lies now, and how a search finds it."""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from worker.simulator.answers import GraphError
from worker.simulator.settings import Settings

SENT, DRAFTS, INBOX = "sentitems", "drafts", "inbox"
_QUOTED = r"'((?:[^']|'')*)'"
_PROPERTY = re.compile(
    r"singleValueExtendedProperties\s*/\s*any\s*\(\s*(\w+)\s*:\s*"
    rf"\(?\s*\1/id\s+eq\s+{_QUOTED}\s+and\s+\1/value\s+eq\s+{_QUOTED}\s*\)?\s*\)",
    re.IGNORECASE,
)
_EQUALS = re.compile(rf"(internetMessageId|subject)\s+eq\s+{_QUOTED}", re.IGNORECASE)
_IS_DRAFT = re.compile(r"isDraft\s+eq\s+(true|false)", re.IGNORECASE)
_RECEIVED = re.compile(r"receivedDateTime\s+ge\s+([0-9TZ:.+-]+)", re.IGNORECASE)
_FOLDERS = {"sentitems": SENT, "sent items": SENT, "drafts": DRAFTS, "inbox": INBOX}


@dataclass(slots=True, eq=False)
class Mail:
    """One mail that is kept, accepted or a draft; times are wall-clock seconds."""

    row: dict[str, Any]
    content: dict[str, Any]
    sent_at: float  # infinite: a draft that nobody sent
    visible_at: float
    immutable: bool = False  # its id was asked for as one that stays
    received: bool = False  # it came in: nobody here sent it

    def folder(self, now: float) -> str:
        """Where it lies now."""
        if self.received:
            return INBOX
        return SENT if now >= self.sent_at else DRAFTS

    def resource(self, now: float) -> dict[str, Any]:
        """Graph's message resource, as far as it was kept."""
        moment = datetime.fromtimestamp(self.row["time"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return self.content | {
            "id": self.row["id"],
            "subject": self.row["subject"],
            "internetMessageId": self.row["internet_message_id"],
            "isDraft": self.folder(now) == DRAFTS,
            "parentFolderId": self.folder(now),
            "createdDateTime": moment,
            "sentDateTime": moment,
            "receivedDateTime": moment,
            "lastModifiedDateTime": moment,
        }


@dataclass(frozen=True, slots=True)
class Criterion:
    """One comparison of a filter; `key` is what the index is asked for."""

    key: tuple[str, str] | None
    draft: bool | None = None
    since: float = 0.0  # received then or later


class Mailboxes:
    """All kept mails, with an index for every comparison a filter may make."""

    def __init__(self) -> None:
        self._mails: defaultdict[str, list[Mail]] = defaultdict(list)
        self._index: defaultdict[tuple[str, str, str], list[Mail]] = defaultdict(list)
        self._whole: deque[Mail] = deque()

    def keep(self, row: dict[str, Any], content: dict[str, Any], settings: Settings) -> None:
        """Put a mail into Drafts, from where it goes to Sent Items by itself."""
        when = row["time"]
        mail = Mail(row, content, when + settings.drafts_seconds, when + settings.search_delay)
        self._add(mail)
        self._whole.append(mail)
        while len(self._whole) > settings.keep_mails:
            self._whole.popleft().content = {}

    def receive(self, row: dict[str, Any], content: dict[str, Any]) -> None:
        """Put a mail into the Inbox at its time."""
        mail = Mail(row, content, row["time"], row["time"], received=True)
        self._add(mail)
        self._whole.append(mail)

    def draft(self, row: dict[str, Any], content: dict[str, Any], settings: Settings) -> Mail:
        """Put a draft into Drafts."""
        mail = Mail(row, content, math.inf, row["time"] + settings.search_delay)
        self._add(mail)
        return mail

    def release(self, mail: Mail, row: dict[str, Any], settings: Settings) -> None:
        """A draft is sent: it goes to Sent Items by itself, under another id unless that stays."""
        mail.row = row
        mail.sent_at = row["time"] + settings.drafts_seconds
        self._whole.append(mail)

    def find(self, mailbox: str, mail_id: str) -> Mail:
        """A mail by its id.

        Raises:
            GraphError: 404.
        """
        for mail in self._mails[mailbox]:
            if mail.row["id"] == mail_id:
                return mail
        text = "The specified object was not found in the store."
        raise GraphError(404, "ErrorItemNotFound", text)

    def delete(self, mailbox: str, mail: Mail) -> None:
        """Take a mail away for good."""
        self._mails[mailbox].remove(mail)
        for mails in self._index.values():
            if mail in mails:
                mails.remove(mail)

    def _add(self, mail: Mail) -> None:
        row, mailbox = mail.row, mail.row["mailbox"]
        self._mails[mailbox].append(mail)
        keys = [*row["properties"].items(), ("internetmessageid", row["internet_message_id"])]
        for name, value in [*keys, ("subject", row["subject"])]:
            self._index[mailbox, name, value].append(mail)

    def stored(self, mailbox: str, now: float) -> list[dict[str, Any]]:
        """Every mail of a mailbox, found by searches yet or not."""
        there = (mail for mail in self._mails[mailbox] if not mail.received or now >= mail.sent_at)
        return [mail.resource(now) for mail in there]

    def search(
        self, mailbox: str, folder: str | None, text: str | None, now: float
    ) -> list[dict[str, Any]]:
        """Mails a search finds now, newest first.

        Raises:
            GraphError: 400 for a filter, 404 for a folder that is not there.
        """
        place = None if folder is None else _FOLDERS.get(folder.lower())
        if folder is not None and place is None:
            raise GraphError(404, "ErrorItemNotFound", "The specified folder was not found.")
        criteria = parse_filter(text) if text else []
        found = self._candidates(mailbox, criteria)
        return [
            mail.resource(now)
            for mail in reversed(found)
            if now >= mail.visible_at
            and place in (None, mail.folder(now))
            and all(c.draft in (None, mail.folder(now) == DRAFTS) for c in criteria)
            and all(c.since <= int(mail.row["time"]) for c in criteria)
        ]

    def _candidates(self, mailbox: str, criteria: list[Criterion]) -> list[Mail]:
        wanted = [self._index.get((mailbox, *c.key), []) for c in criteria if c.key]
        if not wanted:
            return self._mails[mailbox]
        others = [{id(mail) for mail in mails} for mails in wanted[1:]]
        return [mail for mail in wanted[0] if all(id(mail) in other for other in others)]


def parse_filter(text: str) -> list[Criterion]:
    """The comparisons of `$filter`, all of which must hold.

    Raises:
        GraphError: 400, a filter the simulator does not know.
    """
    criteria: list[Criterion] = []
    rest = text.strip()
    while rest:
        if match := _PROPERTY.match(rest):
            criteria.append(Criterion((_plain(match[2]), _plain(match[3]))))
        elif match := _EQUALS.match(rest):
            criteria.append(Criterion((match[1].lower(), _plain(match[2]))))
        elif match := _IS_DRAFT.match(rest):
            criteria.append(Criterion(None, match[1].lower() == "true"))
        elif match := _RECEIVED.match(rest):
            criteria.append(Criterion(None, since=_instant(match[1])))
        else:
            raise GraphError(400, "BadRequest", f"Invalid filter clause: {rest[:80]}")
        rest, joined = re.subn(r"^\s+and\s+", "", rest[match.end() :], flags=re.IGNORECASE)
        if rest.strip() and not joined:
            raise GraphError(400, "BadRequest", f"Invalid filter clause: {rest[:80]}")
    return criteria


def _plain(quoted: str) -> str:
    return quoted.replace("''", "'")


def _instant(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise GraphError(400, "BadRequest", f"Invalid date: {text[:40]}") from None
