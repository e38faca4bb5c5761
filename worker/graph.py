"""Microsoft Graph: one POST of sendMail and what came back. No retries, no redirects.

Over HTTP/1.1 only. The transport is asked directly, without httpx.AsyncClient around it: its
cookies, redirects and authentication are not wanted here, and cost as much as the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import ssl
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from worker.model import MARKER_HEADER, MARKER_NAME, Answer, NotSent, Outcome, Unknown
from worker.policy import BY_CODE, LEASE_NEARLY_OVER, classify, retry_after

#: The extended property by which a sent message is found again. Never change its GUID.
MARKER_PROPERTY = f"String {{d5b1f3f0-5c0e-4a53-9a0f-7d1c6c2e8b4a}} Name {MARKER_NAME}"
#: PidTagListUnsubscribe: Graph refuses this header among internetMessageHeaders.
#: https://learn.microsoft.com/office/client-developer/outlook/mapi/pidtaglistunsubscribe-canonical-property
_LIST_UNSUBSCRIBE = "String 0x1045"

CONNECT_TIMEOUT = 10.0  # seconds, for TCP and TLS together
BODY_TIMEOUT = 5.0  # seconds: the body of an error is for people, the status has decided
BODY_LIMIT = 64 * 1024
LAST_LOOK = 0.1  # seconds, after the request timeout, for what has already arrived
#: Idle connections are closed before common servers do (5 s): a request that goes out on a
#: connection just being closed is lost, and leaves its message in doubt.
KEEPALIVE = 4.0

#: All that a server or a network can make the libraries raise; ValueError: malformed heads.
_NETWORK = (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError, ValueError)
_ADDRESS = re.compile(r"[^\s<>()'\":;,]+@[^\s<>()'\":;,]+")


class Graph:
    """The door to Graph for one event loop; connections are shared by all its lanes."""

    def __init__(
        self,
        url: str,
        *,
        ca_bundle: str | None,
        request_timeout: timedelta,
        connections: int = 256,
    ) -> None:
        """`ca_bundle`: a PEM file that alone is trusted, whatever the environment says."""
        self._users = url.rstrip("/") + "/v1.0/users/"
        self._timeout = request_timeout.total_seconds()
        self._urls: dict[str, httpx.URL] = {}
        self._headers = [
            (b"Host", httpx.URL(url).netloc),
            (b"Content-Type", b"application/json"),
            (b"Accept", b"application/json"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", b"postroom"),
        ]
        trust = (
            ssl.create_default_context(cafile=ca_bundle)
            if ca_bundle
            else httpx.create_ssl_context()
        )

        def session() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=trust, limit=connections, keepalive_timeout=KEEPALIVE
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                response_class=_Response,
            )

        self._transport = AiohttpTransport(verify=trust, proxy=_proxy_for(url), client=session)

    async def send(self, mailbox: str, payload: bytes, token: str, *, deadline: float) -> Outcome:
        """Posts `payload` (see `payload`) to the mailbox's sendMail.

        `deadline`: the instant of `time.monotonic()` from which on the request must not leave;
        it is looked at after the connection is made, just before the first byte. Nothing that
        the network does raises; a cancellation passes through and leaves the message in doubt.
        """
        client_request_id = str(uuid.uuid4())
        started = time.monotonic()
        body = _GuardedBody(payload, deadline)
        request = self._request(mailbox, body, token, client_request_id)
        response: httpx.Response | None = None
        try:
            async with _time_limit(self._timeout):
                response = await self._transport.handle_async_request(request)
        except _NETWORK as error:
            failure: Exception = error
        finally:
            body.shut()
        if response is None:
            return _no_status(body, failure, client_request_id, started)
        content = await _read(response)
        took = timedelta(seconds=time.monotonic() - started)
        return classify(_answer(response, content, client_request_id, took))

    async def close(self) -> None:
        """Closes the connections. What is in flight ends as with a lost connection."""
        await self._transport.aclose()

    def _request(
        self, mailbox: str, body: _GuardedBody, token: str, client_request_id: str
    ) -> httpx.Request:
        url = self._urls.get(mailbox)
        if url is None:
            url = self._urls[mailbox] = httpx.URL(
                f"{self._users}{quote(mailbox, safe='')}/sendMail"
            )
        headers = [
            *self._headers,
            (b"Authorization", b"Bearer " + token.encode()),
            (b"client-request-id", client_request_id.encode()),
            (b"Content-Length", str(body.length).encode()),
        ]
        extensions = {"timeout": {"connect": CONNECT_TIMEOUT}}
        return httpx.Request("POST", url, headers=headers, stream=body, extensions=extensions)


@contextlib.asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout, but an answer that lies in the socket when time is up is still read.

    A process that was paused wakes with both: its timers have run out, and Graph has answered.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(seconds, lambda: limit.reschedule(loop.time() + LAST_LOOK))
        try:
            yield
        finally:
            timer.cancel()


class _Response(aiohttp.ClientResponse):
    """Without the reason phrase: httpx-aiohttp 0.2 raises where it is not UTF-8."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
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

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if time.monotonic() >= self._deadline:
            self.late = True
            raise RuntimeError(LEASE_NEARLY_OVER)
        self.left = True
        yield self._content

    def shut(self) -> None:
        """From now on the body is not given out."""
        self._deadline = -math.inf


