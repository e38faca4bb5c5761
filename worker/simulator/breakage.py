"""How an answer goes wrong on the wire: resets, cuts, garbage, hanging, slowness."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web


def reset(request: web.BaseRequest) -> web.Response:
    """End the connection with a TCP reset; nothing of the answer goes out."""
    transport = request.transport
    if transport is not None:
        connection = transport.get_extra_info("socket")
        # Linger of 0 seconds makes the kernel send RST instead of FIN.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    return web.Response()  # aiohttp finds the connection gone and writes nothing


def send_raw(request: web.BaseRequest, content: bytes) -> web.Response:
    """Send these bytes in place of an answer and close the connection."""
    transport = request.transport
    if transport is not None:
        transport.write(content)
        transport.close()
    return web.Response()


async def until_gone(request: web.BaseRequest, seconds: float) -> None:
    """Wait until the client has given up, at most so long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while request.transport is not None and loop.time() < end:
        await asyncio.sleep(0.01)


async def dribble(
    request: web.BaseRequest, headers: dict[str, str], seconds: float
) -> web.StreamResponse:
    """A 202 whose body comes space by space over so many seconds."""
    pieces = 10
    answer = web.StreamResponse(status=202, headers={**headers, "Content-Length": str(pieces)})
    await answer.prepare(request)
    for _ in range(pieces):
        await asyncio.sleep(seconds / pieces)
        await answer.write(b" ")
    await answer.write_eof()
    return answer
