"""The proxy before the servers: it must be the network that is bad, never the proxy."""

from __future__ import annotations

import hashlib
import os
import socket
import socketserver
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy

from tests.proxy import Proxy, before_postgres, before_redis, before_simulator
from tests.support import wait_until
from worker.servers import PostgresServer, RedisServer
from worker.simulator import Simulator


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets; counts who came and who went, and how."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, EchoServer)
        server.came += 1
        try:
            while piece := self.request.recv(65536):
                server.heard += len(piece)
                self.request.sendall(piece)
            server.went.append("closed")
        except ConnectionResetError:
            server.went.append("reset")


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.came, self.heard, self.went = 0, 0, list[str]()

    @property
    def place(self) -> tuple[str, int]:
        return ("127.0.0.1", int(self.server_address[1]))


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


@pytest.fixture
def line(echo: EchoServer) -> Iterator[Proxy]:
    with Proxy(echo.place) as proxy:
        yield proxy


def call(line: Proxy, seconds: float = 10) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=seconds)


def said(caller: socket.socket, count: int) -> bytes:
    """Exactly so many bytes of the answer."""
    heard = b""
    while len(heard) < count:
        piece = caller.recv(65536)
        assert piece, "the line ended early"
        heard += piece
    return heard


def test_bytes_pass_unchanged_in_both_directions(line: Proxy) -> None:
    """Megabytes at once, more than any buffer holds: none is lost, none changes its place."""
    sent = os.urandom(8 * 1024 * 1024)
    with call(line, 60) as caller:
        threading.Thread(target=caller.sendall, args=[sent]).start()

        assert hashlib.sha256(said(caller, len(sent))).digest() == hashlib.sha256(sent).digest()


def test_the_end_of_one_side_is_told_to_the_other(line: Proxy, echo: EchoServer) -> None:
    """A client that closes in order must not look like a crash."""
    with call(line) as caller:
        caller.sendall(b"hello")
        assert said(caller, 5) == b"hello"

    wait_until(lambda: echo.went == ["closed"], "the server hears of the end")
    wait_until(lambda: line.connections == 0, "nothing is kept")


def test_a_cut_resets_what_stands_and_what_comes(line: Proxy, echo: EchoServer) -> None:
    """Both sides get a reset, as from a router that lost its memory; healed, new calls pass."""
    with call(line) as caller:
        caller.sendall(b"hello")
        said(caller, 5)

        line.cut()
        with pytest.raises(ConnectionResetError):
            caller.recv(1)
    with pytest.raises(ConnectionResetError), call(line) as caller:
        caller.recv(1)
    wait_until(lambda: echo.went == ["reset"], "the server is reset too")
    assert echo.came == 1

    line.heal()
    with call(line) as caller:
        caller.sendall(b"again")
        assert said(caller, 5) == b"again"


def test_a_half_open_line_swallows_and_tells_nobody(line: Proxy, echo: EchoServer) -> None:
    """The client waits in vain, the server never hears that it gave up, then or after the heal."""
    with call(line) as caller:
        caller.sendall(b"hello")
        said(caller, 5)

        line.half_open()
        caller.sendall(b"lost")
        caller.settimeout(0.2)
        with pytest.raises(TimeoutError):
            caller.recv(1)
        with call(line, 0.2) as fresh, pytest.raises(TimeoutError):
            fresh.recv(1)
        line.heal()
        caller.sendall(b"lost")
        with pytest.raises(TimeoutError):
            caller.recv(1)
        with call(line) as fresh:
            fresh.sendall(b"again")
            assert said(fresh, 5) == b"again"

    wait_until(lambda: echo.went == ["closed"], "the new call ends in order")
    assert (echo.came, echo.heard) == (2, 10)


def test_a_delay_keeps_every_piece_back_and_their_order(line: Proxy) -> None:
    """A slow line is slow in both directions, and nothing overtakes."""
    line.delay = 0.1
    with call(line) as caller:
        began = time.monotonic()
        for n in range(10):
            caller.sendall(b"%d" % n)
        assert said(caller, 10) == b"0123456789"
        assert time.monotonic() - began >= 0.2

        caller.sendall(b"x")
        line.delay = 0.0
        caller.sendall(b"y")
        assert said(caller, 2) == b"xy"


def test_a_server_that_is_down_looks_down(tmp_path: Path) -> None:
    """The proxy listens, its server does not: the caller is reset, and is not left to wait."""
    with Proxy(tmp_path / "nobody") as line:
        with pytest.raises(ConnectionResetError), call(line) as caller:
            caller.recv(1)
        assert line.connections == 0


def test_redis_postgresql_and_graph_work_through_it(
    own_redis: RedisServer, own_postgres: PostgresServer, simulator: Simulator
) -> None:
    """The three servers it is made for, two of them behind Unix sockets; a restart included."""
    with (
        before_redis(own_redis) as to_redis,
        before_postgres(own_postgres) as to_sql,
        before_simulator(simulator) as to_graph,
    ):
        with redis.Redis(port=to_redis.port, socket_timeout=5) as client:
            client.set("key", "value" * 10_000)
            to_redis.cut()
            with pytest.raises(redis.ConnectionError):
                client.get("key")
            own_redis.kill()
            to_redis.heal()
            own_redis.start()
            assert client.get("key") == b"value" * 10_000

        address = f"postgresql://postgres@127.0.0.1:{to_sql.port}/postgres"
        with psycopg.connect(address) as connection:
            to_sql.cut()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select 1")
        to_sql.heal()
        engine = sqlalchemy.create_engine(address.replace("://", "+psycopg://"))
        with engine.connect() as sql:
            assert sql.scalar(sqlalchemy.text("select count(*) from generate_series(1, 9999)"))
        engine.dispose()

        trust = ssl.create_default_context(cafile=simulator.ca_bundle)
        place = f"https://127.0.0.1:{to_graph.port}/_simulator/stats"
        with urllib.request.urlopen(place, context=trust, timeout=10) as answer:
            assert answer.status == 200
