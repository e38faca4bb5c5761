"""Short transactions of one engine: what each part of the store stands on."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from sqlalchemy import Connection, Engine

from worker.store.retrying import patiently

T = TypeVar("T")


class Transactions:
    """Reads that lock nothing, and writes that are tried again where they only met others."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def _reading(self) -> AbstractContextManager[Connection]:
        return self.engine.connect().execution_options(reads=True)

    def _do(self, work: Callable[[Connection], T]) -> T:
        return patiently(lambda: self._once(work), chance=random.random)

    def _once(self, work: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            return work(connection)
