"""Who gets an answer: what the proxy says to a client, and how aiohttp's server says it.

`front/fast_path.py` has the other implementation, for the plain calls that are nearly all of them.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from runtime.router.call.errors import CallError
from runtime.router.call.request import Caller
from runtime.router.callers.memory import Memory
from runtime.router.proxy.upstream import Headers, Reply

MAX_ANSWER_BYTES = 64 * 2**20  # that `Collected` keeps

# Whoever serves a request by aiohttp finds there:
CALLER = web.RequestKey("caller", Caller)
REQUEST_ID = web.RequestKey("request_id", str)


class Client(Protocol):
    """One caller, for one answer. Writing raises ConnectionError once it has hung up."""

    @property
    def begun(self) -> bool:
        """The headers have gone out."""

    async def begin(self, status: int, headers: Headers) -> None:
        """Send status and headers (those of this hop are the client's own affair)."""

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; waits while the caller does not read."""

    async def relay(self, reply: Reply, first: bytes) -> None:
        """Send `first` and the rest of `reply`. Raises UpstreamError where it breaks off."""

    def break_off(self) -> None:
        """End the connection so that the answer cannot be taken for a whole one."""


class Collected:
    """Keeps the whole answer, for a call of the router's own: `close` it in the end."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._taken = 0
        self.refused: CallError | None = None  # there was no memory for all of it
        self.begun = False
        self.whole = True
        self.too_large = False
        self.status = 0
        self.headers: Headers = []
        self.body = bytearray()

    async def begin(self, status: int, headers: Headers) -> None:
        """Keep the answer's status and headers."""
        self.begun = True
        self.status = status
        self.headers = headers

    async def write(self, data: bytes) -> None:
        """Keep more of the body. Raises ConnectionResetError where it may not grow."""
        if len(self.body) + len(data) > MAX_ANSWER_BYTES:
            self.too_large = True
            raise ConnectionResetError("the answer is too large to be kept")
        try:
            self._memory.take(len(data))
        except CallError as error:
            self.refused = error
            raise ConnectionResetError("there is no memory for the answer") from None
        self._taken += len(data)
        self.body += data

    def close(self) -> None:
        """Give the memory of the answer back."""
        self._memory.give(self._taken)
        self._taken = 0

    async def relay(self, reply: Reply, first: bytes) -> None:
        """Keep `first` and the rest of an engine's reply."""
        data = first
        while data:
            await self.write(data)
            data = await reply.read()

    def break_off(self) -> None:
        """Note that the answer ended early."""
        self.whole = False


class AiohttpClient:
    """A caller whom aiohttp's server serves."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse | None = None

    @property
    def begun(self) -> bool:
        """Whether the caller has been told a status."""
        return self.response is not None

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the status and the headers."""
        shown: CIMultiDict[str] = CIMultiDict(
            (n.decode("latin-1"), v.decode("utf-8", "replace")) for n, v in headers
        )
        self.response = web.StreamResponse(status=status, headers=shown)
        if self._request.version < HttpVersion11 and self.response.content_length is None:
            self.response.force_close()  # nothing else says where the answer ends
        await self.response.prepare(self._request)

    async def write(self, data: bytes) -> None:
        """Send more of the body."""
        assert self.response is not None
        await self.response.write(data)

    async def relay(self, reply: Reply, first: bytes) -> None:
        """Send `first` and the rest of an engine's reply."""
        data = first
        while data:
            await self.write(data)
            data = await reply.read()

    def break_off(self) -> None:
        """Close the connection in the middle of the answer."""
        if self.response is not None:
            cut_off(self._request, self.response)


def cut_off(request: web.Request, response: web.StreamResponse) -> None:
    """End the connection so that `response`, which has begun, can't be taken for a whole one."""
    transport = request.transport
    if transport is None:
        return
    if response.content_length is not None or request.version >= HttpVersion11:
        transport.close()  # what is buffered still goes out; the framing shows the gap
    else:
        reset(transport.get_extra_info("socket"))  # a mere end would look like success
        transport.abort()


def reset(sock: socket.socket) -> None:
    """Make the end of this connection a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
