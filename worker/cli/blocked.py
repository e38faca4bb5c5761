"""What keeps mailboxes from sending, as lines for people: one for each cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worker.cli import output
from worker.cli.doors import DOCTOR

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: So many mailboxes of one cause are named.
NAMED = 2


def lines(blocked: Sequence[Mapping[str, Any]]) -> list[str]:
    """`blocked` of a status: who, why, the code, and since when."""
    causes: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in blocked:
        causes.setdefault((one["reason"], one["code"]), []).append(one)
    return [_line(reason, code, of) for (reason, code), of in causes.items()]


def _line(reason: str, code: str, of: Sequence[Mapping[str, Any]]) -> str:
    named = [one["mailbox"] for one in of if one["mailbox"]]
    who = ", ".join(named[:NAMED])
    if more := len(named[NAMED:]):
        who = f"{len(named)} mailboxes ({who} and {more} more)"
    times = [output.time_text(one["since"]) for one in of if one["since"]]
    since = f" since {min(times)}" if times else ""
    return f"blocked: {who}{': ' if who else ''}{reason} ({code}){since}"


def warn_refused(rt: Runtime) -> None:
    """Says where no mailbox may send, whatever its own state: the credential is refused."""
    if refusal := rt.refusal():
        output.warn(f"nothing is sent: the credential is refused ({refusal.code}) since "
                    f"{output.time_text(refusal.since)}; {DOCTOR}")  # fmt: skip
