"""What an operator does with a batch: pause, resume, cancel, retry. Again is no error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from worker import report
from worker.client.asking import ask, known_id
from worker.model import BatchState, InvalidMessages, NotFound, Problem, State
from worker.store import Head

if TYPE_CHECKING:
    from worker.runtime import Runtime


class Control:
    """The client's part for operators."""

    _runtime: Callable[[], Runtime]

    def pause(self, batch_id: str, *, by: str = "api", why: str | None = None) -> dict[str, Any]:
        """Nothing more of it is sent until `resume`; what is in flight ends.

        {"batch_id", "state", "queued", "in_flight"}. Raises NotFound, WrongState (it has ended),
        Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        return self._done(batch_id, lambda: rt.store.control.pause(batch_id, by=by, why=why))

    def resume(self, batch_id: str, *, by: str = "api", why: str | None = None) -> dict[str, Any]:
        """Ends a pause; sending goes on at once. The answer is that of `pause`.

        Raises NotFound, WrongState (it is cancelled), Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        found = self._done(batch_id, lambda: rt.store.control.resume(batch_id, by=by, why=why))
        rt.ring_sweep()
        return found

    def cancel(self, batch_id: str, *, by: str = "api", why: str | None = None) -> dict[str, Any]:
        """Takes back what is queued, at once; what is in flight ends; what may have been sent is
        `unknown`. Of a batch that is still arriving, the rest ends cancelled as it comes.

        {"batch_id", "state", "cancelled", "in_flight", "unknown"}: how many messages of the batch
        are in each. Raises NotFound, WrongState (it is finished), Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        return self._done(batch_id, lambda: rt.store.control.cancel(batch_id, by=by, why=why))

    def retry(
        self, batch_id: str, *, code: str | None = None, since: datetime | None = None,
        include_unknown: bool = False, dry_run: bool = False, by: str = "api",
        why: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Queues the failed messages again, with fresh tries: {"requeued", "left": {state: n}}.

        Only those that failed with `code`, and were last tried at or after `since` (with a zone).
        `include_unknown`: also those that may have been sent, which risks a second copy.
        `dry_run`: changes nothing and says what would be. Raises NotFound, WrongState (it is
        cancelled), InvalidMessages (`since` has no zone), Unavailable.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        if since is not None and since.utcoffset() is None:
            detail = "give a zone, e.g. 2026-10-25T09:00+02:00"
            raise InvalidMessages([Problem(0, "TIME_NAIVE", "since", detail)])
        age = rt.settings.max_age.total_seconds()
        found: dict[str, Any] | None = ask(rt, lambda: rt.store.control.retry(
            batch_id, code=code, since=since, include_unknown=include_unknown, dry_run=dry_run,
            by=by, why=why, age=age))  # fmt: skip
        if found is None:  # all of it lies in the inbox: none has failed
            counts = self._counts(batch_id).items()
            return {"requeued": 0, "left": {state: n for state, n in counts if n}}
        if found["requeued"] and not dry_run:
            rt.ring_sweep()
        return found

    def _done(self, batch_id: str, command: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Does it, also to a batch of which SQL has nothing yet and the inbox has."""
        found = ask(self._runtime(), command)
        if found is None:
            self._let_arrive(batch_id)
            found = ask(self._runtime(), command)
        if found is None:
            raise NotFound(f"no batch {batch_id}")
        if found["state"] == BatchState.OPEN:  # what lies in the inbox is queued too
            found["queued"] = self._counts(batch_id)[State.QUEUED]
        return dict(found)

    def _counts(self, batch_id: str) -> dict[str, int]:
        rt = self._runtime()
        status = ask(rt, lambda: report.status(rt, batch_id))
        return dict(status["counts"])

    def _let_arrive(self, batch_id: str) -> None:
        """Makes the row of a batch of which only Redis knows, so that its chunks find it."""
        rt = self._runtime()
        known = rt.inbox.known(batch_id)
        if known is None:
            raise NotFound(f"no batch {batch_id}")
        head = Head.of(batch_id, known, rt.settings.max_age)
        ask(rt, lambda: rt.store.arrive([head], []))
