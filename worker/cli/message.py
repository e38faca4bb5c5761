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
    """One message and its whole story in order: attempts, bounces and events."""
    wanted = an_id(message_id, "message")
    with migrated() as rt:
        found = rt.store.message(wanted)
    if found is None:
        raise NotFound(f"no message {wanted}")
    if json:
        output.print_json(found)
        return
    output.pairs({name: found[name] for name in _SHOWN if found[name] is not False})
    _story(found)


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


def _story(found: Mapping[str, Any]) -> None:
    """All in one table, by time."""
    kinds = (("attempts", _attempt), ("bounces", _bounce), ("events", _event))
    told = [(one["at"], cells(one)) for kind, cells in kinds for one in found[kind]]
    if told:
        output.table(
            ("AT", "WHAT", "WHERE OR WHO", "STATUS", "CODE OR WHY", "REQUEST ID", "SECONDS"),
            ((output.time_text(at), *cells) for at, cells in sorted(told, key=lambda one: one[0])),
        )


def _attempt(a: Mapping[str, Any]) -> tuple[Any, ...]:
    seconds = None if a["duration"] is None else f"{a['duration']:.3f}"
    what = a["outcome"] + (" (late)" if a["late"] else "")
    return (what, a["mailbox"], a["status"], a["code"], a["request_id"], seconds)


def _bounce(b: Mapping[str, Any]) -> tuple[Any, ...]:
    return (f"bounced ({b['kind']})", b["mailbox"], None, b["code"], None, None)


def _event(e: Mapping[str, Any]) -> tuple[Any, ...]:
    return (e["kind"], e["by"], None, e["why"], None, None)
