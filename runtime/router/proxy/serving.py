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
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from runtime.engine.guard import CLOSED
from runtime.router.admission import refusals
from runtime.router.admission.decisions import Decision, Forward, Held
from runtime.router.admission.fairness import Wish
from runtime.router.admission.gate import Gate
from runtime.router.admission.key_limits import GpuShare
from runtime.router.admission.refusals import Refused
from runtime.router.call.error_shapes import shape_of
from runtime.router.call.errors import ApiError, engine_error, internal_error
from runtime.router.call.made_responses import Made, Stored, id_in
from runtime.router.call.outcome import BROKEN_OFF, HUNG_UP, Observer, Outcome
from runtime.router.call.paths import RESPONSES
from runtime.router.call.prompt import keys_of, taken_tokens, tokens_of
from runtime.router.call.request import ANONYMOUS, Call, Caller
from runtime.router.call.stream_usage import Strip, asking
from runtime.router.call.token_meter import Meter
from runtime.router.callers.caller_timeout import patience
from runtime.router.callers.forwarded import Forwarded
from runtime.router.callers.keys import Keys, may, rate_headers, sees
from runtime.router.callers.memory import Memory, MemoryFull
from runtime.router.observe.access_log import AccessLog
from runtime.router.observe.metrics import Metrics
from runtime.router.proxy.batcher import Batcher
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
from runtime.router.proxy.response_cache import Kept, Recorder, ResponseCache, Wanted, wanted
from runtime.router.proxy.route_serving import Routed
from runtime.router.proxy.upstream import (
    Headers,
    HostLost,
    Reply,
    Upstream,
    UpstreamError,
    UpstreamTimeout,
)
from runtime.wire.routes import Endpoint, ModelRoute

if TYPE_CHECKING:  # it needs packages that need not be there
    from runtime.router.observe.tracing import Tracer

log = logging.getLogger("stoker.router")

_DIED = ("replica_failed", "retry_budget_spent")  # refusals of what a replica's engine died of
CAUSE_S = 2.0  # until a table tells why an engine died, its agent having seen the end of it
CACHE_HEADER = b"X-Stoker-Cache"
_ERROR_BYTES = 64 * 1024


