"""`./dev chaos`: one run. N, SECONDS, SEED and ON_UNKNOWN come from the environment."""

from __future__ import annotations

import os
import sys
import time

from tests.chaos.plan import GOAL, Plan
from tests.chaos.run import run

POLICIES = ("hold", "reconcile", "resend")


def main() -> int:
    """0 if every promise held, 1 if not, 2 for wrong usage."""
    try:
        plan = _plan()
    except ValueError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    result = run(plan, tell)
    print(result.table())
    return 1 if result.violations else 0


def _plan() -> Plan:
    messages = _number("N", GOAL, least=10)
    policy = os.environ.get("ON_UNKNOWN", "hold")
    if policy not in POLICIES:
        raise ValueError(f"ON_UNKNOWN: one of {', '.join(POLICIES)}, not {policy!r}")
    seconds = _number("SECONDS", max(40, messages // 50), least=1)
    return Plan(messages, seconds, _number("SEED", 1, least=0), policy)


def _number(name: str, default: int, *, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}: a whole number from {least} up, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
