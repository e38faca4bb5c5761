"""The store's part in messages that go by a draft: which draft, how far, and whether it was sent.

Every write is guarded by the claim: who lost it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Float, delete, literal, select, update

from worker.model import State
from worker.store.clock import after, now
from worker.store.schema import drafts, is_in, messages
from worker.store.statements import insert_for
from worker.store.transactions import Transactions


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a message's draft in a mailbox."""

    draft_id: str | None
    upload_url: str | None


class Drafts(Transactions):
    """The drafts of claimed messages. `fence` is the claim's."""

    def begin(self, message_id: str, fence: int, mailbox: str) -> Draft | None:
        """The claim at work has not released the draft yet; None where the claim is lost.

        A draft in another mailbox is forgotten, for it did not go on there: nobody sent it, and
        nobody will.
        """
        return self._do(lambda c: _begin(c, message_id, fence, mailbox))

    def keep(
        self, message_id: str, fence: int, *, draft_id: str | None, upload_url: str | None = None
    ) -> bool:
        """Commits which draft it is and what is being uploaded; whether the claim is ours."""
        values = {"draft_id": draft_id, "upload_url": upload_url, "at": now()}
        return self._do(lambda c: _change(c, message_id, fence, values))

    def release(self, message_id: str, fence: int, lease: float) -> bool:
        """From now on Graph may be asked to send the draft; whether the claim is ours.

        Its lease begins anew (`lease` seconds): whoever is just ending the old one sees that it
        lives, and does not take the message for one that was never sent.
        """

        def work(connection: Connection) -> bool:
            held = connection.execute(
                update(messages)
                .where(
                    messages.c.id == message_id,
                    messages.c.fence == fence,
                    is_in(State.SENDING),
                    messages.c.lease_until > now(),
                )
                .values(lease_until=after(literal(lease, Float)))
            )
            if not held.rowcount:
                return False
            return _change(connection, message_id, fence, {"released": True})

        return self._do(work)

    def forget(self, message_id: str) -> None:
        """Another mailbox may go on with this message."""
        self._do(lambda c: c.execute(delete(drafts).where(drafts.c.message_id == message_id)))


def _begin(connection: Connection, message_id: str, fence: int, mailbox: str) -> Draft | None:
    if not _claimed(connection, message_id, fence):
        return None
    new = insert_for(connection.dialect.name)(drafts)
    connection.execute(
        new.values(
            message_id=message_id, mailbox=mailbox, at=now(), released=False
        ).on_conflict_do_nothing()
    )
    there = connection.execute(
        select(drafts.c.mailbox, drafts.c.draft_id, drafts.c.upload_url).where(
            drafts.c.message_id == message_id
        )
    ).one()
    values: dict[str, Any] = {"released": False, "at": now()}
    if there.mailbox != mailbox:
        values |= {"mailbox": mailbox, "draft_id": None, "upload_url": None}
    connection.execute(update(drafts).where(drafts.c.message_id == message_id).values(**values))
    if there.mailbox != mailbox:
        return Draft(None, None)
    return Draft(there.draft_id, there.upload_url)


def _change(connection: Connection, message_id: str, fence: int, values: dict[str, Any]) -> bool:
    if not _claimed(connection, message_id, fence):
        return False
    change = update(drafts).where(drafts.c.message_id == message_id).values(**values)
    return connection.execute(change).rowcount == 1


def _claimed(connection: Connection, message_id: str, fence: int) -> bool:
    claim = select(messages.c.id).where(
        messages.c.id == message_id, messages.c.fence == fence, is_in(State.SENDING)
    )
    return connection.execute(claim.with_for_update()).one_or_none() is not None
