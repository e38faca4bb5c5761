"""What became of a batch, from its first chunk in the inbox to its last row in SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from worker.inbox import Inbox
from worker.model import BatchState, NotFound, State, Unavailable
from worker.staging import Staging
from worker.store import Store

#: Every worker keeps such a key, its name behind it, alive while it ticks.
ALIVE = "postroom:worker:"
#: Alive while beat rings.
BEAT = "postroom:beat"

_WAITING = (State.QUEUED, State.SENDING)


def status(
    store: Store, inbox: Inbox, batch_id: str, pools: Mapping[str, Sequence[str]] | None = None,
    staging: Staging | None = None,
) -> dict[str, Any]:  # fmt: skip
    """State, total, counts, blocked mailboxes, rate and `eta` (seconds; None: cannot be said).

    Known from the moment `enqueue` returned: what still lies in the inbox counts as queued. Redis
    is asked only about a batch that is not whole in SQL. `pools`: those of the settings and of SQL
    together. Raises NotFound, Unavailable.
    """
    found = store.batch_status(batch_id)
    if found is None or found["arrived"] < found["total"]:
        waiting = _in_inbox(inbox, batch_id)
        # Once more, and after the inbox: what left it meanwhile is counted in SQL.
        found = _merged(batch_id, store.batch_status(batch_id), waiting)
    if found is None:
        raise NotFound(f"no batch {batch_id}")
    remaining = sum(found["counts"][state] for state in _WAITING)
    rate = found["rate_per_minute"]
    return found | {
        "blocked": store.mailboxes.suspended(_mailboxes(store, found, pools)),
        "eta": round(60 * remaining / rate) if rate and remaining else None,
        "staging": staging.document() if staging else None,
    }


def workers(redis: Redis, host: str | None = None) -> int:
    """How many workers, of this host or of all, ticked in the last seconds."""
    whose = f"{ALIVE}{host}:*" if host else f"{ALIVE}*"
    return sum(1 for _ in redis.scan_iter(match=whose, count=1000))


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
        "counts": {str(state): 0 for state in State},
        "target": head["target"], "target_kind": head["target_kind"],
        "created_at": head["created_at"], "finished_at": None, "rate_per_minute": 0,
        "paused_reason": None,
    }  # fmt: skip


def _mailboxes(
    store: Store, found: Mapping[str, Any], pools: Mapping[str, Sequence[str]] | None
) -> Sequence[str]:
    if found["target_kind"] == "mailbox":
        return [found["target"]]
    return (store.mailboxes.pools() if pools is None else pools).get(found["target"], [])
