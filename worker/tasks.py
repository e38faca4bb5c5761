"""Celery's glue: the application that `celery -A worker` finds, its tasks and its ticker.

Each task is a line or two; what it does stands in the flow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

from celery import Task, bootsteps, signals
from celery.worker import state as celery_state
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from worker import runtime
from worker import settle as settling
from worker.broker import EXPIRES, backlog_key, make_app
from worker.client import Client
from worker.config import Settings
from worker.dashboard import set_defaults
from worker.deliver import SUSPENDED, Deps, Lane, Rules
from worker.doctor import servers
from worker.doctor.values import Status, Visit
from worker.gate import BELL, unheard
from worker.ingest import ingest
from worker.logs import dress, scrubbed
from worker.meters import LEASES, WAITS
from worker.model import InvalidSettings, State
from worker.report import ALIVE, BEAT
from worker.standstill import Standstill
from worker.store.retention import pseudonym
from worker.sweep import mailboxes_of, sweep, tell_ends

log = logging.getLogger(__name__)

try:
    app = make_app(Settings.from_env().redis_url)
except InvalidSettings as error:
    raise SystemExit(f"postroom: {error}") from None

if "flower" in sys.argv:  # Celery has no hook for it, and Flower reads its options right after
    set_defaults(Settings.from_env().flower_login())

#: How often each worker looks by itself, whether it was rung or not.
TICK = timedelta(seconds=1)
#: A wait of at most so many seconds is rung after to the moment; longer ones the sweep ends.
SOON = 10.0
#: The ticker reads the inbox for so long in one go, in seconds: lanes and leases wait meanwhile.
READING = 3.0
#: A task that nobody followed for so long may never be: its lane begins without it.
UNHEARD = timedelta(seconds=1.5)
#: The exit status of a worker that stood still: EX_SOFTWARE of sysexits.h.
EX_STANDSTILL = 70
#: After a stop, lanes have the request timeout and so much more to land, in seconds.
LANDING = 5.0
#: One sweep a tick for all workers together; its mark in Redis lives a little shorter than a tick.
SWEPT = "postroom:swept"


class BrokenOff(Exception):
    """A task met what it should not have: the text is safe to show, the log has the traceback."""


class Discreet(Task):  # type: ignore[type-arg]  # generic in the stubs alone
    """A task whose failures tell Flower nothing of rows, addresses and tokens."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it."""
        try:
            return super().__call__(*args, **kwargs)
        except self.throws:
            raise
        except Exception as error:
            log.exception("task %s broke off", self.name)
            first = str(error).strip().partition("\n")[0]
            raise BrokenOff(scrubbed(f"{type(error).__name__}: {first}")[:300]) from None


@app.task(name="postroom.deliver", base=Discreet)
def deliver(mailbox: str) -> dict[str, Any]:
    """Works one mailbox for a while; says what became of its messages."""
    rt = runtime.current()
    return rt.call(_work(rt, mailbox))


@app.task(name="postroom.ingest", base=Discreet, send_events=False)
def ingest_task() -> dict[str, int]:
    """Writes what lies in the inbox."""
    return _ingest(runtime.current())


@app.task(name="postroom.sweep", base=Discreet, send_events=False)
def sweep_task(rung: bool = False) -> dict[str, int]:
    """Wakes lanes, ends what ran out, finishes batches. `rung`: by whom something became due."""
    rt = runtime.current()
    if not rung:  # by beat
        rt.redis.set(BEAT, "1", ex=30)
    return _sweep(rt)


@app.task(name="postroom.purge", base=Discreet)
def purge() -> dict[str, int]:
    """Forgets contents as CONTENT_AFTER says. Only beat rings it."""
    rt = runtime.current()
    after = rt.settings.content_after
    if after is None:
        return {}
    keep = pseudonym(rt.settings.pseudonym_key())
    return dict(rt.store.retention.purge_content(after.total_seconds(), keep))


@app.task(name="postroom.settle", base=Discreet)
def settle_task() -> dict[str, int]:
    """Looks into mailboxes for messages in doubt; says what became of them."""
    rt = runtime.current()
    return rt.call(settling.settle(_doors(rt)))


class BatchHasTrouble(Exception):
    """Not all of a batch was sent: Flower shows this text where the batch has ended."""


@app.task(name="postroom.finish", base=Discreet, throws=(BatchHasTrouble,))
def finish(batch_id: str) -> dict[str, Any]:
    """A batch has ended: its counts, for Flower; a failure where messages failed or are unknown."""
    status = runtime.current().store.batch_status(batch_id) or {}
    told = _told(status)
    if {State.FAILED, State.UNKNOWN} & told.keys():
        raise BatchHasTrouble(_trouble(batch_id, status.get("name"), told))
    return {"batch": batch_id, "name": status.get("name"), **told}


def _trouble(batch_id: str, name: str | None, told: Mapping[str, int]) -> str:
    counts = ", ".join(f"{n} {state}" for state, n in told.items())
    unknown = " --include-unknown" if State.FAILED not in told else ""
    return f"{name or 'batch'}: {counts}; to send again: postroom batch retry {batch_id}{unknown}"


