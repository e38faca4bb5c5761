"""Settles doubt: looks into mailboxes for messages of which nobody knows whether they were sent.

A look goes through the gate like a send, but beside the lane. Messages are taken mailbox by
mailbox; a mailbox that cannot be asked now costs one request at most, whatever the number of
messages that wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, assert_never

from redis.exceptions import RedisError

from worker.gate import Gate
from worker.graph import Graph
from worker.model import Absent, Forbidden, Found, Look, OnUnknown, State, Trouble
from worker.policy import HOUR, look_after
from worker.store import Store
from worker.store.doubt import InDoubt, Looked
from worker.tokens import Tokens
from worker.visit import NotNow, Visitor

log = logging.getLogger(__name__)

#: So many messages are taken at once, and so many mailboxes are asked at the same time.
TAKE, AT_ONCE = 32, 8
#: Who took a look has it for this long and the request timeout; then it is anybody's.
LEASE = timedelta(minutes=2)
#: A mailbox that may not be read is asked again so late.
BARRED = HOUR
#: A look that went wrong has shown nothing, and is repeated sooner: after so many seconds, the
#: first, the second, ...
TROUBLED = (10.0, 30.0, 120.0, 300.0)


class Stop(Protocol):
    """Whether the process is asked to end."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that settling works by."""

    on_unknown: OnUnknown
    max_attempts: int
    request_timeout: timedelta
    settle_margin: timedelta

    @property
    def wait(self) -> float:
        """Seconds after a token's end from which on nothing of its requests can come any more."""
        return (self.settle_margin + self.request_timeout).total_seconds()


@dataclass(frozen=True, slots=True)
class Deps:
    """The doors that looking uses."""

    store: Store
    gate: Gate
    graph: Graph
    tokens: Tokens
    rules: Rules
    stop: Stop


async def settle(deps: Deps) -> dict[str, int]:
    """Looks for all messages whose look is due; what came of it, for people to read.

    Raises what the database raises; what was not looked for then is due again when its lease ends.
    """
    done: Counter[str] = Counter()
    lease = (LEASE + deps.rules.request_timeout).total_seconds()
    while not deps.stop.is_set():
        taken = await asyncio.to_thread(
            deps.store.doubt.take, TAKE, lease=lease, wait=deps.rules.wait
        )
        if not taken:
            break
        groups: dict[str, list[InDoubt]] = {}
        for one in taken:
            groups.setdefault(one.mailboxes[0], []).append(one)
        some = asyncio.Semaphore(AT_ONCE)
        rounds = (_Round(deps, group, done, some).run() for group in groups.values())
        # All come to their end: none runs on beside the next ones.
        for ended in await asyncio.gather(*rounds, return_exceptions=True):
            if ended is not None:
                raise ended
    return dict(sorted(done.items()))


