"""Keep-alive HTTP/1.1 towards the engines: raw protocols and llhttp, nothing between.

The one place where own code beats the library: aiohttp's client costs three times as much CPU.

Rules this file keeps:
- body bytes are handed on in the pieces they came in, never re-framed, at most BUFFER_BYTES ahead
  of their reader: then the socket is no longer read, so a slow client slows the engine, not us;
- a connection goes back to the pool only after a whole answer with nothing behind it;
- an answer that ends before its framing says so is an error, never an end;
- a pooled connection that the engine closed under us is replaced silently: it says nothing of
  the engine's health. A failure on a fresh one is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Iterable
from typing import cast
from urllib.parse import urlsplit

import httptools

BUFFER_BYTES = 256 * 1024
HEAD_BYTES = 64 * 1024
IDLE_S = 4.0  # below the 5 s after which uvicorn drops an idle connection

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """The engine gave no whole answer. `delivered`: it may have seen the request."""

    def __init__(self, reason: str, delivered: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.delivered = delivered


class Reply:
    """One answer: `status` and `headers` now, the body by `read` until b""."""

    __slots__ = (
        "_chunks", "_connection", "_error", "_size", "_waiter", "complete", "headers", "status",
        "until_eof",
    )  # fmt: skip

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.headers: Headers = []
        self.until_eof = False
        self.complete = False
        self._connection = connection
        self._chunks: list[bytes] = []
        self._size = 0
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """All bytes that have come, at least one; b"" at the end. Raises UpstreamError."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if not self.complete:
            self._connection.resume_reading()
        return data

    def close(self) -> None:
        """Done with it. An unfinished answer closes the connection, so that the engine aborts."""
        if not self.complete:
            self._connection.abort()

    # -- called by the connection

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size > BUFFER_BYTES:
            self._connection.pause_reading()
        self._wake()

    def end(self) -> None:
        self.complete = True
        self._wake()

    def fail(self, error: UpstreamError) -> None:
        if not self.complete:
            self._error = error
            self._wake()

    async def head(self) -> None:
        """Until status and headers are there. Raises UpstreamError."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One socket: at most one answer at a time."""

    def __init__(self, idle: deque[_Connection]) -> None:
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._paused = False
        self._headers: Headers = []
        self._head_bytes = 0
        self.idle_since = 0.0

    # -- called by the pool and the reply

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, body: bytes) -> Reply:
        """Write one request; its answer fills the returned Reply."""
        assert self._transport is not None
        assert self._reply is None
        self._reply = Reply(self)
        self._headers = []
        self._head_bytes = 0
        if len(body) < 65536:
            self._transport.write(request + body)
        else:
            self._transport.write(request)
            self._transport.write(body)
        return self._reply

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        if not self._paused and self.usable:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and self.usable:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        self._parser = httptools.HttpResponseParser(self)
        sock: socket.socket = transport.get_extra_info("socket")
        # A host that lost its power sends no FIN: without probes we would wait for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def data_received(self, data: bytes) -> None:
        if self._reply is None or self._parser is None:
            self.abort()  # nobody asked for anything
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._broken("the replica's answer was not valid HTTP")
            return
        if self._reply is not None and not self._reply.status:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._broken("the replica's answer had too large headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._parser = None  # it holds us: break the cycle
        if self in self._idle:
            self._idle.remove(self)
        reply, self._reply = self._reply, None
        if reply is None:
            return
        if reply.until_eof and exc is None:
            reply.end()
        else:
            reply.fail(_closed(reply))

    # -- called by the parser

    def on_message_begin(self) -> None:
        if self._reply is None:
            self.abort()  # a second answer behind the one that was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, []
        if self._reply is not None and status >= 200:
            self._reply.headers = headers
            self._reply.until_eof = status not in (204, 304) and not _is_framed(headers)
            self._reply.status = status
            self._reply._wake()

    def on_body(self, data: bytes) -> None:
        if self._reply is not None:
            self._reply.feed(data)

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is None or not reply.status:  # an interim 1xx: the answer is still to come
            return
        assert self._transport is not None
        assert self._parser is not None
        self._reply = None
        self.resume_reading()
        sent = not self._transport.get_write_buffer_size()
        if sent and self.usable and self._parser.should_keep_alive():
            self.idle_since = self._loop.time()
            self._idle.append(self)
        else:
            self._transport.close()
        reply.end()

    def _broken(self, reason: str) -> None:
        if self._reply is not None:
            self._reply.fail(UpstreamError(reason, delivered=True))
        self.abort()


def _is_framed(headers: Headers) -> bool:
    return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in headers)


