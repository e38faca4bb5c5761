"""The store's part in settling doubt: looks that are due, what they showed, a person's word.

Nothing can come any more of a message in doubt once the bearer tokens of all its doubtful attempts
have ended: from then on Graph itself refuses the old requests, should a paused process wake and
send one. `wait` is what is added to that, in seconds: a margin and the request timeout.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import exists, select, update

from worker.model import State
from worker.store.doubt import looks
from worker.store.doubt.hand import Hand, settle
from worker.store.doubt.values import InDoubt, Looked, Settled, seconds_on
from worker.store.schema import is_in, messages
from worker.store.transactions import Transactions

__all__ = ["Doubt", "InDoubt", "Looked", "Settled"]


class Doubt(Transactions):
    """Looks and settling. Each transition stands in one statement with its guard in the WHERE."""

    def due(self) -> bool:
        """Whether a look is due. Locks nothing."""
        with self._reading() as connection:
            return bool(connection.execute(select(exists(looks.due_looks(1)))).scalar())

    def take(self, count: int, *, lease: float, wait: float) -> list[InDoubt]:
        """Due looks, at most `count`; nobody else gets them for `lease` seconds."""
        return self._do(lambda connection: looks.take(connection, count, lease, wait))

    def postpone(self, ones: Iterable[InDoubt], seconds: float) -> None:
        """These were not looked for: they are due again in so many seconds."""
        ids = sorted(one.id for one in ones)
        if ids:
            later = update(messages).where(messages.c.id.in_(ids), is_in(State.UNKNOWN))
            self._do(lambda c: c.execute(later.values(look_at=seconds_on(seconds))))

    def found(self, looked: Looked) -> bool:
        """unknown → sent, with the evidence; False where it is settled already."""
        return self._do(lambda connection: looks.found(connection, looked))

    def stays(self, looked: Looked) -> bool:
        """It stays unknown, and is looked for again if `again` says when."""
        return self._do(lambda connection: looks.stays(connection, looked))

    def nothing_came(self, looked: Looked, *, wait: float, max_attempts: int) -> State | None:
        """It was not sent: queued again, or ended where its tries or its batch have ended.

        Its new state, or None where this cannot be said: it is settled already, something may
        still come, or it is quarantined.
        """
        return self._do(lambda c: looks.nothing_came(c, looked, wait, max_attempts))

    def settle(
        self, to: State, *, batch_id: str | None = None, message_id: str | None = None,
        force: bool, wait: float, age: float, by: str, why: str | None,
    ) -> Settled | None:  # fmt: skip
        """A person's word on one message or on a batch: unknown → sent, failed or queued.

        Queued only where nothing can come any more, unless `force`d; what is forced stays in
        doubt. `age`: seconds that what is queued may wait. None: there is no such message or
        batch. Raises WrongState for queueing in a cancelled batch.
        """
        its = messages.c.batch_id == batch_id if batch_id else messages.c.id == message_id
        hand = Hand(to, its, force, wait, age, by, why)
        return self._do(lambda c: settle(c, hand, batch_id, message_id))
