"""The plain call, answered without aiohttp: nearly every request costs half of what it would there.

A connection begins here. As long as each request on it is a plain one (a whole POST with a
Content-Length of at most PLAIN_BODY_BYTES to one of PLAIN_PATHS, nothing unusual in its headers),
it is parsed by llhttp and its answer is written to the socket as it comes. At the first request
that is anything else, the connection and the bytes of that request go to aiohttp's server and stay
there. ADR 0004 says why.

Rules this file keeps:
- it answers nothing that aiohttp would answer otherwise: whoever sends something odd, malformed or
  unknown is handed over before a byte of an answer is written, and the error is made there;
- one request at a time: bytes behind it wait, at most BEHIND_BYTES of them, then the socket is not
  read; two requests in one read are handed over;
- what the caller does not read is not read from the engine either;
- no timer and no parser state per request: one sweep a second looks at all connections.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from http import HTTPStatus
from typing import cast

import httptools
from aiohttp import web

from runtime.router.body import read_head
from runtime.router.errors import ApiError
from runtime.router.paths import PLAIN_PATHS, STREAMS
from runtime.router.proxy import Call, Proxy
from runtime.router.upstream import Headers, Reply

log = logging.getLogger("stoker.router")

PLAIN_BODY_BYTES = 1024 * 1024
PLAIN_HEAD_BYTES = 8 * 1024  # aiohttp's limit for one line
PLAIN_HEADERS = 100  # aiohttp's own limit is 128
BEHIND_BYTES = 64 * 1024
KEEP_ALIVE_S = 75.0  # as nginx; longer than the pauses between a client's calls
SWEEP_S = 1.0

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
_BODYLESS = (204, 304)
# Headers that make a request no plain one.
_ODD = {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer"}
_CONNECTION, _LENGTH, _TYPE = b"connection", b"content-length", b"content-type"
_ID, _HOST = b"x-request-id", b"host"
_LOOKED_AT = _ODD | {_CONNECTION, _LENGTH, _TYPE, _ID, _HOST}
_LENGTHS = {len(name) for name in _LOOKED_AT}


class RequestIds:
    """32 hexadecimal digits, unique among all routers: 64 random bits a process and a count."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(8)
        self._count = itertools.count(secrets.randbits(48))

    def __call__(self) -> str:
        return f"{self._prefix}{next(self._count):016x}"


