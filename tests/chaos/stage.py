"""Everything of a run: servers and the lines to them, workers, beat, producers: all real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psycopg
import redis
from sqlalchemy import make_url

from tests.chaos.plan import MAILBOXES, POOL, PRODUCERS, WORKERS, Plan
from tests.chaos.producer import read_journal
from tests.proxy import Proxy, before_postgres, before_redis, before_simulator
from tests.support import clean_environment, upgrade
from worker.servers import Child, PostgresServer, RedisServer
from worker.simulator import Simulator
from worker.simulator.hostile import MIX

ROOT = Path(__file__).parents[2]
LEASE, REQUEST_TIMEOUT = 8.0, 5.0
#: Settings of every process. Leases and tokens live shortly, so that a short run meets their ends.
SETTINGS = {
    "POSTROOM_REQUEST_TIMEOUT": f"{REQUEST_TIMEOUT:g}s",
    "POSTROOM_LEASE": f"{LEASE:g}s",
    "POSTROOM_TOKEN_MARGIN": "10s",
    "POSTROOM_SETTLE_MARGIN": "2s",
    "POSTROOM_POOLS": json.dumps({POOL: MAILBOXES}),
}
TOKEN_LIFE = 30  # seconds
#: All but revocations: whoever refuses two tokens younger than a minute has refused a credential,
#: and here no token gets older.
HOSTILE = tuple(name for name in MIX if name != "revoked")


class Stage:
    """Sets everything up in a directory of its own, and takes it down again."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.directory = Path(tempfile.mkdtemp(prefix="postroom-chaos-"))
        self.directory.chmod(0o711)  # PostgreSQL runs as another user where we are root
        self.asked: set[int] = set()  # processes that were asked to end
        self.ended = Counter[str]()  # processes that ended by themselves
        self.journals = [self.directory / f"journal-{n}.jsonl" for n in range(PRODUCERS)]
        self._stack = ExitStack()
        self._numbers = Counter[str]()
        self._lock = threading.RLock()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.stop)
            self.redis = stack.enter_context(RedisServer(self.directory / "redis"))
            self.postgres = stack.enter_context(
                PostgresServer(self.directory / "postgres", durable=True)
            )
            upgrade(self.postgres.url)
            self.simulator = stack.enter_context(
                Simulator(
                    self.directory / "simulator", latency_ms="100-500", retry_after=1,
                    token_lifetime=TOKEN_LIFE, drafts_seconds=0.5, search_delay=1.0,
                    seed=self.plan.seed, hostile_percent=self.plan.hostile_percent,
                    hostile_mix=HOSTILE,
                )
            )  # fmt: skip
            self.lines = [self._lines(stack) for _ in range(WORKERS)]
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def remove(self) -> None:
        """Forget the run's files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _lines(self, stack: ExitStack) -> dict[str, Proxy]:
        return {
            "redis": stack.enter_context(before_redis(self.redis)),
            "postgres": stack.enter_context(before_postgres(self.postgres)),
            "graph": stack.enter_context(before_simulator(self.simulator)),
        }

    # ---- processes -----------------------------------------------------------------------------

    def _start(self) -> None:
        calls = self.plan.calls()
        for n in range(PRODUCERS):
            path = self.directory / f"calls-{n}.json"
            path.write_text(json.dumps(calls[n::PRODUCERS]))
        self.workers = [self._worker(slot) for slot in range(WORKERS)]
        self.beat = self._beat()
        self.producers = [self._producer(n) for n in range(PRODUCERS)]
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _spawn(self, name: str, words: list[str], env: Mapping[str, str]) -> Child:
        self._numbers[name] += 1
        log = self.directory / f"{name}-{self._numbers[name]}.log"
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT), **SETTINGS, **env}
        environment["POSTROOM_ON_UNKNOWN"] = self.plan.policy
        return Child([sys.executable, *words], log, env=environment, cwd=self.directory)

    def _worker(self, slot: int) -> Child:
        words = ["-m", "celery", "-A", "worker", "worker", "-P", "threads", "-c", "8",
                 "-n", f"w{slot}@chaos", "-l", "INFO"]  # fmt: skip
        return self._spawn(f"worker{slot}", words, self._through(self.lines[slot]))

    def _beat(self) -> Child:
        words = ["-m", "celery", "-A", "worker", "beat", "-l", "INFO"]
        return self._spawn("beat", words, self._through(self.lines[0]))

    def _producer(self, n: int) -> Child:
        seconds = self.plan.seconds * 0.6
        words = ["-m", "tests.chaos.producer", f"calls-{n}.json", str(self.journals[n]),
                 str(self.plan.seed), f"{seconds:g}"]  # fmt: skip
        env = {"POSTROOM_REDIS_URL": self.redis.url, "POSTROOM_DATABASE_URL": self.postgres.url}
        return self._spawn(f"producer{n}", words, env)

    def _through(self, lines: Mapping[str, Proxy]) -> dict[str, str]:
        """A worker's environment: it knows the servers by its lines to them."""
        graph = f"https://127.0.0.1:{lines['graph'].port}"
        database = make_url(self.postgres.url).set(
            host="127.0.0.1", port=lines["postgres"].port, query={}
        )
        return self.simulator.environment() | {
            "POSTROOM_REDIS_URL": f"redis://127.0.0.1:{lines['redis'].port}/0",
            "POSTROOM_DATABASE_URL": database.render_as_string(hide_password=False),
            "POSTROOM_GRAPH_URL": graph,
        }

    def restart(self, name: str, n: int = 0) -> None:
        """A new process in the place of a dead one."""
        with self._lock:
            if name == "worker":
                self.workers[n] = self._worker(n)
            elif name == "producer":
                self.producers[n] = self._producer(n)
            else:
                self.beat = self._beat()

    def _keep(self) -> None:
        """The supervisor: what ended by itself is started again, and counted."""
        while not self._over.wait(0.25):
            with self._lock:
                for slot, worker in enumerate(self.workers):
                    if not worker.running:
                        self.ended["worker"] += worker.pid not in self.asked
                        worker.kill()
                        self.restart("worker", slot)
                for n, producer in enumerate(self.producers):
                    if not producer.running and not self._is_through(n):
                        self.ended["producer"] += 1
                        producer.kill()
                        self.restart("producer", n)

    def kill(self, name: str, n: int = 0) -> None:
        """SIGKILL, and a new one in its place."""
        with self._lock:
            child = {"worker": self.workers, "producer": self.producers, "beat": [self.beat]}[name]
            child[n].kill()
            self.restart(name, n)

    def _is_through(self, n: int) -> bool:
        return any(line["do"] == "end" for line in read_journal(self.journals[n])[-1:])

    def stop(self) -> None:
        """End all that works, as an operator would; twice does no harm. The servers go on."""
        self._over.set()
        if hasattr(self, "_keeper"):
            self._keeper.join()
        children = [*getattr(self, "workers", []), *getattr(self, "producers", [])]
        children += [self.beat] if hasattr(self, "beat") else []
        for child in children:
            if child.running:
                child.signal(signal.SIGTERM)
        for child in children:
            child.stop(REQUEST_TIMEOUT + 10)

    # ---- what can be seen ----------------------------------------------------------------------

    @property
    def producing(self) -> bool:
        """Whether a producer still has calls to make."""
        return not all(self._is_through(n) for n in range(PRODUCERS))

    def accepted(self) -> int:
        """How many mails Graph has accepted."""
        return int(self.simulator.stats()["accepted"])

    def ask(self, query: str, *parameters: Any) -> list[tuple[Any, ...]] | None:
        """What SQL answers, past all lines; None where it does not."""
        address = self.postgres.url.replace("+psycopg", "")
        try:
            with psycopg.connect(address, connect_timeout=2, autocommit=True) as connection:
                return list(connection.execute(query, parameters))
        except psycopg.Error:
            return None

    def claims(self, slot: int | None = None) -> int:
        """Claims that are open now, of one worker or of all; 0 where the database is down: what
        was open when it stopped has been counted then, and nobody can claim since.
        """
        query = "SELECT count(*) FROM messages WHERE state = 'sending'"
        if slot is None:
            rows = self.ask(query)
        else:
            its = f"{socket.gethostname()}:{self.workers[slot].pid}:%"
            rows = self.ask(f"{query} AND worker LIKE %s", its)
        return int(rows[0][0]) if rows else 0

    def waiting(self) -> int:
        """Chunks in the inbox; -1 where Redis does not answer."""
        with suppress(redis.RedisError), redis.Redis.from_url(self.redis.url) as client:
            return int(client.xlen("postroom:inbox"))
        return -1

    def moving(self) -> int:
        """How many messages of whole batches are under way of which none was ever in doubt; -1
        where the database does not answer. (In doubt, reconcile must wait for a token's end.)
        """
        return self._count(
            "SELECT count(*) FROM messages m JOIN batches b ON b.id = m.batch_id"
            " WHERE b.sealed_at IS NOT NULL AND m.state IN ('queued', 'sending') AND NOT EXISTS"
            " (SELECT 1 FROM attempts a WHERE a.message_id = m.id AND a.outcome = 'unknown')"
        )

    def unsettled(self) -> int:
        """How many messages of whole batches are not over, or batches not finished; -1 as well."""
        states = "'queued', 'sending'" + (", 'unknown'" if self.plan.policy == "reconcile" else "")
        return self._count(
            "SELECT (SELECT count(*) FROM messages m JOIN batches b ON b.id = m.batch_id"
            f" WHERE b.sealed_at IS NOT NULL AND m.state IN ({states}))"
            " + (SELECT count(*) FROM batches WHERE sealed_at IS NOT NULL AND finished_at IS NULL)"
        )

    def _count(self, statement: str) -> int:
        rows = self.ask(statement)
        return int(rows[0][0]) if rows else -1


def wait_for(predicate: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it holds; None where it does not in time."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        if predicate():
            return time.monotonic() - began
        time.sleep(0.25)
    return None


def host_load() -> str:
    """How busy the machine is, to judge figures by."""
    return " ".join(f"{one:.1f}" for one in os.getloadavg())
