"""postroom send: rows and a template, or a single message, become a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from worker.cli import options, output
from worker.cli.attach import attached
from worker.cli.doors import NO_WORKER, By, Json, login, require_tables, runtime, workers
from worker.cli.source import (
    STDIN,
    Format,
    failed,
    lines_of,
    opened,
    require_writable,
    write_rejected,
)
from worker.model import InvalidMessages, Priority, Problem, Receipt, Template

if TYPE_CHECKING:
    from worker.client.door import Review
    from worker.runtime import Runtime

#: So many problems are shown.
SHOWN = 20
#: So many rows are shown as they would be sent.
RENDERED = 3


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be sent, from where, and how."""

    rows: Path | None
    to: Sequence[str]
    template: Template | None
    call: dict[str, Any]  #: the arguments of `enqueue`, apart from messages and template
    attach: list[Path] | None
    rejected: Path | None
    preview: Path | None


def send(  # noqa: PLR0913  (one for each option)
    *,
    rows: options.Rows = None,
    to: options.To = None,
    subject: options.Subject = None,
    sender: options.Sender = None,
    pool: options.Pool = None,
    html: options.Html = None,
    text: options.Text = None,
    attach: options.Attach = None,
    format: options.RowsFormat = None,  # noqa: A002  (the option's name)
    name: options.Name = None,
    idempotency_key: options.Key = None,
    priority: options.PriorityName = "normal",
    send_at: options.SendAt = None,
    expires_at: options.ExpiresAt = None,
    encoding: options.Encoding = "utf-8",
    max_failures: options.MaxFailures = None,
    on_finished: options.OnFinished = None,
    ignore_suppressions: options.IgnoreSuppressions = False,
    skip_invalid: options.SkipInvalid = False,
    rejected: options.Rejected = None,
    dry_run: options.DryRun = False,
    preview: options.Preview = None,
    by: By = None,
    json: Json = False,
) -> None:
    """Sends one mail to each row of a CSV (or of JSON lines), or one message with --to."""
    _check_usage(rows, to, format, sender, pool, priority)
    _check_files(rows, preview, dry_run, rejected)
    template = _template(subject, html, text, needed=not _is_jsonl(rows, format))
    call = {
        "sender": sender, "pool": pool, "name": name, "priority": priority, "send_at": send_at,
        "expires_at": expires_at, "max_failures": max_failures, "on_finished": on_finished,
        "ignore_suppressions": ignore_suppressions, "idempotency_key": idempotency_key,
        "on_invalid": "skip" if skip_invalid else "raise", "by": by or login(),
    }  # fmt: skip
    order = _Order(rows, to or (), template, call, attach, rejected, preview)
    wanted = _wanted(template, _named(html, text))
    with runtime() as rt, opened(rows, order.to, format, encoding, wanted) as source:
        (_dry_run if dry_run else _send)(rt, order, source, json=json)


def print_problems(problems: Sequence[Problem], lines: dict[int, int] | None = None) -> None:
    """The first problems as a table."""
    at = lines or {}
    output.table(
        ("ROW", "LINE", "CODE", "WHERE", "DETAIL"),
        ((p.row or "", at.get(p.row, ""), p.code, p.path, p.detail) for p in problems[:SHOWN]),
    )
    if len(problems) > SHOWN:
        output.say(f"... and {len(problems) - SHOWN} more")


# ---- what was asked for -------------------------------------------------------------------------


def _check_usage(
    rows: Path | None, to: list[str] | None, kind: Format | None, sender: str | None,
    pool: str | None, priority: str,
) -> None:  # fmt: skip
    if (rows is None) == (not to):
        raise typer.BadParameter("give either a file of rows (- for standard input) or --to")
    if kind is not None and rows is None:
        raise typer.BadParameter("--format goes with a file of rows")
    if (sender is None) == (pool is None):
        raise typer.BadParameter("give either --sender or --pool")
    try:
        Priority.named(priority)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_files(
    rows: Path | None, preview: Path | None, dry_run: bool, rejected: Path | None
) -> None:
    if preview is not None and not dry_run:
        raise typer.BadParameter("--preview goes with --dry-run")
    if rejected is None:
        return
    if rows is None:
        raise typer.BadParameter("--rejected goes with a file of rows")
    require_writable(rejected)


def _is_jsonl(rows: Path | None, kind: Format | None) -> bool:
    """Whether each message may bring its own subject and body."""
    if kind is not None or rows is None:
        return kind is Format.JSONL
    return rows.suffix.lower() in {".jsonl", ".ndjson"}


def _template(
    subject: str | None, html: Path | None, text: Path | None, *, needed: bool
) -> Template | None:
    if html is None and text is None:
        if needed or subject is not None:
            raise typer.BadParameter("give --html or --text")
        return None
    if subject is None:
        raise typer.BadParameter("give --subject")
    return Template(subject, html=_read(html, "--html"), text=_read(text, "--text"))


def _read(path: Path | None, option: str) -> str | None:
    if path is None:
        return None
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start + 1})"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
    raise output.Failed(f"{option} {path}: {reason}")


def _named(html: Path | None, text: Path | None) -> dict[str, str]:
    """What the parts of the template are called on the command line."""
    return {"template.subject": "--subject", "template.html": f"--html {html}",
            "template.text": f"--text {text}"}  # fmt: skip


def _wanted(template: Template | None, names: Mapping[str, str]) -> frozenset[str]:
    """The names that the template asks for: columns go by them. Raises Failed."""
    from worker.templates import TemplateProblem, compiled

    if template is None:
        return frozenset()
    try:
        return compiled(asdict(template)).variables
    except TemplateProblem as problem:
        at = names.get(problem.path, problem.path)
        raise output.Failed(f"{at}: {problem.detail} ({problem.code})") from None


