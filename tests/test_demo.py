"""`postroom demo`: the whole way of a message on real parts, in one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import Processes, clean_environment, wait_until
from worker.cli.verdict import Verdict, compare
from worker.model import State

POSTROOM = str(Path(sys.executable).with_name("postroom"))


def demo(
    tmp_path: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    return subprocess.run(
        [POSTROOM, "demo", *words],
        env=clean_environment() | {"TMPDIR": str(tmp_path)} | environment,
        cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


def running_in(directory: Path) -> dict[int, str]:
    """pid → command line of the processes that name `directory` or work in a demo's inside it."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            place = str((process / "cwd").readlink())
        except OSError:
            continue
        ours = str(directory) in words or place.startswith(f"{directory}/postroom-demo-")
        if ours and int(process.name) != os.getpid():
            found[int(process.name)] = words
    return found


def test_the_demo_sends_every_message_once_and_leaves_nothing_running(tmp_path: Path):
    """Ledger and SQL agree on every message, one token was enough, and the database is kept."""
    done = demo(tmp_path, "60", "--json", POSTROOM_DB_SCHEMA="of_somebody_else")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["counts"] == {str(state): 60 * (state is State.SENT) for state in State}
    assert (found["token_requests"], found["duplicates"], found["disagreements"]) == (1, 0, 0)
    assert found["per_second"] > 0
    assert all(Path(log).exists() for log in found["logs"])
    assert running_in(tmp_path) == {}


def test_what_the_demo_prints_to_try_next_works(tmp_path: Path):
    """The lines may be copied: they are run here as they stand."""
    done = demo(tmp_path, "5")
    lines = [line.strip() for line in done.stdout.partition("To try next")[2].splitlines()]
    tried = "\n".join(line for line in lines if line.startswith("cd ") or "postroom batch" in line)
    path = f"{Path(POSTROOM).parent}:{os.environ['PATH']}"

    again = subprocess.run(
        ["sh", "-ec", tried], env=clean_environment() | {"PATH": path}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "duplicates in the ledger    0" in done.stdout
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("@fabrikam.com") == 5
    assert "\x1b" not in done.stdout + done.stderr


def sending(directory: Path) -> bool:
    """Whether a demo's worker has told of a message."""
    logs = directory.glob("postroom-demo-*/worker.log")
    return any(": sent (" in log.read_text() for log in logs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(
    number: signal.Signals, tmp_path: Path, processes: Processes
):
    """Ctrl-C, a stop and even a kill end Redis, simulator, worker and beat."""
    child = processes.start(["postroom", "demo", "20000"], {"TMPDIR": str(tmp_path)}, log="demo")
    wait_until(lambda: sending(tmp_path), "it sends", 60)
    assert "worker beat" in " ".join(running_in(tmp_path).values())

    child.signal(number)
    child.process.wait(40)

    wait_until(lambda: not running_in(tmp_path), "all processes have ended", 40)
    assert "Traceback" not in child.tail()


def test_a_worker_that_dies_ends_the_demo_with_its_last_lines(tmp_path: Path, processes: Processes):
    """No waiting for what cannot come."""
    child = processes.start(["postroom", "demo", "20000"], {"TMPDIR": str(tmp_path)}, log="demo")
    found = wait_until(lambda: list(tmp_path.glob("postroom-demo-*/worker.log")), "it runs", 60)
    log = found[0]
    wait_until(lambda: "ready." in log.read_text(), "the worker is ready", 60)
    worker = next(pid for pid, words in running_in(tmp_path).items() if "worker -P" in words)

    os.kill(worker, signal.SIGKILL)

    assert child.process.wait(60) == 1
    assert "of 20000 messages: worker has ended" in child.tail()
    assert "worker: " in child.tail()


@pytest.mark.parametrize(
    ("state", "entries", "verdict"),
    [
        ("sent", 1, Verdict(0, 0, 0)),
        ("sent", 0, Verdict(0, 1, 0)),
        ("sent", 2, Verdict(1, 1, 0)),
        ("failed", 0, Verdict(0, 0, 0)),
        ("failed", 1, Verdict(0, 1, 0)),
        ("queued", 1, Verdict(0, 1, 0)),
        ("unknown", 0, Verdict(0, 0, 0)),
        ("unknown", 1, Verdict(0, 0, 1)),
        ("unknown", 2, Verdict(1, 1, 1)),
    ],
)
def test_ledger_and_sql_agree_or_are_said_to_differ(state: str, entries: int, verdict: Verdict):
    """Sent means one entry, not sent means none, and doubt may be either."""
    ledger: list[dict[str, Any]] = [{"marker": "a"} for _ in range(entries)]

    assert compare([{"id": "a", "state": state}], ledger) == verdict


def test_a_mail_that_sql_does_not_know_is_a_disagreement():
    """Also one without a marker."""
    ledger: list[dict[str, Any]] = [{"marker": "a"}, {"marker": "b"}, {"marker": None}]

    assert compare([{"id": "a", "state": "sent"}], ledger) == Verdict(0, 2, 0)
