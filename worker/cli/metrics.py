"""postroom metrics: one exporter for the whole service."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.doors import Json, runtime


def metrics(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 9109,
    json: Json = False,
) -> None:
    """Answers Prometheus at /metrics until Ctrl-C. One is enough for all workers."""
    from worker.exporter import serve_forever

    def ready(there: int) -> None:
        url = f"http://{host}:{there}/metrics"
        if json:
            output.print_json({"url": url})
        else:
            output.say(f"metrics at {url}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with runtime() as rt, suppress(KeyboardInterrupt):
        rt.settings.require_database_url()
        try:
            serve_forever(rt, host, port, ready)
        except OSError as error:
            raise output.Failed(f"cannot listen on {host}:{port}: {error.strerror}") from None
