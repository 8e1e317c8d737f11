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
from collections.abc import Iterable

import msgspec

from runtime.engine.guard import CLOSED, CLOSED_HEADER
from runtime.router.admission import RETRY_AFTER_S, Decision, Forward, Held, Refused, Wish
from runtime.router.call import Call
from runtime.router.client import Client
from runtime.router.errors import ApiError, sse_error
from runtime.router.gate import Gate
from runtime.router.metrics import Metrics
from runtime.router.upstream import Headers, Reply, Upstream, UpstreamError, UpstreamTimeout

log = logging.getLogger("stoker.router")

_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
# The body was read whole and inflated; the router speaks to the engine in its own name.
_NOT_SENT = _HOP_BY_HOP | {
    b"host", b"authorization", b"x-api-key", b"content-length", b"content-encoding", b"expect",
    b"x-request-id",
}  # fmt: skip
_NOT_RETURNED = _HOP_BY_HOP | {b"x-request-id"}
_ERROR_BYTES = 64 * 1024
_NAMES = 1024  # header names remembered; there are a few dozen


class Proxy:
    """Takes calls through the gate to a replica."""

    def __init__(
        self, gate: Gate, upstream: Upstream, metrics: Metrics, heartbeat_s: float
    ) -> None:
        self.gate = gate
        self.upstream = upstream
        self.metrics = metrics
        self.heartbeat_s = heartbeat_s

    async def serve(self, call: Call, client: Client) -> None:
        """Answer `client`. Raises ApiError while it has been told nothing."""
        caller = call.caller
        decision = self.gate.arrive(call.model, Wish(caller.tenant, caller.priority))
        exchange = _Exchange(self, call, client)
        status = 499  # unless it gets further than a hang-up
        try:
            await exchange.run(decision)
            status = exchange.status
        except ApiError as error:
            status = error.status
            raise
        except ConnectionError:  # the client hung up while we wrote
            if not client.begun:
                raise
        finally:
            self.gate.leave(decision.request_id)
            self.metrics.ended(call.model, status)


class _Exchange:
    """The state of one call."""

    __slots__ = ("_began_at", "_call", "_client", "_loop", "_proxy", "status")

    def __init__(self, proxy: Proxy, call: Call, client: Client) -> None:
        self._proxy = proxy
        self._call = call
        self._client = client
        self._loop = proxy.gate.loop
        self._began_at = self._loop.time()
        self.status = 499

    async def run(self, decision: Decision) -> None:
        while True:
            if isinstance(decision, Held):
                decision = await self._held(decision)
            if isinstance(decision, Refused):
                return await self._refuse(decision)
            try:
                return await self._forward(decision)
            except UpstreamTimeout as error:  # it works on it: another replica would do no better
                self._warn(decision, error)
                message = f"model {self._call.model!r}: {error.reason}"
                late = Refused(decision.request_id, 504, error.limit, message)
                return await self._refuse(late)
            except UpstreamError as error:
                self._warn(decision, error)
                decision = self._proxy.gate.failed(
                    decision.request_id, self._call.model, error.reason, error.delivered
                )

    def _warn(self, forward: Forward, error: UpstreamError) -> None:
        log.warning(
            "request %s: replica %s of %s failed: %s",
            self._call.request_id, forward.endpoint.replica_id, self._call.model, error,
        )  # fmt: skip

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

    async def _send_early(self, data: bytes) -> None:
        if not self._client.begun:
            headers = [
                (b"Content-Type", b"text/event-stream; charset=utf-8"),
                (b"Cache-Control", b"no-cache"),
                (b"X-Request-ID", self._call.request_id.encode()),
            ]
            await self._client.begin(200, headers)
        await self._client.write(data)

    async def _refuse(self, refused: Refused) -> None:
        error = ApiError(
            refused.status, refused.code, refused.message,
            param=refused.param, retry_after_s=refused.retry_after_s,
        )  # fmt: skip
        if not self._client.begun:
            raise error
        self.status = refused.status
        await self._send_early(sse_error(error.payload()))

    # -------------------------------------------------------------------------------- forwarding

    async def _forward(self, forward: Forward) -> None:
        """Send to the replica and relay. Raises UpstreamError while it can be tried elsewhere."""
        call, endpoint, client = self._call, forward.endpoint, self._client
        headers = _sent_headers(call, endpoint.key)
        reply = await self._proxy.upstream.post(endpoint.base_url, call.path, headers, call.body)
        try:
            if reply.status == 401:  # our key, not the caller's: the table is behind the replica
                raise UpstreamError("the replica refused this router's key", delivered=True)
            if reply.status == 503 and _is_closed(reply.headers):
                raise UpstreamError(CLOSED, delivered=False)  # held until it wakes, or elsewhere
            if reply.status == 404 and (late := self._adapter_late(forward)):
                return await self._refuse(late)
            first = await reply.read()
            self._proxy.metrics.first_byte(call.model, self._loop.time() - self._began_at)
            self._proxy.gate.answered(forward.request_id, reply.status)
            self.status = reply.status
            if not client.begun:
                await client.begin(reply.status, _returned_headers(reply.headers, call.request_id))
            elif reply.status != 200:
                return await self._send_early(sse_error(await _error_of(reply, first)))
            try:
                await client.relay(reply, first)
            except UpstreamError as error:
                log.warning("request %s: broken off: %s", call.request_id, error)
                client.break_off()
        finally:
            reply.close()

    def _adapter_late(self, forward: Forward) -> Refused | None:
        """Why a replica does not know an adapter that the table lists: it was started without."""
        model = self._call.model
        route = self._proxy.gate.find(model)
        if route is None or model not in route.adapters:
            return None
        message = f"no replica of {route.name!r} takes adapters yet: one that does will replace it"
        return Refused(
            forward.request_id, 503, "adapter_not_ready", message, RETRY_AFTER_S, "model"
        )


def _is_closed(headers: Headers) -> bool:
    """Whether the engine did not let the request in, as it is asleep or about to sleep."""
    return any(name.lower() == CLOSED_HEADER for name, _ in headers)


class _Dropped(dict[bytes, bool]):
    """Whether a header of that name, as it is written, is not passed on: one look-up."""

    def __init__(self, names: set[bytes]) -> None:
        super().__init__()
        self._names = names

    def __missing__(self, name: bytes) -> bool:
        dropped = name.lower() in self._names
        if len(self) < _NAMES:
            self[name] = dropped
        return dropped


_not_sent = _Dropped(_NOT_SENT)
_not_returned = _Dropped(_NOT_RETURNED)


def _passed(raw: Iterable[tuple[bytes, bytes]], dropped: _Dropped) -> Headers:
    """The headers that are not of this hop only."""
    options = b""
    kept = []
    for header in raw:
        if not dropped[header[0]]:
            kept.append(header)
        elif header[0].lower() == b"connection" and header[1].lower() != b"keep-alive":
            options += header[1].lower() + b","
    if options:
        named = {option.strip() for option in options.split(b",")}
        kept = [header for header in kept if header[0].lower() not in named]
    return kept


def _sent_headers(call: Call, key: str) -> list[bytes]:
    lines = [b"%b: %b" % header for header in _passed(call.headers, _not_sent)]
    lines.append(b"Authorization: Bearer %b\r\nX-Request-ID: %b" % (
        key.encode(), call.request_id.encode()
    ))  # fmt: skip
    return lines


def _returned_headers(raw: Headers, request_id: str) -> Headers:
    headers = _passed(raw, _not_returned)
    headers.append((b"X-Request-ID", request_id.encode()))
    return headers


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
