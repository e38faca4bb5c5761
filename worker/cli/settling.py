"""postroom batch settle, postroom message settle: a person's word on what may have been sent."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.batch import BatchId
from worker.cli.doors import NO_WORKER, By, Json, Why, an_id, login, migrated, workers


class Word(StrEnum):
    """What became of it."""

    SENT = "sent"
    FAILED = "failed"
    QUEUED = "queued"


As = Annotated[Word, typer.Option("--as", help="What became of it.")]
Force = Annotated[
    bool, typer.Option("--force", help="Queue also what may still come: a second copy is possible.")
]


def settle_batch(
    batch_id: BatchId, as_: As, force: Force = False, by: By = None, why: Why = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Your word on the messages that may have been sent: sent, failed, or to be queued again."""
    wanted = an_id(batch_id, "batch")
    _settle("settle", wanted, as_, json, force=force, by=by or login(), why=why)


def settle_message(
    message_id: Annotated[str, typer.Argument(metavar="ID", help="The message's id.")],
    as_: As, force: Force = False, by: By = None, why: Why = None, json: Json = False,
) -> None:  # fmt: skip
    """Your word on a message that may have been sent: sent, failed, or to be queued again."""
    wanted = an_id(message_id, "message")
    _settle("settle_message", wanted, as_, json, force=force, by=by or login(), why=why)


def _settle(method: str, wanted: str, as_: Word, json: bool, **how: Any) -> None:
    from worker.client import Client

    with migrated() as rt:
        done = getattr(Client(lambda: rt), method)(wanted, as_, **how)
        running = workers(rt) if as_ is Word.QUEUED and done["settled"] else None
    if note := done.pop("note", None):
        output.warn(note)
    if json:
        output.print_json(done)
        return
    left = ", ".join(f"{n} {state}" for state, n in done["left"].items())
    output.say(f"{done['settled']} settled as {as_}" + (f"; left: {left}" if left else ""))
    if running == 0:
        output.warn(NO_WORKER)
