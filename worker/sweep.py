"""The sweep: wakes lanes with due work, ends leases and deadlines that ran out, finishes batches.

It selects by what SQL says and nothing else, so whatever ring was lost, it costs a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from worker.model import OnUnknown
from worker.store import Store

log = logging.getLogger(__name__)


def sweep(
    store: Store, *, on_unknown: OnUnknown, max_attempts: int,
    wake: Callable[[Sequence[tuple[str, str]]], None], finished: Callable[[str], None],
) -> dict[str, int]:  # fmt: skip
    """One round. `wake` is told the (kind, target) of all that is due, `finished` a batch's id."""
    ended = store.end_leases(resend=on_unknown is OnUnknown.RESEND, max_attempts=max_attempts)
    if ended:
        log.warning("%d claims ended without a word: their messages are in doubt", ended)
    expired = store.end_deadlines()
    cancelled = store.control.end_cancelled()
    targets = store.due_targets()
    wake(targets)
    batches = store.finish_batches()
    for batch in batches:
        log.info("batch %s: finished", batch["id"], extra={"batch_id": batch["id"]})
        finished(batch["id"])
    return {"leases": ended, "expired": expired, "cancelled": cancelled, "targets": len(targets),
            "batches": len(batches)}  # fmt: skip


def tell_ends(store: Store, tell: Callable[[str, str, Mapping[str, int]], bool]) -> int:
    """Tells applications of their finished batches: `tell(task, batch_id, counts)`; how many knew.

    A batch is marked only when `tell` succeeded: a crash in between tells it once more, and one
    before it loses nothing.
    """
    done = 0
    for batch in store.untold():
        status = store.batch_status(batch["id"]) or {"counts": {}}
        if not tell(batch["options"]["on_finished"], batch["id"], status["counts"]):
            break  # the same broker would not take the others
        store.told(batch["id"])
        done += 1
    return done


def mailboxes_of(
    targets: Iterable[tuple[str, str]], pools: Mapping[str, Iterable[str]]
) -> list[str]:
    """The mailboxes that serve these targets: themselves, or the members of the pools."""
    found: set[str] = set()
    for kind, target in targets:
        found.update([target] if kind == "mailbox" else pools.get(target, ()))
    return sorted(found)
