"""The store's part in forgetting: contents go first, the audit later, a person when they ask.

Everything goes in steps of a few hundred rows, each a transaction of its own, so that sends go on.
What is left of a recipient is a pseudonym: the keyed hash of the address, by which somebody who
holds the key can still find what happened to a message.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import (
    Connection,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.sql.elements import ColumnElement

from worker.model import State
from worker.store.clock import after, now
from worker.store.schema import attempts, batches, bounces, contents, events, messages
from worker.store.statements import first_look
from worker.store.transactions import Transactions

STEP = 500
#: A batch's times are Redis's, a content's the database's.
APART = 3600.0
_PREFIX = "hmac:"

Pseudonym = Callable[[str], str | None]


def pseudonym(key: str | None) -> Pseudonym:
    """Addresses to keyed hashes; without a key to nothing at all."""

    def of(address: str) -> str | None:
        if not key:
            return None
        if address.startswith(_PREFIX):
            return address
        digest = hmac.new(key.encode(), address.strip().lower().encode(), hashlib.sha256)
        return _PREFIX + digest.hexdigest()[:40]

    return of


class Retention(Transactions):
    """What is forgotten, and when. Times are seconds since a batch was finished."""

    def purge_content(self, older: float, keep: Pseudonym) -> Counter[str]:
        """Contents, templates and addresses of batches that finished longer ago go; rows stay.

        Gives how many batches, messages and attachments it was.
        """
        done: Counter[str] = Counter(batches=0, messages=0, attachments=0)
        while batch_id := self._do(partial(_unpurged, older=older)):
            last = 0
            while step := self._do(partial(_purge_step, batch_id=batch_id, last=last, keep=keep)):
                done["messages"] += len(step)
                last = step[-1]
            done["batches"] += self._do(partial(_purged, batch_id=batch_id))
        while n := self._do(partial(_purge_attachments, older=older)):
            done["attachments"] += n
        return done

    def purge_audit(self, older: float) -> Counter[str]:
        """Batches that finished longer ago go with all that happened to them."""
        done: Counter[str] = Counter(batches=0, messages=0, events=0)
        while batch_id := self._do(partial(_finished, older=older)):
            while n := self._do(partial(_forget_messages, batch_id=batch_id)):
                done["messages"] += n
            done["events"] += self._do(partial(_forget_batch, batch_id=batch_id))
            done["batches"] += 1
        while n := self._do(partial(_forget_events, older=older)):
            done["events"] += n
        return done

    def erase(self, address: str, keep: Pseudonym, *, by: str, why: str | None) -> Counter[str]:
        """Forgets a person: what is queued to them is cancelled, contents and address go.

        Gives erased, cancelled, and left: in flight just now, so that it must be asked again.
        """
        done: Counter[str] = Counter(erased=0, cancelled=0, left=0)
        last = ""
        while step := self._do(partial(_erase_step, address=address, last=last, keep=keep)):
            counts, last = step
            done += counts
        whole = {name: done[name] for name in ("erased", "cancelled", "left")}
        self._do(partial(_tell, kind="erase", by=by, why=why,
                         detail=whole | {"recipient": keep(address)}))  # fmt: skip
        return Counter(whole)


# ---- contents -----------------------------------------------------------------------------------


def _over(older: float) -> ColumnElement[bool]:
    return and_(batches.c.finished_at.is_not(None), batches.c.finished_at < after(literal(-older)))


def _unpurged(connection: Connection, *, older: float) -> str | None:
    return connection.execute(
        select(batches.c.id)
        .where(_over(older), batches.c.purged_at.is_(None))
        .order_by(batches.c.finished_at)
        .limit(1)
    ).scalar()


def _purge_step(
    connection: Connection, *, batch_id: str, last: int, keep: Pseudonym
) -> Sequence[int]:
    """Empties the next messages of a batch; their positions, none where it was reopened."""
    b = batches.c
    still = select(b.id).where(b.id == batch_id, b.finished_at.is_not(None)).with_for_update()
    if connection.execute(still).scalar() is None:
        return []
    m = messages.c
    rows = connection.execute(
        select(m.id, m.position, m.recipient)
        .where(m.batch_id == batch_id, m.position > last)
        .order_by(m.position)
        .limit(STEP)
    ).all()
    _empty(connection, [(row.id, keep(row.recipient) if row.recipient else None) for row in rows])
    return [row.position for row in rows]


def _empty(connection: Connection, of: Sequence[tuple[str, str | None]]) -> None:
    if of:
        connection.execute(
            update(messages)
            .where(messages.c.id == bindparam("one"))
            .values(content=null(), recipient=bindparam("left")),
            [{"one": one, "left": left} for one, left in of],
        )


def _purged(connection: Connection, *, batch_id: str) -> int:
    b = batches.c
    return connection.execute(
        update(batches)
        .where(b.id == batch_id, b.finished_at.is_not(None))
        .values(template=null(), purged_at=now())
    ).rowcount


def _purge_attachments(connection: Connection, *, older: float) -> int:
    """Those that only purged batches can refer to: used before any other was made."""
    oldest = select(func.min(batches.c.created_at)).where(batches.c.purged_at.is_(None))
    if (first := connection.execute(oldest).scalar()) is None:
        first = connection.execute(select(now())).scalar_one()
    c = contents.c
    before = connection.execute(select(now())).scalar_one() - first
    age = max(older, before.total_seconds() + APART)
    step = select(c.sha256).where(c.used_at < after(literal(-age))).limit(STEP)
    names = connection.execute(step).scalars().all()
    return connection.execute(
        delete(contents).where(c.sha256.in_(names), c.used_at < after(literal(-age)))
    ).rowcount


# ---- the audit ----------------------------------------------------------------------------------


def _finished(connection: Connection, *, older: float) -> str | None:
    found = select(batches.c.id).where(_over(older)).order_by(batches.c.finished_at).limit(1)
    return connection.execute(found).scalar()


def _forget_messages(connection: Connection, *, batch_id: str) -> int:
    ids = connection.execute(
        select(messages.c.id).where(messages.c.batch_id == batch_id).limit(STEP)
    ).scalars().all()  # fmt: skip
    for table in (attempts, bounces, events):
        connection.execute(delete(table).where(table.c.message_id.in_(ids)))
    return connection.execute(delete(messages).where(messages.c.id.in_(ids))).rowcount


def _forget_batch(connection: Connection, *, batch_id: str) -> int:
    gone = connection.execute(delete(events).where(events.c.batch_id == batch_id)).rowcount
    connection.execute(delete(batches).where(batches.c.id == batch_id))
    return gone


def _forget_events(connection: Connection, *, older: float) -> int:
    """Those of no batch: of mailboxes, suppressions, erasures."""
    step = (
        select(events.c.id)
        .where(events.c.batch_id.is_(None), events.c.at < after(literal(-older)))
        .order_by(events.c.id)
        .limit(STEP)
    )
    ids = connection.execute(step).scalars().all()
    return connection.execute(delete(events).where(events.c.id.in_(ids))).rowcount


# ---- a person -----------------------------------------------------------------------------------


def _erase_step(
    connection: Connection, *, address: str, last: str, keep: Pseudonym
) -> tuple[Counter[str], str] | None:
    """The next messages to this address: (what became of them, the last one's id)."""
    m = messages.c
    rows = connection.execute(
        select(m.id, m.recipient, m.state)
        .where(_is_to(address), *([m.id > last] if last else []))
        .order_by(m.id)
        .limit(STEP)
        .with_for_update()
    ).all()
    if not rows:
        return None
    queued = [row.id for row in rows if row.state == State.QUEUED]
    if queued:
        connection.execute(
            update(messages)
            .where(m.id.in_(queued), m.doubt.is_(False))
            .values(state=State.CANCELLED)
        )
        connection.execute(
            update(messages)
            .where(m.id.in_(queued), m.doubt.is_(True))
            .values(state=State.UNKNOWN, **first_look(m.doubt))
        )
    ended = [row for row in rows if row.state != State.SENDING]
    mine = address.lower()
    _empty(connection, [
        (row.id, keep(mine) if (row.recipient or "").lower() == mine else row.recipient)
        for row in ended
    ])  # fmt: skip
    counts = Counter(erased=len(ended), cancelled=len(queued), left=len(rows) - len(ended))
    return counts, rows[-1].id


def _is_to(address: str) -> ColumnElement[bool]:
    """Messages that name the address anywhere: first of `to`, another recipient, a variable."""
    m, mine = messages.c, address.lower()
    text = func.lower(cast(m.content, Text))
    words = {mine, json.dumps(mine)[1:-1]}  # as it stands in JSON on either database
    return or_(
        func.lower(m.recipient) == mine,
        and_(
            m.content.is_not(None),
            or_(*(text.contains(f'"{word}"', autoescape=True) for word in words)),
        ),
    )


def _tell(connection: Connection, *, kind: str, by: str, why: str | None, detail: Any) -> None:
    connection.execute(insert(events).values(at=now(), kind=kind, by=by, why=why, detail=detail))
