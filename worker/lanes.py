"""The lanes at work in this process: how many, and when they last gave a sign of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Lanes:
    """Kept by the lanes themselves, read by those who look after them; safe for threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._sign = time.monotonic()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A lane, from its first step to its last."""
        with self._changed:
            if not self._count:
                self.sign()
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self.sign()
                self._changed.notify_all()

    def sign(self) -> None:
        """Something was claimed or recorded, or a lane has ended."""
        self._sign = time.monotonic()

    @property
    def count(self) -> int:
        """How many are at work."""
        return self._count

    @property
    def silent_for(self) -> float:
        """For how many seconds none of those at work gave a sign; 0 where none is."""
        with self._changed:
            return time.monotonic() - self._sign if self._count else 0.0

    def wait_until_idle(self, seconds: float) -> bool:
        """Waits until none is at work any more; False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._count, seconds)
