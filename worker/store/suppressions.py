"""The store's part for suppressions: who is not to be written to, and what that ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from sqlalchemy import Connection, case, delete, insert, select, update

from worker.model import Due, State
from worker.staging import addresses
from worker.store.clock import now
from worker.store.given import is_among
from worker.store.schema import events, is_in, messages, suppressions
from worker.store.statements import first_look, insert_for
from worker.store.transactions import Transactions

#: So many addresses one statement takes.
STEP = 500
#: The code of a message that ended because nobody was left to write to.
SUPPRESSED = "Suppressed"
_FIELDS = ("to", "cc", "bcc")
#: Those of the list `given` that are suppressed.
_AMONG = {
    dialect: select(suppressions.c.address).where(
        is_among(dialect, suppressions.c.address, "given")
    )
    for dialect in ("postgresql", "sqlite")
}


class Suppressions(Transactions):
    """Addresses that are not written to. They are kept in lower case."""

    def add(self, entries: Iterable[tuple[str, str | None]], *, by: str, why: str | None) -> int:
        """Adds (address, reason); how many were new. What is there stays as it is."""
        found, rest = 0, iter(entries)
        while step := {a.lower(): reason for a, reason in islice(rest, STEP)}:
            found += self._do(lambda c, step=step: suppress(c, step, by=by, why=why))  # type: ignore[misc]
        return found

    def remove(self, given: Iterable[str], *, by: str, why: str | None) -> int:
        """Takes addresses off; how many were there."""
        found, rest = 0, iter(given)
        while step := [a.lower() for a in islice(rest, STEP)]:
            found += self._do(lambda c, step=step: _remove(c, step, by, why))  # type: ignore[misc]
        return found

    def listed(self, limit: int, after: str = "") -> list[dict[str, Any]]:
        """The next after the address `after`, in order: address, reason, by, at."""
        with self._reading() as connection:
            rows = connection.execute(
                select(suppressions)
                .where(suppressions.c.address > after)
                .order_by(suppressions.c.address)
                .limit(limit)
            )
            return [dict(row) for row in rows.mappings()]

    def all(self) -> Iterator[dict[str, Any]]:
        """Every suppression, in the order of addresses, in flat memory."""
        last = ""
        while rows := self.listed(STEP, last):
            yield from rows
            last = rows[-1]["address"]

    def sift(self, connection: Connection, due: Sequence[Due]) -> list[Due]:
        """The same messages without the recipients that are suppressed.

        `addresses` of each: who is left. None is left: the message is to end (see `end`).
        """
        wanted = [[a.lower() for a in addresses(one.content)] for one in due]
        bad = _among(connection, {a for each in wanted for a in each})
        return [_without(one, its, bad) for one, its in zip(due, wanted, strict=True)]

    def end(self, sifted: Sequence[Due]) -> None:
        """queued → suppressed for those of which nobody is left; unknown if in doubt.

        Whom a message with others left leaves out is an event, once.
        """
        self._do(lambda connection: _end(connection, sifted))


def _among(connection: Connection, given: Iterable[str]) -> set[str]:
    """Those of these addresses that are suppressed."""
    found: set[str] = set()
    rest = iter(sorted(given))
    while step := list(islice(rest, STEP)):
        found |= set(connection.execute(_AMONG[connection.dialect.name], {"given": step}).scalars())
    return found


def _without(due: Due, its: Sequence[str], bad: set[str]) -> Due:
    left = tuple(a for a in its if a not in bad)
    if len(left) == len(its):
        return replace(due, addresses=left)
    content: dict[str, Any] = dict(due.content)
    out = []
    for field in _FIELDS:
        there = content.get(field) or []
        content[field] = [one for one in there if one["address"].lower() not in bad]
        out += [f"{field}[{n}]" for n, one in enumerate(there) if one["address"].lower() in bad]
    return replace(due, content=content, recipients=len(left), addresses=left, left_out=tuple(out))


def _end(connection: Connection, sifted: Sequence[Due]) -> None:
    over = [one for one in sifted if not one.addresses]
    ended: set[str] = set()
    if over:
        rows = connection.execute(
            update(messages)
            .where(messages.c.id.in_([one.id for one in over]), is_in(State.QUEUED))
            .values(
                state=case((messages.c.doubt, State.UNKNOWN), else_=State.SUPPRESSED),
                error_code=SUPPRESSED,
                **first_look(messages.c.doubt),
            )
            .returning(messages.c.id)
        )
        ended = set(rows.scalars())
    told = {
        row.message_id
        for row in connection.execute(
            select(events.c.message_id).where(
                events.c.message_id.in_([one.id for one in sifted]), events.c.kind == "suppressed"
            )
        )
    }
    happened = [
        _event(one) for one in sifted
        if one.id in ended or (one.addresses and one.id not in told)
    ]  # fmt: skip
    if happened:
        connection.execute(insert(events).values(at=now()), happened)


def _event(one: Due) -> dict[str, Any]:
    """Places, no addresses: what is erased must not live on here."""
    return {
        "kind": "suppressed", "batch_id": one.batch_id, "message_id": one.id, "by": "postroom",
        "detail": {"left_out": list(one.left_out), "left": len(one.addresses)},
    }  # fmt: skip


def suppress(
    connection: Connection, step: Mapping[str, str | None], *, by: str, why: str | None
) -> int:
    """Adds addresses (in lower case) with their reasons; how many were new."""
    there = _among(connection, step)
    rows = [{"address": a, "reason": reason, "by": by} for a, reason in step.items()
            if a not in there]  # fmt: skip
    if rows:
        new = insert_for(connection.dialect.name)
        connection.execute(new(suppressions).values(at=now()).on_conflict_do_nothing(), rows)
        _tell(connection, "suppress", len(rows), by, why)
    return len(rows)


def _remove(connection: Connection, step: Sequence[str], by: str, why: str | None) -> int:
    done = connection.execute(delete(suppressions).where(suppressions.c.address.in_(step)))
    if done.rowcount:
        _tell(connection, "unsuppress", done.rowcount, by, why)
    return done.rowcount


def _tell(connection: Connection, kind: str, count: int, by: str, why: str | None) -> None:
    connection.execute(
        insert(events).values(at=now(), kind=kind, by=by, why=why, detail={"addresses": count})
    )
