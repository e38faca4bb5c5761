"""postroom mailbox ..., postroom pool ...: what is known of senders, and what is done to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.blocked import warn_refused
from worker.cli.doors import By, Json, Why, login, migrated

app = typer.Typer(help="Mailboxes: list, set, suspend, resume.", no_args_is_help=True)
pools = typer.Typer(help="Pools of mailboxes: list, set.", no_args_is_help=True)

Address = Annotated[str, typer.Argument(metavar="MAILBOX", help="The sender's address.")]
Members = Annotated[list[str], typer.Argument(metavar="MAILBOX...", help="All of its mailboxes.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """Mailboxes that are known, in a pool, or were lately sent from."""
    with migrated() as rt:
        found = _client(rt).mailboxes()
        if not json:
            warn_refused(rt)
    if json:
        output.print_json(found)
        return
    output.table(
        ("MAILBOX", "STATE", "UNTIL", "LIMITS", "POOLS", "SINCE", "WHY"),
        ((one["mailbox"], one["state"], output.time_text(one["probe_at"] or one["cooldown_until"]),
          _limits(one["limits"]), ", ".join(one["pools"]), output.time_text(one["since"]),
          one["reason"] and f"{one['reason']} ({one['code']})") for one in found),
    )  # fmt: skip


@app.command("set")
def set_(  # noqa: PLR0913  (one for each option)
    mailbox: Address,
    *,
    recipient_rate: Annotated[str | None, typer.Option(help="Such as 9500/24h, or off.")] = None,
    request_rate: Annotated[str | None, typer.Option(help="Such as 10000/10min.")] = None,
    message_rate: Annotated[str | None, typer.Option(help="Such as 30/min.")] = None,
    upload_rate: Annotated[str | None, typer.Option(help="Such as 150MB/5min.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests at once: 1 to 4.")] = None,
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """Limits of one mailbox alone; `default` takes one back."""
    given = {
        "recipient_rate": recipient_rate, "request_rate": request_rate,
        "message_rate": message_rate, "upload_rate": upload_rate, "concurrency": concurrency,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise typer.BadParameter("give at least one limit, such as --recipient-rate 5000/24h")
    with migrated() as rt:
        done = _client(rt).set_mailbox(mailbox, changes, by=by or login(), why=why)
    if json:
        output.print_json(done)
    else:
        output.say(f"{done['mailbox']}: {_limits(done['limits']) or 'as in the settings'}")


@app.command()
def suspend(mailbox: Address, by: By = None, why: Why = None, json: Json = False) -> None:
    """Sends nothing more from a mailbox until it is resumed; what is in flight ends."""
    with migrated() as rt:
        done = _client(rt).suspend_mailbox(mailbox, by=by or login(), why=why)
    _say(done, json)


@app.command()
def resume(
    mailbox: Annotated[str | None, typer.Argument(metavar="[MAILBOX]", help="Its address.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All that are suspended.")] = False,
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """Sends from a suspended mailbox again; one that refused tries with one message."""
    if (mailbox is None) is not every:
        raise typer.BadParameter("give one mailbox, or --all")
    with migrated() as rt:
        client = _client(rt)
        those = [mailbox] if mailbox else [
            one["mailbox"] for one in client.mailboxes() if one["state"] == "suspended"
        ]  # fmt: skip
        done = [client.resume_mailbox(one, by=by or login(), why=why) for one in those]
    if every and json:
        output.print_json(done)
        return
    for one in done:
        _say(one, json)
    if not done:
        output.say("no mailbox is suspended")


@pools.command("list")
def list_pools(json: Json = False) -> None:
    """All pools with their mailboxes; those from the settings are changed there."""
    with migrated() as rt:
        found = _client(rt).pools()
    if json:
        output.print_json(found)
        return
    output.table(
        ("POOL", "FROM", "MAILBOXES"),
        ((one["pool"], one["from"], ", ".join(one["mailboxes"])) for one in found),
    )


@pools.command("set")
def set_pool(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pool's name.")],
    mailboxes: Members,
    by: By = None,
    why: Why = None,
    json: Json = False,
) -> None:
    """The mailboxes of a pool from now on, also for what is queued."""
    with migrated() as rt:
        done = _client(rt).set_pool(name, mailboxes, by=by or login(), why=why)
    if json:
        output.print_json(done)
    else:
        output.say(f"pool {done['pool']}: {', '.join(done['mailboxes'])}")


def _client(rt: Any) -> Any:
    from worker.client import Client

    return Client(lambda: rt)


def _say(done: Mapping[str, Any], json: bool) -> None:
    if json:
        output.print_json(done)
        return
    already = "" if done["changed"] else " (it was already)"
    output.say(f"{done['mailbox']}: {done['state']}{already}")


def _limits(limits: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in limits.items())
