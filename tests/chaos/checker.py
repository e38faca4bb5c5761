"""The checker: compares the three books, and names every contradiction. Pure.

It joins by recipient, which each row of a run has for itself, so it need not trust any id of ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from tests.chaos.history import History, Row
from tests.chaos.producer import address, subject

NOT_SENT = {"failed", "cancelled", "expired", "suppressed"}
FOUND = "FoundInMailbox"
AT_REST = {"sent", "unknown", *NOT_SENT}


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: which one, and where it is seen."""

    promise: str
    detail: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.detail}"


class Books:
    """The history, indexed."""

    def __init__(self, history: History) -> None:
        self.history = history

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Recipient -> rows in SQL."""
        return _by(self.history.messages, "recipient")

    @cached_property
    def accepted(self) -> dict[str, list[Row]]:
        """Recipient -> what Graph accepted."""
        found: defaultdict[str, list[Row]] = defaultdict(list)
        for entry in self.history.ledger:
            for recipient in entry["recipients"]:
                found[recipient].append(entry)
        return found

    @cached_property
    def attempts(self) -> dict[str, list[Row]]:
        """Message id -> its attempts."""
        return _by(self.history.attempts, "message_id")

    @cached_property
    def attempted(self) -> dict[str, int]:
        """Key -> rows, of every call that was begun."""
        return {line["key"]: line["rows"] for line in self.history.journal if line["do"] == "call"}

    @cached_property
    def acknowledged(self) -> dict[str, int]:
        """Key -> rows, of every call that returned."""
        keys = {line["key"] for line in self.history.journal if line["do"] == "receipt"}
        return {key: self.attempted[key] for key in keys}


def check(history: History) -> list[Violation]:
    """Everything that contradicts a promise."""
    books = Books(history)
    return [Violation(name, detail) for name, rule in RULES.items() for detail in rule(books)]


def _lost(b: Books) -> Iterator[str]:
    """Every message of a call that returned is there, once."""
    for key, rows in b.acknowledged.items():
        for row in range(1, rows + 1):
            found = b.rows.get(address(key, row), [])
            if len(found) != 1:
                yield f"{address(key, row)}: acknowledged, and {len(found)} rows in SQL"


def _invented(b: Books) -> Iterator[str]:
    """Nothing is there that nobody enqueued."""
    known = {address(key, row) for key, rows in b.attempted.items() for row in range(1, rows + 1)}
    for recipient in {*b.rows, *b.accepted} - known:
        yield f"{recipient}: nobody enqueued it"


def _twice(b: Books) -> Iterator[str]:
    """Graph accepts each message once; with `resend`, once more for each doubtful attempt."""
    for recipient, entries in b.accepted.items():
        allowed = 1
        if b.history.policy == "resend":
            its = [a for m in b.rows.get(recipient, []) for a in b.attempts.get(m["id"], [])]
            allowed += sum(a["outcome"] == "unknown" for a in its)
        if len(entries) > allowed:
            times = ", ".join(f"{entry['time']:.3f}" for entry in entries)
            yield f"{recipient}: accepted {len(entries)} times, at {times}"


def _contradiction(b: Books) -> Iterator[str]:
    """A row says what the ledger says, as far as it claims to know."""
    for recipient, rows in b.rows.items():
        copies = len(b.accepted.get(recipient, []))
        for row in rows:
            if row["state"] == "sent" and not copies:
                yield f"{recipient}: sent, and Graph has accepted nothing"
            elif row["state"] in NOT_SENT and copies:
                yield f"{recipient}: {row['state']}, and Graph has accepted it"
            elif row["state"] == "queued" and copies and not row["doubt"]:
                yield f"{recipient}: queued without doubt, and Graph has accepted it"


def _evidence(b: Books) -> Iterator[str]:
    """An attempt that says accepted names an exchange in which Graph accepted this very message.

    By our own id of the exchange: an answer may be cut before Graph's id of it. What a look found
    was no exchange, and names the mail.
    """
    ours = {entry["client_request_id"]: entry for entry in b.history.ledger}
    sent = {entry["marker"] for entry in b.history.ledger}
    for attempt in b.history.attempts:
        its = attempt["message_id"]
        if attempt["outcome"] != "accepted" or (attempt["code"] == FOUND and its in sent):
            continue
        entry = ours.get(attempt["client_request_id"], {"marker": None, "request_id": None})
        if entry["marker"] != its or attempt["request_id"] not in (None, entry["request_id"]):
            yield f"{its}: its 202 was given for {entry['marker']}"


def _doubt(b: Books) -> Iterator[str]:
    """A message is unknown because an attempt was, and for no other reason."""
    for row in b.history.messages:
        its = b.attempts.get(row["id"], [])
        if row["state"] == "unknown" and not any(a["outcome"] == "unknown" for a in its):
            yield f"{row['recipient']}: unknown, and no attempt of it is"


def _fences(b: Books) -> Iterator[str]:
    """One claim, one word: no fence was given twice, and none that was never claimed."""
    for row in b.history.messages:
        its = [a for a in b.attempts.get(row["id"], []) if not a["late"]]
        doubled = [fence for fence, n in Counter(a["fence"] for a in its).items() if n > 1]
        unclaimed = [a["fence"] for a in its if not 1 <= a["fence"] <= row["fence"]]
        if doubled or unclaimed:
            yield f"{row['recipient']}: fences {doubled} twice, {unclaimed} never claimed"


def _content(b: Books) -> Iterator[str]:
    """What was enqueued first under a key is what is sent, under the row's own id."""
    for key, rows in b.attempted.items():
        for row in range(1, rows + 1):
            ids = {m["id"] for m in b.rows.get(address(key, row), [])}
            for entry in b.accepted.get(address(key, row), []):
                if entry["subject"] != subject(key, row) or entry["marker"] not in ids:
                    yield f"{address(key, row)}: sent as {entry['subject']!r} {entry['marker']}"


