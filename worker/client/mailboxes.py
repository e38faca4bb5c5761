"""What an operator does with mailboxes and pools: suspend, resume, limits, members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from worker import checks
from worker.checks import Refused
from worker.client.asking import ask
from worker.limits import Limit, Rate
from worker.model import InvalidSettings

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: A lane at work reads its mailbox again every five seconds: a cooldown until then makes a
#: suspension take effect at once.
HALT = timedelta(seconds=6)
#: What can be set for one mailbox, as people call it, and the limit that it is.
LIMITS: Mapping[str, Limit] = {
    "concurrency": Limit.SLOTS,
    "request_rate": Limit.REQUESTS,
    "message_rate": Limit.MESSAGES,
    "recipient_rate": Limit.RECIPIENTS,
    "upload_rate": Limit.UPLOAD,
}
DEFAULT = "default"


class Mailboxes:
    """The client's part for mailboxes and pools. All raise InvalidSettings and Unavailable."""

    _runtime: Callable[[], Runtime]

    def mailboxes(self) -> list[dict[str, Any]]:
        """Every mailbox that is known: {"mailbox", "state", "cooldown_until", "limits", "code",
        "reason", "since", "probe_at", "pools"}; state is ready, cooling or suspended.
        """
        rt = self._runtime()
        pools = ask(rt, rt.pools)
        known = {one["mailbox"]: one for one in ask(rt, rt.store.mailboxes.all)}
        for mailbox in (m for members in pools.values() for m in members):
            known.setdefault(mailbox, dict.fromkeys(_COLUMNS) | {"mailbox": mailbox})
        return [_shown(known[m], pools) for m in sorted(known)]

    def suspend_mailbox(
        self, mailbox: str, *, by: str = "api", why: str | None = None
    ) -> dict[str, Any]:
        """Nothing is sent from it until `resume_mailbox`: {"mailbox", "state", "changed"}."""
        rt, address = self._runtime(), _address(mailbox)
        changed = ask(rt, lambda: rt.store.mailboxes.suspend(address, by=by, why=why))
        with suppress(RedisError):  # without Redis nothing is sent anyway
            rt.call(rt.gate.cool(address, HALT))
        return {"mailbox": address, "state": "suspended", "changed": changed}

    def resume_mailbox(
        self, mailbox: str, *, by: str = "api", why: str | None = None
    ) -> dict[str, Any]:
        """Ends a suspension: {"mailbox", "state", "changed"}.

        One that was suspended because it refused tries with one message; if that is refused, it is
        suspended again.
        """
        rt, address = self._runtime(), _address(mailbox)
        changed = ask(rt, lambda: rt.store.mailboxes.resume(address, by=by, why=why))
        _wake(rt, address)
        return {"mailbox": address, "state": "ready", "changed": changed}

    def set_mailbox(
        self, mailbox: str, limits: Mapping[str, Any], *, by: str = "api", why: str | None = None
    ) -> dict[str, Any]:
        """Limits of this mailbox alone, by their names in LIMITS: a rate such as `9000/24h`, `off`,
        or `default`. Gives {"mailbox", "limits"}: what differs from the settings now.
        """
        rt, address = self._runtime(), _address(mailbox)
        if unknown := sorted(set(limits) - set(LIMITS)):
            raise InvalidSettings(f"no limit {unknown[0]!r:.64}; there are {', '.join(LIMITS)}")
        changes = {str(LIMITS[name]): _limit(name, value) for name, value in limits.items()}
        found = ask(rt, lambda: rt.store.mailboxes.limit(address, changes, by=by, why=why))
        _wake(rt, address)
        return {"mailbox": address, "limits": _by_name(found)}

    def pools(self) -> list[dict[str, Any]]:
        """{"pool", "mailboxes", "from"} of each pool; from: settings (read-only) or database."""
        rt = self._runtime()
        return [
            {"pool": name, "mailboxes": list(members),
             "from": "settings" if name in rt.settings.pools else "database"}
            for name, members in sorted(ask(rt, rt.pools).items())
        ]  # fmt: skip

    def set_pool(
        self, name: str, mailboxes: Sequence[str], *, by: str = "api", why: str | None = None
    ) -> dict[str, Any]:
        """The mailboxes of a pool from now on, also for what is queued: {"pool", "mailboxes"}."""
        rt, name = self._runtime(), _pool(name)
        if name in rt.settings.pools:
            raise InvalidSettings(f"pool {name} stands in POSTROOM_POOLS: change it there")
        if not mailboxes:
            raise InvalidSettings(f"pool {name}: give at least one mailbox")
        members = sorted({_address(m) for m in mailboxes})
        ask(rt, lambda: rt.store.mailboxes.set_pool(name, members, by=by, why=why))
        rt.ring_sweep()
        return {"pool": name, "mailboxes": members}


def _wake(rt: Runtime, address: str) -> None:
    """There is news for a lane that would else wait until its window has room, or for a probe."""
    with suppress(RedisError):  # without it nothing is sent; the sweep wakes whatever is due
        if rt.call(rt.gate.ring([address]))[0] > 0:
            rt.bell.deliver(address)


_COLUMNS = ("mailbox", "cooldown_until", "limits", "code", "reason", "since", "probe_at")


def _shown(one: Mapping[str, Any], pools: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    state = "suspended" if one["since"] else "cooling" if one["cooldown_until"] else "ready"
    its = sorted(name for name, members in pools.items() if one["mailbox"] in members)
    return {**one, "limits": _by_name(one["limits"] or {}), "state": state, "pools": its}


def _by_name(limits: Mapping[str, Any]) -> dict[str, Any]:
    return {name: limits[limit] for name, limit in LIMITS.items() if limit in limits}


def _address(mailbox: object) -> str:
    try:
        return checks.mailbox(mailbox)
    except Refused as refused:
        raise InvalidSettings(refused.detail) from None


def _pool(name: object) -> str:
    try:
        text = checks.line(name, 200, "POOL_NAME", "the pool's name")
    except Refused as refused:
        raise InvalidSettings(f"pool: {refused.detail}") from None
    if not text.strip():
        raise InvalidSettings("pool: the pool's name is empty")
    return text


def _limit(name: str, value: object) -> str | int | None:
    """As it is stored; None: as in the settings."""
    text = str(value).strip()
    if text == DEFAULT:
        return None
    if name == "concurrency":
        if text not in {"1", "2", "3", "4"}:
            raise InvalidSettings(f"concurrency {text!r}: Graph allows 1 to 4; or default")
        return int(text)
    try:
        Rate.parse(text)
    except ValueError as error:
        raise InvalidSettings(f"{name} {text!r}: {error}; or default") from None
    return text
