"""Keep-alive HTTP/1.1 towards the engines: raw protocols and llhttp, nothing between.

The one place where own code beats the library: aiohttp's client costs three times as much CPU.

Rules this file keeps:
- body bytes are handed on in the pieces they came in, never re-framed, at most BUFFER_BYTES ahead
  of their reader: then the socket is no longer read, so a slow client slows the engine, not us;
- a connection goes back to the pool only after a whole answer with nothing after it;
- an answer that ends before its framing says so is an error, never an end;
- a pooled connection that the engine closed under us is replaced silently: it says nothing of
  the engine's health. A failure on a fresh one is the caller's to judge;
- an engine's word that its core has died is no answer, but a failure of the replica;
- time limits cost a request nothing: one sweep a second or less looks at all answers under way.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import httptools

from runtime.router.call.error_shapes import BEGINNINGS, core_died
from runtime.sockets import SILENT_S, notice_silence

BUFFER_BYTES = 256 * 1024
HEAD_BYTES = 64 * 1024
_LAST_PIECES = 2  # of a stream whose engine dies: its last words, and vLLM's [DONE]
IDLE_S = 3.5  # with the sweep's second below the 5 s after which uvicorn drops an idle connection

Headers = list[tuple[bytes, bytes]]


class UpstreamError(Exception):
    """The engine gave no whole answer. `delivered`: it may have seen the request."""

    def __init__(self, reason: str, delivered: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.delivered = delivered


class Unanswered(UpstreamError):
    """The connection was closed without a byte: its socket was stale, or the engine died."""

    def __init__(self) -> None:
        super().__init__("the replica closed the connection without an answer", delivered=True)


class HostLost(UpstreamError):
    """The scheduler calls the engine's host lost, and the engine says nothing either."""

    def __init__(self) -> None:
        super().__init__("the replica's host no longer answers", delivered=True)


class UpstreamTimeout(UpstreamError):
    """The engine was too slow; `limit` is the setting of [router] that says so."""

    def __init__(self, reason: str, limit: str) -> None:
        super().__init__(reason, delivered=True)
        self.limit = limit


