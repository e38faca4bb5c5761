"""A mailbox's limits as Microsoft documents them, counted exactly over sliding windows.

https://learn.microsoft.com/graph/throttling-limits#outlook-service-limits
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from worker.simulator.settings import Settings


@dataclass(slots=True)
class Load:
    """What one mailbox bears; times are monotonic seconds."""

    running: int = 0
    peak: int = 0
    arrived: int = 0
    accepted: int = 0
    requests: deque[float] = field(default_factory=deque)
    uploads: deque[tuple[float, int]] = field(default_factory=deque)
    uploaded: int = 0
    closed_at: float = 0.0
    closed_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 429: which limit, how long to wait, and whether the caller had been told to wait."""

    limit: str
    seconds: float
    too_early: bool = False


class Limits:
    """Loads of all mailboxes."""

    def __init__(self) -> None:
        self.loads: defaultdict[str, Load] = defaultdict(Load)
        self.too_early = 0

    def arrive(self, mailbox: str) -> None:
        """A request came in; it counts as running until `leave`, refused or not."""
        load = self.loads[mailbox]
        load.arrived += 1
        load.running += 1
        load.peak = max(load.peak, load.running)

    def leave(self, mailbox: str) -> None:
        """A request is about to be answered."""
        self.loads[mailbox].running -= 1

    def check(self, mailbox: str, size: int, now: float, settings: Settings) -> Refusal | None:
        """Count a request and its bytes; the limit it breaks, if any. Refused ones count too."""
        if not settings.limits:
            return None
        load = self.loads[mailbox]
        windows = (
            _requests(load, now, settings),
            _upload(load, size, now, settings),
        )
        if now < load.closed_until:
            early = now > load.closed_at + settings.grace_ms / 1000
            self.too_early += early
            return Refusal("Retry-After", load.closed_until - now, too_early=early)
        if load.running > settings.concurrency:
            return Refusal("MailboxConcurrency", settings.retry_after)
        return next((refusal for refusal in windows if refusal), None)

    def close(self, mailbox: str, seconds: float, now: float) -> None:
        """The caller was told to stay away for so long."""
        load = self.loads[mailbox]
        load.closed_at = now if now >= load.closed_until else load.closed_at
        load.closed_until = max(load.closed_until, now + seconds)


def _requests(load: Load, now: float, settings: Settings) -> Refusal | None:
    window, limit = settings.request_window, settings.request_limit
    seen = load.requests
    seen.append(now)
    while seen[0] <= now - window:
        seen.popleft()
    if len(seen) <= limit:
        return None
    last_to_leave = seen[len(seen) - limit]
    return Refusal("MailboxRequestRate", last_to_leave + window - now)


def _upload(load: Load, size: int, now: float, settings: Settings) -> Refusal | None:
    window, limit = settings.upload_window, settings.upload_limit
    while load.uploads and load.uploads[0][0] <= now - window:
        load.uploaded -= load.uploads.popleft()[1]
    if load.uploaded + size > limit:
        # Bytes that are refused are not counted: nothing of them was stored.
        oldest = load.uploads[0][0] if load.uploads else now
        return Refusal("MailboxUpload", oldest + window - now)
    load.uploads.append((now, size))
    load.uploaded += size
    return None
