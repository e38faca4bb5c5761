"""postroom smtp: a door for whatever speaks SMTP."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.doors import Json, runtime

if TYPE_CHECKING:
    from worker.smtp import Server


def smtp(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 2525,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    json: Json = False,
) -> None:
    """Takes mails by SMTP until Ctrl-C and enqueues them.

    Who may send: POSTROOM_SMTP_SENDERS. Outside of this machine it wants TLS and a password.
    """
    from worker.client import Client
    from worker.smtp import Rules, Server

    with runtime() as rt:
        s = rt.settings
        senders = [one.strip() for one in s.smtp_senders.split(",") if one.strip()]
        rules = Rules(
            senders, s.smtp_size_limit, s.smtp_user, s.smtp_secret(),
            s.smtp_certificate_file,
        )  # fmt: skip
        server = Server(Client(lambda: rt), rules, host, port)
        try:
            asyncio.run(_serve(server, host, json=json))
        except OSError as error:
            raise output.Failed(f"{host}:{port}: {error.strerror or error}") from None


async def _serve(server: Server, host: str, *, json: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def ready(port: int) -> None:
        if json:
            output.print_json({"host": host, "port": port})
        else:
            output.say(f"taking mails at {host}:{port} (Ctrl-C ends it)")

    await server.run(stop, ready)