def _no_status(
    body: _GuardedBody, failure: Exception, client_request_id: str, started: float
) -> Outcome:
    """Without a status line: surely not sent if nothing left, else doubt."""
    took = timedelta(seconds=time.monotonic() - started)
    if body.late:
        code = LEASE_NEARLY_OVER
        detail = "the lease was nearly over before the request could leave"
        return NotSent(
            Answer(code=code, detail=detail, client_request_id=client_request_id, duration=took)
        )
    # What aiohttp raised is more exact than what httpx-aiohttp makes of it.
    cause = failure.__cause__ if isinstance(failure, httpx.HTTPError) else failure
    answer = Answer(
        code=type(cause or failure).__name__,
        detail=_for_people(str(failure)),
        client_request_id=client_request_id,
        duration=took,
    )
    return Unknown(answer) if body.left else NotSent(answer)


async def _read(response: httpx.Response) -> bytes:
    """The body of an answer other than 2xx, as far as it comes; gives the connection back."""
    content = bytearray()
    # The status has decided; a broken body takes nothing away from it.
    with contextlib.suppress(*_NETWORK):
        async with asyncio.timeout(BODY_TIMEOUT):
            if response.status_code >= 300:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) >= BODY_LIMIT:
                        break
    with contextlib.suppress(*_NETWORK):
        await response.aclose()
    return bytes(content[:BODY_LIMIT])


def _answer(
    response: httpx.Response, content: bytes, client_request_id: str, took: timedelta
) -> Answer:
    headers = response.headers
    errors = list(_errors(content)) if content else []
    request_id = headers.get("request-id") or _first(errors, "request-id")
    detail = _first(errors, "message")
    if 300 <= response.status_code < 400:
        detail = "Graph's address answered with a redirect, which is not followed"
    return Answer(
        status=response.status_code,
        code=_code(errors),
        detail=_for_people(detail) if detail else None,
        request_id=request_id[:100] if request_id else None,
        client_request_id=client_request_id,
        retry_after=retry_after(headers.get("retry-after"), headers.get("date")),
        duration=took,
    )


def _errors(content: bytes) -> Iterator[Mapping[str, Any]]:
    """`error` and its inner errors, outermost first; none where the body is of another shape.

    https://learn.microsoft.com/graph/errors; both spellings of innerError occur.
    """
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    while isinstance(error, dict):
        yield error
        error = error.get("innerError") or error.get("innererror")


def _code(errors: Sequence[Mapping[str, Any]]) -> str | None:
    """The innermost code that we know, else the outermost one."""
    codes = [c for e in errors if isinstance(c := e.get("code"), str) and c]
    known = [c for c in codes if c in BY_CODE]
    code = known[-1] if known else next(iter(codes), None)
    return code[:100] if code else None


def _first(errors: Sequence[Mapping[str, Any]], key: str) -> str | None:
    return next((v for e in errors if isinstance(v := e.get(key), str) and v), None)


def _for_people(text: str) -> str:
    """One line of at most 300 characters, without mail addresses."""
    return _ADDRESS.sub("(address)", " ".join(text[:2000].split()))[:300]


def _proxy_for(url: str) -> httpx.Proxy | None:
    """The proxy that the environment or the system names for this address."""
    address = httpx.URL(url)
    proxy = urllib.request.getproxies().get(address.scheme)
    if not proxy or urllib.request.proxy_bypass(address.netloc.decode("ascii")):
        return None
    return httpx.Proxy(proxy if "://" in proxy else f"http://{proxy}")


# ---- payload ------------------------------------------------------------------------------------


def payload(
    content: Mapping[str, Any], *, message_id: str, subject: str, html: str | None, text: str | None
) -> bytes:
    """The JSON of sendMail for one message, with its marker.

    `content`: `to`, `cc`, `bcc`, `reply_to` (lists of {"address", "name"?}), `from` (one of
    these), `importance`, `headers` (name to value; the marker makes one more of Graph's five),
    `list_unsubscribe`, `save_to_sent_items` (default true). Graph takes one body: HTML wins.
    https://learn.microsoft.com/graph/api/user-sendmail
    """
    body = ("html", html) if html is not None else ("text", text or "")
    properties = [{"id": MARKER_PROPERTY, "value": message_id}]
    if content.get("list_unsubscribe"):
        properties.append({"id": _LIST_UNSUBSCRIBE, "value": content["list_unsubscribe"]})
    headers = {**(content.get("headers") or {}), MARKER_HEADER: message_id}
    sender = content.get("from")
    message = {
        "subject": subject,
        "body": {"contentType": body[0], "content": body[1]},
        "toRecipients": _recipients(content.get("to")),
        "ccRecipients": _recipients(content.get("cc")),
        "bccRecipients": _recipients(content.get("bcc")),
        "replyTo": _recipients(content.get("reply_to")),
        "from": _recipient(sender) if sender else None,
        "importance": content.get("importance"),
        "internetMessageHeaders": [{"name": n, "value": v} for n, v in headers.items()],
        "singleValueExtendedProperties": properties,
    }
    # Graph refuses some empty arrays (https://github.com/microsoftgraph/msgraph-sdk-dotnet/issues/2208).
    document = {
        "message": {k: v for k, v in message.items() if v is not None and v != []},
        "saveToSentItems": bool(content.get("save_to_sent_items", True)),
    }
    # A lone surrogate has no UTF-8; a question mark must not stop a lane.
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _recipients(of: Sequence[Mapping[str, str]] | None) -> list[dict[str, Any]]:
    return [_recipient(one) for one in of or ()]


def _recipient(one: Mapping[str, str]) -> dict[str, Any]:
    address = {"address": one["address"]}
    if one.get("name"):
        address["name"] = one["name"]
    return {"emailAddress": address}
