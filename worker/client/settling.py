"""A person's word on messages that may have been sent. Again is no error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from worker import report
from worker.client.asking import ask, known_id
from worker.model import NotFound, State, WrongState

if TYPE_CHECKING:
    from worker.runtime import Runtime
    from worker.store.doubt import Settled

#: What a message in doubt can be settled as.
SETTLED_AS = (State.SENT, State.FAILED, State.QUEUED)


class Settling:
    """The client's part for settling doubt by hand."""

    _runtime: Callable[[], Runtime]

    def settle(
        self, batch_id: str, as_: str, *, force: bool = False, by: str = "api",
        why: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Your word on the messages of a batch that are `unknown`: sent, failed or queued.

        {"settled", "left": {state: n}}. `queued` takes what surely cannot come any more; `force`
        takes the rest as well, at the risk of a second copy. A second call finds nothing left to
        settle; only what is `unknown` is touched. Raises NotFound, Unavailable; WrongState for
        another word, for queueing in a cancelled batch, and where all of it may still come.
        """
        rt, batch_id = self._runtime(), known_id(batch_id)
        done = _settle(rt, as_, force=force, by=by, why=why, batch_id=batch_id)
        if done is not None:
            return done
        # Raises NotFound; else all of it lies in the inbox, and none is in doubt.
        counts = ask(rt, lambda: report.status(rt, batch_id))["counts"]
        return {"settled": 0, "left": {state: n for state, n in counts.items() if n}}

    def settle_message(
        self, message_id: str, as_: str, *, force: bool = False, by: str = "api",
        why: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """As `settle`, for one message."""
        rt, message_id = self._runtime(), known_id(message_id, "message")
        done = _settle(rt, as_, force=force, by=by, why=why, message_id=message_id)
        if done is None:
            raise NotFound(f"no message {message_id}")
        return done


def _settle(rt: Runtime, as_: str, **its: Any) -> dict[str, Any] | None:
    if as_ not in SETTLED_AS:
        raise WrongState(f"{as_!r} is not one of {', '.join(SETTLED_AS)}")
    margin = rt.settings.settle_margin + rt.settings.request_timeout
    done: Settled | None = ask(rt, lambda: rt.store.doubt.settle(
        State(as_), wait=margin.total_seconds(), age=rt.settings.max_age.total_seconds(), **its
    ))  # fmt: skip
    if done is None:
        return None
    answer: dict[str, Any] = {"settled": done.settled, "left": done.left}
    if as_ == State.QUEUED and done.settled:
        rt.ring_sweep()
    if as_ != State.QUEUED or its["force"] or not done.early:
        return answer
    until = f"{done.until:%Y-%m-%d %H:%M:%SZ}" if done.until else "nobody knows when"
    note = (f"{done.early} of them may still be sent by Graph until {until}: settle then, or "
            "force it (--force) at the risk of a second copy")  # fmt: skip
    if not done.settled:
        raise WrongState(note)
    return answer | {"early": done.early, "until": done.until, "note": note}
