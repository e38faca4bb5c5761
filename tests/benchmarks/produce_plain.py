"""The producer of plain Celery: `delay` for each message, and what that cost."""

from __future__ import annotations

import json
import resource
import sys
import time

from tests.benchmarks.letters import variables
from tests.benchmarks.plain import send


def main(order: dict) -> dict:
    """`order`: `to` (mailbox to count), `stem` (of the references)."""
    before, began = _used(), time.monotonic()
    for mailbox, count in order["to"].items():
        for n, (address, values) in enumerate(variables(count)):
            send.delay(f"{order['stem']}-{mailbox}-{n}"[:40], mailbox, address, values)
    return {"seconds": time.monotonic() - began, "processor": _used() - before}


def _used() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
