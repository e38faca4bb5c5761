"""A worker of which a part hangs for good once the Redis key `wedge` names it: loop or writer.

Started as `celery -A tests.wedged worker`; all the rest is the product's own.
"""

from __future__ import annotations

import threading
import time

from worker import runtime
from worker.tasks import app

__all__ = ["app"]

FOR_GOOD = 1_000_000


def _wedge() -> None:
    rt = runtime.current()
    while not (part := rt.redis.get("wedge")):
        time.sleep(0.05)
    if part == b"loop":
        rt.loop.call_soon_threadsafe(time.sleep, FOR_GOOD)
    else:
        rt.writer._thread.submit(time.sleep, FOR_GOOD)


threading.Thread(target=_wedge, daemon=True).start()
