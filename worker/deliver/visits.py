"""Requests of a claim beside the one that sends: each asks the gate before it goes.

They prepare a send, and send nothing themselves.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from worker.deliver.values import Deps
from worker.gate import Grant
from worker.graph import Reply
from worker.limits import Cost, Limits, Used
from worker.model import Answer, Blocked, NotSent, Outcome, Rejected, Unknown
from worker.policy import GATE_CLOSED, HOUR, SECOND, UPLOADING

#: What begins later than so many seconds before the deadline would not leave any more.
MARGIN = 1.0
#: https://learn.microsoft.com/exchange/client-developer/web-service-reference/responsecode
_FINAL = frozenset({
    "ErrorMessageSizeExceeded", "ErrorAttachmentSizeLimitExceeded", "RequestEntityTooLarge",
    "ErrorVirusDetected", "ErrorQuotaExceeded", "quotaLimitReached",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Visits:
    """The gate, for one claim's requests."""

    deps: Deps
    mailbox: str
    message_id: str
    deadline: float  #: monotonic: from then on no request must leave
    limits: Limits  #: the mailbox's

    def over(self) -> bool:
        """Whether nothing more is begun under this claim."""
        return self.deps.stop.is_set() or time.monotonic() >= self.deadline - MARGIN

    async def ask(self, size: int, request: Callable[[], Awaitable[Reply]]) -> Reply:
        """A request with `size` bytes, once the gate has room. Raises redis.RedisError.

        Nothing leaves where the claim's time is up or the gate is closed.
        """
        if self.over():
            return Reply(Answer(code=UPLOADING, retry_after=0 * SECOND), left=False)
        gate, name = self.deps.gate, f"{self.message_id}+"
        # A slot beside the claim's own, which rests meanwhile: never more requests than claims.
        limits = replace(self.limits, slots=2 * self.limits.slots)
        lease = self.deps.rules.lease.total_seconds()
        cost = Cost(1, upload=size)
        grant = await gate.visit(self.mailbox, name, lease, cost=cost, limits=limits)
        if not grant.count:
            return Reply(_closed(grant), left=False)
        used = Used.ALL
        try:
            reply = await request()
            used = Used.ALL if reply.left else Used.NOTHING
        finally:
            await gate.give_back(self.mailbox, name, used=used, limits=limits)
        return reply


def _closed(grant: Grant) -> Answer:
    wait = HOUR if grant.wait is None else max(grant.wait, SECOND)
    detail = f"the gate has no room for the next request: {grant.word}"
    return Answer(code=GATE_CLOSED, detail=detail, retry_after=wait)


def went_wrong(reply: Reply) -> Outcome | None:
    """What a request that sends nothing came to; None: it went well."""
    if 200 <= (reply.answer.status or 0) < 300:
        return None
    match reply.outcome:
        case Unknown(answer):
            return NotSent(answer)  # whatever became of it, no mail was sent by it
        case outcome:
            return outcome


def is_over(reply: Reply) -> bool:
    """An upload session that has ended, by its last range or by its time, is not there.

    Whatever else says nothing of where it goes on, and does not pass by itself, is as good as that:
    what it had is counted, and the rest goes into a new one.
    """
    status = reply.answer.status or 0
    return status == 501 or (200 <= status < 500 and status not in {408, 429})


def is_final(reply: Reply) -> bool:
    """What no other range or session would change: attachment or mailbox are refused."""
    refused = isinstance(reply.outcome, Rejected | Blocked)
    return refused and (reply.answer.status == 413 or reply.answer.code in _FINAL)


def may_draft(token: str) -> bool:
    """Whether the application has the permission for drafts: then it is the mailbox that refuses.

    https://learn.microsoft.com/entra/identity-platform/access-token-claims-reference (roles)
    """
    import jwt  # rarely needed, and it loads half of cryptography

    try:
        claims = jwt.decode(token, options={"verify_signature": False})
    except jwt.InvalidTokenError:
        return False
    roles = claims.get("roles")
    return isinstance(roles, list) and "Mail.ReadWrite" in roles
