"""postroom batch ...: what became of batches."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import blocked, output
from worker.cli.doors import NO_WORKER, Json, an_id, migrated, start_of, workers
from worker.cli.steps import steps
from worker.cli.watch import live
from worker.meanings import meaning
from worker.model import BatchState, State
from worker.staging import Staging

if TYPE_CHECKING:
    from worker.runtime import Runtime

app = typer.Typer(
    help="Batches: what became of them, and pause, resume, cancel, retry.", no_args_is_help=True
)

BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.")]

#: How often `watch` looks, in seconds.
LOOK = 1.0
_ENDED = (BatchState.FINISHED, BatchState.CANCELLED)
_COLUMNS = ("id", "position", "to", "mailbox", "state", "attempts", "error_code", "request_id",
            "sent_at", "bounced")  # fmt: skip


#: A spreadsheet runs what begins so; an address may, as in `=1+1@example.com`.
#: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Format(StrEnum):
    """How an export is written."""

    CSV = "csv"
    JSONL = "jsonl"


@app.command("list")
def list_(
    *,
    state: Annotated[BatchState | None, typer.Option(help="Only those in this state.")] = None,
    name: Annotated[str | None, typer.Option(help="Only those whose name holds this.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Created then or later: 2026-10-25T09:00+02:00 or 2h, 7d.")
    ] = None,
    sender: Annotated[str | None, typer.Option(help="Only those of this mailbox or pool.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    json: Json = False,
) -> None:
    """The newest batches, with their counts."""
    from worker.client import Client

    start = start_of(since) if since else None
    with migrated() as rt:
        found = Client(lambda: rt).batches(
            state=state, name=name, since=start, sender=sender, limit=limit
        )
    if json:
        output.print_json(found)
        return
    output.table(
        ("BATCH", "NAME", "STATE", "TOTAL", "COUNTS", "CREATED"),
        ((one["batch_id"], one["name"], one["state"], one["total"], _counts(one["counts"]),
          output.time_text(one["created_at"])) for one in found),
    )  # fmt: skip


@app.command()
def status(batch_id: BatchId, json: Json = False) -> None:
    """State, counts, blocked mailboxes, rate and the seconds to go."""
    with migrated() as rt:
        found = status_of(rt, batch_id)
    if json:
        output.print_json(found)
        return
    show(found)
    if found["workers"] == 0 and found["state"] not in _ENDED:
        output.warn(NO_WORKER)


@app.command()
def watch(batch_id: BatchId, json: Json = False) -> None:
    """Waits until the batch has ended; exit status 1 if messages failed or are unknown."""
    with migrated() as rt:
        if not json and sys.stdout.isatty():
            found = live(lambda: status_of(rt, batch_id), lambda: time.sleep(LOOK))
        else:
            found = _wait(rt, batch_id, quiet=json)
    if json:
        output.print_json(found)
    else:
        show(found)
    bad = {str(state): found["counts"][state] for state in (State.FAILED, State.UNKNOWN)}
    if any(bad.values()):
        output.warn(f"batch {found['batch_id']}: {_counts(bad)}")
        raise typer.Exit(1)


@app.command()
def export(
    batch_id: BatchId,
    format: Annotated[Format, typer.Option(help="How to write it.")] = Format.CSV,  # noqa: A002
    json: Json = False,
) -> None:
    """Every message of a batch with its state, in the order of its input."""
    from worker import report

    with migrated() as rt:
        wanted = an_id(batch_id, "batch")
        report.status(rt, wanted)  # raises NotFound
        rows = rt.store.export(wanted)
        if json:
            output.write_array(rows)
        elif format is Format.JSONL:
            for row in rows:
                sys.stdout.write(output.as_json(row) + "\n")
        else:
            _write_csv(rows)


@app.command("report")
def report_(
    batch_id: BatchId,
    html: Annotated[Path, typer.Option(help="Where to write the page.")],
    json: Json = False,
) -> None:
    """One page about a batch that anyone may be shown: totals, speed, failures in plain words."""
    from worker.client import Client

    with migrated() as rt:
        page = Client(lambda: rt).report(an_id(batch_id, "batch"))
    try:
        html.write_text(page, encoding="utf-8")
    except OSError as error:
        raise output.Failed(f"--html {html}: cannot be written: {error.strerror}") from None
    if json:
        output.print_json({"html": str(html)})
    else:
        output.say(f"written: {html}")


def status_of(rt: Runtime, batch_id: str) -> dict[str, Any]:
    """The status document. Raises NotFound."""
    from worker import report

    found = report.status(rt, an_id(batch_id, "batch"))
    return found | {"workers": workers(rt)}


def show(found: Mapping[str, Any]) -> None:
    """A status for people."""
    output.pairs({
        "batch": found["batch_id"], "name": found["name"], "state": _state(found),
        "paused": found["paused_reason"],
        "total": found["total"], **{k: n for k, n in found["counts"].items() if n},
        "bounced": found["bounced"] or None,
        "per minute": found["rate_per_minute"] or None,
        "seconds to go": found["eta"], "held back by": found["limit"],
    })  # fmt: skip
    if found["counts"][State.SENT] == found["total"]:
        found = {**found, "blocked": []}  # they cost this batch nothing
    for line in blocked.lines(found["blocked"]):
        output.say(line)
    for one in found["trouble"]:
        _show_trouble(one)
    if found["staging"]:
        output.say(f"staging: {Staging(**found['staging'])}")
    for command, purpose in steps(found):
        output.say(f"run: {command}  # {purpose}")


def _state(found: Mapping[str, Any]) -> str:
    """The state; of an open batch also what it waits for."""
    state, arrived, total = str(found["state"]), found["arrived"], found["total"]
    if state != BatchState.OPEN:
        return state
    if total and arrived >= total:
        return f"{state}: all of it waits in Redis for a worker"
    return f"{state}: {arrived:,} of {total:,} messages have arrived from its producer"


def _show_trouble(one: Mapping[str, Any]) -> None:
    """What a code did, in plain words, and where it was met first."""
    if one["code"] is None:
        return
    output.say(f"{one['state']}: {one['count']}: {meaning(one['code'])} ({one['code']})")
    said = f": {one['detail']}" if one["detail"] else ""
    output.say(
        f"    row {one['position']}" + (f", {one['mailbox']}" if one["mailbox"] else "") + said
    )


def _wait(rt: Runtime, batch_id: str, *, quiet: bool) -> dict[str, Any]:
    before, blocks, warned = "", list[str](), False
    while True:
        found = status_of(rt, batch_id)
        if not warned and found["workers"] == 0 and found["state"] not in _ENDED:
            output.warn(NO_WORKER)
            warned = True
        if found["state"] in _ENDED:
            return found
        line = f"{found['state']}: {_counts(found['counts'])} of {found['total']}"
        now = blocked.lines(found["blocked"])
        if not quiet and (line, now) != (before, blocks):
            for said in (line, *(now if now != blocks else ())):
                output.say(said)
            before, blocks = line, now
        time.sleep(LOOK)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in counts.items() if n)


def _write_csv(rows: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        writer.writerow([_harmless(output.plain(row[name])) for name in _COLUMNS])


def _harmless(cell: Any) -> Any:
    """What a spreadsheet would take for a formula begins with an apostrophe instead."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
