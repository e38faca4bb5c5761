"""One request to Graph and what came back. No retries, no redirects.

Over HTTP/1.1 only. The transport is asked directly, without httpx.AsyncClient around it: its
cookies, redirects and authentication are not wanted here, and cost as much as the request.
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
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from worker.graph.answers import answer_of, for_people
from worker.graph.heads import Connection, make_connector
from worker.model import Answer, NotSent, Outcome, Unknown
from worker.policy import LEASE_NEARLY_OVER, classify

CONNECT_TIMEOUT = 10.0  # seconds, for TCP and TLS together
BODY_TIMEOUT = 5.0  # seconds: the body of an error is for people, the status has decided
BODY_LIMIT = 64 * 1024
LAST_LOOK = 0.5  # seconds, after the request timeout, for what has already arrived
#: Idle connections are closed before common servers do (5 s): a request that goes out on a
#: connection just being closed is lost, and leaves its message in doubt.
KEEPALIVE = 4.0

#: All that a server or a network can make the libraries raise; ValueError: malformed heads.
_NETWORK = (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError, ValueError)

_HEADERS = (
    (b"Accept", b"application/json"),
    (b"Accept-Encoding", b"identity"),
    (b"User-Agent", b"postroom"),
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request brought: its answer for the audit, and the body where it was wanted."""

    answer: Answer
    left: bool = True  #: whether a byte of the request may have gone out
    content: bytes = b""
    location: str | None = None

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
        trust = (
            ssl.create_default_context(cafile=ca_bundle)
            if ca_bundle
            else httpx.create_ssl_context()
        )

        def session() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                connector=make_connector(ssl=trust, limit=connections, keepalive_timeout=KEEPALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),
                response_class=_Response,
            )

        self._transport = AiohttpTransport(verify=trust, proxy=_proxy_for(url), client=session)

    async def ask(
        self, method: str, url: httpx.URL, *, body: bytes, deadline: float,
        token: str | None = None, headers: Sequence[tuple[bytes, bytes]] = (), wants: int = 0,
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
        every = [*headers, (b"client-request-id", client_request_id.encode())]
        if token is not None:
            every.append((b"Authorization", b"Bearer " + token.encode()))
        request = _request(method, url, every, guarded)
        response: httpx.Response | None = None
        failure: Exception | None = None
        asked = _asked.set(guarded)
        try:
            async with _TimeLimit(self._timeout):
                response = await self._transport.handle_async_request(request)
        except _NETWORK as error:
            failure = error
        finally:
            _asked.reset(asked)
            guarded.shut()
        if response is None:
            return _no_status(guarded, failure, client_request_id, started)
        content = await _read(response, wants)
        took = timedelta(seconds=time.monotonic() - started)
        answer = answer_of(response, content, client_request_id, took)
        return Reply(answer, content=content, location=response.headers.get("location"))

    async def close(self) -> None:
        """Closes the connections. What is in flight ends as with a lost connection."""
        await self._transport.aclose()


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


class _Response(aiohttp.ClientResponse):
    """Without the reason phrase: httpx-aiohttp 0.2 raises where it is not UTF-8."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        body = _asked.get(None)
        if body is not None and isinstance(connection.protocol, Connection):
            body.connection = connection.protocol
        await super().start(connection)
        self.reason = None
        return self


class _GuardedBody(httpx.AsyncByteStream):
    """The request's body, and the last word on whether the request leaves.

    aiohttp asks for the body once it is connected, and holds the head back until it has the
    first of it. So `left` says exactly whether a byte of the request went out, which the
    exceptions do not: httpx-aiohttp 0.2 reports a server that hung up as ConnectTimeout.
    """

    def __init__(self, content: bytes, deadline: float) -> None:
        self._content = content
        self._deadline = deadline
        self.length = len(content)
        self.left = False
        self.late = False
        self.connection: Connection | None = None  #: that the request went out on

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if time.monotonic() >= self._deadline:
            self.late = True
            raise RuntimeError(LEASE_NEARLY_OVER)
        self.left = True
        yield self._content

    def shut(self) -> None:
        """From now on the body is not given out."""
        self._deadline = -math.inf


def _new_id() -> str:
    """A UUID to find a request by. It may be guessed: uuid4 would ask the kernel each time."""
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


#: The body of the request that this task is about: how its answer finds it.
_asked: ContextVar[_GuardedBody] = ContextVar("asked")


class _Request(httpx.Request):
    """Says at once that its content is a stream: httpx-aiohttp finds out by an exception."""

    @property
    def content(self) -> Any:
        return self.stream


def _request(
    method: str, url: httpx.URL, headers: Sequence[tuple[bytes, bytes]], body: _GuardedBody
) -> httpx.Request:
    every = [
        (b"Host", url.netloc),
        *_HEADERS,
        *headers,
        (b"Content-Length", str(body.length).encode()),
    ]
    extensions = {"timeout": {"connect": CONNECT_TIMEOUT}}
    request = _Request(method, url, headers=every, stream=body, extensions=extensions)
    request.headers.encoding = "utf-8"  # else httpx tries all headers to find it out
    return request


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
        # What aiohttp raised is more exact than what httpx-aiohttp makes of it.
        cause = failure.__cause__ if isinstance(failure, httpx.HTTPError) else failure
        code, detail = type(cause or failure).__name__, for_people(str(failure))
    answer = Answer(status=status, code=code, detail=detail, client_request_id=client_request_id,
                    duration=took)  # fmt: skip
    return Reply(answer, left=body.left)


async def _read(response: httpx.Response, wants: int) -> bytes:
    """The body of an answer, as far as it is wanted and comes; gives the connection back."""
    content = bytearray()
    most = wants if response.status_code < 300 else BODY_LIMIT
    # The status has decided; a broken body takes nothing away from it.
    with contextlib.suppress(*_NETWORK):
        async with asyncio.timeout(BODY_TIMEOUT):
            if most:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) >= most:
                        break
    with contextlib.suppress(*_NETWORK):
        await response.aclose()
    return bytes(content[:most])


def _proxy_for(url: str) -> httpx.Proxy | None:
    """The proxy that the environment or the system names for this address."""
    address = httpx.URL(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if not proxy or urllib.request.proxy_bypass(address.netloc.decode("ascii")):
        return None
    return httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")
