"""The embedded parts of the demo, each a real process: Redis, simulator, worker, beat; SQLite."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from worker.cli import output
from worker.servers import Child, RedisServer, ServerError
from worker.simulator import Simulator

LATENCY_MS = 50
#: Lanes of one worker: more than there are mailboxes.
THREADS = 8


class Embedded:
    """Starts everything in `directory`, which becomes the working directory, and stops it.

    The environment of this process leads to these parts afterwards, as does the `.env` in
    `directory`. Raises Failed.
    """

    def __init__(self, directory: Path, pools: Mapping[str, Sequence[str]]) -> None:
        self.directory = directory
        self.database = directory / "postroom.db"
        logs = ("worker.log", "beat.log", "simulator/simulator.log", "redis/redis.log")
        self.logs = [directory / log for log in logs]
        self._pools = pools
        self._children: list[Child] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self.redis = stack.enter_context(RedisServer(self.directory / "redis"))
                self.simulator = stack.enter_context(
                    Simulator(self.directory / "simulator", latency_ms=LATENCY_MS)
                )
            except (ServerError, RuntimeError, OSError) as error:
                raise output.Failed(str(error)) from None
            stack.callback(self.stop_workers)
            self._settle()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stack.close()

    def start_workers(self) -> None:
        """A worker and a beat, as anyone starts them."""
        worker = ["worker", "-P", "threads", "-c", str(THREADS), "--loglevel", "INFO"]
        self._start(worker, self.logs[0])
        self._start(["beat", "--loglevel", "INFO"], self.logs[1])

    def stop_workers(self) -> None:
        """Asks both at once to end, and waits for it."""
        for child in self._children:
            if child.running:
                child.signal(signal.SIGTERM)
        while self._children:
            self._children[-1].stop()
            self._children.pop()

    def dead(self) -> Path | None:
        """The log of a child that ended by itself; None while all run."""
        return next((child.log for child in self._children if not child.running), None)

    def _start(self, arguments: Sequence[str], log: Path) -> None:
        command = [sys.executable, "-m", "celery", "-A", "worker", *arguments]
        # Its own working directory: celery looks there first for a module named `worker`.
        self._children.append(Child(command, log, cwd=self.directory))

    def _settle(self) -> None:
        """Leads this process, its children and a later shell in `directory` to these parts."""
        settings = {
            "POSTROOM_REDIS_URL": self.redis.url,
            "POSTROOM_DATABASE_URL": f"sqlite:///{self.database}",
            "POSTROOM_POOLS": json.dumps(self._pools, separators=(",", ":")),
            **self.simulator.environment(),
        }
        lines = "".join(f"{name}='{value}'\n" for name, value in settings.items())
        (self.directory / ".env").write_text(lines, encoding="utf-8")
        environment = os.environ  # noqa: TID251  (the demo is its own operator)
        for name in [name for name in environment if name.startswith("POSTROOM_")]:
            del environment[name]
        environment.update(settings)
        os.chdir(self.directory)
