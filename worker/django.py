"""Django's e-mail through Postroom: EMAIL_BACKEND = "worker.django.EmailBackend".

What Django's own backends do, this one does too; a mail counts as sent once it is durably
enqueued. The settings are those of the environment; Django's settings may name the sender:
POSTROOM_SENDER or POSTROOM_POOL, else it is the address of each mail's From.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from email.utils import parseaddr
from typing import Any

from django.conf import settings
from django.core.mail.backends.base import BaseEmailBackend

from worker.client import Client
from worker.model import PostroomError


class EmailBackend(BaseEmailBackend):  # type: ignore[misc]
    """Enqueues each mail as a batch of one; its Message-ID is the idempotency key."""

    def __init__(
        self, fail_silently: bool = False, *, sender: str | None = None, pool: str | None = None,
        priority: str = "normal", **_options: Any,
    ) -> None:  # fmt: skip
        """`_options`: what Django hands to every backend, as user name and password."""
        super().__init__(fail_silently=fail_silently)
        self._sender = sender or getattr(settings, "POSTROOM_SENDER", None)
        self._pool = pool or getattr(settings, "POSTROOM_POOL", None)
        self._priority = priority
        self._client: Client | None = None
        self._lock = threading.RLock()

    def open(self) -> bool | None:
        """Whether a client was made; None where the settings are wrong and that is not said."""
        if self._client is not None:
            return False
        try:
            self._client = Client.from_env()
        except PostroomError:
            if not self.fail_silently:
                raise
            return None
        return True

    def close(self) -> None:
        """Forgets the client, which holds no connection of its own."""
        self._client = None

    def send_messages(self, email_messages: Sequence[Any]) -> int:
        """How many were enqueued. Raises PostroomError unless that is to stay silent."""
        if not email_messages:
            return 0
        with self._lock:
            opened = self.open()
            if self._client is None:
                return 0
            try:
                return sum(self._send(self._client, message) for message in email_messages)
            finally:
                if opened:
                    self.close()

    def _send(self, client: Client, message: Any) -> bool:
        recipients = [parseaddr(one)[1] for one in message.recipients()]
        if not recipients:
            return False
        mail = message.message()
        try:
            client.send_message(
                mail, sender=self._sender, pool=self._pool, recipients=recipients,
                priority=self._priority,
            )  # fmt: skip
        except PostroomError:
            if not self.fail_silently:
                raise
            return False
        return True
