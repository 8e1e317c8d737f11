"""The plain call, answered without aiohttp: nearly every request costs half of what it would there.

A connection begins here. As long as each request on it is a plain one (a whole POST with a
Content-Length of at most PLAIN_BODY_BYTES to one of PLAIN_PATHS, nothing unusual in its headers),
it is parsed by llhttp and its answer is written to the socket as it comes. At the first request
that is anything else, the connection and the bytes of that request go to aiohttp's server and stay
there. ADR 0006 says why.

Rules this file keeps:
- it answers nothing that aiohttp would answer otherwise: whoever sends something odd or malformed,
  or a key that is not good, is handed over before a byte of an answer is written, and the error is
  made there; what the proxy says (404, 429, 503) it says through either;
- one request at a time: pipelined bytes wait, at most PIPELINED_BYTES, then the socket is not
  read; two requests in one read are handed over;
- what the caller does not read is not read from the engine either;
- no timer per request: the front's sweep says what is late.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol, cast

import httptools
from aiohttp import web

from runtime.outside import JSON_TYPE, is_json_type
from runtime.router.call.body import read_head
from runtime.router.call.errors import CallError, internal_error
from runtime.router.call.paths import PLAIN_PATHS, STREAMS
from runtime.router.call.request import ANONYMOUS, Call
from runtime.router.call.request_ids import RequestIds
from runtime.router.call.whole_error import REASONS, error_answer
from runtime.router.callers.keys import given_token
from runtime.router.callers.local import FOREIGN
from runtime.router.callers.memory import Memory
from runtime.router.proxy.serving import Proxy
from runtime.router.proxy.upstream import Headers, Reply

log = logging.getLogger("stoker.router")

PLAIN_BODY_BYTES = 1024 * 1024
PLAIN_HEAD_BYTES = 8 * 1024  # aiohttp's limit for one line
PLAIN_HEADERS = 100  # aiohttp's own limit is 128
PIPELINED_BYTES = 64 * 1024
KEEP_ALIVE_S = 75.0  # as nginx; longer than the pauses between a client's calls

_BODYLESS = (204, 304)
_LAST_CHUNK = b"0\r\n\r\n"
# Headers that make a request no plain one: among them a browser's.
_ODD = {
    b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer", b"origin",
}  # fmt: skip
_CONNECTION, _LENGTH, _TYPE = b"connection", b"content-length", b"content-type"
_JSON = JSON_TYPE.encode()
_ID, _HOST, _AUTHORIZATION, _API_KEY = b"x-request-id", b"host", b"authorization", b"x-api-key"
_LOOKED_AT = _ODD | FOREIGN | {_CONNECTION, _LENGTH, _TYPE, _ID, _HOST, _AUTHORIZATION, _API_KEY}
_LENGTHS = {len(name) for name in _LOOKED_AT}


class Front(Protocol):
    """What all connections share (`connections.py`)."""

    loop: asyncio.AbstractEventLoop
    proxy: Proxy
    memory: Memory
    max_body_bytes: int
    draining: bool
    request_id: RequestIds

    def opened(self, connection: PlainConnection) -> None:
        """Count it, or turn it away."""

    def hand_over(self, connection: PlainConnection) -> web.RequestHandler:
        """Who serves it from now on."""

    def forget(self, connection: PlainConnection) -> None:
        """Drop a connection that is served elsewhere, or closed."""


class PlainConnection(asyncio.Protocol):
    """One caller's socket, and the `Client` of the request that is being answered."""

    __slots__ = (
        "_address", "_api_key", "_body", "_chunked", "_fields", "_foreign", "_front", "_full",
        "_head", "_host", "_id", "_more", "_parser", "_path", "_pipelined", "_plain", "_raw",
        "_raw_bytes", "_reply", "_since", "_stopped", "_stopped_at", "_taken", "_task", "_token",
        "_transport", "_url", "_whole", "_writable", "begun", "served",
    )  # fmt: skip

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._parser: httptools.HttpRequestParser | None = None
        self._task: asyncio.Task[None] | None = None
        self._reply: Reply | None = None
        self._pipelined = b""
        self._full = self._stopped = False
        self._stopped_at = 0.0
        self.served = False  # a request, whatever became of it
        self._writable: asyncio.Future[None] | None = None
        self._taken = 0  # of the front's memory
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
        self._token = self._api_key = ""
        self._host = b""
        self._plain = True
        self._foreign = False  # a header that a caller from this host need not send
        self._whole = self._more = False
        self._head = b""  # of the answer, until its first piece goes out
        self.begun = self._chunked = False

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket and make a parser for it."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        self._address = address_of(transport)
        self._parser = httptools.HttpRequestParser(self)
        self._front.opened(self)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes, or keep them while a request is being answered."""
        size, memory = len(data), self._front.memory
        self._taken += size
        memory.used += size
        if self._task is not None:
            self._pipelined += data
            if len(self._pipelined) > PIPELINED_BYTES and not self._full:
                self._full = True
                self._transport.pause_reading()  # type: ignore[union-attr]
            return
        if not self._raw:
            self._since = self._front.loop.time()
        self._raw.append(data)
        self._raw_bytes += size
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._plain = False
        if not self._plain or self._more or memory.used > memory.limit:
            self._hand_over()
        elif self._whole:
            self._serve()
        elif self._path is None and self._raw_bytes > PLAIN_HEAD_BYTES:
            self._hand_over()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what was taken and cancel the answer."""
        self._transport = None
        self._parser = None  # it holds us: break the cycle
        self._give_back()
        self._front.forget(self)
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(ConnectionResetError("the client hung up"))
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """Stop reading the engine while the caller does not read."""
        self._stopped = True
        self._stopped_at = self._front.loop.time()
        if self._reply is not None:
            self._reply.pause()

    def resume_writing(self) -> None:
        """Read the engine again: the caller reads."""
        self._stopped = False
        if self._reply is not None:
            self._reply.resume()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    # -- called by the parser

    def on_message_begin(self) -> None:
        """Note a second request in the bytes of one read."""
        if self._whole:
            self._more = True

    def on_url(self, url: bytes) -> None:
        """Keep a piece of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Decide whether the request is plain."""
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
        """Keep a piece of a plain request's body."""
        if self._plain:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        self._whole = True

    def _headers_are_plain(self) -> bool:
        length, size, hosts, typed = -1, 0, 0, False
        for name, value in self._fields:
            size += len(value)
            if len(name) not in _LENGTHS or (lower := name.lower()) not in _LOOKED_AT:
                continue
            if lower == _LENGTH:
                if length >= 0 or not value.isdigit():
                    return False
                length = int(value)
            elif lower == _TYPE:
                if typed or (value != _JSON and not is_json_type(value.decode("latin-1"))):
                    return False
                typed = True
            elif lower == _HOST:
                hosts += 1
                self._host = value
            elif lower in FOREIGN and lower not in _ODD:
                self._foreign = True
            elif lower == _ID:
                self._id = _usable_id(value)
            elif lower == _AUTHORIZATION:
                self._token = self._token or given_token(value)
            elif lower == _API_KEY:
                self._api_key = self._api_key or given_token(value)
            elif lower != _CONNECTION or value.lower() != b"keep-alive":
                return False
        whole = 0 < length <= self._front.max_body_bytes
        return whole and typed and hosts == 1 and size <= PLAIN_HEAD_BYTES

    # -- one request

    def _serve(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        try:
            head = read_head(body)
            caller = self._front.proxy.keys.identify(self._token or self._api_key, time.time())
        except CallError:
            self._hand_over()
            return
        local = self._front.proxy.keys.local
        if (
            caller is ANONYMOUS
            and local is not None
            and (self._foreign or not local.is_good(self._host))
        ):
            self._hand_over()  # it gets its 403 there
            return
        path, address = cast(str, self._path), self._address
        if self._foreign:
            address = self._front.proxy.forwarded.address(address, self._fields)
        self.served = True
        call = Call(
            self._id or self._front.request_id(), head.model, path, self._fields, body,
            bool(head.stream) and path in STREAMS, head, caller, address=address,
        )  # fmt: skip
        self._raw = []
        self._raw_bytes = 0
        self._body = []
        self._task = self._front.loop.create_task(self._answer(call))

    async def _answer(self, call: Call) -> None:
        try:
            await self._front.proxy.serve(call, self)
        except CallError as error:
            self._send_error(error, call)
        except ConnectionError:
            pass
        except Exception:
            log.exception("request %s failed inside the router", call.request_id)
            if self.begun:
                self.break_off()
            else:
                self._send_error(internal_error(), call)
        self._end()

    def _end(self) -> None:
        """The answer is whole: read on."""
        self._task = None
        self._reply = None
        self._front.memory.used -= self._taken
        self._taken = 0
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self.begun and self._chunked:
            transport.write(_LAST_CHUNK)
        if self._front.draining:
            transport.close()
            return
        self._fresh()
        self._since = self._front.loop.time()
        pipelined, self._pipelined = self._pipelined, b""
        if self._full:
            self._full = False
            transport.resume_reading()
        if pipelined:
            self.data_received(pipelined)

    def _give_back(self) -> None:
        """What came in is held no more, or is counted by who takes it over."""
        self._front.memory.used -= self._taken
        self._taken = 0

    def _hand_over(self) -> None:
        """aiohttp's server takes the connection, from the first byte of this request on."""
        self._give_back()
        transport, raw = self._transport, b"".join(self._raw)
        assert transport is not None
        self._parser = None  # it holds us: break the cycle
        successor = self._front.hand_over(self)
        transport.set_protocol(successor)
        successor.connection_made(transport)
        if self._stopped:
            successor.pause_writing()
        successor.data_received(raw)

    # -- the Client of a Call

    async def begin(self, status: int, headers: Headers) -> None:
        """Kept until the first piece of the body: the two go out in one write."""
        self.begun = True
        framed = status in _BODYLESS
        lines = [b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b""))]
        for name, value in headers:
            framed = framed or (len(name) == 14 and name.lower() == _LENGTH)
            lines.append(b"%b: %b" % (name, value))
        self._chunked = not framed
        if self._chunked:
            lines.append(b"Transfer-Encoding: chunked")
        lines.append(b"\r\n")
        self._head = b"\r\n".join(lines)

    async def write(self, data: bytes) -> None:
        """Send bytes; returns when the caller reads. Raises ConnectionResetError."""
        if self._transport is None:
            raise ConnectionResetError("the client hung up")
        self.feed(data)
        if self._stopped:
            self._writable = self._front.loop.create_future()
            await self._writable

    async def relay(self, reply: Reply, first: bytes) -> None:
        """Send `first` and the rest of an engine's reply as it comes."""
        self._reply = reply
        if reply.complete and self._chunked:
            self._send_whole(first)
        else:
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
            data = b"%b%x\r\n%b\r\n" % (self._head, len(data), data)
        elif self._head:
            data = self._head + data
        self._head = b""
        if data:
            self._transport.write(data)

    def _send_whole(self, data: bytes) -> None:
        """A chunked answer of which no more will come: its end goes out in the same write."""
        self._chunked = False
        self.feed(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else _LAST_CHUNK)

    def break_off(self) -> None:
        """Without its last chunk, or short of its Content-Length, no answer looks whole."""
        if self._transport is not None:
            self._transport.close()

    def _send_error(self, error: CallError, call: Call) -> None:
        if self._transport is None:
            return
        self._transport.write(error_answer(error, call.path, call.request_id))

    # -- its end

    @property
    def waits_since(self) -> float | None:
        """Since when it has been owing us a whole request; None: one is being answered."""
        return self._since if self._task is None else None

    def close_if_idle(self) -> None:
        """Close the socket where nothing is being read or answered."""
        if self._task is None and not self._raw and self._transport is not None:
            self._transport.close()

    def close_if_late(self, now: float, read_s: float) -> None:
        """Close what is idle too long, takes too long to say what it wants, or does not read.

        Who has never asked for anything is not idle: its first request is due in `read_s`.
        """
        if self._transport is None:
            return
        if self._stopped and now - self._stopped_at > read_s:
            self._transport.abort()
        elif self._task is None:
            limit_s = KEEP_ALIVE_S if self.served and not self._raw else read_s
            if now - self._since > limit_s:
                self._transport.close()

    def turn_away(self, answer: bytes) -> None:
        """Say `answer` and close."""
        if self._transport is not None:
            self._transport.write(answer)
            self._transport.close()

    def abort(self) -> None:
        """At once, with what it has not read yet."""
        if self._transport is not None:
            self._transport.abort()


def address_of(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end; "": a Unix socket."""
    peer = transport.get_extra_info("peername")
    return peer[0] if isinstance(peer, tuple) else ""


def _usable_id(value: bytes) -> str | None:
    """A caller's request id if it is one to keep."""
    if 0 < len(value) <= 128 and all(33 <= byte <= 126 for byte in value):
        return value.decode("ascii")
    return None
