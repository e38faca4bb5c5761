"""When a batch would end, asked before it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from worker import plan
from worker.checks import Refused, mailbox
from worker.client.asking import ask
from worker.limits import Limit
from worker.model import InvalidSettings, NotFound

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: What a message takes where none was sent in the last day: a short mail, Graph's usual answer.
SECONDS, SIZE = 0.3, 10_000
#: https://techcommunity.microsoft.com/blog/exchange/4372797
_TENANT = (
    "TENANT_EXTERNAL_RATE is off: Exchange lets a tenant write to 500 x licences^0.7 + 9,500 "
    "external recipients in 24 hours (a trial: 5,000); the rest bounces"
)


class Planning:
    """The client's part for plans."""

    _runtime: Callable[[], Runtime]

    def plan(
        self, count: int, *, sender: str | None = None, pool: str | None = None, external: int = 0
    ) -> dict[str, Any]:
        """When a batch of `count` messages with one recipient each, `external` of them outside the
        organisation, would end if it were enqueued now.

        {"count", "ahead", "seconds", "ends_at", "limit", "mailboxes", "suspended", "used",
        "notes"}: `ahead` are the messages that wait before it, `limit` is what it would wait for
        most (slots: requests at once), `used` says of each mailbox how full its windows are.
        `seconds` is None where it would never end. Raises InvalidSettings, NotFound, Unavailable.
        """
        rt = self._runtime()
        if count < 1 or not 0 <= external <= count:
            raise InvalidSettings("count: at least 1, and external from 0 to count")
        members, targets = _senders(rt, sender, pool)
        shut = {one["mailbox"] for one in ask(rt, lambda: rt.store.mailboxes.suspended(members))}
        senders = {m: ask(rt, partial(_sender, rt, m)) for m in members}
        used = {m: _used(one) for m, one in senders.items()}
        ahead: int = ask(rt, lambda: rt.store.outlook.waiting(targets))
        seconds, size = ask(rt, lambda: rt.store.outlook.typical(members))
        one = plan.Typical(seconds or SECONDS, size or SIZE, external / count)
        open_ = [s for m, s in senders.items() if m not in shut]
        for other in open_[1:]:  # the tenant's window is the same for all
            if Limit.EXTERNAL in other.windows:
                other.windows[Limit.EXTERNAL] = open_[0].windows[Limit.EXTERNAL]
        end = plan.forecast(open_, ahead + count, one)
        return {
            "count": count, "ahead": ahead, **_when(rt, end.after), "limit": str(end.limit),
            "mailboxes": len(members), "suspended": sorted(shut), "used": used,
            "notes": _notes(rt, external),
        }  # fmt: skip


def _senders(
    rt: Runtime, sender: str | None, pool: str | None
) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """The mailboxes that would send, and the targets whose messages wait before the batch."""
    if (sender is None) == (pool is None):
        raise InvalidSettings("give a sender or a pool, and not both")
    if pool is not None:
        members = ask(rt, rt.pools).get(pool, [])
        if not members:
            raise NotFound(f"no pool {pool!r}, or it has no mailbox")
        return members, [("pool", pool), *(("mailbox", m) for m in members)]
    try:
        address = mailbox(sender)
    except Refused as refused:
        raise InvalidSettings(refused.detail) from None
    return [address], [("mailbox", address)]


def _sender(rt: Runtime, address: str) -> plan.Sender:
    limits = rt.settings.limits.changed(rt.store.mailboxes.seen(address).limits)
    return plan.Sender(limits, dict(rt.look_back(address, limits).windows))


def _used(sender: plan.Sender) -> dict[str, Mapping[str, Any]]:
    return {
        str(limit): {"used": window.total, "limit": str(sender.limits.rate(limit))}
        for limit, window in sender.windows.items()
    }


def _when(rt: Runtime, after: timedelta | None) -> dict[str, Any]:
    if after is None:
        return {"seconds": None, "ends_at": None}
    return {"seconds": round(after.total_seconds()), "ends_at": rt.inbox.now() + after}


def _notes(rt: Runtime, external: int) -> list[str]:
    if not external or rt.settings.limits.external is not None:
        return []
    return [_TENANT]
