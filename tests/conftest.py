"""The real parts every test uses: Redis, SQLite and PostgreSQL, the simulator, processes.

`TEST_REDIS_URL` and `TEST_DATABASE_URL` name servers to use instead of our own: a Redis database
that is empty, and a PostgreSQL whose user may create databases.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tests.support import Postgres, Processes, Sqlite, clean_environment
from worker.servers import PostgresServer, RedisServer, find_postgres, find_redis

if TYPE_CHECKING:
    from worker.simulator import Simulator


def pytest_configure() -> None:
    """What runs in a shell's background ignores Ctrl-C, and hands that on to its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> list[str]:
    """Say which servers the tests run on; fail at once where there is none."""
    redis_server = os.environ.get("TEST_REDIS_URL") or find_redis()
    postgres_server = os.environ.get("TEST_DATABASE_URL") or find_postgres()
    return [f"redis: {redis_server}", f"postgresql: {postgres_server}"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """Show the logs of a failed test's processes."""
    report = yield
    processes = getattr(item, "funcargs", {}).get("processes")
    if report.failed and isinstance(processes, Processes):
        report.sections.append(("processes", processes.report()))
    return report


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them, nor a .env of theirs."""
    for name in [name for name in os.environ if name.startswith("POSTROOM_")]:
        if name != "POSTROOM_REDIS_SERVER":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def short_directory() -> Iterator[Path]:
    """A directory for sockets: its path is short, and any user may pass through."""
    directory = Path(tempfile.mkdtemp(prefix="postroom-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server(short_directory: Path) -> Iterator[str]:
    """The address of the session's Redis."""
    if url := os.environ.get("TEST_REDIS_URL"):
        with redis.Redis.from_url(url) as client:
            assert client.dbsize() == 0, "TEST_REDIS_URL must name an empty database"
        yield url
        return
    with RedisServer(short_directory / "redis") as server:
        yield server.url


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """The address of a Redis database that is empty, and emptied afterwards."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushdb()
        yield redis_server
        client.flushdb()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, to be stopped and killed."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(short_directory: Path) -> Iterator[str]:
    """The address of the session's PostgreSQL."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    with PostgresServer(short_directory / "postgres") as server:
        yield server.url


@pytest.fixture
def own_postgres(short_directory: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to be stopped and crashed."""
    directory = Path(tempfile.mkdtemp(dir=short_directory))
    with PostgresServer(directory, durable=True) as server:
        yield server


@pytest.fixture(scope="session")
def _sqlite(tmp_path_factory: pytest.TempPathFactory) -> Sqlite:
    return Sqlite(tmp_path_factory.mktemp("sqlite"))


@pytest.fixture(scope="session")
def _postgresql(postgres_server: str) -> Iterator[Postgres]:
    databases = Postgres(postgres_server)
    yield databases
    databases.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """`sqlite`, then `postgresql`. For one of them only:
    `@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)`.
    """
    return str(request.param)


@pytest.fixture
def database_url(
    database_kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[str]:
    """The address of a fresh, empty database."""
    databases = request.getfixturevalue(f"_{database_kind}")
    url = databases.create(tmp_path, migrated=False)
    yield url
    databases.drop(url)


@pytest.fixture
def migrated_url(
    database_kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[str]:
    """The address of a fresh database with our tables, and nothing in them."""
    databases = request.getfixturevalue(f"_{database_kind}")
    url = databases.create(tmp_path, migrated=True)
    yield url
    databases.drop(url)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts processes, shows their logs when the test fails, and kills them."""
    started = Processes(tmp_path, clean_environment())
    yield started
    started.kill()


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """Microsoft's side: Entra and Graph over TLS, with a ledger of what was accepted."""
    from worker.simulator import Simulator

    with Simulator(tmp_path / "simulator") as running:
        yield running
