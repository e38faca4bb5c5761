"""The store's part in bounces: which mailboxes to read, and what their reports say of messages.

A report is written once, whoever reads it and however often; what follows from it follows once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Float, distinct, exists, func, literal, select

from worker.meanings.bounces import Kind, of_tenant, quota_reason
from worker.staging import addresses
from worker.store.clock import after, now
from worker.store.mailboxes import known, suspend_for
from worker.store.schema import attempts, bounces, messages
from worker.store.statements import insert_for
from worker.store.suppressions import suppress
from worker.store.transactions import Transactions

#: A mailbox is read for so long after it sent last: Exchange tries for a day, others for five.
#: https://learn.microsoft.com/exchange/mail-flow-best-practices/non-delivery-reports-in-exchange-online
COMES_WITHIN = timedelta(days=5)
#: Who a suppression is laid to.
BY = "bounces"


@dataclass(frozen=True, slots=True)
class Bounce:
    """A report about one message."""

    message_id: str
    report_id: str
    code: str | None
    kind: Kind
    own: bool  #: by Exchange itself, which alone is believed about the sender
    named: frozenset[str]  #: addresses that it speaks of, in lower case


class Bounces(Transactions):
    """Reports that came back."""

    def senders(self) -> list[str]:
        """The mailboxes that sent lately, sorted. Walks the index from mailbox to mailbox."""
        a = attempts.c
        first = select(func.min(a.mailbox).label("mailbox")).cte("senders", recursive=True)
        following = select(func.min(a.mailbox)).where(a.mailbox > first.c.mailbox)
        every = first.union_all(
            select(following.scalar_subquery()).where(first.c.mailbox.is_not(None))
        )
        since = after(literal(-COMES_WITHIN.total_seconds(), Float))
        lately = exists().where(a.mailbox == every.c.mailbox, a.at > since)
        with self._reading() as connection:
            found = connection.execute(select(every.c.mailbox).where(lately))
            return sorted(found.scalars())

    def record(self, mailbox: str, found: Sequence[Bounce], *, suppress_hard: bool) -> Counter[str]:
        """Writes what is new, for messages that this mailbox sent; how many of each kind.

        A quota suspends the mailbox, and one of the tenant all mailboxes, until an operator resumes
        them: Graph goes on accepting what is never delivered, so no probe could tell.
        `suppress_hard`: nobody writes to a recipient again whose address is bad.
        """
        return self._do(lambda c: _record(c, mailbox, found, suppress_hard))


def bounced(connection: Connection, batch_id: str) -> int:
    """How many messages of a batch bounced."""
    count = select(func.count(distinct(bounces.c.message_id)))
    return connection.execute(count.where(bounces.c.batch_id == batch_id)).scalar_one()


def why_bounced() -> Any:
    """For a statement on messages: the code of a report, else its kind; NULL where none came."""
    b = bounces.c
    said = select(func.min(func.coalesce(b.code, b.kind))).where(b.message_id == messages.c.id)
    return said.scalar_subquery().label("bounced")


def of_message(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    """The reports about a message, in the order in which they were read."""
    b = bounces.c
    rows = connection.execute(
        select(b.at, b.kind, b.code, b.mailbox, b.report_id)
        .where(b.message_id == message_id)
        .order_by(b.at, b.report_id)
    )
    return [dict(row) for row in rows.mappings()]


def _record(
    connection: Connection, mailbox: str, found: Sequence[Bounce], suppress_hard: bool
) -> Counter[str]:
    m, a, done = messages.c, attempts.c, Counter[str]()
    ids = sorted({one.message_id for one in found})
    from_here = exists().where(a.message_id == m.id, a.mailbox == mailbox)
    its = select(m.id, m.batch_id, m.content).where(m.id.in_(ids), from_here)
    known = {row.id: row for row in connection.execute(its)}
    for one in found:
        row = known.get(one.message_id)
        if row is None or not _write(connection, mailbox, row.batch_id, one):
            continue
        done[str(one.kind)] += 1
        if one.kind is Kind.QUOTA and one.own:
            _stop(connection, mailbox, one.code)
        elif one.kind is Kind.HARD and suppress_hard:
            why = f"a report says {one.code}"
            bad = dict.fromkeys(_bad(row.content, one.named), f"bounced: {one.code}")
            suppress(connection, bad, by=BY, why=why)
    return done


def _stop(connection: Connection, mailbox: str, code: str | None) -> None:
    """Nothing more is sent by whom a quota binds."""
    others = connection.execute(select(known())).scalars() if of_tenant(code) else ()
    for address in sorted({mailbox, *others}):
        suspend_for(connection, address, code or "Bounced", quota_reason(code))


def _write(connection: Connection, mailbox: str, batch_id: str, one: Bounce) -> bool:
    """Whether the report is new."""
    row = {
        "message_id": one.message_id, "report_id": one.report_id, "batch_id": batch_id,
        "mailbox": mailbox, "kind": one.kind, "code": one.code, "at": now(),
    }  # fmt: skip
    new = insert_for(connection.dialect.name)(bounces).values(row).on_conflict_do_nothing()
    return connection.execute(new.returning(bounces.c.message_id)).first() is not None


def _bad(content: Mapping[str, Any] | None, named: frozenset[str]) -> list[str]:
    """The recipients that a report is about: an only one, else those that it names."""
    there = sorted({a.lower() for a in addresses(content or {})})
    return there if len(there) == 1 else [a for a in there if a in named]
