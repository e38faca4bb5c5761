"""A process that never outlives its starter, and how servers are found and waited for."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

READY_SECONDS = 10.0

#: Waits for the end of its input, which comes with the end of our process, however that ended.
#: (PDEATHSIG is Linux's alone, and fires when the starting thread ends.)
_TETHER = 'read _; kill -s "$1" -- "-$2"; sleep 5; kill -s KILL -- "-$2"'
#: The command begins once it is tethered; it never does where our process ends before that.
_BEGIN = 'read _ && exec "$@" </dev/null'


class ServerError(RuntimeError):
    """A server is missing, or did not become ready: the message says what to do or its log."""


class Child:
    """A process in a session of its own, which ends when ours does, even by SIGKILL."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        ending: signal.Signals = signal.SIGTERM,
    ) -> None:
        """Start `command`, its output appended to `log`; `ending` asks it to stop.

        `env` replaces the environment; `user` is a numeric id to run as, and its group.
        """
        self.log = log
        self._ending = ending
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["sh", "-c", _BEGIN, "begin", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                user=user,
                group=None if user is None else pwd.getpwuid(user).pw_gid,
                extra_groups=None if user is None else [],
                start_new_session=True,
            )
        arguments = ["sh", "-c", _TETHER, "tether", ending.name[3:], str(self.pid)]
        self._tether = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with cast(IO[bytes], self.process.stdin) as begin:
            begin.write(b"\n")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children."""
        self.process.send_signal(number)

    def stop(self, seconds: float = 20.0) -> int:
        """Ask the process to end, kill it after `seconds`; its exit status."""
        if self.running:
            self.signal(self._ending)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        return self.kill()

    def kill(self) -> int:
        """Kill the process and its children (SIGKILL); its exit status. Twice does no harm."""
        if self._tether.returncode is None:
            # macOS answers PermissionError for a group of zombies.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._tether.kill()
            self._tether.communicate()
        return self.process.wait()

    def wait_ready(self, ready: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
        """Return once `ready()` holds; raise ServerError with the log when it ends before."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.running or time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"{self.process.args!r} did not start:\n{self.tail()}")
            time.sleep(0.01)

    def tail(self, characters: int = 4000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:]


def packaged(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, which is not imported."""
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return [path for place in places or [] for path in sorted(Path(place).glob(pattern))]


def socket_home(directory: Path, name: str) -> Path:
    """`directory`, or a temporary one where a socket's path would be too long for the kernel.

    Linux takes 107 bytes, macOS 103.
    """
    if len(bytes(directory / name)) <= 100:
        return directory
    return Path(tempfile.mkdtemp(prefix="postroom-"))
