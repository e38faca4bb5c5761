"""What tests share: waiting, processes, databases."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import sqlalchemy

from worker.servers import Child

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], what: str, timeout: float = 20.0) -> T:
    """Ask `predicate` until it is true, and give its answer; fail with `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain: {what}"
        time.sleep(0.02)
    return answer


def free_port() -> int:
    """A port of the loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def upgrade(url: str) -> None:
    """Bring an empty database to the newest tables, by our own migrations."""
    from worker import store

    store.upgrade(url)


class Processes:
    """Real processes of one test. Their logs are shown when it fails; none outlives it."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self.started: list[Child] = []

    def start(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        log: str = "process",
    ) -> Child:
        """Start a command, `env` added to the test's own; `log` names its file.

        A command that begins with `celery` or `postroom` is that of this virtual environment.
        """
        program = Path(sys.executable).parent / command[0]
        words = [program, *command[1:]] if program.exists() else list(command)
        path = self._directory / f"{log}-{len(self.started)}.log"
        environment = {**self._environment, **(env or {})}
        self.started.append(Child(words, path, env=environment))
        return self.started[-1]

    def kill(self) -> None:
        for child in self.started:
            child.kill()

    def report(self) -> str:
        return "\n".join(f"--- {child.log.name}\n{child.tail()}" for child in self.started)


class Sqlite:
    """Fresh SQLite files, migrated ones copied from one that was migrated once."""

    def __init__(self, directory: Path) -> None:
        self._template = directory / "template.db"

    def create(self, directory: Path, *, migrated: bool) -> str:
        """The address of a new database in `directory`."""
        path = directory / "postroom.db"
        if migrated:
            if not self._template.exists():
                upgrade(f"sqlite:///{self._template}")
            shutil.copy(self._template, path)
        return f"sqlite:///{path}"

    def drop(self, url: str) -> None:
        """Leave it: pytest keeps the files of the last runs."""


class Postgres:
    """Fresh databases on one server, migrated ones cloned from one that was migrated once."""

    def __init__(self, url: str) -> None:
        self._url = sqlalchemy.make_url(url)
        self._template = ""
        self._engine = sqlalchemy.create_engine(
            self._url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
        )

    def create(self, directory: Path, *, migrated: bool) -> str:
        """The address of a new database; `directory` is not used."""
        if migrated and not self._template:
            self._template = self._new("template1")
            upgrade(self._address(self._template))
        return self._address(self._new(self._template if migrated else "template1"))

    def drop(self, url: str) -> None:
        """Drop it, whoever is still connected."""
        self._run(f'DROP DATABASE IF EXISTS "{sqlalchemy.make_url(url).database}" WITH (FORCE)')

    def close(self) -> None:
        if self._template:
            self._run(f'DROP DATABASE "{self._template}" WITH (FORCE)')
        self._engine.dispose()

    def _new(self, template: str) -> str:
        name = f"postroom_test_{uuid4().hex}"
        self._run(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def _address(self, name: str) -> str:
        return self._url.set(database=name).render_as_string(hide_password=False)

    def _run(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


def clean_environment() -> dict[str, str]:
    """Our environment without anything that could steer Postroom from outside."""
    return {name: value for name, value in os.environ.items() if not name.startswith("POSTROOM_")}