@dataclass(slots=True)
class _Round:
    """The messages of one mailbox, one after the other."""

    deps: Deps
    group: Sequence[InDoubt]
    done: Counter[str]
    some: asyncio.Semaphore
    _barred: dict[str, Forbidden] = field(default_factory=dict)

    async def run(self) -> None:
        async with self.some:
            for n, one in enumerate(self.group):
                try:
                    await self._settle(one)
                    continue
                except NotNow as refused:
                    seconds = refused.seconds
                except RedisError as error:
                    # A connection may be dead without a word; the lease of what was taken is long.
                    log.warning("Redis does not answer (%s): looks wait", type(error).__name__)
                    seconds = TROUBLED[0]
                rest = self.group[n:]
                self.done["postponed"] += len(rest)
                await asyncio.to_thread(self.deps.store.doubt.postpone, rest, seconds)
                return

    async def _settle(self, one: InDoubt) -> None:
        """Looks for one message and writes down what it showed. Raises NotNow."""
        if self.deps.stop.is_set():
            raise NotNow(0)
        if not one.keeps_copy:
            why = "it leaves no copy in the mailbox (save_to_sent_items is off): nobody can look"
            result = await self._write(Looked(one, "no_copy", why))
        else:
            mailbox, look = await self._look(one)
            result = await self._conclude(one, mailbox, look)
        self.done[result] += 1
        log.info("message %s: look %d: %s", one.id, one.looks + 1, result,
                 extra={"message_id": one.id, "batch_id": one.batch_id})  # fmt: skip

    async def _look(self, one: InDoubt) -> tuple[str, Look]:
        """Looks into each mailbox that may have sent it; the least certain word counts, but for
        "found", which ends the search.
        """
        seen: list[tuple[str, Look]] = []
        for mailbox in one.mailboxes:
            look = self._barred.get(mailbox) or await self._ask(mailbox, one.id)
            if isinstance(look, Found) and look.draft and one.by_draft:
                look = Absent(look.answer, draft=True)  # nobody has sent it, or not yet
            if isinstance(look, Found):
                return mailbox, look
            if isinstance(look, Forbidden):
                self._barred[mailbox] = look
            seen.append((mailbox, look))
        return next((s for s in seen if not isinstance(s[1], Absent)), seen[0])

    async def _ask(self, mailbox: str, message_id: str) -> Look:
        """One look through the gate, and another where the token was refused: the next is fresh.
        Raises NotNow.
        """
        deps = self.deps
        visitor = Visitor(deps.gate, deps.tokens, deps.store.mailboxes, deps.rules.request_timeout)
        for _ in range(2):
            look: Look = await visitor.ask(
                mailbox, lambda token: deps.graph.look(mailbox, message_id, token)
            )
            if look.answer.status != 401:
                break
        return look

    async def _conclude(self, one: InDoubt, mailbox: str, look: Look) -> str:
        """What a look comes to. `left`: seconds in which something may still come."""
        pace = look_after(one.looks + 1).total_seconds()
        said = f"{look.answer.status or 'no answer'} {look.answer.code or ''}".strip()
        match look:
            case Found(_, graph_id, sent_at):
                kept = {"graph_id": graph_id, "sent_at": sent_at}
                why = "found in the mailbox by its marker"
                return await self._write(Looked(one, "found", why, mailbox, detail=kept))
            case Forbidden():
                why = f"the mailbox may not be read ({said}): grant Mail.Read, or settle it by hand"
                again = BARRED.total_seconds()
                return await self._write(Looked(one, "forbidden", why, mailbox, again))
            case Trouble(answer):
                why = f"the look went wrong ({said}): it is repeated"
                asked = answer.retry_after.total_seconds() if answer.retry_after else 0.0
                again = max(TROUBLED[min(one.looks, len(TROUBLED) - 1)], asked)
                return await self._write(Looked(one, "trouble", why, mailbox, again))
            case Absent(_, draft) if one.left > 0:
                why = f"{_missing(draft)}; it may still come"
                again = min(pace, max(one.left, 1.0))
                return await self._write(Looked(one, "absent", why, mailbox, again))
            case Absent(_, draft):
                return await self._absent(one, mailbox, draft)
        assert_never(look)

    async def _absent(self, one: InDoubt, mailbox: str, draft: bool) -> str:
        """It is not there, and nothing can come any more: it was not sent."""
        rules = self.deps.rules
        why = f"{_missing(draft)}, and nothing can come any more"
        last = Looked(one, "absent", why, mailbox)
        if rules.on_unknown is not OnUnknown.RECONCILE or one.quarantined:
            return await self._write(last)
        state = await asyncio.to_thread(
            self.deps.store.doubt.nothing_came, last, wait=rules.wait,
            max_attempts=rules.max_attempts,
        )  # fmt: skip
        return "requeued" if state is State.QUEUED else str(state or "settled already")

    async def _write(self, looked: Looked) -> str:
        doubt = self.deps.store.doubt
        write = doubt.found if looked.result == "found" else doubt.stays
        written = await asyncio.to_thread(write, looked)
        return looked.result if written else "settled already"


def _missing(draft: bool) -> str:
    return "only its draft is in the mailbox" if draft else "not in the mailbox"
