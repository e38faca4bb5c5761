"""A large backlog: what a claim, a sweep, a status and a page of a search cost beside it.

    ./dev bench large [--rows 10000,100000,1000000] [--no-limits]

One batch of so many queued messages for a pool of 200 mailboxes, beside a paused batch of half as
many, in PostgreSQL, written by SQL. Then each step is taken fifty times; medians, in milliseconds;
the export once. Exit status 1 if the cost at the most rows is over 1.5 times that at the fewest (a
status may take 200 ms, an export what its rows take), or where a message takes a kilobyte of SQL.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.kit import machine, mailboxes, table
from tests.store_kit import SENT, Kit, opened, to_record
from tests.support import clean_environment, upgrade
from worker.model import OnUnknown, State
from worker.servers import PostgresServer
from worker.store.finding import Wanted
from worker.sweep import sweep

POOL = "all"
EXPORT = "batch export"
MEMBERS = mailboxes(200)
TIMES, PIECE = 50, 20_000
FLAT, STATUS_MS, ROW_BYTES = 1.5, 200.0, 1024

FILL = """
    INSERT INTO messages (id, batch_id, queue_id, position, recipient, recipients, content, state,
                          due_at, deadline_at)
    SELECT gen_random_uuid(), :batch, :queue, n, 'user' || n || '@example.com', 1,
           jsonb_build_object('to', jsonb_build_array(jsonb_build_object(
               'address', 'user' || n || '@example.com')),
               'variables', jsonb_build_object('name', 'User ' || n, 'amount', n)),
           'queued', now() - interval '1 hour', now() + interval '1 day'
    FROM generate_series(CAST(:first AS int), CAST(:last AS int)) AS n
"""


def main(words: list[str]) -> int:
    """Grows the backlog step by step; prints a table."""
    parser = argparse.ArgumentParser(prog="./dev bench large", description=__doc__)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--no-limits", action="store_true", help="measure, do not judge")
    given = parser.parse_args(words)
    print(machine(), flush=True)
    sizes = [int(word) for word in given.rows.split(",")]
    found = [measure(size) for size in sizes]
    names = list(found[0])
    rows = [[name, *(f"{one[name]:,.1f}" for one in found),
             f"{found[-1][name] / found[0][name]:.2f}"] for name in names]  # fmt: skip
    print(table(("milliseconds", *(f"{size:,} rows" for size in sizes), "ratio"), rows))
    missed = [name for name in names if not is_met(name, found[0][name], found[-1][name])]
    print("\n".join(f"missed: {name}" for name in missed))
    return 1 if missed and not given.no_limits else 0


def is_met(name: str, fewest: float, most: float) -> bool:
    """Whether this figure is as it should be at the most rows."""
    if name.startswith("bytes"):
        return most < ROW_BYTES
    if name == EXPORT:
        return True
    # Both count what they show.
    return most < STATUS_MS if name in {"batch status", "batch list"} else most / fewest < FLAT


@contextmanager
def backlog(rows: int) -> Iterator[tuple[Kit, str]]:
    """A database with so many queued messages and half as many paused ones; the batch's id."""
    with tempfile.TemporaryDirectory(prefix="postroom-bench-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        with PostgresServer(directory / "postgres", durable=True) as server:
            upgrade(server.url)
            with opened(server.url) as kit:
                paused = fill(kit, rows // 2)
                kit.store.control.pause(paused, by="bench", why="it lies beside")
                batch = fill(kit, rows)
                with kit.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
                    c.exec_driver_sql("SET statement_timeout = 0")
                    c.exec_driver_sql("VACUUM ANALYZE")  # as autovacuum does after a while
                yield kit, batch


def fill(kit: Kit, total: int) -> str:
    """A batch with so many queued messages; its id."""
    head, _ = kit.batch(1, target_kind="pool", target=POOL)
    for first in range(2, total + 1, PIECE):  # a statement may take eight seconds
        last = min(first + PIECE - 1, total)
        kit.sql(FILL, batch=head.id, queue=head.queue_id, first=first, last=last)
    kit.set_batch(head.id, total=total)
    kit.sql('UPDATE chunks SET "count" = :n WHERE batch_id = :batch', n=total, batch=head.id)
    return head.id


def measure(rows: int) -> dict[str, float]:
    """Name of a step → milliseconds."""
    with backlog(rows) as (kit, batch):
        size = kit.sql("SELECT pg_total_relation_size('messages')")[0][0] / (rows * 1.5)
        finding = kit.store.finding
        a_message = kit.sql("SELECT id, recipient FROM messages WHERE position = 77 LIMIT 1")[0]
        steps: dict[str, Callable[[], object]] = {
            "look, claim and record of 4": lambda: send_four(kit),
            "sweep": lambda: sweep(kit.store, on_unknown=OnUnknown.HOLD, max_attempts=6,
                                   wake=lambda _: None, finished=lambda _: None),
            "batch status": lambda: kit.store.batch_status(batch),
            "batch list": lambda: finding.batches(20),
            "message find": lambda: finding.messages(Wanted(), 50),
            "message find --batch": lambda: finding.messages(Wanted(batch_id=batch), 50),
            "message find --to": lambda: finding.messages(Wanted(to=a_message[1]), 50),
            "message find --state failed": lambda: finding.messages(
                Wanted(state=State.FAILED), 50),
            "message find --state queued": lambda: finding.messages(
                Wanted(state=State.QUEUED), 50),
            "message show": lambda: kit.store.message(str(a_message[0])),
        }  # fmt: skip
        found = {name: milliseconds(step) for name, step in steps.items()}
        return found | export(kit, batch) | {"bytes of SQL a message": size}


def export(kit: Kit, batch: str) -> dict[str, float]:
    """Milliseconds of the command that exports a batch as a CSV, and its memory at most."""
    url = kit.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "worker.cli", "batch", "export", batch]
    began = time.perf_counter()
    exporting = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=clean_environment() | {"POSTROOM_DATABASE_URL": url}
    )
    assert exporting.stdout is not None
    lines = sum(1 for _ in exporting.stdout)
    _, status, used = os.wait4(exporting.pid, 0)
    assert status == 0
    assert lines == kit.sql("SELECT total FROM batches WHERE id = :id", id=batch)[0][0] + 1
    taken = 1000 * (time.perf_counter() - began)
    return {EXPORT: taken, "the memory of an export, MB": used.ru_maxrss / 1024}


def send_four(kit: Kit) -> None:
    """What a lane does with SQL for four messages of the pool."""
    seen = kit.store.look(MEMBERS[7], {POOL: MEMBERS}, {}, 64)
    assert seen is not None
    ids = [due.id for due in seen.due[:4]]
    claims = kit.claim(ids, mailbox=MEMBERS[7])
    head = kit.head(1, id=seen.batch_id, target_kind="pool", target=POOL)
    kit.record(*(to_record(head, one, fence, SENT) for one, fence in claims.items()))
    assert len(claims) == 4


def milliseconds(step: Callable[[], object]) -> float:
    """The median of many times."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        step()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)
