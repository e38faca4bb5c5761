"""What an application and an operator look up: batches, messages; and whom not to write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from worker import report
from worker.checks import Refused
from worker.checks.addresses import address
from worker.client.asking import ask, known_id
from worker.model import BatchState, InvalidMessages, Problem, State
from worker.pages import report_page
from worker.store.finding import Wanted
from worker.store.retention import pseudonym

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: So many problems are kept.
MOST_PROBLEMS = 1000


class Lists:
    """The client's part for searches and suppressions."""

    _runtime: Callable[[], Runtime]

    def batches(
        self, *, state: str | None = None, name: str | None = None,
        since: datetime | timedelta | None = None, sender: str | None = None, limit: int = 50,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The newest batches first, with their counts.

        `state`: open, running, paused, cancelled, finished; `name`: a part of it, in any case;
        `since`: created then or later, or so long ago at most; `sender`: a mailbox or a pool.
        Raises InvalidMessages, Unavailable.
        """
        rt = self._runtime()
        if isinstance(since, datetime) and since.utcoffset() is None:
            raise _refused("TIME_NAIVE", "since", "give a zone, e.g. 2026-10-25T09:00+02:00")
        chosen = None if state is None else _one_of(BatchState, state, "state")
        found: list[dict[str, Any]] = ask(rt, lambda: rt.store.finding.batches(
            limit, state=chosen, name=name, since=since, sender=sender))  # fmt: skip
        return found

    def report(self, batch_id: str) -> str:
        """A page of HTML about a batch, whole in itself, to be shown to anyone.

        Raises NotFound, Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        status = ask(rt, lambda: report.status(rt, batch_id))
        summary = ask(rt, lambda: rt.store.summaries.batch(batch_id))
        slots = rt.settings.mailbox_concurrency
        return report_page(status, summary, slots=slots, now=rt.inbox.now())

    def find(
        self, *, to: str | None = None, state: str | None = None, code: str | None = None,
        batch_id: str | None = None, limit: int = 50, after: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One page of messages: {"messages": [...], "next": word or None}.

        `to`: the first recipient, in any case, also where a purge left its pseudonym only. What was
        due last comes first, the messages of one batch in the order of its input. `after`: the
        `next` of the page before. Raises InvalidMessages, NotFound, Unavailable.
        """
        rt = self._runtime()
        chosen = None if state is None else _one_of(State, state, "state")
        wanted = Wanted(
            to=to, pseudonym=to and pseudonym(rt.settings.pseudonym_key())(to), state=chosen,
            code=code, batch_id=None if batch_id is None else known_id(batch_id),
        )  # fmt: skip
        found, following = ask(rt, lambda: rt.store.finding.messages(wanted, limit, after))
        return {"messages": found, "next": following}

    def suppress(
        self, addresses: str | Iterable[str | tuple[str, str | None]], *,
        reason: str | None = None, by: str = "api", why: str | None = None,
    ) -> dict[str, int]:  # fmt: skip
        """From now on these are not written to, also by what is queued: {"added", "known"}.

        Each is an address, or (address, reason). Raises InvalidMessages (all problems together,
        nothing is added), Unavailable.
        """
        rt = self._runtime()
        wanted = dict(_checked(addresses, reason))
        added = ask(rt, lambda: rt.store.suppressions.add(wanted.items(), by=by, why=why))
        return {"added": added, "known": len(wanted) - added}

    def unsuppress(
        self, addresses: str | Iterable[str], *, by: str = "api", why: str | None = None
    ) -> dict[str, int]:
        """These may be written to again: {"removed", "unknown"}. Raises as `suppress`."""
        rt = self._runtime()
        wanted = dict(_checked(addresses, None))
        removed = ask(rt, lambda: rt.store.suppressions.remove(wanted, by=by, why=why))
        return {"removed": removed, "unknown": len(wanted) - removed}

    def suppressions(self) -> Iterator[dict[str, Any]]:
        """All of them in the order of addresses, streamed: address, reason, by, at."""
        return self._runtime().store.suppressions.all()


def _checked(
    given: str | Iterable[str | tuple[str, str | None]], reason: str | None
) -> list[tuple[str, str | None]]:
    """(address in lower case, reason) of each. Raises InvalidMessages."""
    good: list[tuple[str, str | None]] = []
    bad: list[Problem] = []
    for row, one in enumerate([given] if isinstance(given, str) else given, start=1):
        value, its = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
        try:
            good.append((address(value).lower(), its or reason))
        except Refused as refused:
            bad.append(Problem(row, refused.code, "address", refused.detail))
    if bad:
        raise InvalidMessages(bad[:MOST_PROBLEMS])
    return good


def _one_of(kind: Any, value: str, path: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(one) for one in kind)
        raise _refused("STATE", path, f"{str(value)[:64]!a} is not one of {known}") from None


def _refused(code: str, path: str, detail: str) -> InvalidMessages:
    return InvalidMessages([Problem(0, code, path, detail)])
