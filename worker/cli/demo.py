"""postroom demo: the whole of it on embedded parts, ended by a comparison with the ledger."""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.doors import Json, runtime, upgrade_tables
from worker.model import BatchState, State, Template

if TYPE_CHECKING:
    from worker.cli.embedded import Embedded
    from worker.runtime import Runtime

POOL = "demo"
MAILBOXES = [f"notices{n}@contoso.com" for n in range(1, 6)]
#: Five mailboxes may send 50,000 in ten minutes.
MOST = 45_000
#: Without progress for so many seconds, it gives up.
PATIENCE = 60.0
LOOK = 0.25
_LOG_LINES = 15

_SUBJECT = "Invoice {{ number }} for {{ name }}"
_HTML = """<p>Dear {{ name }},</p>
<p>invoice <b>{{ number }}</b> over {{ amount }} is ready.</p>
"""
_NAMES = ("Ada", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Alan", "Karen")


def demo(
    count: Annotated[
        int, typer.Argument(metavar="[N]", min=1, max=MOST, help="How many notifications.")
    ] = 1000,
    json: Json = False,
) -> None:
    """Sends N notifications with everything embedded: Redis, SQLite, simulator, worker, beat."""
    directory = Path(tempfile.mkdtemp(prefix="postroom-demo-"))
    rows, html = _write_files(directory, count)
    found = _run(directory, rows, html, quiet=json)
    if json:
        output.print_json(found)
    else:
        _show(found)
        _next(found)
    if found["disagreements"]:
        output.warn(f"ledger and SQL disagree on {found['disagreements']} messages")
        raise typer.Exit(1)


def _write_files(directory: Path, count: int) -> tuple[Path, Path]:
    """The CSV and the template that an application would have."""
    rows, html = directory / "invoices.csv", directory / "invoice.html"
    html.write_text(_HTML, encoding="utf-8")
    with rows.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("to", "name", "number", "amount"))
        writer.writerows(
            (f"customer{n}@fabrikam.com", _NAMES[n % len(_NAMES)], f"{n:05}", f"{n % 900 + 10} EUR")
            for n in range(1, count + 1)
        )
    return rows, html


def _run(directory: Path, rows: Path, html: Path, *, quiet: bool) -> dict[str, Any]:
    from worker.cli.embedded import Embedded
    from worker.cli.verdict import compare

    with Embedded(directory, {POOL: MAILBOXES}) as parts, runtime() as rt:
        upgrade_tables(rt)
        parts.start_workers()
        if not quiet:
            _begin(parts)
        began = time.monotonic()
        batch_id = _enqueue(rows, html)
        counts = _follow(rt, parts, batch_id, quiet=quiet)
        seconds = time.monotonic() - began
        parts.stop_workers()
        stats = parts.simulator.stats()
        agreed = compare(rt.store.export(batch_id), parts.simulator.ledger())
        return {
            "batch_id": batch_id, "total": sum(counts.values()), "counts": counts,
            "seconds": round(seconds, 1), "per_second": _rate(stats),
            "token_requests": stats["token_requests"], "throttled": stats["throttled"],
            "duplicates": agreed.duplicates, "disagreements": agreed.disagreements,
            "unknown_in_ledger": agreed.unknown_in_ledger, "redis": parts.redis.version,
            "directory": str(directory), "database": str(parts.database),
            "logs": [str(log) for log in parts.logs],
        }  # fmt: skip


def _enqueue(rows: Path, html: Path) -> str:
    """As an application does it."""
    from worker.client import Client
    from worker.csvfile import CsvFile

    template = Template(_SUBJECT, html=html.read_text(encoding="utf-8"))
    receipt = Client.from_env().enqueue(CsvFile(rows), pool=POOL, name="demo", template=template)
    return receipt.batch_id


def _follow(rt: Runtime, parts: Embedded, batch_id: str, *, quiet: bool) -> dict[str, int]:
    """Waits for the batch's end, with a bar; its counts. Raises Failed where nothing moves."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from worker import report

    bar = Progress(
        TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=output.console(err=True), disable=quiet,
    )  # fmt: skip
    before, moved = None, time.monotonic()
    with bar:
        task = bar.add_task("sending", total=None)
        while True:
            found = report.status(rt, batch_id)
            counts: dict[str, int] = found["counts"]
            ended = sum(counts.values()) - counts[State.QUEUED] - counts[State.SENDING]
            bar.update(task, total=found["total"], completed=ended)
            if found["state"] == BatchState.FINISHED:
                return counts
            if before != (state := (ended, found["state"])):
                before, moved = state, time.monotonic()
            _check_alive(parts, time.monotonic() - moved, ended, found["total"])
            time.sleep(LOOK)


def _check_alive(parts: Embedded, idle: float, ended: int, total: int) -> None:
    dead = parts.dead()
    if idle < PATIENCE and dead is None:
        return
    log = parts.logs[0] if dead is None else dead
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    sys.stderr.write("".join(f"{log.stem}: {line}\n" for line in lines))
    why = f"no progress for {PATIENCE:.0f} s" if dead is None else f"{log.stem} has ended"
    raise output.Failed(
        f"gave up at {ended} of {total} messages: {why}; see {log}", directory=str(parts.directory)
    )


def _rate(stats: Mapping[str, Any]) -> float | None:
    """Messages a second between the first and the last that the simulator accepted."""
    first, last = stats["first_acceptance"], stats["last_acceptance"]
    if first is None or last["monotonic"] <= first["monotonic"]:
        return None
    took = float(last["monotonic"] - first["monotonic"])
    return round((int(stats["accepted"]) - 1) / took, 1)


def _begin(parts: Embedded) -> None:
    output.say(f"{parts.redis.version}, SQLite, simulator, worker and beat run in "
               f"{parts.directory}")  # fmt: skip
    output.say("To watch them in Flower, in another terminal, while they run:")
    output.say(f"  cd {parts.directory} && {_program('celery')} -A worker flower\n")


def _show(found: Mapping[str, Any]) -> None:
    output.say("")
    output.pairs({
        "messages": found["total"], **{k: n for k, n in found["counts"].items() if n},
        "messages a second": found["per_second"],
        "seconds in all": found["seconds"],
        "tokens requested": found["token_requests"],
        "answers 429": found["throttled"],
        "duplicates in the ledger": found["duplicates"],
        "SQL and ledger disagree on": found["disagreements"],
        "unknown, but in the ledger": found["unknown_in_ledger"] or None,
        "database": found["database"],
        "logs": " ".join(Path(log).name for log in found["logs"]),
    })  # fmt: skip


def _next(found: Mapping[str, Any]) -> None:
    program = _program("postroom")
    output.say(f"\nTo try next (the settings are in its .env):\n  cd {found['directory']}")
    output.say(f"  {program} batch list")
    output.say(f"  {program} batch export {found['batch_id']} --format csv")
    output.say(f"  {_program('celery')} -A worker flower    (while a demo runs, in its directory)")


def _program(name: str) -> str:
    """How to call a program of this installation: by its name, where that finds it."""
    ours = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(ours) else str(ours)
