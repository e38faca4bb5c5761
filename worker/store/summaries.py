"""The store's part for reports: what a batch came to, summed up by the database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from worker.model import State
from worker.store.schema import attempts, messages
from worker.store.transactions import Transactions

#: States of which the report says why.
_TOLD = (State.FAILED, State.UNKNOWN, State.EXPIRED, State.SUPPRESSED, State.CANCELLED)
#: So many codes a status names; a batch seldom has more than two.
MOST_CODES = 5
_UNTOLD = {"mailbox": None, "detail": None}


class Summaries(Transactions):
    """One batch in a few rows, however many messages it has."""

    def batch(self, batch_id: str) -> dict[str, Any]:
        """`minutes`: [(minute, sent)]; `codes`: [(state, code, messages)], the most first;
        `outcomes`: outcome → how often; `mailboxes`: how many sent; `seconds`: of an answer, on
        average; `rest`: seconds for which Graph asked to wait, all answers together.
        """
        with self._reading() as connection:
            answers = _answers(connection, batch_id)
            return {
                "minutes": _minutes(connection, batch_id, self.engine.dialect.name),
                "codes": _codes(connection, batch_id),
                "outcomes": {row.outcome: row.times for row in answers},
                "mailboxes": _mailboxes(connection, batch_id),
                "seconds": _mean(answers),
                "rest": sum(row.rest or 0 for row in answers),
            }

    def trouble(self, batch_id: str) -> list[dict[str, Any]]:
        """Why messages failed or are unknown: state, code, how many; and of the first of each its
        position, mailbox, and what was said. The most first.
        """
        m = messages.c
        with self._reading() as connection:
            found = connection.execute(
                select(
                    m.state, m.error_code.label("code"), func.count().label("count"),
                    func.min(m.position).label("position"),
                )
                .where(m.batch_id == batch_id, m.state.in_([State.FAILED, State.UNKNOWN]))
                .group_by(m.state, m.error_code)
                .order_by(func.count().desc(), m.state, m.error_code)
                .limit(MOST_CODES)
            ).mappings().all()  # fmt: skip
            return [dict(one) | _first(connection, batch_id, one["position"]) for one in found]


def _first(connection: Connection, batch_id: str, position: int) -> dict[str, Any]:
    """What was said of one message at last: mailbox, detail."""
    row = connection.execute(
        select(attempts.c.mailbox, attempts.c.detail)
        .join(messages, messages.c.id == attempts.c.message_id)
        .where(messages.c.batch_id == batch_id, messages.c.position == position)
        .order_by(attempts.c.fence.desc(), attempts.c.late.desc())
        .limit(1)
    ).first()
    return {"mailbox": row.mailbox, "detail": row.detail} if row else _UNTOLD


def _minutes(connection: Connection, batch_id: str, dialect: str) -> list[tuple[datetime, int]]:
    minute: ColumnElement[Any] = (
        func.date_trunc("minute", messages.c.sent_at)
        if dialect == "postgresql"
        else func.strftime("%Y-%m-%dT%H:%M:00+00:00", messages.c.sent_at)
    )
    rows = connection.execute(
        select(minute.label("minute"), func.count().label("sent"))
        .where(messages.c.batch_id == batch_id, messages.c.sent_at.is_not(None))
        .group_by(minute)
        .order_by(minute)
    )
    return [(_instant(row.minute), row.sent) for row in rows]


def _instant(value: datetime | str) -> datetime:
    instant = datetime.fromisoformat(value) if isinstance(value, str) else value
    return instant.astimezone(UTC)


def _codes(connection: Connection, batch_id: str) -> list[tuple[str, str | None, int]]:
    rows = connection.execute(
        select(messages.c.state, messages.c.error_code, func.count().label("times"))
        .where(messages.c.batch_id == batch_id, messages.c.state.in_(_TOLD))
        .group_by(messages.c.state, messages.c.error_code)
        .order_by(func.count().desc(), messages.c.state, messages.c.error_code)
    )
    return [(row.state, row.error_code, row.times) for row in rows]


def _answers(connection: Connection, batch_id: str) -> list[Any]:
    # By way of the messages: attempts have no index of their own by batch.
    rows = connection.execute(
        select(
            attempts.c.outcome, func.count().label("times"),
            func.sum(attempts.c.duration).label("took"),
            func.sum(attempts.c.retry_after).label("rest"),
        )
        .join(messages, messages.c.id == attempts.c.message_id)
        .where(messages.c.batch_id == batch_id)
        .group_by(attempts.c.outcome)
    )  # fmt: skip
    return list(rows)


def _mean(answers: list[Any]) -> float | None:
    accepted = next((row for row in answers if row.outcome == "accepted"), None)
    return accepted.took / accepted.times if accepted and accepted.took else None


def _mailboxes(connection: Connection, batch_id: str) -> int:
    return connection.execute(
        select(func.count(messages.c.mailbox.distinct())).where(messages.c.batch_id == batch_id)
    ).scalar_one()
