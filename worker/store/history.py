"""What SQL knows of a mailbox's last hours, for a gate whose books Redis has lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Float, Select, and_, literal, select

from worker.limits import WINDOWS, Cost, Limit, Limits, Used, Window
from worker.model import State
from worker.store.clock import after, now
from worker.store.schema import attempts, is_in, mailboxes, messages
from worker.store.transactions import Transactions

#: What an attempt counts as, by its outcome.
_USED = {
    "accepted": Used.ALL, "unknown": Used.ALL, "notsent": Used.NOTHING,
    "throttled": Used.REQUEST, "rejected": Used.REQUEST, "blocked": Used.REQUEST,
}  # fmt: skip
_MS = timedelta(milliseconds=1)


class History(Transactions):
    """Reads only; times are milliseconds from now, by the database's clock."""

    def windows(self, mailbox: str, limits: Limits) -> dict[Limit, Window]:
        """What the windows of the mailbox, and that of the tenant, hold."""
        found = {w: Window(rate.span_ms) for w in WINDOWS if (rate := limits.rate(w))}
        own = {w: found[w] for w in WINDOWS if w in found and w is not Limit.EXTERNAL}
        with self._reading() as connection:
            longest = max((window.span for window in own.values()), default=0)
            ended = _ended(longest, attempts.c.mailbox == mailbox)
            _add(own, _rows(connection, ended))
            if tenant := found.get(Limit.EXTERNAL):
                ended = _ended(tenant.span, attempts.c.external > 0)
                _add({Limit.EXTERNAL: tenant}, _rows(connection, ended))
                # What others have in flight counts as if it ended now: only their own gates know.
                others = _claims(and_(messages.c.mailbox != mailbox, messages.c.external > 0))
                tenant.add(0, sum(row.external for row in connection.execute(others)))
        return found

    def flying(self, mailbox: str) -> list[tuple[str, int, Cost]]:
        """Open claims of the mailbox: message id, how long the claim lives yet (ms), cost."""
        with self._reading() as connection:
            rows = connection.execute(_claims(messages.c.mailbox == mailbox)).all()
        return [(row.id, max(0, (row.lease_until - row.now) // _MS), _cost(row)) for row in rows]

    def cooldown(self, mailbox: str) -> timedelta:
        """How long the mailbox is to rest yet."""
        resting = select(mailboxes.c.cooldown_until, now().label("now")).where(
            mailboxes.c.address == mailbox, mailboxes.c.cooldown_until > now()
        )
        with self._reading() as connection:
            row = connection.execute(resting).one_or_none()
        return row.cooldown_until - row.now if row else timedelta(0)


def _ended(span: int, which: Any) -> Select[Any]:
    a = attempts.c
    since = after(literal(-span / 1000, Float))
    return (
        select(a.at, now().label("now"), a.outcome, a.recipients, a.size, a.external)
        .where(which, a.at > since, a.late.is_(False))  # a late word is of the same request
        .order_by(a.at)
    )


def _claims(which: Any) -> Select[Any]:
    m = messages.c
    return select(
        m.id, m.lease_until, now().label("now"), m.size, m.recipients, m.external
    ).where(is_in(State.SENDING), which)  # fmt: skip


def _rows(connection: Connection, ended: Select[Any]) -> Iterable[Any]:
    """Streamed: a day of a busy mailbox has ten thousand rows."""
    return connection.execution_options(yield_per=1000).execute(ended)


def _add(windows: Mapping[Any, Window], rows: Iterable[Any]) -> None:
    for row in rows:
        cost = _cost(row).used(_USED[row.outcome])
        for limit, window in windows.items():
            window.add((row.at - row.now) // _MS, cost.of(limit))
    for window in windows.values():
        window.forget(0)


def _cost(row: Any) -> Cost:
    return Cost(1, 1, row.recipients, row.size or 0, row.external or 0)
