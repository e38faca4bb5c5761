"""What a lane works with: its doors and rules, and a message made ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from worker.gate import Gate
from worker.graph import Graph
from worker.model import Due, OnUnknown, Rejected
from worker.store import Store, Writer
from worker.tokens import Tokens


class Stop(Protocol):
    """Whether the process is asked to end."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that a lane works by."""

    concurrency: int
    lease: timedelta
    request_timeout: timedelta
    max_attempts: int
    on_unknown: OnUnknown


@dataclass(frozen=True, slots=True)
class Deps:
    """The doors that a lane uses, one of each for the whole process."""

    store: Store
    writer: Writer
    gate: Gate
    graph: Graph
    tokens: Tokens
    rules: Rules
    worker: str  #: this process, on claims and attempts
    stop: Stop
    crowded: Callable[[], bool] = lambda: False  #: whether others wait for a thread of the process


@dataclass(frozen=True, slots=True)
class Prepared:
    """A due message with its request, ready to go."""

    due: Due
    body: bytes
    problem: Rejected | None = None
