"""The commands that mend what the status of a batch shows, each with what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.meanings.bounces import of_sender, to_resume
from worker.model import BatchState, State

#: A command that can be pasted, and what it is for.
Step = tuple[str, str]


def steps(status: Mapping[str, Any]) -> list[Step]:
    """What to run for all that a status tells of; nothing where all is well."""
    batch, counts = status["batch_id"], status["counts"]
    found = [_unblock(status["target"], one) for one in status["blocked"][:1]]
    if status["state"] == BatchState.PAUSED:
        found.append((f"postroom batch resume {batch}", "sends the rest"))
    if counts[State.FAILED]:
        found.append((f"postroom batch retry {batch}", "once mended: sends the failed again"))
    if counts[State.UNKNOWN]:
        found += [
            (
                f"postroom message find --batch {batch} --state unknown",
                "which: look into Sent Items",
            ),
            (f"postroom batch settle {batch} --as sent", "if they lie there; if not: --as queued"),
        ]
    return found


def _unblock(target: str, blocked: Mapping[str, Any]) -> Step:
    """For the first of the blocked mailboxes: mostly the others are blocked for the same reason."""
    from worker.store.mailboxes import BY_OPERATOR

    mailbox = blocked["mailbox"]
    if mailbox is None:
        return f"postroom pool set {target} MAILBOX...", "the mailboxes to send from"
    if blocked["code"] == BY_OPERATOR:
        return f"postroom mailbox resume {mailbox}", "sends from it again"
    if of_sender(blocked["code"]):
        return to_resume(blocked["code"], mailbox), "when Exchange lets it send again"
    return f"postroom doctor --mailbox {mailbox}", "what is wrong, and what to do"
