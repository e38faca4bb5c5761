"""The sweep: wakes lanes with due work, ends leases and deadlines that ran out, finishes batches.

It selects by what SQL says and nothing else, so whatever ring was lost, it costs a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from worker.model import OnUnknown
from worker.store import Store

log = logging.getLogger(__name__)


def sweep(
    store: Store, *, on_unknown: OnUnknown, max_attempts: int,
    wake: Callable[[str, str], None], finished: Callable[[str], None],
) -> dict[str, int]:  # fmt: skip
    """One round. `wake(kind, target)` rings lanes, `finished(batch_id)` tells of a batch's end."""
    ended = store.end_leases(resend=on_unknown is OnUnknown.RESEND, max_attempts=max_attempts)
    if ended:
        log.warning("%d claims ended without a word: their messages are in doubt", ended)
    expired = store.end_deadlines()
    cancelled = store.control.end_cancelled()
    targets = store.due_targets()
    for kind, target in targets:
        wake(kind, target)
    batches = store.finish_batches()
    for batch in batches:
        log.info("batch %s: finished", batch["id"], extra={"batch_id": batch["id"]})
        finished(batch["id"])
    return {"leases": ended, "expired": expired, "cancelled": cancelled, "targets": len(targets),
            "batches": len(batches)}  # fmt: skip


def mailboxes_of(kind: str, target: str, pools: Mapping[str, Iterable[str]]) -> list[str]:
    """The mailboxes that serve a target: itself, or the members of the pool."""
    return [target] if kind == "mailbox" else sorted(pools.get(target, ()))
