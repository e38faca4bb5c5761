"""A visit to a mailbox that sends nothing: through the gate like a send, but beside the lane.

It takes one slot and one request, and holds nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

from worker.gate import Gate, lane_token
from worker.limits import Limit, Used
from worker.model import Answer
from worker.policy import HOUR, SECOND
from worker.store.mailboxes import Mailboxes
from worker.tokens import Token, TokenRefused, Tokens

#: How often, and how many seconds apart, a visit asks for a slot while all are taken by sends.
TRIES, PATIENCE = 20, 0.25


class NotNow(Exception):
    """The mailbox cannot be asked now: in so many seconds perhaps."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = min(max(seconds, 1.0), HOUR.total_seconds())


class Answered(Protocol):
    """What a visit showed."""

    @property
    def answer(self) -> Answer:
        """The last answer of it."""
        ...


A = TypeVar("A", bound=Answered)


@dataclass(frozen=True, slots=True)
class Visitor:
    """The doors that a visit goes through."""

    gate: Gate
    tokens: Tokens
    mailboxes: Mailboxes
    timeout: timedelta  #: of a request

    async def ask(self, mailbox: str, request: Callable[[str], Awaitable[A]]) -> A:
        """`request` with a bearer token, once the gate has room. Raises NotNow."""
        gate = self.gate
        token = await self._token()
        slot, seconds = f"look-{lane_token()}", self.timeout.total_seconds() + 5
        # What an operator set for this mailbox holds for visits as well as for its lane.
        seen = await asyncio.to_thread(self.mailboxes.seen, mailbox)
        limits = gate.limits.changed(seen.limits)
        for _ in range(TRIES):
            grant = await gate.visit(mailbox, slot, seconds, limits=limits)
            if grant.word != Limit.SLOTS:
                break
            await asyncio.sleep(PATIENCE)  # the lane leaves a slot to who comes again
        if not grant.count:
            raise NotNow((grant.wait or HOUR).total_seconds())
        try:
            shown = await request(token.value)
        finally:
            await gate.give_back(mailbox, slot, used=Used.REQUEST, limits=limits)
        await self._warn(mailbox, shown.answer, token)
        return shown

    async def _token(self) -> Token:
        try:
            token = self.tokens.at_hand()
            return token if token is not None else await asyncio.to_thread(self.tokens.get)
        except TokenRefused as refused:
            raise NotNow(refused.wait.total_seconds()) from None

    async def _warn(self, mailbox: str, answer: Answer, token: Token) -> None:
        """Tells the lanes what they must know as well."""
        if answer.status == 429 or answer.retry_after:
            rest = min(max(answer.retry_after or 10 * SECOND, SECOND), HOUR)
            await self.gate.cool(mailbox, rest)
        elif answer.status == 401:
            code = answer.code or "Unauthorized"
            await asyncio.to_thread(self.tokens.reject, token.serial, code)