class Front:
    """What all connections share; `server` is aiohttp's.

    `read_s`: how long a request may take to arrive. A connection beyond `max_connections` (known
    to a second where it was handed over) gets a 503 and is closed.
    """

    def __init__(
        self,
        proxy: Proxy,
        server: web.Server,
        *,
        read_s: float,
        max_connections: int,
        max_body_bytes: int,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.proxy = proxy
        self.server = server
        self.max_body_bytes = min(PLAIN_BODY_BYTES, max_body_bytes)
        self.request_id = RequestIds()
        self.connections: set[_Connection] = set()
        self.draining = False
        self._read_s = read_s
        self._max_connections = max_connections
        self._handed_over = 0  # connections of aiohttp's server, as the last sweep saw it
        self._idle = asyncio.Event()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)

    def __call__(self) -> asyncio.Protocol:
        """A protocol for a new connection."""
        return _Connection(self)

    def opened(self, connection: _Connection) -> bool:
        """Count it; False: there are too many."""
        self.connections.add(connection)
        count = len(self.connections) + self._handed_over
        self.proxy.metrics.connections = count
        return count <= self._max_connections

    def hand_over(self, connection: _Connection) -> web.RequestHandler:
        """Who serves it from now on."""
        self.forget(connection)
        self._handed_over += 1
        return self.server()

    def forget(self, connection: _Connection) -> None:
        """It is served elsewhere, or closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """End idle connections now, the others with their answer, or after `timeout_s`."""
        self.draining = True
        self._timer.cancel()
        for connection in list(self.connections):
            connection.close_if_idle()
        self._idle.clear()
        if self.connections:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            except TimeoutError:
                for connection in list(self.connections):
                    connection.break_off()

    def _sweep(self) -> None:
        now = self.loop.time()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)
        self._handed_over = len(self.server.connections)
        self.proxy.metrics.connections = len(self.connections) + self._handed_over
        for connection in list(self.connections):
            connection.close_if_late(now, self._read_s)


class _Connection(asyncio.Protocol):
    """One caller's socket, and the `Client` of the request that is being answered."""

    __slots__ = (
        "_behind", "_body", "_chunked", "_fields", "_front", "_head", "_id", "_more", "_parser",
        "_path", "_plain", "_raw", "_raw_bytes", "_reply", "_since", "_stopped", "_stuffed",
        "_task", "_transport", "_url", "_whole", "_writable", "begun",
    )  # fmt: skip

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = None
        self._task: asyncio.Task[None] | None = None
        self._reply: Reply | None = None
        self._behind = b""
        self._stuffed = self._stopped = False
        self._writable: asyncio.Future[None] | None = None
        self._since = front.loop.time()  # idle, or the request has been coming in, since then
        self._fresh()

    def _fresh(self) -> None:
        """Ready for a request."""
        self._raw: list[bytes] = []
        self._raw_bytes = 0
        self._url = b""
        self._path: str | None = None
        self._fields: Headers = []
        self._body: list[bytes] = []
        self._id: str | None = None
        self._plain = True
        self._whole = self._more = False
        self._head = b""  # of the answer, until its first piece goes out
        self.begun = self._chunked = False

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        self._parser = httptools.HttpRequestParser(self)
        if not self._front.opened(self):
            self._transport.write(_FULL)
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._task is not None:
            self._behind += data
            if len(self._behind) > BEHIND_BYTES and not self._stuffed:
                self._stuffed = True
                self._transport.pause_reading()  # type: ignore[union-attr]
            return
        if not self._raw:
            self._since = self._front.loop.time()
        self._raw.append(data)
        self._raw_bytes += len(data)
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._plain = False
        if not self._plain or self._more:
            self._hand_over()
        elif self._whole:
            self._serve()
        elif self._path is None and self._raw_bytes > PLAIN_HEAD_BYTES:
            self._hand_over()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._parser = None  # it holds us: break the cycle
        self._front.forget(self)
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(ConnectionResetError("the client hung up"))
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._stopped = True
        if self._reply is not None:
            self._reply.pause()

    def resume_writing(self) -> None:
        self._stopped = False
        if self._reply is not None:
            self._reply.resume()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # -- called by the parser

    def on_message_begin(self) -> None:
        if self._whole:
            self._more = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        path = PLAIN_PATHS.get(self._url)
        if (
            path is None
            or self._more
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or len(self._fields) > PLAIN_HEADERS
            or not self._headers_are_plain()
        ):
            self._plain = False
            return
        self._path = path

    def on_body(self, data: bytes) -> None:
        if self._plain:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._whole = True

    def _headers_are_plain(self) -> bool:
        length, size, hosts = -1, 0, 0
        for name, value in self._fields:
            size += len(value)
            if len(name) not in _LENGTHS or (lower := name.lower()) not in _LOOKED_AT:
                continue
            if lower == _LENGTH:
                if length >= 0 or not value.isdigit():
                    return False
                length = int(value)
            elif lower == _TYPE:
                if value[:10].lower() == b"multipart/":
                    return False
            elif lower == _HOST:
                hosts += 1
            elif lower == _ID:
                self._id = _usable_id(value)
            elif lower != _CONNECTION or value.lower() != b"keep-alive":
                return False
        return hosts == 1 and size <= PLAIN_HEAD_BYTES and 0 < length <= self._front.max_body_bytes

    # -- one request

    def _serve(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        try:
            model, stream = read_head(body)
        except ApiError:
            self._hand_over()
            return
        if self._front.proxy.gate.find(model) is None:
            self._hand_over()
            return
        path = cast(str, self._path)
        call = Call(
            self._id or self._front.request_id(), model, path, self._fields, body,
            stream and path in STREAMS,
        )  # fmt: skip
        self._raw = []
        self._raw_bytes = 0
        self._body = []
        self._task = self._front.loop.create_task(self._answer(call))

    async def _answer(self, call: Call) -> None:
        try:
            await self._front.proxy.serve(call, self)
        except ApiError as error:
            self._send_error(error, call.request_id)
        except ConnectionError:
            pass
        except Exception:
            log.exception("request %s failed inside the router", call.request_id)
            if self.begun:
                self.break_off()
            else:
                message = "the router failed; its log has more under this request id"
                self._send_error(ApiError(500, "internal_error", message), call.request_id)
        self._end()

    def _end(self) -> None:
        """The answer is whole: read on."""
        self._task = None
        self._reply = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self.begun and self._chunked:
            transport.write(b"0\r\n\r\n")
        if self._front.draining:
            transport.close()
            return
        self._fresh()
        self._since = self._front.loop.time()
        behind, self._behind = self._behind, b""
        if self._stuffed:
            self._stuffed = False
            transport.resume_reading()
        if behind:
            self.data_received(behind)

    def _hand_over(self) -> None:
        """aiohttp's server takes the connection, from the first byte of this request on."""
        transport, raw = self._transport, b"".join(self._raw)
        assert transport is not None
        self._parser = None  # it holds us: break the cycle
        heir = self._front.hand_over(self)
        transport.set_protocol(heir)
        heir.connection_made(transport)
        if self._stopped:
            heir.pause_writing()
        heir.data_received(raw)

    # -- the Client of a Call

    async def begin(self, status: int, headers: Headers) -> None:
        """Kept until the first piece of the body: the two go out in one write."""
        self.begun = True
        framed = status in _BODYLESS
        lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b""))]
        for name, value in headers:
            framed = framed or (len(name) == 14 and name.lower() == _LENGTH)
            lines.append(b"%b: %b" % (name, value))
        self._chunked = not framed
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked")
        lines.append(b"\r\n")
        self._head = b"\r\n".join(lines)

    async def write(self, data: bytes) -> None:
        if self._transport is None:
            raise ConnectionResetError("the client hung up")
        self.feed(data)
        if self._stopped:
            self._writable = self._front.loop.create_future()
            await self._writable

    async def relay(self, reply: Reply, first: bytes) -> None:
        self._reply = reply
        self.feed(first)
        if not reply.complete:
            await reply.pipe(self)
        if self._stopped:  # the next request must not add to what this one left behind
            await self.write(b"")

    def feed(self, data: bytes) -> None:
        """Send a piece, with the headers if they have not gone out yet."""
        if self._transport is None:  # it has hung up: our task is about to be cancelled
            return
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data = self._head + data
            self._head = b""
        if data:
            self._transport.write(data)

    def break_off(self) -> None:
        """Without its last chunk, or short of its Content-Length, no answer looks whole."""
        if self._transport is not None:
            self._transport.close()

    def _send_error(self, error: ApiError, request_id: str) -> None:
        if self._transport is None:
            return
        self._transport.write(error_answer(error, request_id))

    # -- its end

    def close_if_idle(self) -> None:
        if self._task is None and not self._raw and self._transport is not None:
            self._transport.close()

    def close_if_late(self, now: float, read_s: float) -> None:
        """Close what is idle too long, or takes too long to say what it wants."""
        if self._task is None and self._transport is not None:
            limit_s = read_s if self._raw else KEEP_ALIVE_S
            if now - self._since > limit_s:
                self._transport.close()


def error_answer(error: ApiError, request_id: str) -> bytes:
    """A whole answer, headers and all."""
    body = error.body()
    extra = "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
    reason = _REASONS.get(error.status, b"").decode()
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n{extra}\r\n"
    )
    return head.encode() + body


def _usable_id(value: bytes) -> str | None:
    """A caller's request id if it is one to keep."""
    if 0 < len(value) <= 128 and all(33 <= byte <= 126 for byte in value):
        return value.decode("ascii")
    return None


def _full() -> bytes:
    message = "this router has as many connections as it may (router.max_connections)"
    error = ApiError(503, "too_many_connections", message, retry_after_s=1.0)
    return error_answer(error, "-").replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


_FULL = _full()
