"""Celery's glue: the application that `celery -A worker` finds, and its tasks.

Each task is a line or two; what it does stands in the flow.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from celery import Task

from worker import runtime
from worker.broker import make_app
from worker.client import Client
from worker.config import Settings
from worker.dashboard import set_defaults
from worker.logs import scrubbed
from worker.model import InvalidSettings, State
from worker.report import BEAT
from worker.store.retention import pseudonym
from worker.tasks.process import Alone
from worker.tasks.ticker import Ticker
from worker.tasks.work import run_ingest, run_lane, run_settle, run_sweep

log = logging.getLogger(__name__)

try:
    app = make_app(Settings.from_env().redis_url)
except InvalidSettings as error:
    raise SystemExit(f"postroom: {error}") from None

if "flower" in sys.argv:  # Celery has no hook for it, and Flower reads its options right after
    set_defaults(Settings.from_env().flower_login())

app.steps["worker"].add(Ticker)
app.Worker = app.subclass_with_self(Alone)  # type: ignore[misc]  # Celery's own, made when asked


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
    return rt.call(run_lane(rt, mailbox))


@app.task(name="postroom.ingest", base=Discreet, send_events=False)
def ingest_task() -> dict[str, int]:
    """Writes what lies in the inbox."""
    return run_ingest(runtime.current())


@app.task(name="postroom.sweep", base=Discreet, send_events=False)
def sweep_task(rung: bool = False) -> dict[str, int]:
    """Wakes lanes, ends what ran out, finishes batches. `rung`: by whom something became due."""
    rt = runtime.current()
    if not rung:  # by beat
        rt.redis.set(BEAT, "1", ex=30)
    return run_sweep(rt)


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
    return rt.call(run_settle(rt))


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
    parts = [f"{name or 'batch'}: " + ", ".join(f"{n} {state}" for state, n in told.items())]
    if State.FAILED in told:
        parts.append(f"to send again: postroom batch retry {batch_id}")
    if State.UNKNOWN in told:  # a retry could send them twice: a look at the mailbox comes first
        which = f"postroom message find --batch {batch_id} --state unknown"
        parts.append(f"to settle: {which}, then postroom batch settle {batch_id} --as ...")
    return "; ".join(parts)


@app.task(name="postroom.retry_batch", base=Discreet)
def retry_batch(batch_id: str, include_unknown: bool = False) -> dict[str, Any]:
    """Queues the failed messages of a batch again; for Flower's API."""
    client = Client(runtime.current)
    return client.retry(
        batch_id, include_unknown=include_unknown, by="flower", why="postroom.retry_batch"
    )


def _told(status: dict[str, Any]) -> dict[str, int]:
    return {state: n for state, n in status.get("counts", {}).items() if n}
