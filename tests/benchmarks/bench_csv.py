"""A CSV becomes rows in SQL: seconds, the producer's memory, the database's size.

    ./dev bench csv [--rows 100000] [--database sqlite|postgresql|URL] [--no-limits]

Real processes: the command `postroom send` as a child of its own, whose peak memory is measured,
and a worker that takes in. The batch is due in a day, so nothing is sent. Exit status 1 where the
goals are missed: 60 s from the command to the last row, 200 MB for the producer, 150 MB for the
database.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, text

from tests.support import Processes, clean_environment, upgrade
from worker.servers import PostgresServer, RedisServer
from worker.simulator import Simulator
from worker.store import make_engine

GOALS = {"seconds": 60.0, "producer_mb": 200.0, "database_mb": 150.0}
HTML = """<p>Dear {{ name }},</p>
<p>your invoice <b>{{ number }}</b> over {{ amount }} is ready. Please pay before {{ date }}.</p>
"""


def main(words: list[str]) -> int:
    """One run; prints a JSON document."""
    given = _arguments(words)
    with tempfile.TemporaryDirectory(prefix="postroom-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL may run as another user
        server = stack.enter_context(RedisServer(directory / "redis"))
        url = stack.enter_context(_database(given.database, directory))
        simulator = stack.enter_context(Simulator(directory / "simulator"))
        environment = clean_environment() | simulator.environment() | {
            "POSTROOM_REDIS_URL": server.url, "POSTROOM_DATABASE_URL": url,
        }  # fmt: skip
        upgrade(url)
        found = _run(directory, given.rows, url, environment)
    missed = [name for name, most in GOALS.items() if found[name] > most]
    print(json.dumps({"rows": given.rows, "database": given.database, **found, "missed": missed}))
    return 1 if missed and not given.no_limits else 0


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench csv", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--database", default="postgresql", help="sqlite, postgresql or a URL")
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    return parser.parse_args(words)


@contextmanager
def _database(kind: str, directory: Path) -> Iterator[str]:
    if kind == "postgresql":
        with PostgresServer(directory / "postgres", durable=True) as server:
            yield server.url
    else:
        yield f"sqlite:///{directory / 'postroom.db'}" if kind == "sqlite" else kind


def _run(directory: Path, rows: int, url: str, environment: dict[str, str]) -> dict[str, float]:
    people, html = _write(directory, rows)
    processes = Processes(directory, environment)
    try:
        processes.start(["celery", "-A", "worker", "worker", "-P", "threads", "-c", "4"])
        _wait_for_worker(directory, environment)
        before = _megabytes(url)
        began = time.monotonic()
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        batch_id = _send(directory, people, html, tomorrow, environment)
        returned = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        _wait_for_rows(url, batch_id, rows)
        took = time.monotonic() - began
    finally:
        processes.kill()
    found = {"seconds": took, "command_seconds": returned, "producer_mb": peak,
             "database_mb": _megabytes(url) - before}  # fmt: skip
    return {name: round(value, 1) for name, value in found.items()}


def _write(directory: Path, rows: int) -> tuple[Path, Path]:
    people, html = directory / "people.csv", directory / "body.html"
    html.write_text(HTML)
    with people.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("to", "name", "number", "amount", "date"))
        writer.writerows((f"customer{n}@fabrikam.com", f"Customer {n}", f"{n:07}", f"{n % 900} EUR",
                          "2026-12-31") for n in range(1, rows + 1))  # fmt: skip
    return people, html


def _wait_for_worker(directory: Path, environment: dict[str, str]) -> None:
    script = ("from worker import report, runtime; "
              "raise SystemExit(not report.workers(runtime.current().redis))")  # fmt: skip
    deadline = time.monotonic() + 60
    while subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode:
        if time.monotonic() > deadline:
            raise SystemExit(f"no worker came up; see {directory}")


def _send(directory: Path, people: Path, html: Path, at: str, environment: dict[str, str]) -> str:
    postroom = str(Path(sys.executable).with_name("postroom"))
    done = subprocess.run(
        [postroom, "send", str(people), "--sender", "notices@contoso.com",
         "--subject", "Invoice {{ number }}", "--html", str(html), "--send-at", at, "--json"],
        env=environment, cwd=directory, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return str(json.loads(done.stdout)["batch_id"])


def _wait_for_rows(url: str, batch_id: str, rows: int) -> None:
    engine = make_engine(url)
    while _scalar(engine, "SELECT count(*) FROM batches WHERE id = :id AND sealed_at IS NOT NULL",
                  id=batch_id) == 0:  # fmt: skip
        time.sleep(0.05)
    found = _scalar(engine, "SELECT count(*) FROM messages WHERE batch_id = :id", id=batch_id)
    engine.dispose()
    if found != rows:
        raise SystemExit(f"{found} of {rows} rows arrived")


def _megabytes(url: str) -> float:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(str(parsed.database))
        files = [path, path.with_name(path.name + "-wal")]
        return sum(f.stat().st_size for f in files if f.exists()) / 1e6
    engine = make_engine(url)
    size = _scalar(engine, "SELECT pg_database_size(current_database())")
    engine.dispose()
    return float(size) / 1e6


def _scalar(engine: Any, statement: str, **parameters: Any) -> Any:
    with engine.connect() as connection:
        return connection.execute(text(statement), parameters).scalar_one()
