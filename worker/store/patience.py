"""PostgreSQL connections that do not wait for ever.

A server that is stopped, or a network that swallows what is sent, gives no error: without a limit
of our own, whoever waits for such an answer would wait as long as the process lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import psycopg
from sqlalchemy import Engine, event

#: A statement may take so long, in seconds; the server itself ends it a moment earlier.
PATIENCE = 9.0


def limit(engine: Engine, patience: float) -> None:
    """Gives an engine's connections this patience: an answer later than that breaks them."""

    class Patient(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **more: Any) -> Any:
            """As psycopg's, for a bounded time. Raises OperationalError."""
            return super().wait(_bounded(gen, patience, self.close), *args, **more)

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, words: Any, options: Any) -> Any:
        return Patient.connect(*words, **options)


def _bounded(
    steps: Generator[Any, Any, Any], patience: float, close: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """The same steps; each time that nothing came for another moment, the clock is looked at."""
    end = time.monotonic() + patience
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > end:
                close()
                raise psycopg.OperationalError(f"no answer within {patience:g} seconds")
            wanted = steps.send(ready)
    except StopIteration as done:
        return done.value
