"""postroom message ...: what happened to one message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.doors import Json, an_id, migrated
from worker.model import NotFound, State

app = typer.Typer(help="Messages: show, find, settle.", no_args_is_help=True)

_SHOWN = ("id", "batch_id", "position", "to", "state", "doubt", "mailbox", "due_at", "sent_at",
          "deadline_at", "error_code", "request_id")  # fmt: skip


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


@app.command()
def find(
    *,
    to: Annotated[str | None, typer.Option(help="To this address, its first recipient.")] = None,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    code: Annotated[str | None, typer.Option(help="Only those with this code.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="ID", help="Only this batch's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
    after: Annotated[str | None, typer.Option(help="The `next` of the page before.")] = None,
    json: Json = False,
) -> None:
    """Messages, what was due last first; those of one batch in the order of its input."""
    from worker.client import Client

    if to is None and state is None and code is None and batch is None:
        raise typer.BadParameter("give --to, --state, --code or --batch")
    with migrated() as rt:
        wanted = None if batch is None else an_id(batch, "batch")
        found = Client(lambda: rt).find(
            to=to, state=state, code=code, batch_id=wanted, limit=limit, after=after
        )
    if json:
        output.print_json(found)
        return
    output.table(
        ("MESSAGE", "BATCH", "ROW", "TO", "STATE", "CODE", "DUE", "SENT"),
        ((m["id"], m["batch_id"], m["position"], m["to"], m["state"], m["error_code"],
          output.time_text(m["due_at"]), output.time_text(m["sent_at"]))
         for m in found["messages"]),
    )  # fmt: skip
    if found["next"]:
        output.say(f"more: --after {found['next']}")


def _attempts(attempts: list[Mapping[str, Any]]) -> None:
    if not attempts:
        return
    output.table(
        ("AT", "MAILBOX", "OUTCOME", "STATUS", "CODE", "REQUEST ID", "SECONDS"),
        ((output.time_text(a["at"]), a["mailbox"], a["outcome"] + (" (late)" if a["late"] else ""),
          a["status"], a["code"], a["request_id"],
          None if a["duration"] is None else f"{a['duration']:.3f}") for a in attempts),
    )  # fmt: skip
