"""The Celery application and the bell: tasks are doorbells and hints, SQL decides.

Nothing rests on a Celery message, so they run without acknowledgement emulation: no duplicates, no
leaked slots and no crash after a restart of Redis, at a third of the cost.
https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/redis.html
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from kombu import Connection, Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

QUEUE = "postroom"
PREFIX = "postroom:"
#: Tasks wait at most so long for a worker, in seconds; the sweep rings again anyway.
EXPIRES = 60.0


#: So long may a ring take, in seconds; after one that failed, none is tried for as long.
RING_PATIENCE = 1.0
#: A worker looks again so soon for a Redis that went away, in seconds.
RECONNECT = 1.0


#: What beat rings, beside the tickers of the workers.
SCHEDULE = {
    "sweep": {
        "task": "postroom.sweep",
        "schedule": 5.0,
        "options": {"expires": 5.0, "ignore_result": True},
    },
    "purge": {
        "task": "postroom.purge",
        "schedule": 3600.0,
        "options": {"expires": 3600.0, "ignore_result": True},
    },
}


class QuickConnection(Connection):
    """Looks for its server every second. kombu's own waits grow to 30 s, and Celery offers no
    setting for them: after a long outage a worker would stay idle for as long again.

    Puts nothing back: where Redis is gone, kombu would write the tasks of lanes at work into a
    file and call it an emergency. They are doorbells.
    """

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        """As kombu's, with even waits."""
        even = {"interval_start": RECONNECT, "interval_step": 0, "interval_max": RECONNECT}
        return super().ensure_connection(*args, **{**kwargs, **even})

    def channel(self) -> Any:
        """As kombu's."""
        channel: Any = super().channel()
        channel.do_restore = False
        return channel


class QuickAMQP(AMQP):
    """Celery's, with that connection."""

    Connection = QuickConnection


def make_app(redis_url: str, patience: float = 30.0) -> Celery:
    """The application, configured for a Redis that restarts, stalls and forgets.

    `patience`: how long an answer of Redis may take, in seconds. A worker's is far above any
    stall, because a failed reply costs it a reconnect.
    """
    app = Celery("postroom", broker=celery_url(redis_url), amqp=QuickAMQP, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "ack_emulation": False,
            "global_keyprefix": PREFIX,
            "socket_connect_timeout": min(2.0, patience),
            "socket_timeout": patience,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        task_default_queue=QUEUE,
        task_queues=[Queue(QUEUE)],
        task_create_missing_queues=False,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_disable_rate_limits=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=True,
        worker_enable_remote_control=True,
        beat_scheduler="celery.beat:Scheduler",  # in memory: two beats share no file
        beat_schedule=SCHEDULE,
        timezone="UTC",
    )
    return app


def celery_url(redis_url: str) -> str:
    """What kombu calls a URL that redis-py takes.

    A Unix socket has another spelling there, and TLS without options would trust anybody.
    """
    if redis_url.startswith("rediss://") and "ssl_cert_reqs=" not in redis_url:
        return f"{redis_url}{'&' if '?' in redis_url else '?'}ssl_cert_reqs=required"
    if not redis_url.startswith("unix://"):
        return redis_url
    path, _, query = redis_url.removeprefix("unix://").partition("?")
    number = re.search(r"(?:^|&)db=(\d+)", query)
    return f"redis+socket://{path}?virtual_host={number[1] if number else 0}"


def backlog_key() -> str:
    """The Redis list in which tasks wait for a worker."""
    return f"{PREFIX}{QUEUE}"


class Bell:
    """Sends the doorbell tasks. A ring that fails is no failure: the ticker looks every second."""

    def __init__(self, redis_url: str) -> None:
        self._app = make_app(redis_url, RING_PATIENCE)
        self._silent_until = 0.0  # monotonic

    def ingest(self) -> None:
        """Something lies in the inbox."""
        self._ring("postroom.ingest")

    def sweep(self) -> None:
        """Something became due."""
        self._ring("postroom.sweep", True)

    def deliver(self, mailbox: str) -> None:
        """This mailbox has due work."""
        self._ring("postroom.deliver", mailbox)

    def finish(self, batch_id: str) -> None:
        """This batch has ended."""
        self._ring("postroom.finish", batch_id)

    def _ring(self, task: str, *args: Any) -> None:
        began = time.monotonic()
        if began < self._silent_until or self._sent(task, args):
            return
        # After a restart of Redis, kombu's first try may meet a connection that is dead. Where
        # that took its time, nobody answers.
        if time.monotonic() < began + RING_PATIENCE / 2 and self._sent(task, args):
            return
        self._silent_until = time.monotonic() + RING_PATIENCE
        log.warning("the bell of %s was not heard", task)

    def _sent(self, task: str, args: Sequence[Any]) -> bool:
        try:
            self._app.send_task(
                task, args=args, queue=QUEUE, expires=EXPIRES, retry=False, ignore_result=True
            )
        except (OperationalError, RedisError, OSError):
            return False
        return True


class Callback:
    """Calls tasks of the application's own, in its queue: another Celery, without our prefix."""

    def __init__(self, broker_url: str, queue: str) -> None:
        self._queue = queue
        self._app = Celery("postroom-callback", broker=celery_url(broker_url), set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            task_ignore_result=True,
            broker_connection_timeout=2,
            broker_transport_options={"socket_connect_timeout": 2, "socket_timeout": 5},
        )

    def finished(self, task: str, batch_id: str, counts: Mapping[str, int]) -> bool:
        """Sends `task(batch_id, counts)`; False where the broker does not take it."""
        try:
            self._app.send_task(
                task, args=[batch_id, dict(counts)], queue=self._queue, retry=False,
                ignore_result=True,
            )  # fmt: skip
        except (OperationalError, RedisError, OSError) as error:
            log.warning("batch %s: %s could not be told of its end (%s); trying again",
                        batch_id, task, type(error).__name__)  # fmt: skip
            return False
        log.info("batch %s: %s was told of its end", batch_id, task)
        return True