@app.task(name="postroom.retry_batch", base=Discreet)
def retry_batch(batch_id: str, include_unknown: bool = False) -> dict[str, Any]:
    """Queues the failed messages of a batch again; for Flower's API."""
    client = Client(runtime.current)
    return client.retry(
        batch_id, include_unknown=include_unknown, by="flower", why="postroom.retry_batch"
    )


async def _work(rt: runtime.Runtime, mailbox: str) -> dict[str, Any]:
    """A lane from its pools to its end."""
    with rt.lanes.at_work():
        try:
            known = await asyncio.to_thread(rt.pools)
        except SQLAlchemyError as error:
            log.warning("mailbox %s: no answer from SQL (%s)", mailbox, type(error).__name__)
            return {"waits_for": "the database"}
        pools = {name: list(of) for name, of in known.items() if mailbox in of}
        result = await Lane(_deps(rt), mailbox, pools, rt.settings.limits).run()
    if result.get("waits_for"):
        rt.meters.add(WAITS + result["waits_for"])
    if result.get("waits_for") not in {None, "held", SUSPENDED} and result["seconds"] <= SOON:
        _ring_after(rt, mailbox, result["seconds"])
    return result


async def _fill_in(rt: runtime.Runtime, most: int) -> None:
    """Starts the lanes whose task nobody hears: a broker's connection may be dead without a word.

    Never more lanes than the process has threads for tasks.
    """
    begun = set[asyncio.Task[Any]]()
    while not rt.stop.is_set():
        await asyncio.sleep(TICK.total_seconds())
        try:
            waiting = await _unheard(rt) if rt.lanes.count < most else []
        except (RedisError, SQLAlchemyError, OSError):
            continue  # the ticker says so
        for mailbox in waiting[: most - rt.lanes.count]:
            log.warning("mailbox %s: nobody heard its task; its lane begins without", mailbox)
            task = asyncio.create_task(_work(rt, mailbox))
            begun.add(task)
            task.add_done_callback(begun.discard)


async def _unheard(rt: runtime.Runtime) -> list[str]:
    targets = await asyncio.to_thread(rt.store.due_targets)
    pools = await asyncio.to_thread(rt.pools) if targets else {}
    return await unheard(rt.loops_redis, mailboxes_of(targets, pools), UNHEARD)


def _told(status: dict[str, Any]) -> dict[str, int]:
    return {state: n for state, n in status.get("counts", {}).items() if n}


def _deps(rt: runtime.Runtime) -> Deps:
    s = rt.settings
    rules = Rules(
        lease=s.lease, request_timeout=s.request_timeout, max_attempts=s.max_attempts,
        on_unknown=s.on_unknown, internal_domains=s.internal_domains, staging=s.staging,
    )  # fmt: skip
    return Deps(
        store=rt.store, writer=rt.writer, gate=rt.gate, graph=rt.graph, tokens=rt.tokens,
        rules=rules, worker=rt.name, stop=rt.stop, crowded=rt.crowded.is_set,
    )  # fmt: skip


def _doors(rt: runtime.Runtime) -> settling.Deps:
    s = rt.settings
    rules = settling.Rules(
        on_unknown=s.on_unknown, max_attempts=s.max_attempts, request_timeout=s.request_timeout,
        settle_margin=s.settle_margin,
    )  # fmt: skip
    return settling.Deps(
        store=rt.store, gate=rt.gate, graph=rt.graph, tokens=rt.tokens, rules=rules, stop=rt.stop
    )


def _ingest(rt: runtime.Runtime, seconds: float = math.inf) -> dict[str, int]:
    """`seconds`: leaves the rest to the next who looks."""
    end = time.monotonic() + seconds
    enough = lambda: rt.stop.is_set() or time.monotonic() > end  # noqa: E731
    rt.parts.drain(rt.name, rt.store.contents.arrive, enough)
    return ingest(
        rt.inbox, rt.store, consumer=rt.name, max_age=rt.settings.max_age,
        wake=lambda targets: _wake(rt, targets, news=True), enough=enough,
    )  # fmt: skip


def _sweep(rt: runtime.Runtime) -> dict[str, int]:
    done = sweep(
        rt.store, on_unknown=rt.settings.on_unknown, max_attempts=rt.settings.max_attempts,
        wake=lambda targets: _wake(rt, targets, news=False), finished=rt.bell.finish,
    )  # fmt: skip
    rt.meters.add(LEASES, done["leases"])
    return done | {"told": tell_ends(rt.store, rt.callback.finished)}


def _wake(rt: runtime.Runtime, targets: Sequence[tuple[str, str]], *, news: bool) -> None:
    pools = rt.pools() if any(kind == "pool" for kind, _ in targets) else {}
    resting = rt.store.mailboxes.resting() if pools else set()
    mailboxes = [m for m in mailboxes_of(targets, pools) if m not in resting]
    answers = rt.call(rt.gate.ring(mailboxes, _patience(rt), news=news))
    for mailbox, answer in zip(mailboxes, answers, strict=True):
        if answer > 0:
            rt.bell.deliver(mailbox)


