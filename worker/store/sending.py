"""The store's part in sending: peek, claim, record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    Connection,
    Float,
    literal,
    select,
)

from worker.model import Due, Outcome, Rejected, State, Verdict
from worker.store import rejections
from worker.store.clock import after
from worker.store.given import array_of, rows_given
from worker.store.mailboxes import note, refusal
from worker.store.schema import attempts
from worker.store.statements import (
    attempts_statement,
    claim_statement,
    cool_mailbox,
    evidence_statement,
    peek_statement,
    record_statement,
    wake_statement,
)

#: A message whose claims ended without a word this many times is set aside: it may be the message.
POISON = 3


@dataclass(frozen=True, slots=True)
class ToClaim:
    """A request to claim message `id`, whose request will be `size` bytes long."""

    id: str
    size: int
    mailbox: str
    worker: str
    lease: float  #: seconds
    token_left: float  #: seconds until the bearer token that will be used ends
    external: int = 0  #: recipients outside the organisation
    addresses: Sequence[str] = ()  #: in lower case; if one is suppressed, there is no claim


@dataclass(frozen=True, slots=True)
class ToRecord:
    """What came of claim (id, fence), to be written: the attempt and the message's next state."""

    id: str
    fence: int
    batch_id: str
    queue_id: str
    mailbox: str
    worker: str
    recipients: int
    size: int
    outcome: Outcome
    verdict: Verdict
    token_left: float
    clears: bool = False  #: an acceptance that ends what SQL holds against the mailbox
    external: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """The claim: message id and fencing number."""
        return self.id, self.fence


class Sending:
    """The statements of sending, compiled once for one database."""

    def __init__(self, dialect: str, max_failures: int | None = None) -> None:
        """`max_failures`: so many rejections in a row pause a batch; None or 0: none do."""
        self._dialect = dialect
        self._max_failures = max_failures
        self._peek = peek_statement()
        self._claim = claim_statement(dialect)
        self._record = record_statement(dialect)
        self._evidence = evidence_statement(dialect)
        self._attempts = attempts_statement(dialect)
        self._wake = wake_statement(dialect)

    def peek(
        self, connection: Connection, queue: str, *, count: int, share: int, shares: int,
        mailbox: str = "",
    ) -> list[Due]:  # fmt: skip
        """The next due messages of a queue, at most `count`; none of them is claimed yet."""
        window = count * min(shares, 16)
        parameters = {
            "queue": queue,
            "count": count,
            "share": share,
            "shares": shares,
            "window": window,
            "mailbox": mailbox,
        }
        return [Due(*row) for row in connection.execute(self._peek, parameters).all()]

    def claim(self, connection: Connection, wanted: Sequence[ToClaim]) -> dict[str, int]:
        """Claims what still may be sent: message id → fencing number. queued → sending."""
        rows = {c.id: json.dumps(_claim(c)) for c in sorted(wanted, key=lambda c: c.id)}
        found = connection.execute(
            self._claim, rows_given(self._dialect, rows.values(), list(rows))
        )
        return {row.id: row.fence for row in found}

    def record(self, connection: Connection, results: Sequence[ToRecord]) -> set[tuple[str, int]]:
        """Writes attempts and next states; gives (id, fence) of the claims that were still ours.

        A second call with the same results changes nothing, and gives the same. A claim that was
        given up meanwhile is not touched, but a late 202 is proof: whatever the state, it becomes
        `sent`.
        """
        rows = {r.key: json.dumps(_row(r)) for r in sorted(results, key=lambda r: r.id)}
        found = connection.execute(self._record, self._given(rows))
        before = {(row.id, row.fence): row.rejections for row in found}
        done = set(before)
        told = self._told(connection, [r for r in results if r.key not in done])
        fresh = [r for r in results if r.key in done]
        late = [r for r in results if r.key not in done and _told_as(r) not in told]
        self._audit(connection, [rows[r.key] for r in fresh], late=False)
        self._audit(connection, [rows[r.key] for r in late], late=True)
        if proofs := {r.key: rows[r.key] for r in late if r.verdict.state is State.SENT}:
            connection.execute(self._evidence, self._given(proofs))
        self._count_rejections(connection, fresh, before)
        self._wake_queues(connection, [r for r in fresh if r.verdict.state is State.QUEUED])
        self._tend(connection, fresh, late)
        return done | {key[:2] for key, was_late in told.items() if not was_late}

    def _told(
        self, connection: Connection, results: Sequence[ToRecord]
    ) -> dict[tuple[Any, ...], bool]:
        """The audit rows of these messages, and whether each came late: what is merely repeated,
        because the answer to its COMMIT was lost, is known by them.
        """
        if not results:
            return {}
        a = attempts.c
        found = connection.execute(
            select(a.message_id, a.fence, a.outcome, a.code, a.client_request_id, a.late).where(
                a.message_id.in_([r.id for r in results])
            )
        )
        wanted = {_told_as(r) for r in results}
        return {tuple(row[:5]): row.late for row in found if tuple(row[:5]) in wanted}

    def _audit(self, connection: Connection, rows: Sequence[str], *, late: bool) -> None:
        if rows:
            connection.execute(self._attempts, {"rows": array_of(rows), "late": late})

    def _given(self, rows: Mapping[tuple[str, int], str]) -> dict[str, Any]:
        return rows_given(self._dialect, rows.values(), [message_id for message_id, _ in rows])

    def _count_rejections(
        self, connection: Connection, fresh: Sequence[ToRecord],
        before: Mapping[tuple[str, int], int],
    ) -> None:  # fmt: skip
        """The batches' rows, before their queues' as at an arrival: nobody waits crosswise."""
        ends = [r for r in fresh if rejections.counts(r.outcome, r.verdict)]
        changed = {r.batch_id for r in ends
                   if isinstance(r.outcome, Rejected) or before[r.key]}  # fmt: skip
        for batch_id in sorted(changed):
            outcomes = [r.outcome for r in ends if r.batch_id == batch_id]
            rejections.note(connection, batch_id, outcomes, self._max_failures)

    def _wake_queues(self, connection: Connection, requeued: Sequence[ToRecord]) -> None:
        soonest: dict[str, float] = {}
        for r in requeued:
            delay = r.verdict.delay.total_seconds()
            soonest[r.queue_id] = min(delay, soonest.get(r.queue_id, delay))
        if soonest:
            rows = [{"id": q, "delay": d} for q, d in sorted(soonest.items())]
            connection.execute(self._wake, {"rows": json.dumps(rows)})

    def _tend(
        self, connection: Connection, fresh: Sequence[ToRecord], late: Sequence[ToRecord]
    ) -> None:
        """The mailboxes' rows: the longest cooldown, for the day that Redis forgets, and refusals.

        In one order, and nothing at all where all went well.
        """
        longest: dict[str, timedelta] = {}
        noted: dict[str, list[Outcome]] = {}
        for r in [*fresh, *late]:
            if r.verdict.cooldown:
                longest[r.mailbox] = max(r.verdict.cooldown, longest.get(r.mailbox, timedelta(0)))
        for r in fresh:
            if r.clears or refusal(r.outcome):
                noted.setdefault(r.mailbox, []).append(r.outcome)
        for mailbox in sorted({*longest, *noted}):
            if mailbox in longest:
                until = after(literal(longest[mailbox].total_seconds(), Float))
                connection.execute(cool_mailbox(connection, mailbox, until))
            if mailbox in noted:
                note(connection, mailbox, noted[mailbox])


