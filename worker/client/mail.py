"""Mails as Python's email package makes them, for those who come from smtplib."""

from __future__ import annotations

from collections.abc import Iterable
from email.message import Message as AnyMail
from typing import TYPE_CHECKING, Any

from worker import mime
from worker.model import Receipt

if TYPE_CHECKING:
    from collections.abc import Callable


class Mails:
    """What a Client does with whole mails."""

    if TYPE_CHECKING:
        enqueue: Callable[..., Receipt]

    def send_message(
        self, message: AnyMail, *, sender: str | None = None, pool: str | None = None,
        recipients: str | Iterable[str] | None = None, idempotency_key: str | None = None,
        **arguments: Any,
    ) -> Receipt:  # fmt: skip
        """Enqueues a mail: its bodies, inline images and attachments arrive as they were.

        Without `sender` or `pool`, the address of From is the mailbox. `recipients`: the
        envelope's, where they are not those of To, Cc and Bcc. The Message-ID is the idempotency
        key unless one is given: the same mail again adds nothing. `arguments`: as of `enqueue`.
        Raises what `enqueue` raises.
        """
        if sender is None and pool is None:
            sender = mime.sender_of(message)
        envelope = [recipients] if isinstance(recipients, str) else recipients
        one = mime.message_of(message, mailbox=sender, recipients=envelope)
        key = idempotency_key or mime.key_of(message)
        return self.enqueue(one, sender=sender, pool=pool, idempotency_key=key, **arguments)
