"""postroom send: a CSV and a template become a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.attach import attached
from worker.cli.doors import NO_WORKER, Json, require_tables, runtime, workers
from worker.model import InvalidMessages, Message, Priority, Problem, Receipt, Template

if TYPE_CHECKING:
    from worker.csvfile import CsvFile
    from worker.runtime import Runtime
    from worker.templates import Rendered

#: So many problems are shown.
SHOWN = 20
#: So many rows are shown as they would be sent.
RENDERED = 3
_BLOCK = 200


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be sent, from where, and how."""

    csv: Path
    encoding: str
    template: Template
    sender: str | None
    pool: str | None
    name: str | None
    priority: str
    idempotency_key: str | None
    skip_invalid: bool
    max_failures: str | None
    attach: list[Path] | None


def send(  # noqa: PLR0913  (one for each option)
    *,
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="Column `to`; others: variables.")],
    subject: Annotated[str, typer.Option(help="The subject, a template too.")],
    sender: Annotated[str | None, typer.Option(help="The mailbox to send from.")] = None,
    pool: Annotated[str | None, typer.Option(help="Or the pool of mailboxes.")] = None,
    html: Annotated[Path | None, typer.Option(help="Template of the HTML body.")] = None,
    text: Annotated[Path | None, typer.Option(help="Template of the text body.")] = None,
    attach: Annotated[
        list[Path] | None, typer.Option(help="A file for every mail; again for more files.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The batch's name.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A repeat with the same key adds nothing.")
    ] = None,
    priority: Annotated[str, typer.Option(help="high, normal or bulk.")] = "normal",
    encoding: Annotated[str, typer.Option(help="The encoding of the CSV.")] = "utf-8",
    max_failures: Annotated[
        str | None, typer.Option(help="Pause after so many rejections in a row; off: never.")
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave bad rows out, send the others.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, show the first rows, send nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Sends one mail to each row of a CSV."""
    _check_usage(sender, pool, html, text, priority)
    template = Template(subject, html=_read(html, "--html"), text=_read(text, "--text"))
    order = _Order(csv, encoding, template, sender, pool, name, priority, idempotency_key,
                   skip_invalid, max_failures, attach)  # fmt: skip
    with runtime() as rt:
        if dry_run:
            _dry_run(rt, order, json=json)
        else:
            _send(rt, order, json=json)


def print_problems(problems: Sequence[Problem], lines: dict[int, int] | None = None) -> None:
    """The first problems as a table."""
    at = lines or {}
    output.table(
        ("ROW", "LINE", "CODE", "WHERE", "DETAIL"),
        ((p.row or "", at.get(p.row, ""), p.code, p.path, p.detail) for p in problems[:SHOWN]),
    )
    if len(problems) > SHOWN:
        output.say(f"... and {len(problems) - SHOWN} more")


def _check_usage(
    sender: str | None, pool: str | None, html: Path | None, text: Path | None, priority: str
) -> None:
    if (sender is None) == (pool is None):
        raise typer.BadParameter("give either --sender or --pool")
    if html is None and text is None:
        raise typer.BadParameter("give --html or --text")
    try:
        Priority.named(priority)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read(path: Path | None, option: str) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start + 1})"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
    raise output.Failed(f"{option} {path}: {reason}")


def _send(rt: Runtime, order: _Order, *, json: bool) -> None:
    from worker.client import Client

    if order.idempotency_key or (order.pool and order.pool not in rt.settings.pools):
        require_tables(rt.store, rt.settings.db_schema or None)
    file = _open(order)
    try:
        receipt = Client(lambda: rt).enqueue(
            attached(file, order.attach), sender=order.sender, pool=order.pool, name=order.name,
            template=order.template, priority=order.priority, idempotency_key=order.idempotency_key,
            on_invalid="skip" if order.skip_invalid else "raise", max_failures=order.max_failures,
        )  # fmt: skip
    except InvalidMessages as error:
        raise _refused(file, error.problems, json=json) from None
    if not receipt.accepted + receipt.duplicates:
        raise _refused(file, receipt.rejected, json=json)
    _report(file, receipt, workers(rt), json=json)


def _open(order: _Order) -> CsvFile:
    """The CSV; its columns go by the names that the template asks for. Raises Failed."""
    from worker.csvfile import CsvFile
    from worker.templates import TemplateProblem, compiled

    try:
        wanted = compiled(asdict(order.template)).variables
    except TemplateProblem as problem:
        raise output.Failed(f"{problem} ({problem.code})") from None
    try:
        return CsvFile(order.csv, encoding=order.encoding, wanted=wanted)
    except InvalidMessages as error:
        raise _failed(order.csv, error.problems) from None


def _report(file: CsvFile, receipt: Receipt, running: int | None, *, json: bool) -> None:
    if json:
        rejected = [{"row": p.row, "code": p.code, "detail": f"{p.path}: {p.detail}"}
                    for p in _by_row(receipt.rejected)]  # fmt: skip
        output.print_json({"batch_id": receipt.batch_id, "accepted": receipt.accepted,
                           "duplicates": receipt.duplicates, "rejected": rejected,
                           "workers": running})  # fmt: skip
        return
    if receipt.rejected:
        print_problems(receipt.rejected, _lines(file, receipt.rejected))
        output.warn(f"left out: {len(_by_row(receipt.rejected))} rows")
    again = f", {receipt.duplicates} were there already" if receipt.duplicates else ""
    output.say(f"batch {receipt.batch_id}: {receipt.accepted} accepted{again}")
    output.say(f"postroom batch watch {receipt.batch_id}")
    if running == 0:
        output.warn(NO_WORKER)


def _dry_run(rt: Runtime, order: _Order, *, json: bool) -> None:
    file = _open(order)
    problems = _call_problems(rt, order)
    rows = 0
    first: list[Rendered] = []
    try:
        for count, wrong, shown in _checked(rt, attached(file, order.attach), order.template):
            rows += count
            problems += wrong
            first += shown[: RENDERED - len(first)]
    except InvalidMessages as error:  # of the file as a whole
        problems += error.problems
    if any(p.row == 0 or not order.skip_invalid for p in problems):
        raise _refused(file, problems, json=json)
    rejected = len(_by_row(problems))
    if json:
        output.print_json({"rows": rows, "rejected": [asdict(p) for p in _by_row(problems)],
                           "first": [asdict(one) for one in first]})  # fmt: skip
        return
    for one in first:
        output.say(f"Subject: {one.subject}\n\n{one.html or one.text}\n")
    output.say(f"{rows - rejected} of {rows} rows would be sent; nothing was")


def _call_problems(rt: Runtime, order: _Order) -> list[Problem]:
    """What is wrong with the call apart from its rows."""
    from worker.checks import check_call, check_key

    given = {"sender": order.sender, "pool": order.pool, "name": order.name,
             "max_failures": order.max_failures}  # fmt: skip
    _, problems = check_call(given, now=rt.inbox.now(), known_pool=lambda p: p in rt.pools())
    key = order.idempotency_key
    return [*problems, *(check_key(key) if key is not None else [])]


def _checked(
    rt: Runtime, file: Iterable[Message | Problem], template: Template
) -> Iterator[tuple[int, list[Problem], list[Rendered]]]:
    """(rows, problems, rows as they would be sent), block by block so that memory stays flat."""
    from worker.client import Client

    client, rows, done = Client(lambda: rt), iter(file), 0
    while block := list(itertools.islice(rows, _BLOCK)):
        wrong = [row for row in block if isinstance(row, Problem)]
        rendered: list[Rendered] = []
        try:
            good = [row if isinstance(row, Message) else Message(to="x@example.com")
                    for row in block]  # fmt: skip
            rendered = client.preview(good, template=template, count=_BLOCK)
        except InvalidMessages as error:
            wrong += [replace(p, row=p.row + done) for p in error.problems]
        yield len(block), wrong, rendered
        done += len(block)


def _refused(file: CsvFile, problems: Sequence[Problem], *, json: bool) -> output.Failed:
    """All problems: as a table, or in the document of --json; and the one line."""
    if not any(p.row for p in problems):
        return _failed(file.path, problems)
    lines = _lines(file, problems)
    if not json:
        print_problems(problems, lines)
    shown = [asdict(p) | {"line": lines.get(p.row)} for p in problems]
    first = next(p for p in problems if p.row)
    at = f"line {lines[first.row]}: " if first.row in lines and "line" not in first.path else ""
    return output.Failed(
        f"nothing was sent: {len(_by_row(problems))} rows of {file.path} are wrong; "
        f"first: {at}{first.path}: {first.detail} ({first.code})",
        problems=shown,
    )


def _failed(path: Path, problems: Sequence[Problem]) -> output.Failed:
    """What is wrong apart from rows, all in the one line."""
    told = "; ".join(
        f"{path if p.code.startswith('CSV') and p.path == path.name else p.path}: {p.detail}"
        f" ({p.code})" for p in problems
    )  # fmt: skip
    return output.Failed(f"nothing was sent: {told}", problems=[asdict(p) for p in problems])


def _by_row(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of each row."""
    first: dict[int, Problem] = {}
    for problem in problems:
        if problem.row:
            first.setdefault(problem.row, problem)
    return list(first.values())


def _lines(file: CsvFile, problems: Sequence[Problem]) -> dict[int, int]:
    """row → line of the rows whose problems are shown; reads the file up to the last of them."""
    wanted = {p.row for p in problems[:SHOWN] if p.row}
    rows = enumerate(file.numbered(), start=1)
    upto = itertools.islice(rows, max(wanted, default=0))
    return {row: line for row, (line, _) in upto if row in wanted}
