"""One call from a client to a replica and back: bytes in, bytes out.

Rules this file keeps:
- the body and every byte of the answer pass unchanged and as they come; a client that does not
  read stops the engine's socket from being read;
- nothing goes to the client before the answer's first body byte (but the comments to one who
  waits for a stream), so until then a failed replica can be replaced;
- an answer that breaks off in the middle breaks the client's connection off too: it must not
  look complete;
- a client that hangs up cancels this task, which closes the upstream connection at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from runtime.router.admission import Decision, Forward, Held, Refused
from runtime.router.errors import ApiError, sse_error
from runtime.router.gate import Gate
from runtime.router.metrics import Metrics
from runtime.router.upstream import Headers, Reply, Upstream, UpstreamError

log = logging.getLogger("stoker.router")

_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
# The body was read whole and inflated; the router speaks to the engine in its own name.
_NOT_SENT = _HOP_BY_HOP | {
    b"host", b"authorization", b"content-length", b"content-encoding", b"expect", b"x-request-id",
}  # fmt: skip
_NOT_RETURNED = _HOP_BY_HOP | {b"x-request-id"}
_ERROR_BYTES = 64 * 1024


@dataclass(slots=True, frozen=True)
class Call:
    """One inference call: `path` is the engine's raw request target, `model` the caller's word."""

    request: web.Request
    request_id: str
    model: str
    path: str
    body: bytes
    streams: bool  # the answer will be server-sent events


class Proxy:
    """Takes calls through the gate to a replica."""

    def __init__(
        self, gate: Gate, upstream: Upstream, metrics: Metrics, heartbeat_s: float
    ) -> None:
        self.gate = gate
        self.upstream = upstream
        self.metrics = metrics
        self.heartbeat_s = heartbeat_s

    async def serve(self, call: Call) -> web.StreamResponse:
        """The answer, already sent where it has a body from an engine. Raises ApiError."""
        decision = self.gate.arrive(call.model)
        exchange = _Exchange(self, call)
        status = 499  # unless it gets further than a hang-up
        try:
            response = await exchange.run(decision)
            status = exchange.status
            return response
        except ApiError as error:
            status = error.status
            raise
        except ConnectionError:  # the client hung up while we wrote
            if exchange.begun is None:
                raise
            return exchange.begun
        finally:
            self.gate.leave(decision.request_id)
            self.metrics.ended(call.model, status)


class _Exchange:
    """The state of one call."""

    def __init__(self, proxy: Proxy, call: Call) -> None:
        self._proxy = proxy
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self.begun: web.StreamResponse | None = None  # set once the client has our headers
        self.status = 499

    async def run(self, decision: Decision) -> web.StreamResponse:
        while True:
            if isinstance(decision, Held):
                decision = await self._held(decision)
            if isinstance(decision, Refused):
                return await self._refuse(decision)
            try:
                return await self._forward(decision)
            except UpstreamError as error:
                log.warning(
                    "request %s: replica %s of %s failed: %s",
                    self._call.request_id, decision.endpoint.replica_id, self._call.model, error,
                )  # fmt: skip
                decision = self._proxy.gate.failed(
                    decision.request_id, self._call.model, error.reason, error.delivered
                )

    # -------------------------------------------------------------------------------- waiting

    async def _held(self, held: Held) -> Forward | Refused:
        since = self._loop.time()
        turn = self._proxy.gate.turn(held.request_id)
        if not self._call.streams:
            decision = await turn
        else:
            decision = await self._beat_until(turn)
        self._proxy.metrics.held(self._call.model, self._loop.time() - since)
        return decision

    async def _beat_until(self, turn: asyncio.Future[Forward | Refused]) -> Forward | Refused:
        """Comments to the waiting client, the first at once."""
        while not turn.done():
            await self._send_early(self._comment())
            await asyncio.wait([turn], timeout=self._proxy.heartbeat_s)
        return turn.result()

    def _comment(self) -> bytes:
        model = self._call.model
        route = self._proxy.gate.find(model)
        reason = (route and route.waiting_for) or "a replica"
        text = f"waiting for {model}: {reason}, {self._loop.time() - self._began_at:.0f}s"
        if route and route.eta_s is not None:
            text += f", about {route.eta_s:.0f}s left"
        return f": {' '.join(text.split())}\n\n".encode()

    async def _send_early(self, data: bytes) -> web.StreamResponse:
        if self.begun is None:
            headers = {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Request-ID": self._call.request_id,
            }
            self.begun = web.StreamResponse(headers=headers)
            await self.begun.prepare(self._call.request)
        await self.begun.write(data)
        return self.begun

    async def _refuse(self, refused: Refused) -> web.StreamResponse:
        error = ApiError(
            refused.status, refused.code, refused.message,
            param=refused.param, retry_after_s=refused.retry_after_s,
        )  # fmt: skip
        if self.begun is None:
            raise error
        self.status = refused.status
        return await self._send_early(sse_error(error.payload()))

    # -------------------------------------------------------------------------------- forwarding

    async def _forward(self, forward: Forward) -> web.StreamResponse:
        """Send to the replica and relay. Raises UpstreamError while it can be tried elsewhere."""
        call, endpoint = self._call, forward.endpoint
        headers = _sent_headers(call, endpoint.key)
        reply = await self._proxy.upstream.post(endpoint.base_url, call.path, headers, call.body)
        try:
            if reply.status == 401:  # our key, not the caller's: the table is behind the replica
                raise UpstreamError("the replica refused this router's key", delivered=True)
            first = await reply.read()
            self._proxy.metrics.first_byte(call.model, self._loop.time() - self._began_at)
            self.status = reply.status
            if self.begun is not None and reply.status != 200:
                return await self._send_early(sse_error(await _error_of(reply, first)))
            return await self._relay(reply, first)
        finally:
            reply.close()

    async def _relay(self, reply: Reply, data: bytes) -> web.StreamResponse:
        response = self.begun
        if response is None:
            headers = _returned_headers(reply.headers, self._call.request_id)
            self.begun = response = web.StreamResponse(status=reply.status, headers=headers)
            await response.prepare(self._call.request)
        try:
            while data:
                await response.write(data)
                data = await reply.read()
        except UpstreamError as error:
            log.warning("request %s: broken off: %s", self._call.request_id, error)
            self._break_off(response)
        return response

    def _break_off(self, response: web.StreamResponse) -> None:
        """End the client's connection so that its answer cannot be taken for a whole one."""
        transport = self._call.request.transport
        if transport is None:
            return
        if response.content_length is not None or self._call.request.version >= HttpVersion11:
            transport.close()  # what is buffered still goes out; the framing shows the gap
        else:
            linger_not = struct.pack("ii", 1, 0)  # a reset: here a mere end would look like success
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
            transport.abort()


