"""The ticker: what every worker looks after by itself, whether it was rung or not."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

from celery import bootsteps
from celery.worker import state as celery_state
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker import runtime
from worker.broker import backlog_key
from worker.doctor import servers
from worker.doctor.values import Status, Visit
from worker.report import ALIVE
from worker.runtime import Runtime
from worker.standstill import Standstill
from worker.store.retrying import name_of
from worker.tasks.process import LANDING
from worker.tasks.ringing import never_heard
from worker.tasks.work import run_bounces, run_ingest, run_lane, run_settle, run_sweep

log = logging.getLogger(__name__)

#: How often each worker looks by itself, whether it was rung or not.
TICK = timedelta(seconds=1)
#: How often each worker asks which mailboxes are due to be read for bounces, and when it does so
#: first, in seconds: a report takes minutes to come.
BOUNCES, BOUNCES_FIRST = 60.0, 300.0
#: The ticker reads the inbox for so long in one go, in seconds: lanes and leases wait meanwhile.
READING = 3.0
#: The exit status of a worker that stood still: EX_SOFTWARE of sysexits.h.
EX_STANDSTILL = 70
#: One sweep a tick for all workers together; its mark in Redis lives a little shorter than a tick.
SWEPT = "postroom:swept"


def _quietly(work: Callable[[], Any]) -> str | None:
    """Runs a chore that comes again by itself; the name of its trouble, which ends no ticker."""
    try:
        work()
    except (RedisError, SQLAlchemyError, OSError) as error:
        return name_of(error)
    except Exception:
        log.exception("a chore failed, and will be tried again")
    return None


def _say_what_redis_lacks(rt: Runtime) -> None:
    """What would lose messages some day is named when a worker starts, with what to do."""
    for check in servers.redis(Visit(rt)):
        if check.status in {Status.WARN, Status.FAIL}:
            log.warning("%s: %s; %s", check.name, check.detail, check.fix)


def _end(rt: Runtime, _why: str) -> None:
    """Ends this process for its supervisor to start it anew: in order if that is possible."""
    rt.stop.set()
    celery_state.should_stop = EX_STANDSTILL  # type: ignore[assignment]
    seconds = rt.settings.request_timeout.total_seconds() + LANDING
    time.sleep(seconds)
    os._exit(EX_STANDSTILL)  # what hangs, hangs: the process must not


async def _fill_in(rt: Runtime, most: int) -> None:
    """Starts the lanes whose task nobody hears: a broker's connection may be dead without a word.

    Never more lanes than the process has threads for tasks.
    """
    begun = set[asyncio.Task[Any]]()
    while not rt.stop.is_set():
        await asyncio.sleep(TICK.total_seconds())
        try:
            waiting = await never_heard(rt) if rt.lanes.count < most else []
        except (RedisError, SQLAlchemyError, OSError):
            continue  # the ticker says so
        for mailbox in waiting[: most - rt.lanes.count]:
            log.warning("mailbox %s: nobody heard its task; its lane begins without", mailbox)
            task = asyncio.create_task(run_lane(rt, mailbox))
            begun.add(task)
            task.add_done_callback(begun.discard)


class _OnLoop:
    """A chore on the loop, one at a time."""

    now: Future[dict[str, int]] | None = None

    def under_way(self) -> bool:
        """Whether it still runs. Raises what went wrong in one that has ended."""
        if self.now is None or not self.now.done():
            return self.now is not None
        ended, self.now = self.now, None
        ended.result()
        return False


class Ticker(bootsteps.StartStopStep):
    """Looks after inbox and lanes every second in every worker: no ring, no beat is needed."""

    def __init__(self, worker: Any, **options: Any) -> None:
        pool = f"{worker.pool_cls.__module__}"
        if not pool.endswith((".thread", ".solo")):
            raise SystemExit(
                f"postroom: the pool {pool.rpartition('.')[2]} is not supported; "
                "start with: celery -A worker worker -P threads"
            )
        self._looking, self._reading = _OnLoop(), _OnLoop()
        self._read_at = time.monotonic() + BOUNCES_FIRST
        self._thread = threading.Thread(target=self._run, name="postroom-ticker", daemon=True)
        self._most = int(worker.concurrency)
        self._watch: Standstill | None = None
        self._met: set[str] = set()  # the troubles of the last tick
        super().__init__(worker, **options)

    def start(self, _worker: Any) -> None:
        """Begins to tick."""
        rt = runtime.current()
        self._watch = Standstill(rt.settings, rt.lanes, partial(_end, rt))
        self._thread.start()
        self._watch.start()

    def stop(self, _worker: Any) -> None:
        """Ends with the worker."""
        runtime.current().stop.set()
        if self._watch is not None:
            self._watch.stop()

    def _run(self) -> None:
        rt = runtime.current()
        _quietly(partial(_say_what_redis_lacks, rt))
        rt.submit(_fill_in(rt, self._most))
        while not rt.stop.wait(TICK.total_seconds()):
            # Each for itself: an inbox that cannot be read must not keep the lanes asleep.
            chores = (self._show, self._ingest, self._sweep, self._settle, self._bounces)
            self._say({met for chore in chores if (met := _quietly(partial(chore, rt)))})
            if self._watch is not None:
                self._watch.tick()

    def _say(self, met: set[str]) -> None:
        """Each trouble once, and once that it is over."""
        for name in met - self._met:
            log.warning("%s: trying again every second", name)
        if self._met and not met:
            log.warning("Redis and database answer again")
        self._met = met

    def _show(self, rt: Runtime) -> None:
        rt.redis.set(ALIVE + rt.name, "1", ex=15)  # a round of chores may take so long
        rt.meters.flush()
        (rt.crowded.set if rt.redis.llen(backlog_key()) else rt.crowded.clear)()

    def _ingest(self, rt: Runtime) -> None:
        run_ingest(rt, READING)

    def _settle(self, rt: Runtime) -> None:
        """Looks on the loop, beside the lanes: neither this thread nor a task waits for them."""
        if not self._looking.under_way() and rt.store.doubt.due():
            self._looking.now = rt.submit(run_settle(rt))

    def _bounces(self, rt: Runtime) -> None:
        """As looks, on the loop: a mailbox that must wait for its gate keeps nobody waiting."""
        if rt.settings.bounces == "off" or time.monotonic() < self._read_at:
            return
        if not self._reading.under_way():
            self._read_at = time.monotonic() + BOUNCES
            self._reading.now = rt.submit(run_bounces(rt))

    def _sweep(self, rt: Runtime) -> None:
        if rt.redis.set(SWEPT, rt.name, nx=True, px=int(TICK.total_seconds() * 900)):
            run_sweep(rt)
