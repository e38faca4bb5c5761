"""What one running simulator remembers, and the one place where a mail becomes accepted."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.simulator.entra import Tokens
from worker.simulator.faults import Fault, Faults
from worker.simulator.hostile import Chance
from worker.simulator.ledger import Ledger
from worker.simulator.limits import Limits
from worker.simulator.mail import Mail, Mailboxes
from worker.simulator.reports import reports
from worker.simulator.settings import Settings
from worker.simulator.validation import recipients

MARKER = "PostroomId"
REQUESTS_KEPT = 1_000_000
_NAMED = re.compile(r"Name\s+(\S+)")


@dataclass(slots=True)
class Upload:
    """An upload session: what it is for, and what has arrived of it."""

    mailbox: str
    mail: Mail
    item: dict[str, Any]
    ends: float  # wall-clock seconds
    received: bytearray = field(default_factory=bytearray)


class State:
    """All of it; one event loop changes it, so no step needs a lock."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.settings = settings
        self.base = ""
        self.random = random.Random(settings.seed)  # noqa: S311 - repeatable, not secret
        self.tokens = Tokens(directory)
        self.faults = Faults(settings.seed)
        self.chance = Chance(settings.seed)
        self.limits = Limits()
        self.mailboxes = Mailboxes()
        self.uploads: dict[str, Upload] = {}
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.first: dict[str, float] | None = None
        self.last: dict[str, float] | None = None
        for line in self.ledger.lines:
            row = json.loads(line)
            if row["save_to_sent_items"]:
                self.mailboxes.keep(row, {}, settings)

    def latency(self) -> float:
        """Seconds this answer takes."""
        least, most = self.settings.latency()
        return least if least == most else self.random.uniform(least, most)

    def misfortune(self, *, accepts: bool) -> Fault | None:
        """What befalls this request by chance; `accepts`: it carries a mail."""
        s = self.settings
        return self.chance.draw(s.hostile_percent, s.hostile_mix, accepts=accepts)

    def befalls(self, where: str, ordered: Fault | None, chance: Fault | None) -> Fault | None:
        """The fault that strikes here: the ordered one, else what chance drew for this place."""
        if ordered is not None or chance is None or chance.where != where:
            return ordered
        self.counts["hostile"] += 1
        self.faults.count(chance)
        return chance

    def accept(
        self, mailbox: str, message: dict[str, Any], save: bool, ids: tuple[str, str]
    ) -> None:
        """Write the ledger and put the mail into the mailbox; ids are request's and client's."""
        row = _row(mailbox, message, save, ids)
        self._note(row)
        if save:
            self.mailboxes.keep(row, message, self.settings)

    def draft(
        self, mailbox: str, message: dict[str, Any], ids: tuple[str, str], *, immutable: bool
    ) -> Mail:
        """Put a draft into the mailbox: nothing is sent, nothing is in the ledger."""
        row = _row(mailbox, message, True, ids)
        mail = self.mailboxes.draft(row, message, self.settings)
        mail.immutable = immutable and self.settings.immutable_ids
        return mail

    def release(self, mailbox: str, mail: Mail, ids: tuple[str, str]) -> None:
        """A draft is sent: write the ledger."""
        row = _row(mailbox, mail.content, True, ids)
        row["internet_message_id"] = mail.row["internet_message_id"]
        if mail.immutable:
            row["id"] = mail.row["id"]
        self._note(row)
        self.mailboxes.release(mail, row, self.settings)

    def _note(self, row: dict[str, Any]) -> None:
        self.ledger.append(row)
        self.last = {"monotonic": row["monotonic"], "time": row["time"]}
        self.first = self.first or self.last
        self.limits.loads[row["mailbox"]].accepted += 1
        for report, content in reports(row, self.settings):
            self.mailboxes.receive(report, content)

    def stats(self) -> dict[str, Any]:
        """Counts since the start; the ledger's length is over all starts."""
        loads = self.limits.loads
        return {
            "token_requests": self.counts["token_requests"],
            "tokens_issued": self.counts["tokens_issued"],
            "accepted": sum(load.accepted for load in loads.values()),
            "ledger": len(self.ledger.lines),
            "throttled": self.statuses["429"],
            "too_early": self.limits.too_early,
            "unauthorized": self.statuses["401"],
            "searches": self.counts["read"],
            "statuses": dict(self.statuses),
            "faults": dict(self.faults.struck),
            "hostile": self.counts["hostile"],
            "first_acceptance": self.first,
            "last_acceptance": self.last,
            "max_concurrent": {name: load.peak for name, load in loads.items()},
            "requests": {name: load.arrived for name, load in loads.items()},
            "accepted_by_mailbox": {name: load.accepted for name, load in loads.items()},
        }


def _row(mailbox: str, message: dict[str, Any], save: bool, ids: tuple[str, str]) -> dict[str, Any]:
    stored = message.get("singleValueExtendedProperties") or ()
    properties = {item["id"]: item["value"] for item in stored}
    names = {name[1]: value for key, value in properties.items() if (name := _NAMED.search(key))}
    content = (message.get("body") or {}).get("content") or ""
    return {
        "n": 0,
        "time": time.time(),
        "monotonic": time.monotonic(),
        "mailbox": mailbox,
        "marker": names.get(MARKER),
        "properties": properties,
        "headers": {h["name"]: h["value"] for h in message.get("internetMessageHeaders") or ()},
        "recipients": recipients(message),
        "subject": message.get("subject") or "",
        "body_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "request_id": ids[0],
        "client_request_id": ids[1],
        "save_to_sent_items": save,
        "id": f"AAkALg{uuid.uuid4().hex}=",
        "internet_message_id": f"<{uuid.uuid4().hex}@simulator.prod.outlook.com>",
    }
