"""Starts a simulator as a process of its own, for tests and for the demo."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from worker.simulator.environment import environment
from worker.simulator.ledger import read_lines
from worker.simulator.settings import Settings

START_SECONDS = 20.0
STOP_SECONDS = 5.0


class Simulator:
    """A running simulator; also a context manager that stops it.

    Options are the settings of `Settings`, by name, and `port`. The process ends with the one
    that started it. A directory used before continues: same CA, same tokens, same ledger.

    Raises:
        RuntimeError: it did not start; the text is its own complaint.
    """

    def __init__(self, directory: str | Path, *, port: int = 0, **options: Any) -> None:
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        given = Settings().changed(options)
        self.tenant_id = given.tenant_id
        self.client_id = given.client_id
        self.client_secret = given.client_secret
        self.ca_bundle = str(self.directory / "ca.pem")
        self._given = given
        (self.directory / "address").unlink(missing_ok=True)
        self.process = self._spawn(port, options)
        self.url = self._wait()
        trust = urllib.request.HTTPSHandler(
            context=ssl.create_default_context(cafile=self.ca_bundle)
        )
        # No proxy of the environment may stand between.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trust)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """POSTROOM_* variables that lead a worker here."""
        return environment(self.url, self.directory, self._given)

    def stats(self) -> dict[str, Any]:
        """Counts since the start; see `State.stats`."""
        return cast("dict[str, Any]", self.control("GET", "stats"))

    def ledger(self) -> list[dict[str, Any]]:
        """Every accepted mail, in order; works after the process has ended too."""
        return [json.loads(line) for line in read_lines(self.directory / "ledger.jsonl")]

    def requests(self) -> list[dict[str, Any]]:
        """Every request to Graph with its arrival, mailbox and status."""
        return cast("list[dict[str, Any]]", self.control("GET", "requests"))

    def mail(self, mailbox: str) -> list[dict[str, Any]]:
        """What a mailbox holds, whether searches find it yet or not."""
        return cast("list[dict[str, Any]]", self.control("GET", f"mail/{mailbox}"))

    def fault(self, kind: str, count: int = 1, **where: Any) -> None:
        """Let the next `count` matching requests fail (0: all); see `faults.KINDS`.

        `where` takes mailbox, recipient, operation (send, read, draft, upload, any), probability
        and the details of the kind.
        """
        self.control("POST", "faults", {"kind": kind, "count": count, **where})

    def clear_faults(self) -> None:
        """Let no fault stand."""
        self.control("DELETE", "faults")

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Change settings while it runs; answers with all of them."""
        return cast("dict[str, Any]", self.control("POST", "settings", changes))

    def revoke_tokens(self) -> None:
        """End every token issued so far."""
        self.control("POST", "revoke-tokens")

    def control(self, method: str, path: str, order: dict[str, Any] | None = None) -> Any:
        """Ask the control API.

        Raises:
            ValueError: it refused the order.
        """
        data = None if order is None else json.dumps(order).encode()
        request = urllib.request.Request(  # noqa: S310 - our own https address
            f"{self.url}/_simulator/{path}", data, {"Connection": "close"}, method=method
        )
        try:
            with self._opener.open(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(json.load(error)["error"]) from None

    def stop(self) -> None:
        """End the process; a second call does nothing."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def _spawn(self, port: int, options: dict[str, Any]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "worker.simulator", "--until-stdin-closes"]
        command += ["--directory", str(self.directory), "--port", str(port)]
        for name, value in options.items():
            text = ",".join(value) if isinstance(value, list | tuple) else str(value)
            command.append(f"--{name.replace('_', '-')}={text}")
        with (self.directory / "simulator.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
            )

    def _wait(self) -> str:
        address = self.directory / "address"
        end = time.monotonic() + START_SECONDS
        while not address.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                log = (self.directory / "simulator.log").read_text().strip()
                raise RuntimeError(f"the simulator did not start: {log[-500:]}")
            time.sleep(0.005)
        return address.read_text()