class Proxy:
    """Takes calls through the gate to a replica."""

    def __init__(
        self,
        gate: Gate,
        upstream: Upstream,
        metrics: Metrics,
        keys: Keys,
        cache: ResponseCache,
        heartbeat_s: float,
        memory: Memory | None = None,
        forwarded: Forwarded | None = None,
    ) -> None:
        self.gate = gate
        self.memory = memory or Memory()
        self.forwarded = forwarded or Forwarded()
        self.keys = keys
        self.cache = cache
        self.shares = GpuShare()
        self.stored = Stored()
        self.others_made: Callable[[str], Awaitable[Made | None]] | None = None  # of other workers
        self.upstream = upstream
        self.metrics = metrics
        self.heartbeat_s = heartbeat_s
        self.observers: list[Observer] = []  # told of each call's end; they do not raise
        self.access_log: AccessLog | None = None  # one of them, for who answers without us
        self.tracer: Tracer | None = None
        self.routed = Routed(self)
        self.batcher = Batcher(self)

    async def serve(self, call: Call, client: Client) -> None:
        """Answer `client`. Raises ApiError while it has been told nothing."""
        ways = self.gate.versions.ways
        if call.model in ways and call.attempt is None:
            return await self.routed.serve(ways[call.model], call, client)
        caller, route = call.caller, self.gate.find(call.model)
        wish, decision, charged = self._wish(call, route), None, False
        exchange = _Exchange(self, call, client, route)
        outcome, status = exchange.outcome, HUNG_UP  # unless it gets further
        try:
            if caller is not ANONYMOUS:
                self._let_in(call, route, wish.tokens)
                charged = True
            if call.path.startswith(RESPONSES):
                await self._check_stored(call)
            if exchange.has_no_short_cut or not await exchange.by_a_short_cut():
                decision = self.gate.arrive(call.model, wish)
                await exchange.run(decision)
            status = exchange.status
        except ApiError as error:
            status = error.status
            outcome.error = error.code
            raise
        except ConnectionError:  # the client hung up while we wrote
            if not client.begun:
                raise
        except Exception:
            status, outcome.error = 500, "internal_error"
            if not client.begun:
                raise
            log.exception("request %s failed inside the router", call.request_id)
            await exchange.break_off(internal_error())
        finally:
            if decision is not None:
                self.gate.leave(decision.request_id)
            outcome.status = status
            self._tell(outcome)
            if charged:
                self._settle(caller, wish.tokens, exchange)

    async def _check_stored(self, call: Call) -> None:
        """Whether it may go on with the response that it names. Raises ApiError (400, 404)."""
        if self.others_made is not None and self.keys.any:
            for response_id in self.stored.named(call.head):
                if (made := await self.others_made(response_id)) is not None:
                    self.stored.keep(response_id, made)
        self.stored.check(call.head, call.caller.tenant, self.keys.any)

    async def carry(self, call: Call, client: Client) -> _Exchange:
        """Serve a call of the router's own: nobody is charged, nothing is counted."""
        route = self.gate.find(call.model)
        exchange = _Exchange(self, call, client, route)
        decision = self.gate.arrive(call.model, self._wish(call, route))
        try:
            await exchange.run(decision)
        finally:
            self.gate.leave(decision.request_id)
        return exchange

    def _settle(self, caller: Caller, expected: int, exchange: _Exchange) -> None:
        """Charge what was taken, and not what was expected."""
        outcome = exchange.outcome
        answered = outcome.ttft_s is not None and exchange.status < 400
        hung_up = exchange.status == HUNG_UP and exchange.gpu_s > 0
        tokens = taken_tokens(
            outcome.call.body, expected, outcome.usage, answered=answered,
            worked_s=outcome.total_s - outcome.held_s if hung_up else 0.0,
        )  # fmt: skip
        self.keys.end(caller, expected, tokens, exchange.gpu_s)

    def _tell(self, outcome: Outcome) -> None:
        outcome.end(self.gate.loop.time())
        self.metrics.ended(outcome)
        if outcome.call.attempt is not None:
            self.routed.ended(outcome)
        for observer in self.observers:
            observer(outcome)
        if outcome.trace is not None:
            outcome.trace.end()

    def _let_in(self, call: Call, route: ModelRoute | None, tokens: int) -> None:
        """Charge a caller with a key. Raises ApiError (403, 429): then nothing was charged."""
        attempt = call.attempt
        name, asked = route.name if route else call.model, call.model
        if attempt is not None:  # who may call a route may call what it leads to
            name, asked = attempt.route, attempt.asked
        _check_scope(call.caller, name, asked, call.path)
        again = attempt is not None and attempt.again
        self.keys.begin(call.caller, tokens, self.gate.loop.time(), again, call.counted)

    def check_scope(self, caller: Caller, model: str, path: str) -> None:
        """Raises ApiError (403) where `caller` may not call `path` of `model`, which may be a
        route's name: what `serve` would say, for a call that is answered later."""
        route, way = self.gate.find(model), self.gate.versions.ways.get(model)
        name = way.route if way is not None else route.name if route is not None else model
        _check_scope(caller, name, model, path)

    def meant(self, caller: Caller, model: str) -> str:
        """What an error about an unknown `model` adds: close names, of those `caller` may call."""
        table = self.gate.table
        models = table.models if table is not None else ()
        routes = (*models, *self.gate.versions.listed(models))
        known = (
            name
            for r in routes
            for name in (r.name, *r.aliases, *r.adapters)
            if sees(caller, (name, r.name, *r.aliases))
        )
        return refusals.meant(model, known)

    def _wish(self, call: Call, route: ModelRoute | None) -> Wish:
        """Keys of the prompt are made only where there is a choice of replicas, and how long the
        caller waits is looked for only where it may have to."""
        caller = call.caller
        tokens = tokens_of(call.body, call.head)
        keys: tuple[int, ...] = ()
        waits = None
        if route is not None:
            if len(route.endpoints) > 1 and route.affinity == "prefix":
                name = call.model if call.model in route.adapters else route.name
                keys = keys_of(call.path, call.headers, call.body, call.head, name, caller.tenant)
            if not route.endpoints or self.gate.waiting(route.name):
                waits = patience(call.headers, call.streams)
        wait_s, limit = waits or (None, "")
        return Wish(caller.tenant, caller.priority, tokens, keys, wait_s, caller.weight, limit)