class EngineTimeouts(NamedTuple):
    """How long an engine may take, in seconds."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0  # from the request to the first byte of a body
    idle_s: float = 300.0  # between two pieces of a body
    total_s: float = 3600.0


class Sink(Protocol):
    """Who takes a body as it comes (`Reply.pipe`)."""

    def feed(self, data: bytes) -> None:
        """One piece. Never blocks: `Reply.pause` is how to slow the engine."""


class Filter(Protocol):
    """Sees every piece of a body on its way, and says what is passed on of it."""

    def feed(self, data: bytes) -> bytes:
        """One piece."""

    def rest(self) -> bytes:
        """What it kept back; no more pieces will come."""


class Reply:
    """One answer: `status` and `headers` now, the body by `read` until b"", or by `pipe`."""

    __slots__ = (
        "_chunks", "_connection", "_error", "_sink", "_waiter", "begun", "complete",
        "headers", "meter", "moved", "moved_at", "sent_at", "status", "until_eof",
    )  # fmt: skip

    def __init__(self, connection: _Connection, now: float) -> None:
        self.status = 0
        self.headers: Headers = []
        self.until_eof = False
        self.complete = False
        self.sent_at = self.moved_at = now
        self.moved = False  # body bytes came since the last sweep
        self.begun = False  # a sweep has seen body bytes
        self._connection = connection
        self._chunks = connection.body  # the socket's pieces come into it while it is our answer
        self._error: UpstreamError | None = None
        self._sink: Sink | None = None
        self.meter: Filter | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """All bytes that have come, at least one; b"" at the end. Raises UpstreamError."""
        data = b""
        while not data:
            while not self._chunks:
                if self._error is not None:
                    raise self._error
                if self.complete:
                    return self._rest()
                await self._wait()
            data = self._take()
            if not self.complete:
                self._connection.resume_reading()
        return data + self._rest() if self.complete else data

    async def pipe(self, sink: Sink) -> None:
        """Hand every piece to `sink` when it comes, without waking a task, until the end.

        Raises UpstreamError. `pause` and `resume` are the sink's brakes.
        """
        self._sink = sink
        self.flush()
        while self._error is None:
            if self.complete:
                if rest := self._rest():
                    sink.feed(rest)
                return
            await self._wait()
        raise self._error

    def pause(self) -> None:
        """Stop reading from the engine."""
        if not self.complete:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self.complete:
            self._connection.resume_reading()

    @property
    def base_url(self) -> str:
        """Of the engine that answers."""
        return self._connection.base_url

    @property
    def held_up(self) -> bool:
        """Nobody takes what the engine sends."""
        return not self.complete and self._connection.paused

    def close(self) -> None:
        """Done with it. An unfinished answer closes the connection, so that the engine aborts."""
        if not self.complete:
            self._connection.abort()

    # -- called by the connection

    def flush(self) -> None:
        """The pieces of one read from the socket have come."""
        if not self._chunks:
            return
        self.moved = True
        for piece in self._chunks[-_LAST_PIECES:]:
            if piece.startswith(BEGINNINGS) and core_died(piece):
                del self._chunks[self._chunks.index(piece) :]  # it is not passed on
                self._break(UpstreamError("the replica's engine died at work", delivered=True))
                break
        if self._sink is None:
            self._wake()
        elif self._chunks:
            self._sink.feed(self._take())

    def more(self) -> None:
        """The pieces of one read have come, and it goes on: not too far ahead of its reader."""
        self.flush()
        if self._sink is None and sum(map(len, self._chunks)) > BUFFER_BYTES:
            self._connection.pause_reading()

    def end(self) -> None:
        """Note the end of the body."""
        self.flush()
        if self._error is None:
            self.complete = True
            self._part()

    def fail(self, error: UpstreamError) -> None:
        """Note why the body ends early, if it has not ended yet."""
        self.flush()
        if not self.complete and self._error is None:
            self._break(error)

    def _break(self, error: UpstreamError) -> None:
        self._error = error
        self._part()

    def _part(self) -> None:
        """What has come stays to be read; what the connection brings from now on is not ours."""
        self._chunks = self._chunks.copy()
        self._wake()

    async def head(self) -> None:
        """Until status and headers are there. Raises UpstreamError.

        A wait that ends without them closes the connection.
        """
        try:
            while not self.status:
                if self._error is not None:
                    raise self._error
                self._waiter = self._connection.loop.create_future()
                await self._waiter
        except BaseException:
            self.close()
            raise
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return data if self.meter is None else self.meter.feed(data)

    def _rest(self) -> bytes:
        """What the meter kept back, once the answer is whole."""
        return b"" if self.meter is None else self.meter.rest()

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One socket: at most one answer at a time."""

    def __init__(self, base_url: str, idle: deque[_Connection], active: set[Reply]) -> None:
        self.base_url = base_url
        self._idle = idle
        self._active = active
        self.loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = None
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self.body: list[bytes] = []
        # For the parser, which calls it once a piece: a method of ours would be most of the cost.
        self.on_body = self.body.append
        self.paused = False
        self._headers: Headers = []
        self._head_bytes = 0
        self.idle_since = 0.0

    # -- called by the pool and the reply

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, body: bytes, now: float) -> Reply:
        """Write one request; its answer fills the returned Reply."""
        assert self._transport is not None
        assert self._reply is None
        self._reply = Reply(self, now)
        self._active.add(self._reply)
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
        if not self.paused and self.usable:
            assert self._transport is not None
            self.paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self.paused and self.usable:
            assert self._transport is not None
            self.paused = False
            self._transport.resume_reading()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        self._parser = httptools.HttpResponseParser(self)
        sock: socket.socket = transport.get_extra_info("socket")
        notice_silence(sock)

    def data_received(self, data: bytes) -> None:
        if self._reply is None or self._parser is None:
            self.abort()  # nobody asked for anything
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._broken("the replica's answer was not valid HTTP")
            return
        self._parsed(len(data))

    def _parsed(self, size: int) -> None:
        """One read of `size` bytes has been through the parser."""
        reply = self._reply
        if reply is None:
            return
        if reply.status:
            reply.more()
            return
        self._head_bytes += size
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
        self._active.discard(reply)
        if reply.until_eof and exc is None:
            reply.end()
        else:
            reply.fail(_closed() if reply.status or self._head_bytes else Unanswered())

    # -- called by the parser

    def on_message_begin(self) -> None:
        if self._reply is None:
            self.abort()  # a second answer after the one that was asked for

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
            self._reply._wake()  # it runs once this read is parsed: most answers are whole then

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is None or not reply.status:  # an interim 1xx: the answer is still to come
            return
        assert self._transport is not None
        assert self._parser is not None
        self._reply = None
        self._active.discard(reply)
        self.resume_reading()
        sent = not self._transport.get_write_buffer_size()
        if sent and self.usable and self._parser.should_keep_alive():
            self.idle_since = self.loop.time()
            self._idle.append(self)
        else:
            self._transport.close()
        reply.end()
        self.body.clear()

    def _broken(self, reason: str) -> None:
        if self._reply is not None:
            self._reply.fail(UpstreamError(reason, delivered=True))
        self.abort()


def _is_framed(headers: Headers) -> bool:
    for name, _ in headers:
        if len(name) in (14, 17) and name.lower() in (b"content-length", b"transfer-encoding"):
            return True
    return False


def _closed() -> UpstreamError:
    reason = "the replica closed the connection in the middle of its answer"
    return UpstreamError(reason, delivered=True)


