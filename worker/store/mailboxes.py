"""The store's part in mailboxes: who is suspended, what limits differ, who is in which pool.

A mailbox that refuses several times in a row is suspended and probed with one message at a growing
interval; one that an operator suspended waits for an operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    Connection,
    Float,
    Subquery,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union,
    update,
)

from worker.meanings import meaning
from worker.model import Accepted, Answer, Blame, Blocked, Outcome
from worker.store.clock import after, now
from worker.store.schema import batches, events, mailboxes, pools
from worker.store.statements import insert_for
from worker.store.transactions import Transactions

#: So many refusals in a row suspend a mailbox.
REFUSALS = 3
#: Policies of Exchange take up to two hours to apply; a mended one should not wait much longer.
#: https://learn.microsoft.com/exchange/permissions-exo/application-rbac#limitations
PROBE_FIRST, PROBE_LONGEST = timedelta(minutes=1), timedelta(minutes=30)
#: The code of a suspension that an operator ordered.
BY_OPERATOR = "Suspended"
#: Who a step of ours is laid to.
POSTROOM = "postroom"
#: A mailbox that was sent from within so many days is listed, with nothing else known of it.
LISTED = timedelta(days=30)

_m = mailboxes.c


@dataclass(frozen=True, slots=True)
class MailboxSeen:
    """What a lane must know of its mailbox before it works."""

    limits: Mapping[str, Any] = field(default_factory=dict)  #: what differs from the settings
    refusals: int = 0  #: in a row
    suspended: bool = False
    probe_in: float | None = None  #: seconds until one message may try; None: only an operator ends
    rest: float = 0.0  #: seconds of its cooldown


# ---- in the transaction that records outcomes ----------------------------------------------------


def note(connection: Connection, address: str, outcomes: Sequence[Outcome]) -> None:
    """Outcomes of a mailbox, in their order: refusals, and acceptances that end what they began."""
    clears = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Accepted)]
    since = outcomes[clears[-1] + 1 :] if clears else outcomes
    if clears:
        _accepted(connection, address)
    if since:
        _refused(connection, address, len(since), since[-1].answer)


def refusal(outcome: Outcome) -> bool:
    """Whether the mailbox refused: through no fault of the message, nor of the credential."""
    return isinstance(outcome, Blocked) and outcome.blame is Blame.MAILBOX


def _refused(connection: Connection, address: str, times: int, answer: Answer) -> None:
    """A mailbox refused `times` more in a row: the third suspends, a probe's puts off the next."""
    counted = case((_m.suspended_at.is_(None), _m.refusals + times), else_=_m.refusals)
    row = connection.execute(
        insert_for(connection.dialect.name)(mailboxes)
        .values(address=address, refusals=times)
        .on_conflict_do_update(index_elements=["address"], set_={"refusals": counted})
        .returning(_m.refusals, _m.suspended_at, _m.probes)
    ).one()
    reason = str(meaning(answer.code, answer.status))
    said: dict[str, Any] = {
        "suspended_code": answer.code or f"HTTP{answer.status}", "suspended_reason": reason,
    }  # fmt: skip
    if row.suspended_at is not None:
        # What was under way when it was suspended is no probe.
        probed = and_(_m.address == address, _m.probe_at <= now())
        again = {"probes": row.probes + 1, "probe_at": after(_seconds(_interval(row.probes + 1)))}
        connection.execute(update(mailboxes).where(probed).values(**again, **said))
    elif row.refusals >= REFUSALS:
        connection.execute(
            update(mailboxes)
            .where(_m.address == address)
            .values(suspended_at=now(), probes=0, probe_at=after(_seconds(PROBE_FIRST)), **said)
        )
        detail = {"code": answer.code, "status": answer.status, "detail": answer.detail}
        _tell(connection, "suspend", address, POSTROOM, reason, detail)


def suspend_for(connection: Connection, address: str, code: str, reason: str) -> None:
    """Suspends a mailbox that no probe could try, until an operator resumes it; told once."""
    if _suspend(connection, address, code, reason):
        _tell(connection, "suspend", address, POSTROOM, reason, {"code": code})


