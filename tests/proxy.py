"""A small TCP proxy that stands before a real server and plays a bad network on the way to it.

with Proxy(("127.0.0.1", 5432)) as line:        # or a Unix socket's path
    url = f"postgresql+psycopg://postgres@127.0.0.1:{line.port}/postgres"
    line.cut()          # every connection ends by a reset, and new ones do, until
    line.heal()
    line.half_open()    # what either side sends is swallowed, and neither is told
    line.delay = 0.2    # seconds that each piece is kept back
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from urllib.parse import unquote, urlsplit

from worker.servers import PostgresServer, RedisServer
from worker.servers.postgres import SOCKET

if TYPE_CHECKING:
    from worker.simulator import Simulator

T = TypeVar("T")

#: Linger of 0 seconds makes the kernel send RST instead of FIN.
_RESET = struct.pack("ii", 1, 0)


def before_redis(server: RedisServer | str) -> Proxy:
    """A proxy before a Redis, or its address; database 0 is `redis://127.0.0.1:{port}/0`."""
    address = urlsplit(server if isinstance(server, str) else server.url)
    if address.port:
        return Proxy((address.hostname or "127.0.0.1", address.port))
    return Proxy(unquote(address.path))


def before_postgres(server: PostgresServer) -> Proxy:
    """A proxy before a PostgreSQL of our own."""
    return Proxy(server.directory / SOCKET)


def before_simulator(simulator: Simulator) -> Proxy:
    """A proxy before the simulator, whose certificate holds for any port."""
    return Proxy(("127.0.0.1", urlsplit(simulator.url).port or 0))


class Proxy:
    """Listens on a loopback port of its own and passes all on to `upstream`.

    `upstream`: (host, port), or the path of a Unix socket. It runs on a thread of its own; all
    methods may be called from any thread, and return when what they ask for is done.
    """

    def __init__(self, upstream: tuple[str, int] | Path | str) -> None:
        self._upstream = upstream
        self.delay = 0.0  #: seconds that each piece is kept back, in both directions
        self._mode = "pass"
        self._pairs: set[_Pair] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def cut(self) -> None:
        """Reset every connection, and from now on every new one."""
        self._set("cut")

    def half_open(self) -> None:
        """Swallow what either side sends, on every connection and on new ones; tell neither.

        Connections that were struck stay so: what was swallowed can never be made up for.
        """
        self._set("half_open")

    def heal(self) -> None:
        """Let new connections through, without delay."""
        self.delay = 0.0
        self._set("pass")

    @property
    def connections(self) -> int:
        """How many connections stand, the swallowed ones too."""
        return len(self._pairs)

    def close(self) -> None:
        """End all; twice does no harm."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._server.close)
        self._set("cut")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _set(self, mode: str) -> None:
        self._call(self._strike(mode))

    async def _strike(self, mode: str) -> None:
        self._mode = mode
        for pair in list(self._pairs):
            if mode == "cut":
                pair.reset()
            elif mode == "half_open":
                pair.swallow = True

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> asyncio.Server:
        return await self._loop.create_server(self._arrived, "127.0.0.1", 0, backlog=512)

    def _arrived(self) -> _End:
        pair = _Pair(self._pairs, lambda: self.delay)
        if self._mode == "pass":
            pair.connecting = self._loop.create_task(self._connect(pair))
        pair.swallow = self._mode == "half_open"
        pair.refused = self._mode == "cut"
        return pair.client

    async def _connect(self, pair: _Pair) -> None:
        """Open the other half; where it cannot be opened, the client is reset, as by a host
        whose server is down.
        """
        try:
            if isinstance(self._upstream, tuple):
                await self._loop.create_connection(lambda: pair.server, *self._upstream)
            else:
                await self._loop.create_unix_connection(lambda: pair.server, str(self._upstream))
        except OSError:
            pair.reset()


class _Pair:
    """The two ends of one connection through the proxy."""

    def __init__(self, pairs: set[_Pair], delay: Callable[[], float]) -> None:
        self._pairs = pairs
        self.swallow = False
        self.refused = False
        self.connecting: asyncio.Task[None] | None = None
        self.client, self.server = _End(self, delay), _End(self, delay)
        self.client.other, self.server.other = self.server, self.client
        pairs.add(self)

    def reset(self) -> None:
        for end in (self.client, self.server):
            end.reset()
        self.forget()

    def forget(self) -> None:
        self._pairs.discard(self)
        if self.connecting is not None and not self.connecting.done():
            self.connecting.cancel()


class _End(asyncio.Protocol):
    """One end: what it receives goes out at the other."""

    other: _End

    def __init__(self, pair: _Pair, delay: Callable[[], float]) -> None:
        self._pair = pair
        self._delay = delay
        self._transport: asyncio.Transport | None = None
        self._closed = False
        # What is on its way out at this end, and when it is due; None: the end.
        self._kept: deque[tuple[float, bytes | None]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        raw = self._transport.get_extra_info("socket")
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._pair.refused or self._closed:
            self._pair.reset()
            self.reset()
        elif self is self._pair.server:
            self._flush()

    def data_received(self, data: bytes) -> None:
        if not self._pair.swallow:
            self._pass_on(data)

    def connection_lost(self, error: Exception | None) -> None:
        """One side is gone; the other hears it in the same way, unless the line is dead."""
        self._closed = True
        if self._pair.swallow:
            if self.other._closed or self.other._transport is None:
                self._pair.forget()
        elif error is not None:
            self._pair.reset()
        else:
            self._pass_on(None)
            if self.other._closed:
                self._pair.forget()

    def pause_writing(self) -> None:
        """This end takes no more: the other must not read on."""
        if self.other._transport is not None:
            self.other._transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other._transport is not None:
            self.other._transport.resume_reading()

    def reset(self) -> None:
        self._closed = True
        if self._transport is not None and not self._transport.is_closing():
            raw = self._transport.get_extra_info("socket")
            if raw.family != socket.AF_UNIX:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def _pass_on(self, piece: bytes | None) -> None:
        loop, kept = asyncio.get_running_loop(), self.other._kept
        due = loop.time() + self._delay()
        if kept:
            due = max(due, kept[-1][0])
        kept.append((due, piece))
        loop.call_at(due, self.other._flush)

    def _flush(self) -> None:
        """Send out what was kept back long enough, oldest first."""
        if self._transport is None or self._pair.swallow:
            return
        # The loop calls a little early, by the resolution of its clock.
        now = asyncio.get_running_loop().time() + 0.001
        while self._kept and self._kept[0][0] <= now and not self._transport.is_closing():
            _, piece = self._kept.popleft()
            if piece is None:
                self._transport.close()
            else:
                self._transport.write(piece)