class Upstream:
    """Connections to every engine, kept alive between requests."""

    def __init__(self, limits: EngineTimeouts) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._pools: dict[str, tuple[str, int, bytes, deque[_Connection]]] = {}
        self._active: set[Reply] = set()
        self._lost: set[str] = set()
        self._every_s = min(1.0, *(limit / 4 for limit in limits[1:]))
        self._timer = self._loop.call_later(self._every_s, self._sweep)

    async def post(
        self,
        base_url: str,
        path: str,
        headers: Iterable[bytes],
        body: bytes,
        method: str = "POST",
    ) -> Reply:
        """Send one POST (or `method`) and wait for the answer's head, as long as it takes.

        `path` is the raw request target; `headers` are whole `name: value` lines without Host and
        Content-Length. Raises UpstreamError; a cancelled wait closes the connection.
        """
        host, port, host_line, idle = self._pool(base_url)
        request = b"\r\n".join(
            (
                f"{method} {path} HTTP/1.1".encode("ascii"), host_line,
                b"Content-Length: %d" % len(body), *headers, b"\r\n",
            )
        )  # fmt: skip
        delivered = False
        while (connection := self._pooled(idle)) is not None:
            reply = connection.send(request, body, self._loop.time())
            try:
                await reply.head()
            except Unanswered:
                delivered = True
                continue
            return reply
        try:
            connection = await self._connect(base_url, host, port, idle)
        except UpstreamError as error:
            raise UpstreamError(error.reason, delivered) from None
        reply = connection.send(request, body, self._loop.time())
        await reply.head()
        return reply

    def close(self) -> None:
        """Close every idle connection; those in use close with their answer."""
        self._timer.cancel()
        for *_, idle in self._pools.values():
            for connection in list(idle):
                connection.abort()

    def keep_only(self, base_urls: set[str]) -> None:
        """Drop the pools of all other engines; answers under way go on."""
        for base_url in self._pools.keys() - base_urls:
            for connection in list(self._pools.pop(base_url)[3]):
                connection.abort()

    def lost(self, base_urls: Iterable[str]) -> None:
        """End the answers of engines whose hosts are newly called lost, with HostLost.

        One whose bytes still come is left alone: then it is the scheduler that cannot see the
        host. If they stop, the socket's own time limits end it (`notice_silence`).
        """
        news = set(base_urls) - self._lost
        self._lost = set(base_urls)
        now = self._loop.time()
        for reply in [r for r in self._active if r.base_url in news] if news else ():
            if not _still_comes(reply, now):
                reply.fail(HostLost())
                reply.close()
        for base_url in news & self._pools.keys():
            for connection in list(self._pools[base_url][3]):
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
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def _sweep(self) -> None:
        """End what took too long, and close what has been idle too long to be trusted."""
        now = self._loop.time()
        self._timer = self._loop.call_later(self._every_s, self._sweep)
        for *_, idle in self._pools.values():
            while idle and now - idle[0].idle_since > IDLE_S:
                idle.popleft().abort()
        for reply in list(self._active):
            late = _too_late(reply, now, self._limits)
            if late is not None:
                reply.fail(late)
                reply.close()

    async def _connect(
        self, base_url: str, host: str, port: int, idle: deque[_Connection]
    ) -> _Connection:
        limit_s = self._limits.connect_s
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(base_url, idle, self._active), host, port
                )
        except TimeoutError:
            reason = f"the replica did not accept a connection in {limit_s:g}s (connect_timeout_s)"
            raise UpstreamError(reason, delivered=False) from None
        except OSError:
            raise UpstreamError("the replica refused the connection", delivered=False) from None
        return connection


def _still_comes(reply: Reply, now: float) -> bool:
    """Whether bytes of its body came lately, as far as a client that reads lets them come."""
    if reply.moved or reply.held_up:
        return True
    return reply.begun and now - reply.moved_at < SILENT_S


def _too_late(reply: Reply, now: float, limits: EngineTimeouts) -> UpstreamTimeout | None:
    """Why the answer has to end now, if it has. An engine held up by a slow client is not late."""
    if reply.moved or reply.held_up:
        reply.moved, reply.moved_at, reply.begun = False, now, True
    if now - reply.sent_at > limits.total_s:
        reason = f"the answer was not whole within {limits.total_s:g}s (router.total_timeout_s)"
        return UpstreamTimeout(reason, "total_timeout")
    limit_s = limits.idle_s if reply.begun else limits.first_byte_s
    if now - reply.moved_at <= limit_s:
        return None
    if reply.begun:
        reason = f"nothing more of the answer came in {limit_s:g}s (router.idle_timeout_s)"
        return UpstreamTimeout(reason, "idle_timeout")
    reason = f"no byte of an answer came in {limit_s:g}s (router.first_byte_timeout_s)"
    return UpstreamTimeout(reason, "first_byte_timeout")
