"""postroom plan: when a batch would end, and what it would wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.blocked import warn_refused
from worker.cli.doors import Json, migrated


def plan(
    count: Annotated[int, typer.Option(min=1, help="How many messages.")],
    sender: Annotated[str | None, typer.Option(help="The mailbox to send from.")] = None,
    pool: Annotated[str | None, typer.Option(help="Or the pool of mailboxes.")] = None,
    external: Annotated[
        int, typer.Option(min=0, help="How many of them leave the organisation.")
    ] = 0,
    json: Json = False,
) -> None:
    """Says when a batch would end, which limit binds, and what is used already."""
    from worker.client import Client

    if (sender is None) == (pool is None):
        raise typer.BadParameter("give either --sender or --pool")
    with migrated() as rt:
        found = Client(lambda: rt).plan(count, sender=sender, pool=pool, external=external)
        if not json:
            warn_refused(rt)
    if json:
        output.print_json(found)
        return
    never = "never: " + ("all mailboxes are suspended" if len(found["suspended"])
                         == found["mailboxes"] else "a message is larger than a limit")  # fmt: skip
    length = None if found["seconds"] is None else str(timedelta(seconds=found["seconds"]))
    output.pairs({
        "messages": found["count"], "ahead": found["ahead"], "takes": length or never,
        "ends": found["ends_at"], "waits for": found["limit"],
        "suspended": ", ".join(found["suspended"]),
    })  # fmt: skip
    output.table(
        ("MAILBOX", "LIMIT", "USED", "OF"),
        ((mailbox, limit, one["used"], one["limit"])
         for mailbox, used in found["used"].items() for limit, one in used.items()),
    )  # fmt: skip
    for note in found["notes"]:
        output.say(note)
