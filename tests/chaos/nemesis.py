"""The faults of a run, as they were planned: what each does, and what it may leave in doubt."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from tests.chaos.plan import PRODUCERS, WORKERS, Fault, Plan
from tests.chaos.stage import LEASE, Stage

#: Two faults are at least so far apart, in seconds.
APART = 0.2
#: Where nothing is sent for so long, in seconds, the next fault comes all the same.
PATIENCE = 15.0


class Nemesis:
    """Strikes as planned. `exposed` counts what may be left in doubt: the claims open at each
    fault that can end a request or its record.
    """

    def __init__(self, plan: Plan, stage: Stage) -> None:
        self.plan = plan
        self.stage = stage
        self.exposed = 0
        self.struck: Counter[str] = Counter()
        self._down: set[str] = set()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._log = (stage.directory / "faults.jsonl").open("w")
        self._began = time.monotonic()

    def run(self, tell: Callable[[str], None]) -> None:
        """All faults; returns when the last has passed."""
        faults = self.plan.faults()
        for fault in faults:
            self._wait_until_due(fault, tell)
            self._strike(fault)
        while self._later:
            self._do_what_is_due()
            time.sleep(0.02)
        tell("all faults have passed")
        self._log.close()

    def _wait_until_due(self, fault: Fault, tell: Callable[[str], None]) -> None:
        """Due by the messages that were sent, so that a slow machine meets them in the same
        places; but not faster than the run is to last.
        """
        soonest = self._began + fault.due * 0.8 * self.plan.seconds
        wanted = fault.due * 0.95 * self.plan.messages
        accepted, moved = -1, time.monotonic()
        time.sleep(APART)
        while time.monotonic() < moved + PATIENCE:
            self._do_what_is_due()
            before, accepted = accepted, self.stage.accepted()
            if accepted >= wanted and time.monotonic() >= soonest:
                break
            moved = time.monotonic() if accepted > before else moved
            time.sleep(0.1)
        tell(f"fault {fault.number + 1}: {fault.kind} ({self.stage.accepted()} accepted)")

    def _do_what_is_due(self) -> None:
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()

    def _after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), what))

    def _strike(self, fault: Fault) -> None:
        before = self.exposed
        if getattr(self, f"_{fault.kind}")(fault) is False:
            return
        self.struck[fault.kind] += 1
        line = {"at": time.time(), "fault": fault.kind, "slot": fault.slot,
                "server": fault.server, "exposed": self.exposed - before}  # fmt: skip
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    # ---- workers -------------------------------------------------------------------------------

    def _worker_kill(self, fault: Fault) -> None:
        self._kill(fault.slot)

    def _all_workers_kill(self, _fault: Fault) -> None:
        for slot in range(WORKERS):
            self._kill(slot)

    def _kill(self, slot: int) -> None:
        """Stopped first, so that its open claims can be counted before it dies."""
        worker = self.stage.workers[slot]
        if worker.running:
            worker.signal(signal.SIGSTOP)
            self.exposed += self.stage.claims(slot)
        self.stage.kill("worker", slot)

    def _worker_pause(self, fault: Fault) -> bool:
        """Longer than its lease: others go on, and it wakes as a zombie."""
        worker = self.stage.workers[fault.slot]
        if not worker.running:
            return False
        worker.signal(signal.SIGSTOP)
        self.exposed += self.stage.claims(fault.slot)

        def go_on() -> None:
            if worker.running:
                worker.signal(signal.SIGCONT)

        self._after(LEASE * (1.2 + fault.strength), go_on)
        return True

    def _worker_stop(self, fault: Fault) -> None:
        """A deploy: SIGTERM, and a new one when it has ended. It may leave nothing in doubt."""
        worker = self.stage.workers[fault.slot]
        if worker.running:
            self.stage.asked.add(worker.pid)
            worker.signal(signal.SIGTERM)
            worker.signal(signal.SIGCONT)

    # ---- servers -------------------------------------------------------------------------------

    def _redis_kill(self, fault: Fault) -> bool:
        if "redis" in self._down:
            return False
        self._down.add("redis")
        self.stage.redis.kill()
        self.exposed += self.stage.claims()
        self._after(0.2 + 2 * fault.strength, self._redis_start)
        return True

    def _redis_start(self) -> None:
        self.stage.redis.start()
        self._down.discard("redis")

    def _redis_pause(self, fault: Fault) -> bool:
        if "redis" in self._down:
            return False
        pid = self.stage.redis.pid
        self._signal(pid, signal.SIGSTOP)
        self.exposed += self.stage.claims()
        self._after(1 + 3 * fault.strength, lambda: self._signal(pid, signal.SIGCONT))
        return True

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # killed meanwhile
            os.kill(pid, number)

    def _postgres_stop(self, fault: Fault) -> bool:
        if "postgres" in self._down:
            return False
        self._down.add("postgres")
        self.exposed += self.stage.claims()
        self.stage.postgres.stop_immediate()
        self._after(0.2 + 2 * fault.strength, self._postgres_start)
        return True

    def _postgres_start(self) -> None:
        self.stage.postgres.start()
        self._down.discard("postgres")

    def _backends_end(self, _fault: Fault) -> None:
        """Every connection to the database is ended from its side."""
        self.exposed += self.stage.claims()
        self.stage.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    # ---- others --------------------------------------------------------------------------------

    def _producer_kill(self, fault: Fault) -> bool:
        n = fault.slot % PRODUCERS
        if not self.stage.producers[n].running:
            return False
        self.stage.kill("producer", n)
        return True

    def _beat_kill(self, _fault: Fault) -> None:
        self.stage.kill("beat")

    # ---- lines ---------------------------------------------------------------------------------

    def _cut(self, fault: Fault) -> None:
        line = self.stage.lines[fault.slot][fault.server]
        line.cut()
        self._count_line(fault)
        self._after(2 * fault.strength, line.heal)

    def _half_open(self, fault: Fault) -> None:
        line = self.stage.lines[fault.slot][fault.server]
        line.half_open()
        self._count_line(fault)
        self._after(1 + 3 * fault.strength, line.heal)

    def _delay(self, fault: Fault) -> None:
        line = self.stage.lines[fault.slot][fault.server]
        line.delay = 0.05 + 0.3 * fault.strength
        self._count_line(fault)
        self._after(1 + 3 * fault.strength, line.heal)

    def _count_line(self, fault: Fault) -> None:
        """The claims open at the fault; and on the line to Graph, a request more for each
        connection that stands: it may be sent into the void before the end is seen.
        """
        self.exposed += self.stage.claims()
        if fault.server == "graph":
            self.exposed += self.stage.lines[fault.slot]["graph"].connections
