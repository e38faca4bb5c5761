"""The command line. What a command needs is imported when it runs: starting must be quick."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from worker.cli import control, health, mailbox, message, output, settling, suppressions
from worker.cli.demo import demo
from worker.cli.doctor import doctor
from worker.cli.doors import Json, explain
from worker.cli.metrics import metrics
from worker.cli.plan import plan
from worker.cli.retention import erase, purge
from worker.cli.send import print_problems, send
from worker.cli.smtp import smtp
from worker.model import InvalidMessages

app = typer.Typer(
    name="postroom", help="Bulk notifications through Microsoft Graph.", no_args_is_help=True,
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
database = typer.Typer(help="The database: upgrade.", no_args_is_help=True)
app.add_typer(database, name="db")
app.add_typer(control.app, name="batch")  # batch's own, with what control adds
app.add_typer(message.app, name="message")
app.add_typer(suppressions.app, name="suppress")
app.add_typer(mailbox.app, name="mailbox")
app.add_typer(mailbox.pools, name="pool")
app.add_typer(health.app, name="health")
control.app.command("settle")(settling.settle_batch)
message.app.command("settle")(settling.settle_message)
app.command()(demo)
app.command()(send)
app.command()(smtp)
app.command()(doctor)
app.command()(plan)
app.command()(metrics)
app.command()(purge)
app.command()(erase)


def main() -> None:
    """The entry point: every failure is one line on standard error and exit status 1."""
    try:
        app()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        _fail(error, line)
    finally:
        _flush()


def _flush() -> None:
    """A reader that has gone (`... | head`) is no failure, and Python would say so at exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, line: str) -> None:
    problems = error.problems if isinstance(error, InvalidMessages) else ()
    if "--json" in sys.argv[1:]:
        extra = error.document if isinstance(error, output.Failed) else {}
        output.print_json({"error": line, **extra})
    elif problems:
        print_problems(problems)
    output.warn(line)
    sys.exit(1)


@database.callback()
def _database() -> None:
    """Keeps `db upgrade` two words while there is one command."""


@database.command()
def upgrade(json: Json = False) -> None:
    """Brings the tables up to date; again, and at once from several places, does no harm."""
    from worker.cli.doors import runtime, upgrade_tables

    with runtime() as rt:
        revision = upgrade_tables(rt)
    if json:
        output.print_json({"revision": revision})
    else:
        output.say(f"the database is at revision {revision}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def simulator(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    json: Json = False,
) -> None:
    """Runs a Graph and an Entra of one's own over TLS until Ctrl-C.

    Its own settings follow as options: --latency-ms=50, --token-lifetime=330, ...
    All of them: python -m worker.simulator --help
    """
    if json:
        _simulate_for_programs(port, context.args)
        return
    from worker.simulator import main as serve

    raise typer.Exit(serve(["--port", str(port), *context.args]))


def _simulate_for_programs(port: int, words: Sequence[str]) -> None:
    """Serves like `simulator`; the document holds its address and the settings that lead there."""
    from worker.simulator import Simulator

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        contextlib.suppress(KeyboardInterrupt),
        TemporaryDirectory(prefix="postroom-simulator-") as directory,
    ):
        try:
            running = Simulator(directory, port=port, **dict(_options(words)))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        except RuntimeError as error:
            raise output.Failed(str(error)) from None
        with running:
            output.print_json({"url": running.url, "environment": running.environment()})
            running.process.wait()


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--latency-ms=50` or `--latency-ms 50` as ("latency_ms", "50")."""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        yield name.replace("-", "_"), value if equals else next(rest, "")
