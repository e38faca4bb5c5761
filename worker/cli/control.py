"""postroom batch pause, resume, cancel, retry: what an operator does with a whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

import typer

from worker.cli import batch, output
from worker.cli.batch import BatchId
from worker.cli.doors import NO_WORKER, By, Json, Why, an_id, login, migrated, start_of, workers
from worker.model import BatchState

app = batch.app


@app.command()
def pause(batch_id: BatchId, by: By = None, why: Why = None, json: Json = False) -> None:
    """Sends nothing more of a batch until it is resumed; what is in flight ends."""
    with migrated() as rt:
        done = _client(rt).pause(an_id(batch_id, "batch"), by=by or login(), why=why)
    _show(done, json, "queued", "in_flight")


@app.command()
def resume(batch_id: BatchId, by: By = None, why: Why = None, json: Json = False) -> None:
    """Sends a paused batch on."""
    with migrated() as rt:
        done = _client(rt).resume(an_id(batch_id, "batch"), by=by or login(), why=why)
        running = workers(rt)
    _show(done, json, "queued", "in_flight")
    if done["queued"] and running == 0 and not json:
        output.warn(NO_WORKER)


@app.command()
def cancel(batch_id: BatchId, by: By = None, why: Why = None, json: Json = False) -> None:
    """Takes back what is not yet sent, for good; what is in flight ends."""
    with migrated() as rt:
        done = _client(rt).cancel(an_id(batch_id, "batch"), by=by or login(), why=why)
    _show(done, json, "cancelled", "in_flight", "unknown")


@app.command()
def retry(
    batch_id: BatchId,
    code: Annotated[str | None, typer.Option(help="Only those that failed with this code.")] = None,
    since: Annotated[
        str | None,
        typer.Option(help="Only those tried since: 2026-10-25T09:00+02:00, or 90min, 2h, 3d ago."),
    ] = None,
    include_unknown: Annotated[
        bool, typer.Option("--include-unknown", help="Also those that may have been sent.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be queued, and change nothing.")
    ] = False,
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """Queues the failed messages again, with fresh tries."""
    start = None if since is None else start_of(since)
    with migrated() as rt:
        start = rt.inbox.now() - start if isinstance(start, timedelta) else start
        done = _client(rt).retry(
            an_id(batch_id, "batch"), code=code, since=start,
            include_unknown=include_unknown, dry_run=dry_run, by=by or login(), why=why,
        )  # fmt: skip
        running = workers(rt)
    if json:
        output.print_json(done)
        return
    left = ", ".join(f"{n} {state}" for state, n in done["left"].items())
    word = "would be queued again" if dry_run else "queued again"
    output.say(f"{done['requeued']} {word}" + (f"; left: {left}" if left else ""))
    if done["requeued"] and running == 0 and not dry_run:
        output.warn(NO_WORKER)


def _client(rt: Any) -> Any:
    from worker.client import Client

    return Client(lambda: rt)


def _show(done: Mapping[str, Any], json: bool, *names: str) -> None:
    if json:
        output.print_json(done)
        return
    numbers = ", ".join(f"{done[name]} {name.replace('_', ' ')}" for name in names)
    more = "; not all of it has arrived" if done["state"] == BatchState.OPEN else ""
    output.say(f"batch {done['batch_id']} is {done['state']}: {numbers}{more}")