def _sent_headers(call: Call, key: str) -> list[bytes]:
    raw = call.request.raw_headers
    dropped = _NOT_SENT | _connection_options(raw)
    lines = [b"%b: %b" % (n, v) for n, v in raw if n.lower() not in dropped]
    lines.append(b"Authorization: Bearer " + key.encode())
    lines.append(b"X-Request-ID: " + call.request_id.encode())
    return lines


def _returned_headers(raw: Headers, request_id: str) -> CIMultiDict[str]:
    dropped = _NOT_RETURNED | _connection_options(raw)
    headers: CIMultiDict[str] = CIMultiDict(
        (n.decode("latin-1"), v.decode("utf-8", "replace"))
        for n, v in raw
        if n.lower() not in dropped
    )
    headers["X-Request-ID"] = request_id
    return headers


def _connection_options(raw: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """The header names that a Connection header declares to be for this hop only."""
    return {
        option.strip().lower()
        for name, value in raw
        if name.lower() == b"connection"
        for option in value.split(b",")
    }


async def _error_of(reply: Reply, data: bytes) -> dict[str, object]:
    """An engine's error answer as OpenAI's error object, for a stream already begun."""
    body = data
    while data and len(body) < _ERROR_BYTES:
        data = await reply.read()
        body += data
    try:
        raw = msgspec.json.decode(body)
    except msgspec.DecodeError:
        raw = None
    if isinstance(raw, dict) and isinstance(raw.get("error"), dict):
        return raw
    message = f"the engine answered with status {reply.status}"
    return ApiError(reply.status, "engine_error", message).payload()
