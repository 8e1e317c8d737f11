"""aiohttp's server as the router runs it: its limits, and what is said before any handler runs.

Rules this file keeps:
- what cannot be parsed, or is refused before it is routed, is answered in OpenAI's shape with a
  request id and told to the access log, as any other call;
- a head is bounded as a whole, not only line by line;
- a path means the same with a slash at its end.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from runtime.router.call.errors import CallError, internal_error

# aiohttp tells of every malformed request with a stack trace; `RouterApi` tells of our faults.
_http_log = logging.getLogger("stoker.router.http")
_http_log.setLevel(logging.CRITICAL)

LINE_BYTES = 16 * 1024
HEADERS = 256
HEAD_BYTES = 64 * 1024

LINGER_S = 1.0  # while a caller who still sends a head can read why it is not wanted

Refuse = Callable[[web.BaseRequest, CallError, str], web.Response]  # with the page's origin
_ORIGIN = re.compile(rb"\norigin:[ \t]*([^\r\n]{1,512})", re.IGNORECASE)
_REFUSED = web.RequestKey("refused", CallError)


class _HeadTooLarge(HttpProcessingError):
    """All of a head is larger than HEAD_BYTES."""


class OddConnection(web.RequestHandler):
    """One connection that the front handed over; `refuse` makes the answer to a failure."""

    __slots__ = ("_body", "_head", "_refuse", "_refused", "_stopped_at")

    def __init__(self, server: web.Server, refuse: Refuse, idle_s: float) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=idle_s,
            access_log=None,  # type: ignore[arg-type]  # what AppRunner passes on
            logger=_http_log,
            max_line_size=LINE_BYTES,
            max_field_size=LINE_BYTES,
            max_headers=HEADERS,
        )
        self._refuse = refuse
        self._head = b""  # of the request that is coming in, and what came in one piece with it
        self._refused = False  # what still comes is thrown away
        self._body: StreamReader | None = None
        self._stopped_at: float | None = None  # since then the caller reads nothing

    @property
    def idle(self) -> bool:
        """Whether it waits for a request, or for the rest of a request's head."""
        return self._waiter is not None and not self._messages

    def pause_writing(self) -> None:
        """Note since when the caller does not read."""
        super().pause_writing()
        self._stopped_at = self._loop.time()

    def resume_writing(self) -> None:
        """Note that the caller reads again."""
        super().resume_writing()
        self._stopped_at = None

    def close_if_late(self, now: float, read_s: float) -> None:
        """End it where the caller has read nothing for `read_s`: all that it was asked for ends."""
        stopped = self._stopped_at is not None and now - self._stopped_at > read_s
        if stopped and self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Give aiohttp the bytes, unless they break a request that is being read."""
        if self._refused:
            return
        count = self._request_count
        if self._body is None or self._body.is_eof():  # the last piece of a body is no head
            self._head += data
        super().data_received(data)
        if self._request_count != count:
            if self._body is not None and not self._body.is_eof() and self._is_broken():
                self._break_off(self._body)
                return
            self._body = self._messages[-1][1] if self._messages else None
            if self._is_broken():
                return
            if len(self._head) > HEAD_BYTES and self._messages and self._is_too_large():
                self._messages.pop()
                self._refuse_head()
            else:
                self._head = b""
        elif len(self._head) > HEAD_BYTES:
            self._refuse_head()

    def _is_too_large(self) -> bool:
        """The head that came last, which is whole: a body may have come with it."""
        message, _ = self._messages[-1]
        assert not isinstance(message, _ErrInfo)
        return sum(len(n) + len(v) + 4 for n, v in message.raw_headers) > HEAD_BYTES

    def _refuse_head(self) -> None:
        """Have it answered as aiohttp answers what it cannot parse."""
        self._refused = True
        error = _HeadTooLarge(message="the head is too large")
        self._messages.append((_ErrInfo(400, error, error.message), EMPTY_PAYLOAD))
        self._request_count += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _is_broken(self) -> bool:
        return bool(self._messages) and isinstance(self._messages[-1][0], _ErrInfo)

    def _break_off(self, body: StreamReader) -> None:
        """A body that goes on as its head did not say: that request is told, and is the last one.

        aiohttp takes it for a second request, has that one answered, and leaves the first one
        waiting for its body.
        """
        failure, _ = self._messages.pop()
        assert isinstance(failure, _ErrInfo)
        body.set_exception(web.RequestPayloadError(failure.message.split("\n")[0].strip(" :.")))
        self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what was no request."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: it can only break off")
        found = _ORIGIN.search(self._head)
        origin = found[1].decode("latin-1").strip() if found else ""
        response = self._refuse(request, _told(status, exc, message or ""), origin)
        if self._refused:  # a close with bytes unread would take the answer back
            response.headers["Connection"] = "close"
            self._loop.call_later(LINGER_S, self.force_close)
        else:
            response.force_close()
        return response


def prepare(server: web.Server, refuse: Refuse) -> None:
    """Make `server` do as this module says."""
    server.request_factory = _factory(server.request_factory)
    server.request_handler = _handler(server.request_handler, refuse)


def _factory(inner: Callable[..., web.BaseRequest]) -> Callable[..., web.BaseRequest]:
    def make(message: Any, *rest: Any) -> web.BaseRequest:
        too_new = message.version > HttpVersion11
        if too_new:
            message = message._replace(version=HttpVersion11)
        if message.method == "UNKNOWN":  # aiohttp's word for what is not a request; we close it
            message = message._replace(version=HttpVersion11, should_close=False)
        too_old = message.version < HttpVersion10  # a request line without a version, as HTTP/0.9
        if too_old:
            message = message._replace(version=HttpVersion11)
        if "Upgrade" in message.headers:  # declined; aiohttp loses what came in one piece with it
            message = message._replace(should_close=True)
        raw = message.url.raw_path
        if len(raw) > 1 and raw.endswith("/"):
            url = message.url.with_path(raw.rstrip("/") or "/", encoded=True, keep_query=True)
            message = message._replace(url=url, path=str(url))
        request = inner(message, *rest)
        if too_new:
            text = "this is an HTTP/1.1 server: it speaks no later version on this connection"
            request[_REFUSED] = CallError(505, "http_version", text, final=True)
        elif too_old:
            text = "this is no HTTP/1.1 request: its first line does not end with a version"
            request[_REFUSED] = CallError(400, "bad_request", text)
        return request

    return make


def _handler(
    inner: Callable[[Any], Awaitable[web.StreamResponse]], refuse: Refuse
) -> Callable[[Any], Awaitable[web.StreamResponse]]:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        refused = request.get(_REFUSED)
        if refused is None:
            try:
                return await inner(request)
            except web.HTTPException as error:  # before the middlewares, e.g. of Expect
                text = error.text or error.reason
                refused = CallError(error.status, "http_error", text)
        response = refuse(request, refused, request.headers.get("Origin", ""))
        response.force_close()
        return response

    return handle


def _told(status: int, exc: BaseException | None, message: str) -> CallError:
    """What a caller is told of a request that aiohttp could not read."""
    if status >= 500:
        return internal_error()
    if isinstance(exc, _HeadTooLarge):
        text = f"the request's head has more than {HEAD_BYTES} bytes"
        return CallError(431, "head_too_large", text)
    if isinstance(exc, LineTooLong):
        text = f"a line of the request's head is longer than {LINE_BYTES} bytes"
        return CallError(431, "head_too_large", text)
    if "Too many headers" in message:
        return CallError(431, "head_too_large", f"the request has more than {HEADERS} headers")
    if isinstance(exc, ContentEncodingError) or "content-encoding" in message:
        text = "the body's Content-Encoding cannot be read; send gzip, deflate, zstd or none"
        return CallError(415, "unsupported_encoding", text)
    first = message.replace("Pause on PRI/Upgrade", "an HTTP/2 preface").split("\n")[0]
    first = first.strip(" :.") or "it cannot be parsed"
    return CallError(400, "bad_request", f"this is no HTTP/1.1 request: {first[:200]}")
