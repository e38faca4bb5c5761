"""No silent standstill: a process that gets nothing done although it could says so, and ends.

Its supervisor starts it anew; whatever it had claimed ends like that of any process that died. The
watch runs in a thread of its own and uses nothing that the lanes use: what holds them up must not
hold up who looks after them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from worker.config import Settings
from worker.lanes import Lanes
from worker.store import make_engine

log = logging.getLogger(__name__)

#: Every request ends within its timeout; what follows has so many seconds more until it shows.
GRACE = 15.0
#: How often it is looked, in seconds.
LOOK = 1.0
#: A server that answers does so within this time, in seconds.
ANSWER = 2.0


class Standstill:
    """Watches the lanes and the ticker of one process; calls `end(why)` once, and is done."""

    def __init__(self, settings: Settings, lanes: Lanes, end: Callable[[str], None]) -> None:
        self._settings = settings
        self._lanes = lanes
        self._end = end
        self._patience = settings.request_timeout.total_seconds() + GRACE
        self._ticked = self._excused = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="postroom-watch", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """The process ends anyway."""
        self._over.set()

    def tick(self) -> None:
        """The ticker has come round."""
        self._ticked = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            why = self._why()
            if why is None:
                continue
            if not _servers_answer(self._settings):
                self._excused = time.monotonic()  # they are to blame, and others say so
                continue
            if not self._over.is_set():
                log.critical("standstill: %s; this worker ends, to be started anew", why)
                self._end(why)
            return

    def _why(self) -> str | None:
        """What has stood still for too long."""
        since = time.monotonic() - self._excused
        if min(self._lanes.silent_for, since) > self._patience:
            return f"{self._lanes.count} lanes claim, record and end nothing"
        if min(time.monotonic() - self._ticked, since) > self._patience:
            return "the ticker does not come round"
        return None


def _servers_answer(settings: Settings) -> bool:
    """Whether Redis and the database answer somebody who asks anew."""
    client = redis.Redis.from_url(
        settings.redis_url, socket_timeout=ANSWER, socket_connect_timeout=ANSWER,
        retry=Retry(NoBackoff(), 0),
    )  # fmt: skip
    engine = make_engine(settings.require_database_url(), pool_size=1, patience=ANSWER)
    try:
        client.ping()
        with engine.execution_options(reads=True).connect() as connection:
            connection.execute(text("SELECT 1"))
    except (RedisError, SQLAlchemyError, OSError):
        return False
    finally:
        client.close()
        engine.dispose()
    return True