# ---- sending ------------------------------------------------------------------------------------


def _send(rt: Runtime, order: _Order, source: Any, *, json: bool) -> None:
    from worker.client import Client

    pool = order.call["pool"]
    if order.call["idempotency_key"] or (pool and pool not in rt.settings.pools):
        require_tables(rt.store, rt.settings.db_schema or None)
    try:
        receipt = Client(lambda: rt).enqueue(
            attached(source, order.attach), template=order.template, **order.call
        )
    except InvalidMessages as error:
        raise _refused(order, source, error.problems, json=json) from None
    if not receipt.accepted + receipt.duplicates:
        refused = _refused(order, source, receipt.rejected, json=json)
        refused.document |= {"accepted": 0, "duplicates": 0, "rejected": _told(receipt.rejected)}
        raise refused
    if order.rejected:
        try:
            write_rejected(order.rejected, source, receipt.rejected)
        except output.Failed as error:
            known = f"batch {receipt.batch_id}: {receipt.accepted} accepted; but {error}"
            raise output.Failed(known, batch_id=receipt.batch_id) from None
    _report(source, receipt, workers(rt), json=json)


def _report(source: Any, receipt: Receipt, running: int | None, *, json: bool) -> None:
    if json:
        output.print_json({"batch_id": receipt.batch_id, "accepted": receipt.accepted,
                           "duplicates": receipt.duplicates, "rejected": _told(receipt.rejected),
                           "workers": running})  # fmt: skip
        return
    if receipt.rejected:
        print_problems(receipt.rejected, _lines(source, receipt.rejected))
        output.warn(f"left out: {len(_by_row(receipt.rejected))} rows")
    again = f", {receipt.duplicates} were there already" if receipt.duplicates else ""
    output.say(f"batch {receipt.batch_id}: {receipt.accepted} accepted{again}")
    output.say(f"postroom batch watch {receipt.batch_id}")
    if running == 0:
        output.warn(NO_WORKER)


def _told(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """The refused rows for programs, one entry each."""
    return [{"row": p.row, "code": p.code, "detail": f"{p.path}: {p.detail}"}
            for p in _by_row(problems)]  # fmt: skip


def _dry_run(rt: Runtime, order: _Order, source: Any, *, json: bool) -> None:
    from worker.client import Client

    problems = _call_problems(rt, order)
    try:
        rows = attached(source, order.attach)
        found = Client(lambda: rt).review(rows, template=order.template, count=RENDERED)
    except InvalidMessages as error:  # of the file as a whole
        raise _refused(order, source, [*problems, *error.problems], json=json) from None
    problems += found.problems
    skips = order.call["on_invalid"] == "skip"
    if any(p.row == 0 and p.code != "MORE" for p in problems) or (problems and not skips):
        raise _refused(order, source, problems, json=json)
    if order.rejected:
        write_rejected(order.rejected, source, problems)
    if order.preview:
        _write_preview(order.preview, found)
    if json:
        output.print_json({"rows": found.rows, "rejected": [asdict(p) for p in _by_row(problems)],
                           "first": [asdict(one) for one in found.first]})  # fmt: skip
        return
    for one in found.first:
        output.say(f"Subject: {one.subject}\n\n{one.html or one.text}\n")
    output.say(f"{found.rows - found.bad} of {found.rows} rows would be sent; nothing was")


def _write_preview(path: Path, found: Review) -> None:
    from worker.pages import preview_page

    try:
        path.write_text(preview_page(found.first, found.to, found.rows), encoding="utf-8")
    except OSError as error:
        raise output.Failed(f"--preview {path}: cannot be written: {error.strerror}") from None


def _call_problems(rt: Runtime, order: _Order) -> list[Problem]:
    """What is wrong with the call apart from its rows."""
    from worker.checks import check_call, check_key

    key = order.call["idempotency_key"]
    known = lambda pool: pool in rt.settings.pools or pool in rt.pools()  # noqa: E731
    _, problems = check_call(order.call, now=rt.inbox.now(), known_pool=known)
    return [*problems, *(check_key(key) if key is not None else [])]


# ---- refusals -----------------------------------------------------------------------------------


def _refused(
    order: _Order, source: Any, problems: Sequence[Problem], *, json: bool
) -> output.Failed:
    """All problems: as a table, or in the document of --json; and the one line."""
    of = source.name if order.rows in (None, STDIN) else order.rows
    if not any(p.row for p in problems):
        return failed(of, problems)
    if order.rejected:
        write_rejected(order.rejected, source, problems)
    lines = _lines(source, problems)
    if not json:
        print_problems(problems, lines)
    shown = [asdict(p) | {"line": lines.get(p.row)} for p in problems]
    first = next(p for p in problems if p.row)
    at = f"line {lines[first.row]}: " if first.row in lines and "line" not in first.path else ""
    of_call = [p for p in problems if not p.row and p.code != "MORE"]
    least = "at least " if any(p.code == "MORE" for p in problems) else ""
    told = "".join(f"{p.path}: {p.detail} ({p.code}); " for p in of_call)
    return output.Failed(
        f"nothing was sent: {told}{least}{len(_by_row(problems)):,} rows of {of} are wrong; "
        f"first: {at}{first.path}: {first.detail} ({first.code})",
        problems=shown,
    )


def _by_row(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of each row."""
    first: dict[int, Problem] = {}
    for problem in problems:
        if problem.row:
            first.setdefault(problem.row, problem)
    return list(first.values())


def _lines(source: Any, problems: Sequence[Problem]) -> dict[int, int]:
    """row → line of the rows whose problems are shown."""
    return lines_of(source, {p.row for p in problems[:SHOWN] if p.row})
