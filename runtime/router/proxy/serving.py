"""Every call's way through the router: let in, counted, sent by a route or to a model, settled.

Rules this file keeps:
- each call is told of once, at its end, whatever became of it;
- who was charged is settled with, by what was taken and not by what was expected;
- a client that hangs up cancels this task, which closes the upstream connection at once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from runtime.router.admission.fairness import RequestProfile
from runtime.router.admission.gate import Gate
from runtime.router.call.errors import CallError, internal_error
from runtime.router.call.made_responses import Made
from runtime.router.call.outcome import HUNG_UP, Observer, Outcome
from runtime.router.call.paths import RESPONSES
from runtime.router.call.prompt import keys_of, taken_tokens, tokens_of
from runtime.router.call.request import ANONYMOUS, Call, Caller
from runtime.router.callers.caller_timeout import patience
from runtime.router.callers.forwarded import Forwarded
from runtime.router.callers.keys import Keys, may
from runtime.router.callers.memory import Memory
from runtime.router.observe.access_log import AccessLog
from runtime.router.observe.metrics import RouterMetrics
from runtime.router.proxy.batcher import Batcher
from runtime.router.proxy.exchange import Exchange, Means
from runtime.router.proxy.responder import Client
from runtime.router.proxy.response_cache import ResponseCache
from runtime.router.proxy.route_serving import RouteServing
from runtime.router.proxy.short_cuts import ShortCuts
from runtime.router.proxy.upstream import (
    Upstream,
)
from runtime.wire.routes import ModelRoute

log = logging.getLogger("stoker.router")


class Proxy:
    """Takes calls through the gate to a replica."""

    def __init__(
        self,
        gate: Gate,
        upstream: Upstream,
        metrics: RouterMetrics,
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
        self.upstream = upstream
        self.metrics = metrics
        self.means = Means(gate, upstream, metrics, keys, cache, self.memory, heartbeat_s)
        self.stored = self.means.stored
        self.others_made: Callable[[str], Awaitable[Made | None]] | None = None  # of other workers
        self.observers: list[Observer] = []  # told of each call's end; they do not raise
        self.access_log: AccessLog | None = None  # one of them, for who answers without us
        self.routed = RouteServing(gate, self.serve)
        self.batcher = Batcher(gate.loop, self.memory, self.carry)
        self._short_cuts = ShortCuts(cache, self.batcher)

    async def serve(self, call: Call, client: Client) -> None:
        """Answer `client`. Raises CallError while it has been told nothing."""
        ways = self.gate.versions.ways
        if call.model in ways and call.attempt is None:
            return await self.routed.serve(ways[call.model], call, client)
        caller, route = call.caller, self.gate.find(call.model)
        profile, decision, charged = self._profile(call, route), None, False
        exchange = Exchange(self.means, call, client, route)
        outcome, status = exchange.outcome, HUNG_UP  # unless it gets further
        try:
            if caller is not ANONYMOUS:
                self._let_in(call, route, profile.tokens)
                charged = True
            if call.path.startswith(RESPONSES):
                await self._check_stored(call)
            if not self._short_cuts.offered(exchange) or not await self._short_cuts.taken(exchange):
                # It looks the route up again: what was awaited may have outlived our table.
                decision = self.gate.arrive(call.model, profile)
                await exchange.run(decision)
            status = exchange.status
        except CallError as error:
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
                self._settle(caller, profile.tokens, exchange)

    async def _check_stored(self, call: Call) -> None:
        """Whether it may go on with the response that it names. Raises CallError (400, 404)."""
        if self.others_made is not None and self.keys.any:
            for response_id in self.stored.named(call.head):
                if (made := await self.others_made(response_id)) is not None:
                    self.stored.keep(response_id, made)
        self.stored.check(call.head, call.caller.tenant, self.keys.any)

    async def carry(self, call: Call, client: Client) -> Exchange:
        """Serve a call of the router's own: nobody is charged, nothing is counted."""
        route = self.gate.find(call.model)
        exchange = Exchange(self.means, call, client, route)
        decision = self.gate.arrive(call.model, self._profile(call, route))
        try:
            await exchange.run(decision)
        finally:
            self.gate.leave(decision.request_id)
        return exchange

    def _settle(self, caller: Caller, expected: int, exchange: Exchange) -> None:
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
        """Charge a caller with a key. Raises CallError (403, 429): then nothing was charged."""
        attempt = call.attempt
        name, asked = route.name if route else call.model, call.model
        if attempt is not None:  # who may call a route may call what it leads to
            name, asked = attempt.route, attempt.asked
        _check_scope(call.caller, name, asked, call.path)
        again = attempt is not None and attempt.again
        self.keys.begin(call.caller, tokens, self.gate.loop.time(), again, call.counted)

    def check_scope(self, caller: Caller, model: str, path: str) -> None:
        """Raises CallError (403) where `caller` may not call `path` of `model`, which may be a
        route's name: what `serve` would say, for a call that is answered later."""
        route, way = self.gate.find(model), self.gate.versions.ways.get(model)
        name = way.route if way is not None else route.name if route is not None else model
        _check_scope(caller, name, model, path)

    def _profile(self, call: Call, route: ModelRoute | None) -> RequestProfile:
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
        return RequestProfile(
            caller.tenant, caller.priority, tokens, keys, wait_s, caller.weight, limit
        )


def _check_scope(caller: Caller, name: str, asked: str, path: str) -> None:
    path = path.partition("?")[0]
    if not may(caller, (name,), asked, path):
        message = f"this API key may not call {path} of model {asked!r}"
        raise CallError(403, "not_allowed", message)
