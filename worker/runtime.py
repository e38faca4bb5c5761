"""Builds everything real, once a process and lazily: connections must not cross a fork."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.config import Settings
from worker.inbox import Inbox
from worker.lanes import Lanes
from worker.meters import TOKENS, Meters
from worker.model import InvalidSettings
from worker.parts import Parts
from worker.store import Store, Writer, make_engine

if TYPE_CHECKING:  # imported where they are built: a producer needs none of Microsoft's side
    from redis.asyncio import Redis as AsyncRedis

    from worker.broker import Bell, Callback
    from worker.gate import Gate, Past
    from worker.graph import Graph
    from worker.limits import Limits
    from worker.tokens import Refusal, Tokens

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long a call to Redis may take, in seconds: `Unavailable` is promised within two.
REDIS_TIMEOUT = 1.5


#: How long the end of a process waits for its last outcomes, in seconds.
CLOSING = 3.0


class Runtime:
    """The doors of one process. Each is built when it is first used."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.stop = threading.Event()
        self.crowded = threading.Event()  # tasks wait for a thread of some worker
        self.inbox_rung = threading.Event()  # something may lie in the inbox
        self.taking_in = threading.Lock()
        self.name = f"{socket.gethostname()}:{self.pid}:{secrets.token_hex(3)}"
        self.lanes = Lanes()
        self._lock = threading.RLock()

    @classmethod
    def from_env(cls) -> Runtime:
        """The runtime of this process's environment. Raises InvalidSettings."""
        return cls(Settings.from_env())

    # ---- Redis ---------------------------------------------------------------------------------

    @cached_property
    def redis(self) -> redis.Redis:
        """For threads. No silent retries: a script that ran twice would count twice."""
        return redis.Redis.from_url(
            self.settings.redis_url, retry=Retry(NoBackoff(), 0), **_redis_options()
        )

    @cached_property
    def meters(self) -> Meters:
        """Counts for the metrics."""
        return Meters(self.redis)

    @cached_property
    def inbox(self) -> Inbox:
        """Where enqueued messages wait for their rows."""
        return Inbox(self.redis)

    @cached_property
    def parts(self) -> Parts:
        """Where the parts of attachments wait, before the messages that refer to them."""
        return Parts(self.redis)

    @cached_property
    def bell(self) -> Bell:
        """The doorbell tasks."""
        from worker.broker import Bell

        return Bell(self.settings.redis_url)

    @cached_property
    def callback(self) -> Callback:
        """The way to the application's own tasks."""
        from worker.broker import Callback

        broker = self.settings.on_finished_broker or self.settings.redis_url
        return Callback(broker, self.settings.on_finished_queue)

    def ring_ingest(self) -> None:
        """Something lies in the inbox."""
        self.bell.ingest()

    def ring_sweep(self) -> None:
        """Something became due, and need not wait for the next tick."""
        try:
            self.bell.sweep()
        except Exception as error:  # noqa: BLE001  (a ring is a hint: every worker looks by itself)
            log.warning("the bell was not heard (%s)", type(error).__name__)

    # ---- SQL -----------------------------------------------------------------------------------

    @cached_property
    def store(self) -> Store:
        """SQL."""
        url = self.settings.require_database_url()
        engine = make_engine(url, self.settings.db_schema)
        return Store(engine, max_failures=self.settings.max_failures)

    def pools(self) -> Mapping[str, list[str]]:
        """All pools: those of the settings win over those in SQL."""
        return self.store.mailboxes.pools() | self.settings.pools

    # ---- Microsoft -----------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> Tokens:
        """The one token that all processes share."""
        from worker.tokens import Tokens

        tenant, client = self.settings.identity()
        key = self.settings.secret_key
        return Tokens(
            self.redis,
            authority=self.settings.authority,
            tenant_id=tenant,
            client_id=client,
            credential=self.settings.credential,
            scope=self.settings.graph_scope,
            ca_bundle=str(self.settings.ca_bundle) if self.settings.ca_bundle else None,
            margin=self.settings.token_margin,
            secret_keys=key.get_secret_value().split(",") if key else (),
            fetching=lambda: self.meters.add(TOKENS),
        )

    def refusal(self) -> Refusal | None:
        """Why no worker has a token; None where that is not so, or cannot be known here."""
        try:
            return self.tokens.refusal()
        except (InvalidSettings, redis.RedisError):
            return None  # a producer need not have the credential

    # ---- the loop and what lives on it ---------------------------------------------------------

    @cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The process's one event loop, in a thread of its own."""
        with self._lock:  # from Python 3.12 on, cached_property has none of its own
            if "loop" not in self.__dict__:
                loop = self.__dict__["loop"] = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=loop.run_forever, name="postroom-loop", daemon=True
                )
                self._thread.start()
            found: asyncio.AbstractEventLoop = self.__dict__["loop"]
            return found

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the loop and waits for it, from any other thread."""
        return self.submit(work).result()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts `work` on the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @cached_property
    def loops_redis(self) -> AsyncRedis:
        """For the loop; no silent retries either."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry as AsyncRetry

        return Redis.from_url(
            self.settings.redis_url, retry=AsyncRetry(NoBackoff(), 0), **_redis_options()
        )

    @cached_property
    def gate(self) -> Gate:
        """The gates of all mailboxes; for the loop."""
        from worker.gate import Gate

        return Gate(self.loops_redis, self.settings.limits, history=self._past)

    async def _past(self, mailbox: str, limits: Limits) -> Past:
        """What SQL knows of a mailbox, for a gate that Redis has lost."""
        return await asyncio.to_thread(self.look_back, mailbox, limits)

    def look_back(self, mailbox: str, limits: Limits) -> Past:
        """As SQL knows it, from any thread."""
        from worker.gate import Past

        known = self.store.history
        # Claims first: one that ends meanwhile counts twice, never not at all.
        flying = known.flying(mailbox)
        return Past(known.windows(mailbox, limits), flying, known.cooldown(mailbox))

    @cached_property
    def graph(self) -> Graph:
        """The way to Graph; for the loop."""
        from worker.graph import Graph

        return Graph(
            self.settings.graph_url,
            ca_bundle=str(self.settings.ca_bundle) if self.settings.ca_bundle else None,
            request_timeout=self.settings.request_timeout,
        )

    @cached_property
    def writer(self) -> Writer:
        """Claims and outcomes of all lanes; for the loop."""
        return Writer(
            self.store.engine, self.store.sending,
            told=lambda record: self.meters.attempt(record.outcome), committed=self.lanes.sign,
        )  # fmt: skip

    def close(self) -> None:
        """Ends what is open; used at the end of a process."""
        self.stop.set()
        if "loop" in self.__dict__:
            self.call(self._close_on_loop())
            self._end_loop()
        if "tokens" in self.__dict__:
            self.tokens.close()
        if "store" in self.__dict__:
            self.store.close()
        if "redis" in self.__dict__:
            self.redis.close()

    def _end_loop(self) -> None:
        """Closes it where nothing is left on it; what a stop gave up ends with the process."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CLOSING)
        if not self._thread.is_alive() and not asyncio.all_tasks(self.loop):
            self.loop.close()

    async def _close_on_loop(self) -> None:
        if "writer" in self.__dict__:
            try:
                await asyncio.wait_for(self.writer.close(), CLOSING)
            except TimeoutError:
                log.warning("the database does not answer: outcomes are lost, and in doubt")
        if "graph" in self.__dict__:
            await self.graph.close()
        if "loops_redis" in self.__dict__:
            await self.loops_redis.aclose()


def _redis_options() -> dict[str, Any]:
    return {
        "socket_timeout": REDIS_TIMEOUT,
        "socket_connect_timeout": REDIS_TIMEOUT,
        "health_check_interval": 25,
    }


_current: Runtime | None = None
_lock = threading.Lock()


def current() -> Runtime:
    """The runtime of this process, made when first asked for; a forked child makes its own."""
    global _current  # noqa: PLW0603  (one a process, and nowhere else)
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = Runtime.from_env()
        return _current
