"""What the client asks of SQL, and what it says where SQL does not answer."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from worker.model import NotFound, Unavailable

if TYPE_CHECKING:
    from worker.runtime import Runtime

#: An answer that takes longer, in seconds, makes us ask whether anybody is there at all.
GLANCE = 0.5
#: Whoever is there says so within this time, in seconds: together less than the two promised.
THERE = 1.2


class _Asked(threading.Thread):
    """A question under way. A server that is stopped gives neither answer nor error: whoever waits
    for it in a thread of its own can still go.
    """

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__(name="postroom-asks", daemon=True)
        self._question = question
        self._answer: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._question()
        except BaseException as error:  # noqa: BLE001  (it is raised where it was asked)
            self._error = error

    def is_over(self, seconds: float) -> bool:
        self.join(seconds)
        return not self.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._answer


def ask(rt: Runtime, question: Callable[[], Any], batch_id: str | None = None) -> Any:
    """What SQL answers, however long it thinks. Raises Unavailable within two seconds where nobody
    is there; what was asked for may then still be done later.
    """
    asked = _Asked(question)
    while not asked.is_over(GLANCE):
        there = _Asked(lambda: _knock(rt))
        if asked.is_over(0) or (there.is_over(THERE) and not there.failed):
            continue
        raise Unavailable("the database does not answer", batch_id)
    try:
        return asked.result()
    except SQLAlchemyError as error:
        what = f"the database does not answer ({type(error).__name__})"
        raise Unavailable(what, batch_id) from error


def _knock(rt: Runtime) -> None:
    with rt.store.engine.execution_options(reads=True).connect() as connection:
        connection.execute(text("SELECT 1"))


def known_id(given: object, what: str = "batch") -> str:
    """An id in its usual form. Raises NotFound: nothing has an id of another form."""
    try:
        return str(uuid.UUID(given))  # type: ignore[arg-type]
    except (ValueError, AttributeError, TypeError):
        raise NotFound(f"a {what} id is a UUID") from None
