"""What benchmarks share: servers, workers, processor time, and what the simulator saw.

All clocks are CLOCK_MONOTONIC, which all processes of a machine share. Processor time is user and
system time of a whole session of processes, from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
import sqlalchemy

from tests.support import Processes, clean_environment, upgrade
from worker.report import ALIVE
from worker.servers import Child, PostgresServer, RedisServer
from worker.simulator import Simulator

HOME = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
#: How long anything may take that a benchmark waits for, in seconds.
PATIENCE = 300.0


def mailboxes(count: int) -> list[str]:
    """So many senders."""
    return [f"notices{n:03}@contoso.com" for n in range(count)]


@dataclass
class Stage:
    """Redis, PostgreSQL (durable) and a simulator, with an environment that leads there."""

    directory: Path
    redis: RedisServer
    postgres: PostgresServer
    simulator: Simulator
    environment: dict[str, str]
    processes: Processes
    workers: list[Child] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def set_up(cls, settings: Mapping[str, str], **simulated: Any) -> Iterator[Stage]:
        """All of it, until the block ends. `settings`: POSTROOM_... without that prefix."""
        with tempfile.TemporaryDirectory(prefix="postroom-bench-") as name, ExitStack() as stack:
            directory = Path(name)
            directory.chmod(0o711)  # PostgreSQL may run as another user
            server = stack.enter_context(RedisServer(directory / "redis", maxmemory="2gb"))
            postgres = stack.enter_context(PostgresServer(directory / "postgres", durable=True))
            simulator = stack.enter_context(Simulator(directory / "simulator", **simulated))
            environment = clean_environment() | simulator.environment() | {
                "POSTROOM_REDIS_URL": server.url, "POSTROOM_DATABASE_URL": postgres.url,
            } | {f"POSTROOM_{name}": value for name, value in settings.items()}  # fmt: skip
            upgrade(postgres.url)
            processes = Processes(directory, environment)
            stack.callback(processes.kill)
            yield cls(directory, server, postgres, simulator, environment, processes)

    def start_workers(self, count: int, threads: int = 32) -> None:
        """So many worker processes, and waits until all of them tick."""
        for _ in range(count):
            command = ["celery", "-A", "worker", "worker", "-P", "threads", "-c", str(threads)]
            self.workers.append(self.processes.start([*command, "-n", f"w{len(self.workers)}@x"]))
        with redis.Redis.from_url(self.redis.url) as client:
            wait(lambda: sum(1 for _ in client.scan_iter(f"{ALIVE}*")) >= len(self.workers),
                 "the workers")  # fmt: skip

    def stop_workers(self) -> None:
        """Ends them in order, and forgets them."""
        for child in self.workers:
            child.stop()
        self.workers.clear()
        with redis.Redis.from_url(self.redis.url) as client:
            wait(lambda: not any(client.scan_iter(f"{ALIVE}*")), "the workers' end")

    def seconds(self) -> float:
        """Processor seconds of the workers so far."""
        return processor(self.workers)

    def produce(
        self, to: Mapping[str, int], due: datetime | None = None, kilobytes: int | None = None
    ) -> dict[str, Any]:
        """Enqueues so many messages for each of these mailboxes, in a process of its own.

        Gives what it says: seconds, processor seconds, peak memory, batches.
        """
        order = {"to": dict(to), "due": due.isoformat() if due else None, "kilobytes": kilobytes}
        return run_module("produce", order, self.environment)

    def prepare(self, to: Mapping[str, int], rows_a_second: int = 1500) -> float:
        """Enqueues, waits until all is in SQL, and gives the instant (monotonic) it is due.

        So the processor time of taking in lies before that instant, that of sending after it.
        """
        total = sum(to.values())
        lead = timedelta(seconds=5 + total / rows_a_second)
        due, at = datetime.now(UTC) + lead, time.monotonic() + lead.total_seconds()
        before = self.scalar("SELECT count(*) FROM batches WHERE sealed_at IS NOT NULL")
        self.produced = self.produce(to, due)
        wait(lambda: self.scalar("SELECT count(*) FROM batches WHERE sealed_at IS NOT NULL")
             == before + len(to), "the rows")  # fmt: skip
        if time.monotonic() > at:
            raise SystemExit("taking in took longer than the benchmark allows for")
        return at

    def accepted(self) -> int:
        """How many mails the simulator accepted so far."""
        return int(self.simulator.stats()["ledger"])

    def wait_accepted(self, count: int) -> None:
        """Until the simulator accepted so many in all, and all of them are recorded."""
        wait(lambda: self.accepted() >= count, f"{count} accepted mails", pause=0.25)
        wait(lambda: not self.scalar("SELECT count(*) FROM messages WHERE state = 'sending'"),
             "the outcomes")  # fmt: skip

    def scalar(self, statement: str) -> Any:
        """The one value of an SQL query."""
        engine = sqlalchemy.create_engine(self.postgres.url, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            return connection.execute(sqlalchemy.text(statement)).scalar_one()


# ---- measuring ----------------------------------------------------------------------------------


def processor(children: Sequence[Child]) -> float:
    """Processor seconds of these processes and of all their children, dead ones included."""
    sessions = {child.pid for child in children}
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rpartition(")")[2].split()
            if int(words[3]) in sessions:
                total += sum(map(int, words[11:15]))
    return float(total) / TICKS


def resident_mb(pid: int) -> float:
    """Memory of a process that lies in RAM now."""
    return _status_mb(pid, "VmRSS")


def own_mb(pid: int) -> float:
    """That of it which is no file: libraries lie in RAM once for all processes."""
    return _status_mb(pid, "RssAnon")


def _status_mb(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    [kilobytes] = [line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(kilobytes) / 1024


def wait(
    ready: Callable[[], Any], what: str, *, pause: float = 0.05, seconds: float = PATIENCE
) -> None:
    """Until `ready()` holds; ends the benchmark where that takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:g} s in vain: {what}")
        time.sleep(pause)


def sleep_until(instant: float) -> None:
    """Until this instant of the monotonic clock."""
    time.sleep(max(0.0, instant - time.monotonic()))


def run_module(
    name: str, order: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Runs tests.benchmarks.NAME with this order as JSON; gives the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", json.dumps(order)], check=False,
        env=dict(environment), stdout=subprocess.PIPE, text=True, cwd=HOME,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_mailbox(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The instants of acceptance of each mailbox, in order."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[row["mailbox"]].append(row["monotonic"])
    return {mailbox: sorted(times) for mailbox, times in found.items()}


def rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Messages a second from the first acceptance to the last."""
    times: list[float] = [row["monotonic"] for row in rows]
    return float(len(times) - 1) / (max(times) - min(times))


def doubles(rows: Sequence[Mapping[str, Any]], key: str = "marker") -> int:
    """How many mails were accepted a second time."""
    return len(rows) - len({row[key] for row in rows})


# ---- showing ------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and least to most where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The shape of this machine, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, "
            f"Python {platform.python_version()}, load before the run {load:.1f}")  # fmt: skip
