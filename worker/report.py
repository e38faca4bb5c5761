"""What became of a batch, from its first chunk in the inbox to its last row in SQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis import Redis
from redis.exceptions import RedisError

from worker.inbox import Inbox
from worker.meanings import known, meaning
from worker.model import BatchState, NotFound, State, Unavailable

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: Every worker keeps such a key, its name behind it, alive while it ticks.
ALIVE = "postroom:worker:"
#: Said where workers are refused, and the credential that is set by now is another.
OLD_CREDENTIAL = "The workers' credential is not the one that is set here: restart them."
#: Alive while beat rings.
BEAT = "postroom:beat"

_WAITING = (State.QUEUED, State.SENDING)


def status(rt: Runtime, batch_id: str) -> dict[str, Any]:
    """State, total, counts, blocked mailboxes, rate, `limit` (which binds), `eta` (seconds), and
    `trouble`: why messages failed or are unknown.

    None: cannot be said, or nothing moves. Known from the moment `enqueue` returned: what still
    lies in the inbox counts as queued. Redis must answer only for a batch that is not whole in SQL.
    Raises NotFound, Unavailable.
    """
    store = rt.store
    found = store.batch_status(batch_id)
    if found is None or found["arrived"] < found["total"]:
        waiting = _in_inbox(rt.inbox, batch_id)
        # Once more, and after the inbox: what left it meanwhile is counted in SQL.
        found = _merged(batch_id, store.batch_status(batch_id), waiting)
    if found is None:
        raise NotFound(f"no batch {batch_id}")
    remaining = sum(found["counts"][state] for state in _WAITING)
    pace = found.pop("pace")
    mailboxes = _mailboxes(rt, found)
    blocked = _blocked(rt, found, mailboxes) if remaining else store.mailboxes.suspended(mailboxes)
    shut = {one["mailbox"] for one in blocked}
    ill = found["counts"][State.FAILED] or found["counts"][State.UNKNOWN]
    return found | {
        "blocked": blocked,
        "trouble": store.summaries.trouble(batch_id) if ill else [],
        "limit": _limit(rt, [m for m in mailboxes if m not in shut]) if remaining else None,
        "eta": round(remaining / pace) if pace and remaining and _moves(rt) else None,
        "staging": rt.settings.staging.document() if rt.settings.staging else None,
    }


def workers(redis: Redis, host: str | None = None) -> int:
    """How many workers, of this host or of all, ticked in the last seconds."""
    whose = f"{ALIVE}{host}:*" if host else f"{ALIVE}*"
    return sum(1 for _ in redis.scan_iter(match=whose, count=1000))


def _moves(rt: Runtime) -> bool:
    try:
        return workers(rt.redis) > 0
    except RedisError:
        return False


def _in_inbox(inbox: Inbox, batch_id: str) -> Mapping[str, Any] | None:
    try:
        return inbox.batch(batch_id)
    except RedisError as error:
        raise Unavailable(f"Redis does not answer ({type(error).__name__})") from error


def _merged(
    batch_id: str, stored: dict[str, Any] | None, waiting: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    if waiting is None:
        return stored
    found = stored or _unseen(batch_id, waiting)
    found["counts"][State.QUEUED] += max(0, waiting["arrived"] - found["arrived"])
    found["arrived"] = max(waiting["arrived"], found["arrived"])
    return found


def _unseen(batch_id: str, waiting: Mapping[str, Any]) -> dict[str, Any]:
    """The status of a batch of which SQL has nothing yet."""
    head = waiting["head"]
    return {
        "batch_id": batch_id, "name": head.get("name"), "state": str(BatchState.OPEN),
        "total": waiting["messages"], "arrived": 0,
        "counts": {str(state): 0 for state in State}, "bounced": 0,
        "target": head["target"], "target_kind": head["target_kind"],
        "created_at": head["created_at"], "finished_at": None, "rate_per_minute": 0, "pace": 0.0,
        "paused_reason": None,
    }  # fmt: skip


def _mailboxes(rt: Runtime, found: Mapping[str, Any]) -> Sequence[str]:
    if found["target_kind"] == "mailbox":
        return [found["target"]]
    return rt.pools().get(found["target"], [])


def _blocked(
    rt: Runtime, found: Mapping[str, Any], mailboxes: Sequence[str]
) -> list[dict[str, Any]]:
    """What keeps mailboxes of a batch from sending until somebody mends it."""
    if not mailboxes:
        reason = f"Pool {found['target']} has no mailbox. Give it some: postroom pool set."
        return [{"mailbox": None, "code": "PoolEmpty", "reason": reason, "since": None}]
    blocked = rt.store.mailboxes.suspended(mailboxes)
    refusal = rt.refusal()
    if refusal is None:
        return blocked
    reason = str(meaning(refusal.code)) if known(refusal.code) else refusal.detail or refusal.code
    if not refusal.ours:
        reason += f" {OLD_CREDENTIAL}"
    shut = {one["mailbox"] for one in blocked}
    blocked += (
        {"mailbox": m, "code": refusal.code, "reason": reason, "since": refusal.since}
        for m in mailboxes if m not in shut
    )  # fmt: skip
    return sorted(blocked, key=lambda one: str(one["mailbox"]))


def _limit(rt: Runtime, mailboxes: Sequence[str]) -> str | None:
    """The limit that keeps all of these mailboxes back now; of several, what most wait for."""
    from worker.gate import bounds

    try:
        found = bounds(rt.redis, mailboxes) if mailboxes else []
    except RedisError:
        return None
    binding = [bound for bound in found if bound]
    return Counter(binding).most_common(1)[0][0] if len(binding) == len(found) and found else None