def _closed(reply: Reply) -> UpstreamError:
    when = "in the middle of its answer" if reply.status else "without an answer"
    return UpstreamError(f"the replica closed the connection {when}", delivered=True)


class Upstream:
    """Connections to every engine, kept alive between requests."""

    def __init__(self, connect_timeout_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._pools: dict[str, tuple[str, int, bytes, deque[_Connection]]] = {}

    async def post(self, base_url: str, path: str, headers: Iterable[bytes], body: bytes) -> Reply:
        """Send one POST and wait for the answer's head, as long as it takes.

        `path` is the raw request target; `headers` are whole `name: value` lines without Host and
        Content-Length. Raises UpstreamError; a cancelled wait closes the connection.
        """
        host, port, host_line, idle = self._pool(base_url)
        request = b"\r\n".join(
            (
                b"POST %b HTTP/1.1" % path.encode("ascii"), host_line,
                b"Content-Length: %d" % len(body), *headers, b"\r\n",
            )
        )  # fmt: skip
        delivered = False
        while (connection := self._pooled(idle)) is not None:
            reply = connection.send(request, body)
            try:
                await _head_or_close(reply)
            except UpstreamError:
                delivered = True  # the socket was stale, or this request has just killed the engine
                continue
            return reply
        try:
            connection = await self._connect(host, port, idle)
        except UpstreamError as error:
            raise UpstreamError(error.reason, delivered) from None
        reply = connection.send(request, body)
        await _head_or_close(reply)
        return reply

    def close(self) -> None:
        """Close every idle connection; those in use close with their answer."""
        for *_, idle in self._pools.values():
            for connection in list(idle):
                connection.abort()

    def keep_only(self, base_urls: set[str]) -> None:
        """Drop the pools of all other engines; answers under way go on."""
        for base_url in self._pools.keys() - base_urls:
            for connection in list(self._pools.pop(base_url)[3]):
                connection.abort()

    def _pool(self, base_url: str) -> tuple[str, int, bytes, deque[_Connection]]:
        pool = self._pools.get(base_url)
        if pool is None:
            url = urlsplit(base_url)
            if url.scheme != "http" or not url.hostname:
                raise UpstreamError("the replica's address is not an http:// URL", delivered=False)
            host_line = b"Host: " + url.netloc.encode("ascii")
            pool = (url.hostname, url.port or 80, host_line, deque())
            self._pools[base_url] = pool
        return pool

    def _pooled(self, idle: deque[_Connection]) -> _Connection | None:
        """The connection used last, which is the likeliest to be alive."""
        now = asyncio.get_running_loop().time()
        while idle and now - idle[0].idle_since > IDLE_S:
            idle.popleft().abort()
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self, host: str, port: int, idle: deque[_Connection]) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(idle), host, port)
        except TimeoutError:
            reason = f"the replica did not accept a connection in {self._connect_timeout_s:g}s"
            raise UpstreamError(reason, delivered=False) from None
        except OSError:
            raise UpstreamError("the replica refused the connection", delivered=False) from None
        return connection


async def _head_or_close(reply: Reply) -> None:
    try:
        await reply.head()
    except BaseException:
        reply.close()
        raise
