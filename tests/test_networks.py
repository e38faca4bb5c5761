"""The ways through a company's network: Redis over TLS, Microsoft through a proxy."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import redis
import trustme

from tests.test_spine import Service, service, simulator_options

__all__ = ["service", "simulator_options"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


class Tunnel:
    """A server on a loopback port, in a thread of its own."""

    def __init__(self, handler: Handler, trust: ssl.SSLContext | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(handler, "127.0.0.1", 0, ssl=trust)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.port = int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


async def joined(
    one: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    other: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Passes on both ways until both have ended."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    await asyncio.gather(pass_on(one[0], other[1]), pass_on(other[0], one[1]))


@pytest.fixture
def tls_redis(redis_server: str, tmp_path: Path) -> Iterator[str]:
    """The session's Redis behind TLS, with a certificate of a CA of its own."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "redis-ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    there = urlsplit(redis_server)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if there.hostname:
            upstream = await asyncio.open_connection(there.hostname, there.port)
        else:
            upstream = await asyncio.open_unix_connection(unquote(there.path))
        await joined((reader, writer), upstream)

    tunnel = Tunnel(handle, context)
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
        with (
            make_app(untrusted).connection_for_write() as connection,
            pytest.raises(Exception, match=r"(?i)certificate"),
        ):
            connection.default_channel.client.ping()


def test_microsoft_is_reached_through_the_proxy_of_the_environment(service: Service) -> None:
    """HTTPS_PROXY, for the token as for the mails; without the proxy nothing is sent."""
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split()[1])
        host, _, port = head.split()[1].partition(":")
        upstream = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await joined((reader, writer), upstream)

    proxy = Tunnel(handle)
    service.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{proxy.port}"
    service.environment["NO_PROXY"] = ""
    worker = service.worker("one")
    assert service.wait_for_end(service.enqueue(20))["sent"] == 20
    there = urlsplit(service.simulator.url).netloc
    assert set(asked) == {there}
    assert len(asked) >= 2, "one tunnel at least for the token, one for the mails"
    worker.stop()
    proxy.close()

    service.simulator.revoke_tokens()
    late = service.enqueue(1)
    service.worker("two")
    service.client.status(late)
    assert service.counts(late)["sent"] == 0
