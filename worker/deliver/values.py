"""What a lane works with: its doors and rules, and a message made ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from worker.checks import IN_REQUEST
from worker.gate import Gate
from worker.graph import Graph
from worker.model import Due, OnUnknown, Rejected
from worker.store import Store, Writer
from worker.templates import Rendered
from worker.tokens import Tokens

#: Bytes of JSON around the content of an attachment, more or less.
OVERHEAD = 200


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
    body: bytes  #: without attachments
    problem: Rejected | None = None
    shown: Rendered | None = None

    @property
    def size(self) -> int:
        """Bytes of the request, with the attachments that go in it."""
        return len(self.body) + attached(self.due.content)


def attached(content: Mapping[str, Any]) -> int:
    """Bytes that a message's attachments add to its request; those that go by a draft add none."""
    references = content.get("attachments", ())
    if sum(a["size"] for a in references) > IN_REQUEST:
        return 0
    return sum((a["size"] + 2) // 3 * 4 + len(a["name"]) + OVERHEAD for a in references)