class _Exchange:
    """The state of one call."""

    __slots__ = (
        "_asked", "_batching", "_began_at", "_call", "_client", "_hedge_after_s", "_loop", "_proxy",
        "_rule", "_strips", "gpu_s", "outcome", "status",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, call: Call, client: Client, route: ModelRoute | None) -> None:
        self._proxy = proxy
        self._call = call
        self._client = client
        self._loop = proxy.gate.loop
        self._began_at = self._loop.time()
        self._rule = route.cache if route is not None else None
        self._batching = route.batching if route is not None else None
        self._hedge_after_s = _hedge_after_s(route, call)
        self._asked: Wanted | None = None  # of the cache
        self._strips = False  # usage out of the stream, which the caller did not ask for
        self.outcome = Outcome(call, route, self._began_at)
        if proxy.tracer is not None:
            self.outcome.trace = proxy.tracer.begin(self.outcome)
        self.status = HUNG_UP
        self.gpu_s = 0.0

    @property
    def has_no_short_cut(self) -> bool:
        """Neither are answers kept of this model, nor do its calls share requests."""
        return self._rule is None and self._batching is None

    async def by_a_short_cut(self) -> bool:
        """Whether the answer was there already, or came by a request that others shared."""
        return await self._replay() or await self._share()

    async def _replay(self) -> bool:
        """Whether the answer was one that is kept."""
        if self._rule is None or self._client.begun:
            return False
        call = self._call
        self._asked = asked = wanted(
            self._rule, call.caller.tenant, call.path, call.headers, call.body, call.head
        )
        if asked is None:
            return False
        kept = self._proxy.cache.look(self.outcome.model, asked, self._began_at)
        if kept is None:
            return False
        self.status = 200
        self.outcome.cached = True
        headers = [
            (b"Content-Type", kept.content_type),
            (b"Content-Length", b"%d" % len(kept.body)),
            (b"Age", b"%d" % (self._began_at - kept.kept_at)),
            (CACHE_HEADER, b"hit"),
            *own_headers(call),
        ]
        await self._client.begin(200, headers + self._rate_headers())
        await self._client.write(kept.body)
        return True

    async def _share(self) -> bool:
        """Whether the answer came by a request that others shared."""
        rule, call = self._batching, self._call
        if rule is None or call.streams:
            return False
        answer = await self._proxy.batcher.ask(rule, call)
        if answer is None:
            return False
        outcome = self.outcome
        self.status, self.gpu_s = answer.status, answer.gpu_s
        outcome.replica_id, outcome.held_s = answer.replica_id, answer.held_s
        outcome.ttft_s = self._loop.time() - self._began_at
        outcome.meter = Meter()
        outcome.meter.feed(answer.body)
        if self._asked is not None and answer.status == 200:
            self._keep(b"application/json", answer.body, self._asked)
        headers = [
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(answer.body)),
            *own_headers(call),
        ]
        await self._client.begin(answer.status, headers + self._rate_headers())
        await self._client.write(answer.body)
        return True

    def _rate_headers(self) -> Headers:
        caller = self._call.caller
        return [] if caller is ANONYMOUS else rate_headers(caller, self._loop.time())

    async def run(self, decision: Decision) -> None:
        send = self._timed if self._proxy.keys.any else self._forward
        while True:
            if isinstance(decision, Held):
                decision = await self._held(decision)
            if isinstance(decision, Refused):
                return await self._refuse(decision)
            try:
                return await send(decision)
            except UpstreamTimeout as error:  # it works on it: another replica would do no better
                self._warn(decision, error)
                message = f"model {self._call.model!r}: {error.reason}"
                late = Refused(decision.request_id, 504, error.limit, message)
                return await self._refuse(late)
            except UpstreamError as error:
                self._warn(decision, error)
                failed = decision.endpoint.replica_id
                decision = self._proxy.gate.failed(
                    decision.request_id, self._call.model, error.reason, error.delivered
                )
                told = not isinstance(error, HostLost)
                if told and isinstance(decision, Refused) and decision.code in _DIED:
                    decision = await self._with_cause(decision, failed)

    def _warn(self, forward: Forward, error: UpstreamError) -> None:
        log.warning(
            "request %s: replica %s of %s failed: %s",
            self._call.request_id, forward.endpoint.replica_id, self._call.model, error,
        )  # fmt: skip
        if self.outcome.trace is not None:
            self.outcome.trace.failed(error.reason)

    # -------------------------------------------------------------------------------- waiting

    async def _held(self, held: Held) -> Forward | Refused:
        since, trace = self._loop.time(), self.outcome.trace
        if trace is not None:
            route = self._proxy.gate.find(self._call.model)
            trace.hold(route.waiting_for if route else None)
        turn, call = self._proxy.gate.turn(held.request_id), self._call
        try:
            with self._proxy.memory.waiting(call.caller.tenant, len(call.body)):
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
                UNBUFFERED,
            ]
            if self._is_spare():  # it is not known yet which model will answer
                headers.append((b"X-Request-ID", self._call.request_id.encode()))
            else:
                headers += own_headers(self._call)
            await self._client.begin(200, headers)
        await self._client.write(data)

    async def _refuse(self, refused: Refused) -> None:
        message, call = refused.message, self._call
        if refused.code == refusals.UNKNOWN and self._proxy.gate.find(call.model) is None:
            message += self._proxy.meant(call.caller, call.model)
        error = ApiError(
            refused.status, refused.code, message,
            param=refused.param, retry_after_s=refused.retry_after_s, final=refused.final or None,
        )  # fmt: skip
        if not self._client.begun or self._is_spare():
            raise error
        self.outcome.error = error.code
        await self._end_stream(error)

    async def _end_stream(self, error: ApiError) -> None:
        """As an event: comments have gone out, and nothing else."""
        self.status = error.status
        await self._client.write(error.last_event(self._call.path, self._call.request_id))

    def _is_spare(self) -> bool:
        """If this model can't be had, another one is tried."""
        attempt = self._call.attempt
        return attempt is not None and attempt.spare

    # -------------------------------------------------------------------------------- forwarding

    async def _timed(self, forward: Forward) -> None:
        """Forward, and note the share of the replica's time: somebody pays for it."""
        shares, replica_id = self._proxy.shares, forward.endpoint.replica_id
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
        gate, metrics = self._proxy.gate, self._proxy.metrics
        heard, reply, twice = await first_of(gate, forward, self._post, self._hedge_after_s)
        if twice:
            metrics.hedged[self.outcome.model, "lost" if heard is forward else "won"] += 1
        try:
            await self._relay(heard, reply)
        except UpstreamError as error:
            if heard is forward:
                raise
            message = f"model {self._call.model!r}: {error.reason}"
            raise ApiError(502, "replica_failed", message) from None
        finally:
            reply.close()
            if heard is not forward:
                gate.leave(heard.request_id)

    async def _post(self, endpoint: Endpoint) -> Reply:
        """Send to the replica; its answer's head."""
        call, trace = self._call, self.outcome.trace
        headers, upstream = sent_headers(call, endpoint.key), self._proxy.upstream
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
            self._proxy.memory.give(len(asked))

    def _asking(self) -> bytes | None:
        """The body with the wish for usage, taken from the budget: it is held beside the caller's
        own until the answer begins. None: it needs none, or there is no room for it; then the
        events of its answer are counted."""
        asked = asking(self._call.path, self._call.body, self._call.head)
        if asked is not None:
            try:
                self._proxy.memory.take(len(asked))
            except MemoryFull:
                return None
        return asked

    async def _relay(self, forward: Forward, reply: Reply) -> None:
        """Hand the answer to the client. Raises UpstreamError while it has been told nothing."""
        call, client, outcome = self._call, self._client, self.outcome
        outcome.replica_id = forward.endpoint.replica_id
        if reply.status == 401:  # our key, not the caller's: the table is behind the replica
            raise UpstreamError("the replica refused this router's key", delivered=True)
        if reply.status == 503 and is_closed(reply.headers):
            raise UpstreamError(CLOSED, delivered=False)  # held until it wakes, or elsewhere
        if reply.status == 404 and (late := self._adapter_late(forward)):
            return await self._refuse(late)
        strip = Strip() if self._strips else None
        reply.meter = outcome.meter = meter = (
            Meter(strip) if self._asked is None else Recorder(strip)
        )
        first = await reply.read()
        outcome.ttft_s = self._loop.time() - self._began_at
        self._proxy.gate.answered(forward.request_id, reply.status)
        self.status = reply.status
        if reply.status != 200 and (client.begun or self._is_foreign(reply)):
            return await self._tell_error(reply, first)
        if reply.status == 200 and call.path.startswith(RESPONSES):
            self._note_response(first)
        if not client.begun:
            headers = returned_headers(reply.headers, call) + self._rate_headers()
            if self._asked is not None:
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
        call, response_id = self._call, id_in(first)
        if response_id is not None and call.path.partition("?")[0] == RESPONSES:
            asked = call.attempt.asked if call.attempt is not None else call.model
            made = Made(call.caller.tenant, call.model, asked, self.outcome.replica_id)
            self._proxy.stored.keep(response_id, made)

    def _is_foreign(self, reply: Reply) -> bool:
        """Whether it is an error that the path's clients can't read: Anthropic's have types, and a
        shape, that engines use in part."""
        return reply.status >= 400 and shape_of(self._call.path) == "anthropic"

    async def _broken(self, error: UpstreamError, reply: Reply) -> ApiError:
        message = f"model {self._call.model!r}: {error.reason}"
        if isinstance(error, UpstreamTimeout):
            return ApiError(504, error.limit, message)
        told = not isinstance(error, HostLost)  # no agent is there to tell why
        if told and self._call.streams and is_open_stream(reply.headers):
            message += await self._cause(self.outcome.replica_id)
        return ApiError(502, "replica_failed", message)

    async def _with_cause(self, refused: Refused, replica_id: str) -> Refused:
        if self._is_spare():  # another model is tried at once
            return refused
        return refused._replace(message=refused.message + await self._cause(replica_id))

    async def _cause(self, replica_id: str) -> str:
        """Why a replica's engine died, as the scheduler tells soon after; "": it does not."""
        until = self._loop.time() + CAUSE_S
        while (route := self._proxy.gate.find(self._call.model)) is not None:
            why = route.failures.get(replica_id) or route.refusal
            if why is not None:
                return f" ({why})"
            if self._loop.time() > until:
                break
            await asyncio.sleep(CAUSE_S / 40)
        return ""

    async def _tell_error(self, reply: Reply, first: bytes) -> None:
        """An engine's own error, for a client that would not understand it as it is."""
        call, client = self._call, self._client
        error = engine_error(reply.status, await _whole_error(reply, first))
        if client.begun:
            await self._end_stream(error)
            return
        body = error.body(call.path, call.request_id)
        kept = without_body(returned_headers(reply.headers, call))
        kept.append((b"Content-Type", b"application/json"))
        kept.append((b"Content-Length", b"%d" % len(body)))
        await client.begin(reply.status, kept + self._rate_headers())
        await client.write(body)

    async def break_off(self, error: ApiError, reply: Reply | None = None) -> None:
        """An answer that is not whole, of `reply` or (None) of ours: told in its stream where an
        event can be, and cut off."""
        call, meter = self._call, self.outcome.meter
        sent = meter.told() if meter is not None else b""
        try:
            if call.streams and (is_open_stream(reply.headers) if reply else not sent):
                await self._client.write(error.last_event(call.path, call.request_id, sent))
        finally:
            self._client.break_off()

    def _keep_whole(self, reply: Reply, recorder: Recorder) -> None:
        """The whole answer has passed: it may be given again."""
        body = recorder.body()
        if body is None or self._asked is None or reply.status != 200:
            return
        headers = {name.lower(): value for name, value in reply.headers}
        if b"content-encoding" in headers:
            return
        self._keep(headers.get(b"content-type", b"application/json"), body, self._asked)

    def _keep(self, content_type: bytes, body: bytes, asked: Wanted) -> None:
        assert self._rule is not None
        kept = Kept(content_type, body, self._loop.time(), self._rule.ttl_s)
        self._proxy.cache.keep(asked, kept)

    def _adapter_late(self, forward: Forward) -> Refused | None:
        """Why a replica does not know an adapter that the table lists: it was started without."""
        model = self._call.model
        route = self._proxy.gate.find(model)
        if route is None or model not in route.adapters:
            return None
        return refusals.adapter_late(forward.request_id, route)


def _check_scope(caller: Caller, name: str, asked: str, path: str) -> None:
    path = path.partition("?")[0]
    if not may(caller, (name,), asked, path):
        message = f"this API key may not call {path} of model {asked!r}"
        raise ApiError(403, "not_allowed", message)


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