def _open(b: Books) -> Iterator[str]:
    """Nothing of a batch that never became whole is sent."""
    unsealed = {batch["id"] for batch in b.history.batches if batch["sealed_at"] is None}
    for row in b.history.messages:
        copies = b.accepted.get(row["recipient"], [])
        if row["batch_id"] in unsealed and (copies or row["state"] != "queued"):
            yield f"{row['recipient']}: of an open batch, {row['state']}, {len(copies)} accepted"


def _receipts(b: Books) -> Iterator[str]:
    """Receipts add up; a call that had returned adds nothing when it is repeated; other content
    under the same key is refused.
    """
    for line in b.history.journal:
        do, key = line["do"], line["key"]
        if do == "conflict" and not line.get("conflict"):
            yield f"{key}: other content was taken"
        elif do in {"receipt", "again"} and line.get("conflict"):
            yield f"{key}: the same content was refused"
        elif do in {"receipt", "again"}:
            if line["accepted"] + line["duplicates"] != b.attempted[key]:
                yield f"{key}: {line['accepted']} + {line['duplicates']} of {b.attempted[key]}"
            if do == "again" and line["accepted"]:
                yield f"{key}: the repeat added {line['accepted']}"


def _rest(b: Books) -> Iterator[str]:
    """When the faults have ended, everything comes to rest."""
    whole = {batch["id"] for batch in b.history.batches if batch["sealed_at"] is not None}
    moving = Counter(
        row["state"]
        for row in b.history.messages
        if row["batch_id"] in whole and row["state"] not in AT_REST
    )
    if moving:
        yield f"still moving: {dict(moving)}"
    if b.history.waiting:
        yield f"{b.history.waiting} chunks still in the inbox"
    unfinished = [x for x in b.history.batches if x["sealed_at"] and not x["finished_at"]]
    if unfinished and not moving:
        yield f"{len(unfinished)} batches with nothing to do are not finished"


def _bounded(b: Books) -> Iterator[str]:
    """Doubt is bounded by what was in flight at a fault; `reconcile` leaves none."""
    unknown = sum(row["state"] == "unknown" for row in b.history.messages)
    most = 0 if b.history.policy == "reconcile" else b.history.exposed
    if unknown > most:
        yield f"{unknown} unknown, at most {most} allowed"


def _retry_after(b: Books) -> Iterator[str]:
    """Nobody calls a mailbox before its Retry-After has passed."""
    if b.history.too_early:
        yield f"{b.history.too_early} requests came too early"


RULES: Mapping[str, Callable[[Books], Iterator[str]]] = {
    "lost": _lost,
    "invented": _invented,
    "sent twice": _twice,
    "contradiction": _contradiction,
    "evidence": _evidence,
    "doubt without cause": _doubt,
    "fence": _fences,
    "other content": _content,
    "open batch": _open,
    "receipt": _receipts,
    "not at rest": _rest,
    "too much doubt": _bounded,
    "called too early": _retry_after,
}


def _by(rows: object, name: str) -> dict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    assert isinstance(rows, list | tuple)
    for row in rows:
        found[row[name]].append(row)
    return found