def _suspend(connection: Connection, address: str, code: str, reason: str) -> bool:
    """Without probes; False where that is so already."""
    _make_sure(connection, address)
    done = connection.execute(
        update(mailboxes)
        .where(_m.address == address, or_(_m.suspended_at.is_(None), _m.probe_at.is_not(None)))
        .values(
            suspended_at=func.coalesce(_m.suspended_at, now()), suspended_code=code,
            suspended_reason=reason, probe_at=None,
        )
    )  # fmt: skip
    return bool(done.rowcount)


def known() -> Subquery:
    """Addresses of which anything is known, that are in a pool, or were lately sent from."""
    lately = and_(batches.c.target_kind == "mailbox",
                  batches.c.created_at > after(_seconds(-LISTED)))  # fmt: skip
    return union(
        select(_m.address), select(pools.c.mailbox), select(batches.c.target).where(lately)
    ).subquery("known")


def _accepted(connection: Connection, address: str) -> None:
    """A mailbox that had refused, or was suspended, sent: it is as good as any."""
    row = connection.execute(
        select(_m.suspended_at, _m.probe_at).where(_m.address == address).with_for_update()
    ).one_or_none()
    if row is None or (row.suspended_at and row.probe_at is None):
        return  # an operator suspended it while this was under way
    connection.execute(update(mailboxes).where(_m.address == address).values(_lifted(0)))
    if row.suspended_at:
        _tell(connection, "resume", address, POSTROOM, "a probe was accepted")


def _interval(probes: int) -> timedelta:
    longer: timedelta = PROBE_FIRST * 2 ** min(probes, 10)
    return min(PROBE_LONGEST, longer)


def _seconds(span: timedelta) -> Any:
    return literal(span.total_seconds(), Float)


def _lifted(refusals: Any) -> dict[str, Any]:
    return {
        "refusals": refusals, "suspended_at": None, "suspended_code": None,
        "suspended_reason": None, "probe_at": None, "probes": 0,
    }  # fmt: skip


