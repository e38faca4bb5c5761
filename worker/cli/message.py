"""postroom message ...: what happened to one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.doors import Json, an_id, migrated
from worker.model import NotFound

app = typer.Typer(help="Messages: show.", no_args_is_help=True)

_SHOWN = ("id", "batch_id", "position", "to", "state", "doubt", "mailbox", "due_at", "sent_at",
          "deadline_at", "error_code", "request_id")  # fmt: skip


@app.callback()
def _group() -> None:
    """Keeps `message show` two words while there is one command."""


@app.command()
def show(
    message_id: Annotated[str, typer.Argument(metavar="ID", help="The message's id.")],
    json: Json = False,
) -> None:
    """One message, its attempts and its events."""
    wanted = an_id(message_id, "message")
    with migrated() as rt:
        found = rt.store.message(wanted)
    if found is None:
        raise NotFound(f"no message {wanted}")
    if json:
        output.print_json(found)
        return
    output.pairs({name: found[name] for name in _SHOWN if found[name] is not False})
    _attempts(found["attempts"])
    for one in found["events"]:
        why = f": {one['why']}" if one["why"] else ""
        output.say(f"{output.time_text(one['at'])} {one['kind']} by {one['by']}{why}")


def _attempts(attempts: list[Mapping[str, Any]]) -> None:
    if not attempts:
        return
    output.table(
        ("AT", "MAILBOX", "OUTCOME", "STATUS", "CODE", "REQUEST ID", "SECONDS"),
        ((output.time_text(a["at"]), a["mailbox"], a["outcome"] + (" (late)" if a["late"] else ""),
          a["status"], a["code"], a["request_id"],
          None if a["duration"] is None else f"{a['duration']:.3f}") for a in attempts),
    )  # fmt: skip
