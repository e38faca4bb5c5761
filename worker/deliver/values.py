"""What a lane works with: its doors and rules, and a message made ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from worker.checks import IN_REQUEST
from worker.gate import Gate
from worker.graph import Graph
from worker.limits import Cost
from worker.model import Due, OnUnknown, Outcome
from worker.staging import NO_STAGING, Staging
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

    lease: timedelta
    request_timeout: timedelta
    max_attempts: int
    on_unknown: OnUnknown
    internal_domains: frozenset[str] = frozenset()  #: none: those of the senders
    staging: Staging = NO_STAGING


@dataclass(frozen=True, slots=True)
class Deps:
    """The doors that a lane uses, one of each for the whole process."""

    store: Store
    writer: Writer
    gate: Gate
    graph: Graph
    tokens: Tokens
    rules: Rules
    pools: Callable[[], Mapping[str, Sequence[str]]]  #: all there are now: name → members
    worker: str  #: this process, on claims and attempts
    stop: Stop
    crowded: Callable[[], bool] = lambda: False  #: whether others wait for a thread of the process


@dataclass(frozen=True, slots=True)
class Prepared:
    """A due message with its request, ready to go. Its id is the name of its slot."""

    due: Due
    shared: bool  #: of a pool: other mailboxes may take it when it returns to its queue
    body: bytes  #: without attachments
    cost: Cost
    problem: Outcome | None = None  #: it will not be sent, for this reason
    shown: Rendered | None = None

    @property
    def size(self) -> int:
        """Bytes of the request, with the attachments that go in it."""
        return self.cost.upload


def attached(content: Mapping[str, Any]) -> int:
    """Bytes that a message's attachments add to its request; those that go by a draft add none."""
    references = content.get("attachments", ())
    if not fits(content):
        return 0
    return sum((a["size"] + 2) // 3 * 4 + len(a["name"]) + OVERHEAD for a in references)


def fits(content: Mapping[str, Any]) -> bool:
    """Whether the message's attachments go in its request."""
    return sum(int(a["size"]) for a in content.get("attachments", ())) <= IN_REQUEST
