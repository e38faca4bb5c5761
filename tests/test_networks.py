"""The ways through a company's network: Redis over TLS, Microsoft through a proxy."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import redis
import trustme

from tests.test_spine import Service, service, simulator_options

__all__ = ["service", "simulator_options"]

Onward = Callable[[socket.socket], socket.socket]
pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


class Tunnel:
    """A server on a loopback port that joins each connection to another; a thread for each."""

    def __init__(self, onward: Onward, trust: ssl.SSLContext | None = None) -> None:
        """`onward` makes the other connection; it may talk to the caller first."""
        tunnel = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    tunnel._serve(self.request)

        self._onward = onward
        self._trust = trust
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            caller = self._trust.wrap_socket(raw, server_side=True) if self._trust else raw
            stack.enter_context(caller)
            upstream = stack.enter_context(self._onward(caller))
            back = threading.Thread(target=pass_on, args=(upstream, caller), daemon=True)
            back.start()
            pass_on(caller, upstream)
            back.join()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """One way, until it ends; then the other end is told."""
    with contextlib.suppress(OSError):
        while piece := one.recv(65536):
            other.sendall(piece)
    for end in (one, other):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls_redis(redis_server: str, tmp_path: Path) -> Iterator[str]:
    """The session's Redis behind TLS, with a certificate of a CA of its own."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "redis-ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    there = urlsplit(redis_server)

    def onward(_caller: socket.socket) -> socket.socket:
        if there.hostname:
            return socket.create_connection((there.hostname, there.port))
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(unquote(there.path))
        return upstream

    tunnel = Tunnel(onward, context)
    yield f"rediss://127.0.0.1:{tunnel.port}/0?ssl_ca_certs={tmp_path}/redis-ca.pem"
    tunnel.close()


class TestRedisOverTls:
    """`rediss://` for everything: the application, the workers, Celery itself."""

    @pytest.fixture
    def redis_url(self, tls_redis: str) -> Iterator[str]:
        with redis.Redis.from_url(tls_redis) as client:
            client.flushdb()
            yield tls_redis
            client.flushdb()

    def test_a_batch_goes_its_way(self, service: Service) -> None:
        """Enqueued, ingested, delivered and finished, every byte to Redis encrypted."""
        service.worker("one")
        assert service.wait_for_end(service.enqueue(20))["sent"] == 20

    def test_a_certificate_that_nobody_trusts_is_refused(
        self, service: Service, tls_redis: str
    ) -> None:
        """Neither our clients nor Celery's talk to it."""
        from worker.broker import make_app

        untrusted = tls_redis.partition("?")[0]
        with redis.Redis.from_url(untrusted) as client, pytest.raises(redis.ConnectionError):
            client.ping()
        connection: Any = make_app(untrusted).connection_for_write()
        with pytest.raises(Exception, match=r"(?i)certificate"):
            connection.default_channel.client.ping()
        connection.release()


def test_microsoft_is_reached_through_the_proxy_of_the_environment(service: Service) -> None:
    """HTTPS_PROXY, for the token as for the mails."""
    asked: list[str] = []

    def onward(caller: socket.socket) -> socket.socket:
        head = caller.recv(65536).decode()
        asked.append(head.split()[1])
        host, _, port = asked[-1].partition(":")
        upstream = socket.create_connection((host, int(port)))
        caller.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return upstream

    proxy = Tunnel(onward)
    service.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{proxy.port}"
    service.environment["NO_PROXY"] = ""
    worker = service.worker("one")
    assert service.wait_for_end(service.enqueue(20))["sent"] == 20
    there = urlsplit(service.simulator.url).netloc
    assert set(asked) == {there}
    assert len(asked) >= 2, "one tunnel at least for the token, one for the mails"
    worker.stop()
    proxy.close()