def _told_as(r: ToRecord) -> tuple[str, int, str, str | None, str | None]:
    """What tells an audit row from all others."""
    answer = r.outcome.answer
    outcome = type(r.outcome).__name__.lower()
    return (r.id, r.fence, outcome, plain(answer.code), plain(answer.client_request_id))


def plain(value: str | None) -> str | None:
    """Text as any database takes it: no NUL, no half of a surrogate pair."""
    if value is None:
        return None
    return value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _claim(c: ToClaim) -> dict[str, Any]:
    return {
        "id": c.id, "size": c.size, "external": c.external, "mailbox": c.mailbox,
        "worker": c.worker, "lease": c.lease, "token_left": c.token_left,
        "addresses": list(c.addresses),
    }  # fmt: skip


def _row(r: ToRecord) -> dict[str, Any]:
    answer = r.outcome.answer
    return {
        "id": r.id, "fence": r.fence, "batch_id": r.batch_id, "mailbox": r.mailbox,
        "worker": r.worker, "recipients": r.recipients, "size": r.size, "external": r.external,
        "outcome": type(r.outcome).__name__.lower(), "status": answer.status,
        "code": plain(answer.code), "detail": plain(answer.detail),
        "request_id": plain(answer.request_id),
        "client_request_id": plain(answer.client_request_id),
        "retry_after": answer.retry_after.total_seconds() if answer.retry_after else None,
        "duration": answer.duration.total_seconds(), "token_left": r.token_left,
        "state": r.verdict.state, "delay": r.verdict.delay.total_seconds(),
        "tries": int(r.verdict.spends_try), "doubt": r.verdict.doubt,
    }  # fmt: skip
