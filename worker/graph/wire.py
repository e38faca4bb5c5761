"""One request to Graph and what came back. No retries, no redirects.

Over HTTP/1.1 only, by aiohttp: httpx around it cost a tenth of a message's processor time, and told
less of what broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import ssl
import time
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter

from worker.graph.answers import answer_of, for_people
from worker.graph.heads import Connection, make_connector
from worker.model import Answer, NotSent, Outcome, Unknown
from worker.policy import LEASE_NEARLY_OVER, classify

CONNECT_TIMEOUT = 10.0  # seconds, for TCP and TLS together
BODY_TIMEOUT = 5.0  # seconds, for a body after its head: the status has decided most
BODY_LIMIT = 64 * 1024
LAST_LOOK = 0.5  # seconds, after the request timeout, for what has already arrived
#: Idle connections are closed before common servers do (5 s): a request that goes out on a
#: connection just being closed is lost, and leaves its message in doubt.
KEEPALIVE = 4.0

#: All that a server or a network can make the libraries raise; ValueError: malformed heads.
_NETWORK = (aiohttp.ClientError, OSError, ValueError)

_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "postroom"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request brought: its answer for the audit, and the body where it was wanted."""

    answer: Answer
    left: bool = True  #: whether a byte of the request may have gone out
    content: bytes = b""

    @property
    def outcome(self) -> Outcome:
        """What the answer means for a message that this request was to send."""
        if self.answer.status is not None:
            return classify(self.answer)
        return Unknown(self.answer) if self.left else NotSent(self.answer)


class Wire:
    """Connections to Graph for one event loop, shared by all its lanes."""

    def __init__(
        self, url: str, *, ca_bundle: str | None, request_timeout: timedelta, connections: int
    ) -> None:
        self._timeout = request_timeout.total_seconds()
        self._trust = (
            ssl.create_default_context(cafile=ca_bundle)
            if ca_bundle
            else httpx.create_ssl_context()
        )
        self._proxy = _proxy_for(url)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        """Connections belong to the loop that runs, so the first request makes them."""
        if self._session is None:
            connector = make_connector(
                ssl=self._trust, limit=self._connections, keepalive_timeout=KEEPALIVE
            )
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT),
                auto_decompress=False, proxy=self._proxy,
            )  # fmt: skip
        return self._session

    async def ask(
        self, method: str, url: str, *, body: bytes, deadline: float,
        token: str | None = None, headers: Mapping[str, str] | None = None, wants: int = 0,
    ) -> Reply:  # fmt: skip
        """One request with a body (which may be empty), sent at most once.

        `deadline`: the instant of `time.monotonic()` from which on the request must not leave; it
        is looked at after the connection is made, just before the first byte. `token`: the bearer
        token; without one, the address authenticates by itself. `wants`: so many bytes of a good
        answer's body are read. Nothing that the network does raises; a cancellation passes
        through, and leaves what the request was to do in doubt.
        """
        client_request_id = _new_id()
        started = time.monotonic()
        guarded = _GuardedBody(body, deadline)
        every = {**(headers or {}), "client-request-id": client_request_id}
        if not body:  # then there is nothing that a type would be of
            every.pop("Content-Type", None)
        if token is not None:
            every["Authorization"] = f"Bearer {token}"
        response: aiohttp.ClientResponse | None = None
        failure: Exception | None = None
        try:
            async with _TimeLimit(self._timeout):
                response = await self._open().request(
                    method, url, headers=every, data=guarded, allow_redirects=False,
                    skip_auto_headers=() if body else ("Content-Type",),
                )  # fmt: skip
        except _NETWORK as error:
            failure = error
        finally:
            guarded.shut()
        if response is None:
            return _no_status(guarded, failure, client_request_id, started)
        content = await _read(response, wants)
        took = timedelta(seconds=time.monotonic() - started)
        answer = answer_of(response, content, client_request_id, took)
        return Reply(answer, content=content)

    async def close(self) -> None:
        """Closes the connections. What is in flight ends as with a lost connection."""
        if self._session is not None:
            await self._session.close()


class _TimeLimit:
    """As asyncio.timeout, but an answer that lies in the socket when time is up is still read.

    A process that was paused wakes with both: its timers have run out, and Graph has answered.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._timer = self._loop.call_later(seconds, self._is_up)

    def _is_up(self) -> None:
        self._limit.reschedule(self._loop.time() + LAST_LOOK)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(*error)


class _GuardedBody(aiohttp.Payload):
    """The request's body, and the last word on whether the request leaves.

    aiohttp asks for the body once it is connected, and holds the head back until it has the
    first of it. So `left` says exactly whether a byte of the request went out. After a lost
    connection it would repeat a GET, PUT or DELETE by itself, and ask for the body anew.
    """

    def __init__(self, content: bytes, deadline: float) -> None:
        super().__init__(content)
        self._size = len(content)
        self._deadline = deadline
        self.left = False
        self.late = False
        self.connection: Connection | None = None  #: that the request went out on

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Lets the request go, once, and unless it is too late."""
        if self.left:
            raise RuntimeError("the connection was lost")
        if time.monotonic() >= self._deadline:
            self.late = True
            raise RuntimeError(LEASE_NEARLY_OVER)
        self.left = True
        if isinstance(writer, StreamWriter) and isinstance(writer.protocol, Connection):
            self.connection = writer.protocol
        await writer.write(self._value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As a text; aiohttp's own bodies have this."""
        return str(self._value, encoding, errors)

    def shut(self) -> None:
        """From now on the body is not given out."""
        self._deadline = -math.inf


def _new_id() -> str:
    """A UUID to find a request by. It may be guessed: uuid4 would ask the kernel each time."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def _no_status(
    body: _GuardedBody, failure: Exception | None, client_request_id: str, started: float
) -> Reply:
    """No whole head came, or none at all.

    A status line that did come is evidence, if it says that the request was accepted. A broken
    head of any other kind proves nothing: what is refused in it may be cut short of its code.
    """
    took = timedelta(seconds=time.monotonic() - started)
    status = None if body.connection is None else body.connection.accepted()
    if status:
        code, detail = None, "the answer broke off after its status line"
    elif body.late:
        code = LEASE_NEARLY_OVER
        detail = "the lease was nearly over before the request could leave"
    else:
        code, detail = type(failure).__name__, for_people(str(failure))
    answer = Answer(status=status, code=code, detail=detail, client_request_id=client_request_id,
                    duration=took)  # fmt: skip
    return Reply(answer, left=body.left)


async def _read(response: aiohttp.ClientResponse, wants: int) -> bytes:
    """The body of an answer, as far as it is wanted and comes; gives the connection back."""
    content = bytearray()
    if most := wants if response.status < 300 else BODY_LIMIT:
        # The status has decided; a broken body takes nothing away from it.
        with contextlib.suppress(*_NETWORK):
            async with asyncio.timeout(BODY_TIMEOUT):
                while len(content) < most and (chunk := await response.content.readany()):
                    content += chunk
    response.release()
    return bytes(content[:most])


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment or the system names for this address."""
    address = urlsplit(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if not proxy or urllib.request.proxy_bypass(address.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