def _tell(
    connection: Connection, kind: str, mailbox: str | None, by: str, why: str | None,
    detail: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    row = {"at": now(), "kind": kind, "mailbox": mailbox, "by": by, "why": why, "detail": detail}
    connection.execute(insert(events).values(row))


# ---- for lanes, the sweep and people -------------------------------------------------------------


class Mailboxes(Transactions):
    """Mailboxes and pools: what is known of them, and what an operator does to them."""

    def seen(self, address: str) -> MailboxSeen:
        """What a lane must know of this mailbox."""
        with self._reading() as connection:
            row = connection.execute(
                select(
                    _m.limits, _m.refusals, _m.suspended_at, _m.probe_at, _m.cooldown_until,
                    now().label("now"),
                ).where(_m.address == address)
            ).one_or_none()  # fmt: skip
        if row is None:
            return MailboxSeen()
        probe_in = (row.probe_at - row.now).total_seconds() if row.probe_at else None
        rest = (row.cooldown_until - row.now).total_seconds() if row.cooldown_until else 0.0
        suspended = row.suspended_at is not None
        return MailboxSeen(row.limits or {}, row.refusals, suspended, probe_in, max(0.0, rest))

    def resting(self) -> set[str]:
        """The suspended mailboxes that nobody is to wake: their probe is not due."""
        waits = or_(_m.probe_at.is_(None), _m.probe_at > now())
        with self._reading() as connection:
            found = select(_m.address).where(_m.suspended_at.is_not(None), waits)
            return set(connection.execute(found).scalars())

    def suspended(self, addresses: Iterable[str]) -> list[dict[str, Any]]:
        """Those of these mailboxes that are suspended: mailbox, code, reason, since."""
        with self._reading() as connection:
            rows = connection.execute(
                select(
                    _m.address.label("mailbox"), _m.suspended_code.label("code"),
                    _m.suspended_reason.label("reason"), _m.suspended_at.label("since"),
                )
                .where(_m.address.in_(list(addresses)), _m.suspended_at.is_not(None))
                .order_by(_m.address)
            )  # fmt: skip
            return [dict(row) for row in rows.mappings()]

    def suspend(self, address: str, *, by: str, why: str | None) -> bool:
        """Nothing is claimed for this mailbox until it is resumed; whether that is new.

        One that was suspended for its refusals is not probed any more.
        """
        reason = f"suspended by {by}" + (f": {why}" if why else "")

        def work(connection: Connection) -> bool:
            new = _suspend(connection, address, BY_OPERATOR, reason)
            if new:
                _tell(connection, "suspend", address, by, why)
            return new

        return self._do(work)

    def resume(self, address: str, *, by: str, why: str | None) -> bool:
        """Lifts the suspension; whether there was one.

        One that was suspended for its refusals tries with one message, and a refusal of that one
        suspends it again.
        """
        refusals = case((_m.probe_at.is_(None), 0), else_=REFUSALS - 1)

        def work(connection: Connection) -> bool:
            done = connection.execute(
                update(mailboxes)
                .where(_m.address == address, _m.suspended_at.is_not(None))
                .values(_lifted(refusals))
            )
            if done.rowcount:
                _tell(connection, "resume", address, by, why)
            return bool(done.rowcount)

        return self._do(work)

    def limit(
        self, address: str, changes: Mapping[str, Any], *, by: str, why: str | None
    ) -> dict[str, Any]:
        """Limits of this mailbox alone, by name; None takes one back. Gives those that differ."""

        def work(connection: Connection) -> dict[str, Any]:
            _make_sure(connection, address)
            there = connection.execute(
                select(_m.limits).where(_m.address == address).with_for_update()
            ).scalar()
            limits = {k: v for k, v in {**(there or {}), **changes}.items() if v is not None}
            if limits != (there or {}):
                connection.execute(
                    update(mailboxes).where(_m.address == address).values(limits=limits or None)
                )
                _tell(connection, "limit", address, by, why, dict(changes))
            return limits

        return self._do(work)

    def all(self) -> list[dict[str, Any]]:
        """Every mailbox that is known or was lately sent from, with its state and limits."""
        those = known()
        address = those.c.address
        cooling = case((_m.cooldown_until > now(), _m.cooldown_until))
        found = (
            select(
                address.label("mailbox"), cooling.label("cooldown_until"), _m.limits,
                _m.suspended_code.label("code"), _m.suspended_reason.label("reason"),
                _m.suspended_at.label("since"), _m.probe_at,
            )
            .select_from(those.outerjoin(mailboxes, _m.address == address))
            .order_by(address)
        )  # fmt: skip
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(found).mappings()]

    # ---- pools ---------------------------------------------------------------------------------

    def pools(self) -> dict[str, list[str]]:
        """The pools that live in SQL: name → mailboxes, sorted."""
        found: dict[str, list[str]] = {}
        with self._reading() as connection:
            for row in connection.execute(select(pools).order_by(pools.c.name, pools.c.mailbox)):
                found.setdefault(row.name, []).append(row.mailbox)
        return found

    def set_pool(
        self, name: str, members: Sequence[str], *, by: str = POSTROOM, why: str | None = None
    ) -> None:
        """The mailboxes of a pool from now on; none deletes it."""
        wanted = sorted(set(members))

        def work(connection: Connection) -> None:
            there = connection.execute(select(pools.c.mailbox).where(pools.c.name == name))
            if sorted(there.scalars()) == wanted:
                return
            connection.execute(delete(pools).where(pools.c.name == name))
            if wanted:
                new = insert_for(connection.dialect.name)(pools).on_conflict_do_nothing()
                connection.execute(new, [{"name": name, "mailbox": m} for m in wanted])
            _tell(connection, "pool", None, by, why, {"pool": name, "mailboxes": wanted})

        self._do(work)


def _make_sure(connection: Connection, address: str) -> None:
    new = insert_for(connection.dialect.name)(mailboxes)
    connection.execute(new.values(address=address).on_conflict_do_nothing())
