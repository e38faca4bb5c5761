"""The simulator's command line."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from worker.simulator.environment import environment
from worker.simulator.settings import HELP, SettingError, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulator until it is stopped.

    Returns:
        0 after a stop, 1 when it could not serve, 2 for a wrong setting.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    port, directory, until = given.pop("port"), given.pop("directory"), given.pop("until")
    try:
        settings = Settings().changed({k: v for k, v in given.items() if v is not None})
    except SettingError as error:
        return _complain(error, 2)
    if not 0 <= port <= 65535:
        return _complain(f"port: from 0 to 65535, not {port}", 2)
    try:
        if directory:
            return _serve(Path(directory), settings, port, until)
        with tempfile.TemporaryDirectory(prefix="postroom-simulator-") as temporary:
            return _serve(Path(temporary), settings, port, until)
    except OSError as error:
        return _complain(error, 1)


def _serve(directory: Path, settings: Settings, port: int, until: bool) -> int:
    from worker.simulator.server import run  # wrong usage answers without aiohttp

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "address").unlink(missing_ok=True)

    def ready(url: str) -> None:
        lines = [f"Graph and Entra are simulated at {url} (Ctrl-C ends it); copy:"]
        named = environment(url, directory, settings)
        lines += [f"export {name}={value}" for name, value in named.items()]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()

    run(directory.absolute(), settings, port, ready, until)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="postroom simulator", description="A Graph and Entra of one's own, over TLS."
    )
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--directory", help="for ca.pem, address and ledger.jsonl")
    parser.add_argument(
        "--until-stdin-closes", dest="until", action="store_true", help="end with the starter"
    )
    for name, text in HELP.items():
        default = getattr(Settings(), name)
        shown = ",".join(default) if isinstance(default, tuple) else default
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", help=f"{text} [{shown}]"
        )
    return parser


def _complain(problem: object, status: int) -> int:
    sys.stderr.write(f"postroom simulator: {problem}\n")
    return status
