"""The embedded servers keep what they were given, and never outlive their starter."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import redis

from tests.support import Processes, wait_until
from worker.servers import Child, PostgresServer, RedisServer, ServerError, find_redis

ORPHAN = """
import sys, threading, time
from pathlib import Path
from worker.servers import Child

def start():
    stubborn = ["sh", "-c", "trap '' TERM; sleep 300 & wait; sleep 300"]
    child = Child(stubborn if sys.argv[2] == "stubborn" else ["sleep", "300"], Path("child.log"))
    Path(sys.argv[1]).write_text(f"{child.pid}\\n")
    globals()["kept"] = child

thread = threading.Thread(target=start)
thread.start()
thread.join()
time.sleep(300)
"""


def test_a_killed_redis_has_its_data_when_it_is_back(own_redis: RedisServer) -> None:
    """The append-only file is on: with it, the crash tests mean something."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("appendfsync", "always")
        client.set("kept", "yes")
        own_redis.kill()
        own_redis.start()

        assert client.get("kept") == b"yes"


def test_redis_refuses_writes_when_full_and_forgets_nothing(own_redis: RedisServer) -> None:
    """An evicted inbox entry would be a lost message."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("kept", "yes")
        client.config_set("maxmemory", 1)

        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("more", "no")
        assert client.get("kept") == b"yes"


def test_a_long_directory_still_gives_a_socket(tmp_path: Path) -> None:
    """Sockets have short paths; people have deep folders."""
    with (
        RedisServer(tmp_path / ("deep" * 25)) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        assert client.ping()


def test_a_missing_redis_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong setting must not fall back to another server silently."""
    monkeypatch.setenv("POSTROOM_REDIS_SERVER", "no-such-server")

    with pytest.raises(ServerError, match="POSTROOM_REDIS_SERVER names no program: no-such-server"):
        find_redis()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Whoever sees the failure sees the server's log."""
    with pytest.raises(ServerError, match="argument"):
        RedisServer(tmp_path, maxmemory="no-number").start()


def test_a_crashed_postgresql_has_its_data_when_it_is_back(own_postgres: PostgresServer) -> None:
    """What was committed outlives an immediate stop."""
    address = own_postgres.url.replace("+psycopg", "")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    own_postgres.stop_immediate()
    own_postgres.start()

    with psycopg.connect(address) as connection:
        assert connection.execute("SELECT one FROM kept").fetchone() == (1,)


@pytest.mark.parametrize("manner", ["obedient", "stubborn"])
def test_a_child_ends_with_its_starter_even_by_sigkill(
    manner: str, processes: Processes, tmp_path: Path
) -> None:
    """A killed demo leaves nothing running, nor does a child that ignores SIGTERM stay."""
    note, orphan = tmp_path / "pid", tmp_path / "orphan.py"
    orphan.write_text(ORPHAN)
    root = str(Path(__file__).parent.parent)
    starter = processes.start([sys.executable, orphan, note, manner], {"PYTHONPATH": root})
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"), "the child's number")
    child = int(note.read_text())
    assert alive(child)

    starter.signal(signal.SIGKILL)

    wait_until(lambda: not alive(child), "the end of the orphan")


DYING = """
import os, signal, subprocess, sys
from pathlib import Path
from worker.servers import Child

class Untethered(subprocess.Popen):
    def __init__(self, words, *rest, **options):
        if "tether" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(words, *rest, **options)

subprocess.Popen = Untethered
Child(["touch", sys.argv[1]], Path("child.log"))
"""


def test_a_child_whose_starter_dies_before_its_tether_never_begins(
    processes: Processes, tmp_path: Path
) -> None:
    """Else nobody would ever end it."""
    begun, dying = tmp_path / "begun", tmp_path / "dying.py"
    dying.write_text(DYING)
    root = str(Path(__file__).parent.parent)

    starter = processes.start([sys.executable, dying, begun], {"PYTHONPATH": root})

    assert starter.process.wait(20) == -signal.SIGKILL
    wait_until(lambda: str(begun) not in " ".join(command_lines()), "the child's end")
    assert not begun.exists()


def command_lines() -> list[str]:
    """Of all processes that can be read, without the starters of this test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [words for words in found if "dying.py" not in words]


def test_stopping_a_child_ends_its_children_too(tmp_path: Path) -> None:
    """A worker's own processes go with it."""
    note = tmp_path / "pid"
    child = Child(["sh", "-c", f"sleep 300 & echo $! > '{note}'; wait"], tmp_path / "log")
    wait_until(lambda: note.exists() and note.read_text().endswith("\n"), "the grandchild's number")

    child.stop()

    wait_until(lambda: not alive(int(note.read_text())), "the end of the grandchild")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, whose parent is slow to ask, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())
