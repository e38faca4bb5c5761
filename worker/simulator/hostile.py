"""A hostile service: what may befall any request, mixed by chance.

The statuses are those of Microsoft's Dev Proxy; what it lacks stands beside them: errors after the
mail was accepted, lines that break, answers that never end.
https://learn.microsoft.com/microsoft-cloud/dev/dev-proxy/technical-reference/graphrandomerrorplugin
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from worker.simulator.faults import KINDS, Fault, ordered

#: Name of a misfortune -> the fault that it is.
MIX: Mapping[str, dict[str, Any]] = {
    "throttle": {"kind": "throttle"},
    "500": {"kind": "status", "status": 500},
    "502": {"kind": "status", "status": 502, "body": "<html>Bad gateway</html>"},
    "503": {"kind": "status", "status": 503, "headers": {"Retry-After": "1"}},
    "504": {"kind": "status", "status": 504, "code": "Gateway Timeout"},  # as Dev Proxy spells it
    "507": {"kind": "status", "status": 507, "code": "Insufficient Storage"},
    "500_after": {"kind": "status_after", "status": 500},
    "503_after": {"kind": "status_after", "status": 503, "headers": {"Retry-After": "1"}},
    "504_after": {"kind": "status_after", "status": 504},
    "revoked": {"kind": "revoked"},
    "reset_before_reading": {"kind": "reset_before_reading"},
    "reset_before": {"kind": "reset_before"},
    "reset_after": {"kind": "reset_after"},
    "close_before": {"kind": "close_before"},
    "close_after": {"kind": "close_after"},
    "cut_in_status": {"kind": "cut_in_status"},
    "cut_after_status": {"kind": "cut_after_status"},
    "hang_before": {"kind": "hang_before"},
    "hang_after": {"kind": "hang_after"},
    "slow_body": {"kind": "slow_body"},
    "garbage": {"kind": "garbage"},
    "garbage_after": {"kind": "garbage_after"},
    "accepted_retry_after": {"kind": "accepted_retry_after", "retry_after": "2"},
    "accept_late": {"kind": "accept_late", "seconds": 1.0},
}


class Chance:
    """Draws misfortunes; the same seed draws the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"hostile {seed}")  # noqa: S311 - repeatable, not secret

    def draw(self, percent: float, names: Sequence[str], *, accepts: bool) -> Fault | None:
        """The misfortune of one request, or None. `names`: those to choose from, none for all;
        `accepts`: whether there is a mail that could be accepted.
        """
        if self._random.random() * 100 >= percent:
            return None
        faults = [ordered(MIX[name]) for name in names or MIX]
        fitting = [fault for fault in faults if accepts or not KINDS[fault.kind][1]]
        return self._random.choice(fitting) if fitting else None
