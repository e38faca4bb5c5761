"""postroom doctor: what is wrong, and the one thing to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.doors import Json

if TYPE_CHECKING:
    from worker.doctor import Check

_MARKS = {"ok": "ok   ", "warn": "WARN ", "fail": "FAIL ", "skip": "  -  ", "open": "  ?  "}


def doctor(
    mailbox: Annotated[str | None, typer.Option(help="A mailbox to send from.")] = None,
    outside: Annotated[str | None, typer.Option(help="A mailbox that must be refused.")] = None,
    send: Annotated[
        bool, typer.Option("--send", help="Send one real mail from --mailbox to itself.")
    ] = False,
    flower: Annotated[str | None, typer.Option(help="Where Flower is.")] = None,
    json: Json = False,
) -> None:
    """Checks everything that a first mail needs. Sends nothing without --send."""
    from worker.doctor import examine

    if send and mailbox is None:
        raise typer.BadParameter("--send needs --mailbox: whom the mail is from and to")
    checks = []
    for check in examine(mailbox=mailbox, outside=outside, send=send, flower=flower):
        checks.append(check)
        if not json:
            _show(check)
    if json:
        output.print_json({"checks": [
            {"name": c.name, "status": str(c.status), "detail": c.detail, "fix": c.fix}
            for c in checks
        ]})  # fmt: skip
    wrong = [check for check in checks if check.status == "fail"]
    if wrong:
        if not json:  # once more: the first of them may have left the screen
            output.say("")
            for check in wrong:
                _show(check)
        names = ", ".join(check.name for check in wrong)
        output.warn(f"{len(wrong)} of {len(checks)} checks failed: {names}")
        raise typer.Exit(1)


def _show(check: Check) -> None:
    output.say(f"{_MARKS[check.status]} {check.name}: {check.detail}")
    if check.fix:
        output.say(f"        -> {check.fix}")
