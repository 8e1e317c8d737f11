"""One call's exchange with a client and with replicas: held, sent, relayed, refused, broken off.

Rules this file keeps:
- the body and every byte of the answer pass unchanged and as they come; a client that does not
  read stops the engine's socket from being read;
- nothing goes to the client before the answer's first body byte (but the comments to one who
  waits for a stream), so until then a failed replica can be replaced;
- an answer that breaks off in the middle breaks the client's connection off too: it must not
  look complete.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from runtime.engine.guard import CLOSED
from runtime.router.admission import refusals
from runtime.router.admission.decisions import Decision, Forward, Held
from runtime.router.admission.gate import Gate
from runtime.router.admission.key_limits import GpuShare
from runtime.router.admission.refusals import Refused
from runtime.router.call.error_shapes import shape_of
from runtime.router.call.errors import CallError, engine_error
from runtime.router.call.made_responses import Made, MadeResponses, id_in
from runtime.router.call.outcome import BROKEN_OFF, HUNG_UP, Outcome, Tracer
from runtime.router.call.paths import RESPONSES
from runtime.router.call.request import ANONYMOUS, Call, Caller
from runtime.router.call.stream_usage import Strip, asking
from runtime.router.call.token_meter import Meter
from runtime.router.callers.keys import Keys, rate_headers, sees
from runtime.router.callers.memory import Memory, MemoryFull
from runtime.router.observe.metrics import RouterMetrics
from runtime.router.proxy.headers import (
    UNBUFFERED,
    is_closed,
    is_open_stream,
    own_headers,
    returned_headers,
    sent_headers,
    without_body,
)
from runtime.router.proxy.hedge import HEDGED, first_of
from runtime.router.proxy.responder import Client
from runtime.router.proxy.response_cache import Kept, Recorder, ResponseCache, Wanted
from runtime.router.proxy.upstream import (
    Headers,
    HostLost,
    Reply,
    Upstream,
    UpstreamError,
    UpstreamTimeout,
)
from runtime.wire.routes import Endpoint, ModelRoute

log = logging.getLogger("stoker.router")

_DIED = ("replica_failed", "retry_budget_spent")  # refusals of what a replica's engine died of
CAUSE_S = 2.0  # until a table tells why an engine died, its agent having seen the end of it
CACHE_HEADER = b"X-Stoker-Cache"
_ERROR_BYTES = 64 * 1024


@dataclass(slots=True, eq=False)
class Means:
    """What all exchanges of a router work with."""

    gate: Gate
    upstream: Upstream
    metrics: RouterMetrics
    keys: Keys
    cache: ResponseCache
    memory: Memory
    heartbeat_s: float
    shares: GpuShare = field(default_factory=GpuShare)
    stored: MadeResponses = field(default_factory=MadeResponses)
    tracer: Tracer | None = None


class Exchange:
    """The state of one call."""

    __slots__ = (
        "_hedge_after_s", "_loop", "_means", "_strips", "batch_rule", "began_at", "cache_rule",
        "call", "client", "gpu_s", "outcome", "status", "wanted",
    )  # fmt: skip

    def __init__(self, means: Means, call: Call, client: Client, route: ModelRoute | None) -> None:
        self._means = means
        self.call = call
        self.client = client
        self._loop = means.gate.loop
        self.began_at = self._loop.time()
        self.cache_rule = route.cache if route is not None else None
        self.batch_rule = route.batching if route is not None else None
        self._hedge_after_s = _hedge_after_s(route, call)
        self.wanted: Wanted | None = None  # of the cache
        self._strips = False  # usage out of the stream, which the caller did not ask for
        self.outcome = Outcome(call, route, self.began_at)
        if means.tracer is not None:
            self.outcome.trace = means.tracer.begin(self.outcome)
        self.status = HUNG_UP
        self.gpu_s = 0.0

    def answered_by(self, replica_id: str, status: int, held_s: float, gpu_s: float) -> None:
        """Note that another request brought the answer, and what part of it was this call's."""
        outcome = self.outcome
        self.status, self.gpu_s = status, gpu_s
        outcome.replica_id, outcome.held_s = replica_id, held_s
        outcome.ttft_s = self._loop.time() - self.began_at

    def rate_headers(self) -> Headers:
        """The header lines that say what is left of the caller's limits."""
        caller = self.call.caller
        return [] if caller is ANONYMOUS else rate_headers(caller, self._loop.time())

    async def run(self, decision: Decision) -> None:
        """Carry the call: wait, send, and try again until it is answered or refused."""
        send = self._timed if self._means.keys.any else self._forward
        while True:
            if isinstance(decision, Held):
                decision = await self._held(decision)
            if isinstance(decision, Refused):
                return await self._refuse(decision)
            try:
                return await send(decision)
            except UpstreamTimeout as error:  # it works on it: another replica would do no better
                self._warn(decision, error)
                message = f"model {self.call.model!r}: {error.reason}"
                late = Refused(decision.request_id, 504, error.limit, message)
                return await self._refuse(late)
            except UpstreamError as error:
                self._warn(decision, error)
                failed = decision.endpoint.replica_id
                decision = self._means.gate.failed(
                    decision.request_id, self.call.model, error.reason, error.delivered
                )
                told = not isinstance(error, HostLost)
                if told and isinstance(decision, Refused) and decision.code in _DIED:
                    decision = await self._with_cause(decision, failed)

    def _warn(self, forward: Forward, error: UpstreamError) -> None:
        log.warning(
            "request %s: replica %s of %s failed: %s",
            self.call.request_id, forward.endpoint.replica_id, self.call.model, error,
        )  # fmt: skip
        if self.outcome.trace is not None:
            self.outcome.trace.failed(error.reason)

    # -------------------------------------------------------------------------------- waiting

    async def _held(self, held: Held) -> Forward | Refused:
        since, trace = self._loop.time(), self.outcome.trace
        if trace is not None:  # what it waits for, as the table in force says it
            route = self._means.gate.find(self.call.model)
            trace.hold(route.waiting_for if route else None)
        turn, call = self._means.gate.turn(held.request_id), self.call
        try:
            with self._means.memory.waiting(call.caller.tenant, len(call.body)):
                return await (self._beat_until(turn) if call.streams else turn)
        except MemoryFull as error:
            return Refused(
                held.request_id, error.status, error.code, error.message, error.retry_after_s
            )
        finally:
            self.outcome.held_s += self._loop.time() - since
            if trace is not None:
                trace.let_go()

    async def _beat_until(self, turn: asyncio.Future[Forward | Refused]) -> Forward | Refused:
        """Comments to the waiting client, the first at once."""
        while not turn.done():
            await self._send_early(self._comment())
            await asyncio.wait([turn], timeout=self._means.heartbeat_s)
        return turn.result()

    def _comment(self) -> bytes:
        model = self.call.model
        route = self._means.gate.find(model)  # tables came while it waited
        reason = (route and route.waiting_for) or "a replica"
        text = f"waiting for {model}: {reason}, {self._loop.time() - self.began_at:.0f}s"
        if route and route.eta_s is not None:
            text += f", about {route.eta_s:.0f}s left"
        return f": {' '.join(text.split())}\n\n".encode()

    async def _send_early(self, data: bytes) -> None:
        if not self.client.begun:
            headers = [
                (b"Content-Type", b"text/event-stream; charset=utf-8"),
                (b"Cache-Control", b"no-cache"),
                UNBUFFERED,
            ]
            if self._is_spare():  # it is not known yet which model will answer
                headers.append((b"X-Request-ID", self.call.request_id.encode()))
            else:
                headers += own_headers(self.call)
            await self.client.begin(200, headers)
        await self.client.write(data)

    async def _refuse(self, refused: Refused) -> None:
        message, call = refused.message, self.call
        if refused.code == refusals.UNKNOWN and self._means.gate.find(call.model) is None:
            message += meant(self._means.gate, call.caller, call.model)
        error = CallError(
            refused.status, refused.code, message,
            param=refused.param, retry_after_s=refused.retry_after_s, final=refused.final or None,
        )  # fmt: skip
        if not self.client.begun or self._is_spare():
            raise error
        self.outcome.error = error.code
        await self._end_stream(error)

    async def _end_stream(self, error: CallError) -> None:
        """As an event: comments have gone out, and nothing else."""
        self.status = error.status
        await self.client.write(error.last_event(self.call.path, self.call.request_id))

    def _is_spare(self) -> bool:
        """If this model can't be had, another one is tried."""
        attempt = self.call.attempt
        return attempt is not None and attempt.spare

    # -------------------------------------------------------------------------------- forwarding

    async def _timed(self, forward: Forward) -> None:
        """Forward, and note the share of the replica's time: somebody pays for it."""
        shares, replica_id = self._means.shares, forward.endpoint.replica_id
        reading = shares.begin(replica_id, self._loop.time())
        try:
            await self._forward(forward)
        finally:
            now = self._loop.time()
            self.gpu_s += shares.end(replica_id, reading, forward.endpoint.devices, now)

    async def _forward(self, forward: Forward) -> None:
        """Send to the replica and relay. Raises UpstreamError while it can be tried elsewhere."""
        if self._hedge_after_s is None:
            reply = await self._post(forward.endpoint)
            try:
                return await self._relay(forward, reply)
            finally:
                reply.close()
        gate, metrics = self._means.gate, self._means.metrics
        heard, reply, twice = await first_of(gate, forward, self._post, self._hedge_after_s)
        if twice:
            metrics.hedged[self.outcome.model, "lost" if heard is forward else "won"] += 1
        try:
            await self._relay(heard, reply)
        except UpstreamError as error:
            if heard is forward:
                raise
            message = f"model {self.call.model!r}: {error.reason}"
            raise CallError(502, "replica_failed", message) from None
        finally:
            reply.close()
            if heard is not forward:
                gate.leave(heard.request_id)

    async def _post(self, endpoint: Endpoint) -> Reply:
        """Send to the replica; its answer's head."""
        call, trace = self.call, self.outcome.trace
        headers, upstream = sent_headers(call, endpoint.key), self._means.upstream
        if trace is not None:
            headers = trace.sent(headers, endpoint)
        asked = None
        if call.head.stream and call.caller.accounts:  # somebody pays for its tokens
            asked = self._asking()
            self._strips = asked is not None
        if asked is None:
            return await upstream.post(endpoint.base_url, call.path, headers, call.body)
        try:
            return await upstream.post(endpoint.base_url, call.path, headers, asked)
        finally:
            self._means.memory.give(len(asked))

    def _asking(self) -> bytes | None:
        """The body with the wish for usage, taken from the budget: it is held beside the caller's
        own until the answer begins. None: it needs none, or there is no room for it; then the
        events of its answer are counted."""
        asked = asking(self.call.path, self.call.body, self.call.head)
        if asked is not None:
            try:
                self._means.memory.take(len(asked))
            except MemoryFull:
                return None
        return asked

    async def _relay(self, forward: Forward, reply: Reply) -> None:
        """Hand the answer to the client. Raises UpstreamError while it has been told nothing."""
        call, client, outcome = self.call, self.client, self.outcome
        outcome.replica_id = forward.endpoint.replica_id
        if reply.status == 401:  # our key, not the caller's: the table is older than the replica
            raise UpstreamError("the replica refused this router's key", delivered=True)
        if reply.status == 503 and is_closed(reply.headers):
            raise UpstreamError(CLOSED, delivered=False)  # held until it wakes, or elsewhere
        if reply.status == 404 and (late := self._adapter_late(forward)):
            return await self._refuse(late)
        strip = Strip() if self._strips else None
        reply.meter = outcome.meter = meter = (
            Meter(strip) if self.wanted is None else Recorder(strip)
        )
        first = await reply.read()
        outcome.ttft_s = self._loop.time() - self.began_at
        self._means.gate.answered(forward.request_id, reply.status)
        self.status = reply.status
        if reply.status != 200 and (client.begun or self._is_foreign(reply)):
            return await self._tell_error(reply, first)
        if reply.status == 200 and call.path.startswith(RESPONSES):
            self._note_response(first)
        if not client.begun:
            headers = returned_headers(reply.headers, call) + self.rate_headers()
            if self.wanted is not None:
                headers.append((CACHE_HEADER, b"miss"))
            await client.begin(reply.status, headers)
        try:
            await client.relay(reply, first)
            if isinstance(meter, Recorder):
                self._keep_whole(reply, meter)
        except UpstreamError as error:
            log.warning("request %s: broken off: %s", call.request_id, error)
            outcome.error = BROKEN_OFF
            reply.close()
            await self.break_off(await self._broken(error, reply), reply)

    def _note_response(self, first: bytes) -> None:
        """Who made it, for a GET of it."""
        call, response_id = self.call, id_in(first)
        if response_id is not None and call.path.partition("?")[0] == RESPONSES:
            asked = call.attempt.asked if call.attempt is not None else call.model
            made = Made(call.caller.tenant, call.model, asked, self.outcome.replica_id)
            self._means.stored.keep(response_id, made)

    def _is_foreign(self, reply: Reply) -> bool:
        """Whether it is an error that the path's clients can't read: Anthropic's have types, and a
        shape, that engines use in part."""
        return reply.status >= 400 and shape_of(self.call.path) == "anthropic"

    async def _broken(self, error: UpstreamError, reply: Reply) -> CallError:
        message = f"model {self.call.model!r}: {error.reason}"
        if isinstance(error, UpstreamTimeout):
            return CallError(504, error.limit, message)
        told = not isinstance(error, HostLost)  # no agent is there to tell why
        if told and self.call.streams and is_open_stream(reply.headers):
            message += await self._cause(self.outcome.replica_id)
        return CallError(502, "replica_failed", message)

    async def _with_cause(self, refused: Refused, replica_id: str) -> Refused:
        if self._is_spare():  # another model is tried at once
            return refused
        return refused._replace(message=refused.message + await self._cause(replica_id))

    async def _cause(self, replica_id: str) -> str:
        """Why a replica's engine died, as the scheduler tells soon after; "": it does not."""
        until = self._loop.time() + CAUSE_S
        while (route := self._means.gate.find(self.call.model)) is not None:
            why = route.failures.get(replica_id) or route.refusal
            if why is not None:
                return f" ({why})"
            if self._loop.time() > until:
                break
            await asyncio.sleep(CAUSE_S / 40)
        return ""

    async def _tell_error(self, reply: Reply, first: bytes) -> None:
        """An engine's own error, for a client that would not understand it as it is."""
        call, client = self.call, self.client
        error = engine_error(reply.status, await _whole_error(reply, first))
        if client.begun:
            await self._end_stream(error)
            return
        body = error.body(call.path, call.request_id)
        kept = without_body(returned_headers(reply.headers, call))
        kept.append((b"Content-Type", b"application/json"))
        kept.append((b"Content-Length", b"%d" % len(body)))
        await client.begin(reply.status, kept + self.rate_headers())
        await client.write(body)

    async def break_off(self, error: CallError, reply: Reply | None = None) -> None:
        """An answer that is not whole, of `reply` or (None) of ours: told in its stream where an
        event can be, and cut off."""
        call, meter = self.call, self.outcome.meter
        sent = meter.told() if meter is not None else b""
        try:
            if call.streams and (is_open_stream(reply.headers) if reply else not sent):
                await self.client.write(error.last_event(call.path, call.request_id, sent))
        finally:
            self.client.break_off()

    def _keep_whole(self, reply: Reply, recorder: Recorder) -> None:
        """The whole answer has passed: it may be given again."""
        body = recorder.body()
        if body is None or self.wanted is None or reply.status != 200:
            return
        headers = {name.lower(): value for name, value in reply.headers}
        if b"content-encoding" in headers:
            return
        self.keep(headers.get(b"content-type", b"application/json"), body, self.wanted)

    def keep(self, content_type: bytes, body: bytes, asked: Wanted) -> None:
        """Keep an answer in the response cache."""
        assert self.cache_rule is not None
        kept = Kept(content_type, body, self._loop.time(), self.cache_rule.ttl_s)
        self._means.cache.keep(asked, kept)

    def _adapter_late(self, forward: Forward) -> Refused | None:
        """Why a replica does not know an adapter that the table lists: it was started without."""
        model = self.call.model
        route = self._means.gate.find(model)
        if route is None or model not in route.adapters:
            return None
        return refusals.adapter_late(forward.request_id, route)


def meant(gate: Gate, caller: Caller, model: str) -> str:
    """What an error about an unknown `model` adds: close names, of those `caller` may call."""
    table = gate.table
    models = table.models if table is not None else ()
    routes = (*models, *gate.versions.listed(models))
    known = (
        name
        for r in routes
        for name in (r.name, *r.aliases, *r.adapters)
        if sees(caller, (name, r.name, *r.aliases))
    )
    return refusals.meant(model, known)


def _hedge_after_s(route: ModelRoute | None, call: Call) -> float | None:
    if route is None or route.hedge_after_s is None or call.streams or call.path not in HEDGED:
        return None
    return route.hedge_after_s


async def _whole_error(reply: Reply, first: bytes) -> bytes:
    """All of an engine's error, of which `first` has come."""
    body = data = first
    while data and len(body) < _ERROR_BYTES:
        data = await reply.read()
        body += data
    return body