def _patience(rt: runtime.Runtime) -> timedelta:
    """How long a task that was sent counts as under way.

    Where tasks queue up for a thread, it is not lost: a second one would take another's turn.
    """
    return timedelta(seconds=EXPIRES) if rt.crowded.is_set() else BELL


def _ring_after(rt: runtime.Runtime, mailbox: str, seconds: float) -> None:
    """Rings when a wait is over; costs no thread meanwhile. If it is lost, the sweep rings."""

    async def later() -> None:
        rest: float | None = seconds  # 0: its turn is over, and it goes on at once
        with contextlib.suppress(RedisError):
            while rest is not None and not rt.stop.is_set():
                await asyncio.sleep(rest)
                [answer] = await rt.gate.ring([mailbox], _patience(rt), news=False)
                if answer > 0:
                    await asyncio.to_thread(rt.bell.deliver, mailbox)
                rest = -answer / 1000 if 0 < -answer < SOON * 1000 else None

    rt.submit(later())


def _quietly(work: Callable[[], Any]) -> None:
    """Runs a chore that comes again by itself: trouble is only said, and ends no ticker."""
    try:
        work()
    except (RedisError, SQLAlchemyError, OSError) as error:
        log.warning("%s: trying again", type(error).__name__)
    except Exception:
        log.exception("a chore failed, and will be tried again")


def _say_what_redis_lacks(rt: runtime.Runtime) -> None:
    """What would lose messages some day is named when a worker starts, with what to do."""
    for check in servers.redis(Visit(rt)):
        if check.status in {Status.WARN, Status.FAIL}:
            log.warning("%s: %s; %s", check.name, check.detail, check.fix)


def _end(rt: runtime.Runtime, _why: str) -> None:
    """Ends this process for its supervisor to start it anew: in order if that is possible."""
    rt.stop.set()
    celery_state.should_stop = EX_STANDSTILL  # type: ignore[assignment]
    seconds = rt.settings.request_timeout.total_seconds() + LANDING
    time.sleep(seconds)
    os._exit(EX_STANDSTILL)  # what hangs, hangs: the process must not


class Ticker(bootsteps.StartStopStep):
    """Looks after inbox and lanes every second in every worker: no ring, no beat is needed."""

    def __init__(self, worker: Any, **options: Any) -> None:
        pool = f"{worker.pool_cls.__module__}"
        if not pool.endswith((".thread", ".solo")):
            raise SystemExit(
                f"postroom: the pool {pool.rpartition('.')[2]} is not supported; "
                "start with: celery -A worker worker -P threads"
            )
        self._looking: Future[dict[str, int]] | None = None
        self._thread = threading.Thread(target=self._run, name="postroom-ticker", daemon=True)
        self._most = int(worker.concurrency)
        self._watch: Standstill | None = None
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
            for chore in (self._show, partial(_ingest, seconds=READING), self._sweep, self._settle):
                _quietly(partial(chore, rt))
            if self._watch is not None:
                self._watch.tick()

    def _show(self, rt: runtime.Runtime) -> None:
        rt.redis.set(ALIVE + rt.name, "1", ex=5)
        rt.meters.flush()
        (rt.crowded.set if rt.redis.llen(backlog_key()) else rt.crowded.clear)()

    def _settle(self, rt: runtime.Runtime) -> None:
        """Looks on the loop, beside the lanes: neither this thread nor a task waits for them."""
        if self._looking is not None:
            if not self._looking.done():
                return
            looking, self._looking = self._looking, None
            looking.result()  # raises what went wrong
        if rt.store.doubt.due():
            self._looking = rt.submit(settling.settle(_doors(rt)))

    def _sweep(self, rt: runtime.Runtime) -> None:
        if rt.redis.set(SWEPT, rt.name, nx=True, px=int(TICK.total_seconds() * 900)):
            _sweep(rt)


app.steps["worker"].add(Ticker)


@signals.after_setup_logger.connect(weak=False)
@signals.after_setup_task_logger.connect(weak=False)
def _dress_logs(logger: logging.Logger, **_: Any) -> None:
    dress(logger, programs=Settings.from_env().log_format == "json")


@signals.worker_shutting_down.connect(weak=False)
def _shutting_down(**_: Any) -> None:
    """SIGTERM: nothing new is claimed; what is in flight ends and is recorded."""
    runtime.current().stop.set()


@signals.worker_shutdown.connect(weak=False)
def _shutdown(**_: Any) -> None:
    rt = runtime.current()
    rt.stop.set()
    rt.lanes.wait_until_idle(rt.settings.request_timeout.total_seconds() + LANDING)
    rt.close()


@signals.celeryd_init.connect(weak=False)
def _check_settings(**_: Any) -> None:
    try:
        rt = runtime.current()
        rt.settings.identity()
        rt.settings.credential()
        rt.settings.require_database_url()
        if rt.settings.staging:
            log.warning("staging: %s", rt.settings.staging)
    except InvalidSettings as error:
        raise SystemExit(f"postroom: {error}") from None
