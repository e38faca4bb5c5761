"""postroom purge and erase: what is forgotten, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.doors import By, Json, Why, login, migrated


def purge(
    content_after: Annotated[
        str | None, typer.Option(help="Forget contents of batches that finished so long ago: 30d.")
    ] = None,
    audit_after: Annotated[
        str | None, typer.Option(help="Forget all of batches that finished so long ago: 400d.")
    ] = None,
    json: Json = False,
) -> None:
    """Forgets what is old, in small steps, while sends go on."""
    from worker.store.retention import pseudonym

    if content_after is None and audit_after is None:
        raise typer.BadParameter("give --content-after, --audit-after or both")
    contents, audit = _seconds(content_after), _seconds(audit_after)
    done: dict[str, Mapping[str, int]] = {}
    with migrated() as rt:
        if contents is not None:
            keep = pseudonym(rt.settings.pseudonym_key())
            done["content"] = rt.store.retention.purge_content(contents, keep)
        if audit is not None:
            done["audit"] = rt.store.retention.purge_audit(audit)
    if json:
        output.print_json(done)
        return
    for what, counts in done.items():
        told = ", ".join(f"{n} {name}" for name, n in counts.items())
        output.say(f"{what} forgotten: {told}")


def erase(
    recipient: Annotated[str, typer.Option(help="The person's address.")],
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """Forgets a person: cancels what is queued to them, then contents and address go."""
    from worker.checks import Refused
    from worker.checks.addresses import address
    from worker.store.retention import pseudonym

    try:
        whom = address(recipient)
    except Refused as refused:
        raise typer.BadParameter(f"--recipient: {refused.detail}") from None
    with migrated() as rt:
        keep = pseudonym(rt.settings.pseudonym_key())
        done = rt.store.retention.erase(whom, keep, by=by or login(), why=why)
    if json:
        output.print_json(done)
    else:
        output.say(f"{done['erased']} messages erased, {done['cancelled']} of them cancelled")
    if done["left"]:
        output.warn(f"{done['left']} are being sent just now; run it again in a minute")


def _seconds(span: str | None) -> float | None:
    from worker.config import duration

    if span is None:
        return None
    try:
        return duration(span).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
