"""Reads the non-delivery reports that answer our messages, where the mailboxes may be read.

`sent` stays `sent`: Graph accepted the message, and the report comes minutes or days later. Which
mailbox was read, and up to where, lies in Redis: where that is lost, a few days are read once more,
and the database knows what it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import TYPE_CHECKING

from worker.graph import Bounced, Graph, Reports
from worker.policy import HOUR
from worker.store import Bounce, Store
from worker.store.bounces import COMES_WITHIN
from worker.visit import NotNow, Visitor

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

#: A mailbox is read so often, by one worker of all; by the next one after a refusal of the gate.
EVERY, AGAIN = timedelta(minutes=5), timedelta(minutes=1)
#: A mailbox that may not be read is asked again so late.
BARRED = HOUR
#: So many mailboxes are asked at the same time, and so many pages of one are read in a row.
AT_ONCE, PAGES = 4, 20
#: What was read so lately is read again: a report may show later than one that came after it.
OVERLAP = timedelta(minutes=10)
#: While such a key is there, nobody reads the mailbox; and where the next reading begins.
_READ, _MARK = "postroom:bounces:read:", "postroom:bounces:mark:"


@dataclass(frozen=True, slots=True)
class Deps:
    """The doors that reading uses."""

    store: Store
    graph: Graph
    visitor: Visitor
    redis: Redis
    suppress_hard: bool  #: a bad address goes to the suppressions
    stop: Event


async def read_bounces(deps: Deps) -> dict[str, int]:
    """Reads the mailboxes that are due, each page by one request; how many bounces of each kind.

    Raises what the doors raise; a mailbox that was not read to the end is due again in minutes.
    """
    some = asyncio.Semaphore(AT_ONCE)

    async def one(mailbox: str) -> Counter[str]:
        async with some:
            return await _Inbox(deps, mailbox).read() if await _take(deps, mailbox) else Counter()

    senders = await asyncio.to_thread(deps.store.bounces.senders)
    found = sum(await asyncio.gather(*map(one, senders)), Counter[str]())
    return dict(sorted(found.items()))


async def _take(deps: Deps, mailbox: str) -> bool:
    return bool(await deps.redis.set(_READ + mailbox, 1, nx=True, ex=EVERY))


@dataclass(frozen=True, slots=True)
class _Inbox:
    """One mailbox, from where it was read last."""

    deps: Deps
    mailbox: str

    async def read(self) -> Counter[str]:
        done, since = Counter[str](), await self._mark()
        mark, following = since, None
        for _ in range(PAGES):
            page = None if self.deps.stop.is_set() else await self._page(since, following)
            if page is None:
                break
            done += await self._record(page.found)
            mark, following = _up_to(since, mark, page), page.following
            if following is None:
                break
        if mark != since:
            await self.deps.redis.set(_MARK + self.mailbox, mark.isoformat(), ex=COMES_WITHIN)
        for kind, n in sorted(done.items()):
            log.warning("mailbox %s: %d bounced (%s)", self.mailbox, n, kind)
        return done

    async def _mark(self) -> datetime:
        seconds, _ = await self.deps.redis.time()
        first = datetime.fromtimestamp(seconds, UTC) - COMES_WITHIN
        mark: bytes | None = await self.deps.redis.get(_MARK + self.mailbox)  # type: ignore[assignment]
        return max(first, datetime.fromisoformat(mark.decode())) if mark else first

    async def _page(self, since: datetime, following: str | None) -> Reports | None:
        """The next reports; None where the mailbox cannot or may not be read now."""
        deps, mailbox = self.deps, self.mailbox
        try:
            page = await deps.visitor.ask(
                mailbox, lambda token: deps.graph.reports(mailbox, since, token, following)
            )
        except NotNow as refused:
            await self._again(max(AGAIN, timedelta(seconds=refused.seconds)))
            return None
        if page.forbidden:
            await self._again(BARRED)
        elif page.trouble:
            said = f"{page.answer.status or 'no answer'} {page.answer.code or ''}".strip()
            log.warning("mailbox %s: its reports could not be read (%s)", mailbox, said)
        return None if page.forbidden or page.trouble else page

    async def _again(self, wait: timedelta) -> None:
        await self.deps.redis.set(_READ + self.mailbox, 1, ex=wait)

    async def _record(self, found: Sequence[Bounced]) -> Counter[str]:
        ours = [
            Bounce(one.message_id, one.report_id, one.code, one.kind, one.own, one.named)
            for one in found if one.message_id is not None
        ]  # fmt: skip
        if not ours:
            return Counter()
        bounces, hard = self.deps.store.bounces, self.deps.suppress_hard
        return await asyncio.to_thread(bounces.record, self.mailbox, ours, suppress_hard=hard)


def _up_to(since: datetime, mark: datetime, page: Reports) -> datetime:
    """Where the next round begins: at the last report where there are more, and a little before
    it where all were read.
    """
    last = page.found[-1].received if page.found else mark
    return last if page.following else max(since, last - OVERLAP)
