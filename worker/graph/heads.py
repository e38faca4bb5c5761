"""The head of an answer as it comes, for the day that it breaks off.

aiohttp gives an answer out when its head is whole. Graph says 202 in the first line of it, and
whatever goes wrong after that line takes nothing away from the word: the message is sent.
"""

from __future__ import annotations

import functools
import re
from asyncio import sslproto
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

#: What a TLS connection reads into, in bytes. asyncio sets 256 kB aside for each, a worker has
#: hundreds of them, and what Graph says to a send is short; a longer answer takes more readings.
_READ_INTO = 4 * 1024
#: So much of an answer is kept; interim heads (1xx) come before the one that counts.
_KEPT = 4096
_ACCEPTED = re.compile(rb"(?:HTTP/1\.[01] 1\d\d[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n)*"
                       rb"HTTP/1\.[01] (202)(?: [^\r\n]*)?\r\n")  # fmt: skip


class Connection(ResponseHandler):
    """One connection: aiohttp's, which keeps the beginning of the present request's answer."""

    def __init__(self, **given: Any) -> None:
        self._head = b""
        super().__init__(**given)

    def set_response_params(self, **given: Any) -> None:
        """A request is about to go out on this connection."""
        self._head = b""
        super().set_response_params(**given)

    def data_received(self, data: bytes) -> None:
        """Some of the answer came."""
        if len(self._head) < _KEPT:
            self._head += data[:_KEPT]
        super().data_received(data)

    def is_connected(self) -> bool:
        """Whether a request may go out on it: not where an answer came that nobody asked for.

        aiohttp would take it for the answer to the next request.
        """
        return super().is_connected() and not self._buffer and not self._tail

    def accepted(self) -> int | None:
        """202 if the whole status line of the answer has come and says so, else None."""
        found = _ACCEPTED.match(self._head)
        return int(found[1]) if found else None


def make_connector(**given: Any) -> aiohttp.TCPConnector:
    """A connector whose connections keep heads and are small.

    aiohttp and asyncio have no public places for this. Should the private ones move, an answer that
    breaks off is doubt again, which is safe, and a test says so; connections are large again.
    """
    sslproto.SSLProtocol.max_size = _READ_INTO
    connector: Any = aiohttp.TCPConnector(**given)
    connector._factory = functools.partial(Connection, loop=connector._loop)
    return connector  # type: ignore[no-any-return]
