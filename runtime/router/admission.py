"""Who is served now, who waits and who is refused: all that the router decides. Pure.

Rules this file keeps (`check_invariants` checks them):
- a request is in exactly one place: waiting for its model, or in flight at one replica;
- every request that `arrive` lets in ends exactly once: by `finished` or by a Refused;
- waiting requests leave in the order they arrived; one whose replica failed goes back to the place
  its arrival gave it, so it is ahead of all that came later, and `hold_s` counts from its arrival;
- a replica that failed is left alone as `breaker.py` says, or until a table no longer lists it;
- only a request that may have reached a replica counts against MAX_ATTEMPTS: one that kills
  engines must not kill them all, one that found a dead host just waits for a live one.
"""

from __future__ import annotations

import bisect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.router.breaker import REST_S, Breaker, RetryBudget
from runtime.router.sketch import Sketch
from runtime.schema import close_names
from runtime.wire import Endpoint, ModelDemand, ModelRoute, RouteTable

SUSPECT_S = REST_S  # how long a replica is left alone after its first failure
MAX_ATTEMPTS = 3
RETRY_AFTER_S = 5.0  # where neither the scheduler nor an estimate says better


class Wish(NamedTuple):
    """Whose request it is and what it would like."""

    tenant: str = ""
    priority: int = 0  # higher goes first
    tokens: int = 1  # about how many it makes the engine read and write
    affinity: int | None = None  # requests of one value share a prompt's beginning: 64 bits
    wait_s: float | None = None  # its caller waits no longer than this for a replica


PLAIN = Wish()


class Forward(NamedTuple):
    """Send the request to this replica now."""

    request_id: str
    endpoint: Endpoint


class Held(NamedTuple):
    """The request waits; a later call returns its Forward or Refused."""

    request_id: str


class Refused(NamedTuple):
    """The request has ended; `status` is an HTTP status, `message` is for its caller."""

    request_id: str
    status: int
    code: str
    message: str
    retry_after_s: float | None = None
    param: str | None = None


Decision = Forward | Held | Refused


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    seq: int
    model: str
    arrived_at: float
    wish: Wish
    attempts: int = 0
    retried: bool = False  # its one immediate retry at another live replica is spent
    replica_id: str | None = None  # None: it waits
    sent_at: float = 0.0
    held: bool = False


@dataclass(slots=True)
class _Model:
    waiting: list[_Request] = field(default_factory=list)  # in order of arrival
    in_flight: int = 0
    active_at: float = 0.0
    turn: int = 0  # where the next choice among equally loaded replicas starts
    ttft: Sketch = field(default_factory=Sketch)  # of requests that were not held
    first_token_s: float | None = None  # of the last that was held, from when it was sent on


_by_arrival = operator.attrgetter("seq")


class Admission:
    """One router's queues and counts. Every call carries `now`, in seconds of one steady clock.

    `max_in_flight`: more are not sent to one replica at a time, they wait; None: no limit.
    """

    def __init__(self, max_in_flight: int | None = None) -> None:
        self._max_in_flight = max_in_flight or sys.maxsize
        self.table: RouteTable | None = None
        self._route: dict[str, ModelRoute] = {}  # by name, alias and adapter
        self._models: dict[str, _Model] = {}
        self._requests: dict[str, _Request] = {}
        self._replica_in_flight: Counter[str] = Counter()
        self._arrived: Counter[str] = Counter()  # by model; outlives its route: it only grows
        self._breaker = Breaker()
        self._budget = RetryBudget()
        self._seq = 0

    # -------------------------------------------------------------------------------- events

    def routes(self, table: RouteTable, now: float) -> list[Forward | Refused]:
        """Route by `table` from now on; what no longer has to wait is returned, oldest first."""
        self.table = table
        self._route = {
            name: route for route in table.models for name in (*route.aliases, *route.adapters)
        }
        self._route |= {route.name: route for route in table.models}
        listed = {e.replica_id for route in table.models for e in route.endpoints}
        self._breaker.keep_only(listed)
        released = self._release(now)
        for name in [n for n in self._models if n not in self._route]:
            self._forget_if_unused(name)
        return released

    def arrive(self, request_id: str, model: str, now: float, wish: Wish = PLAIN) -> Decision:
        """A new request for `model` (a name or an alias); `request_id` must not be in use."""
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already in use")
        route = self._route.get(model)
        if route is None:
            return self._unknown(request_id, model)
        name = route.name
        self._arrived[name] += 1
        self._budget.request(now)
        if route.refusal is not None:
            return _refusal(request_id, route)
        state = self._models.get(name)
        if state is None:
            state = self._models[name] = _Model()
        endpoint = self._choose(route, state, now)
        if endpoint is None and len(state.waiting) >= route.max_queue:
            return _queue_full(request_id, route)
        self._seq += 1
        request = _Request(request_id, self._seq, name, now, wish)
        self._requests[request_id] = request
        state.active_at = now
        if endpoint is None:
            request.held = True
            state.waiting.append(request)
            return Held(request_id)
        return self._forward(request, state, endpoint, now)

    def answered(self, request_id: str, now: float, status: int) -> list[Forward | Refused]:
        """The first byte of its answer came, with this HTTP status; who may go on thereby.

        Optional: without it no replica is known to fail with 5xx, and `ttft_p95_s` is None.
        """
        request = self._requests[request_id]
        if request.replica_id is None:
            raise ValueError(f"request {request_id!r} is not in flight")
        state = self._models[request.model]
        if status < 400 and request.held:
            state.first_token_s = now - request.sent_at
        elif status < 400:
            state.ttft.add(now - request.arrived_at, now)
        if status < 500 and not self._breaker:
            return []
        changed = self._breaker.answered(request.replica_id, now, status >= 500)
        return self._release(now) if changed else []

    def finished(self, request_id: str, now: float) -> list[Forward | Refused]:
        """The request is over, answered or not, or its caller has gone: waiting or in flight, it
        leaves. An id that already ended is fine. What may go on in its place is returned."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        self._leave(request, now)
        state = self._models.get(request.model)
        return self._release_model(request.model, state, now) if state and state.waiting else []

    def failed(self, request_id: str, now: float, reason: str, delivered: bool) -> Decision:
        """Its replica failed before the answer's first byte; says what happens to it next.

        `delivered`: the request may have reached the replica. `reason` is shown to the caller.
        """
        request = self._requests[request_id]
        if request.replica_id is None:
            raise ValueError(f"request {request_id!r} is not in flight")
        self._breaker.failed(request.replica_id, request.sent_at, now)
        self._unassign(request)
        request.attempts += delivered
        return self._again(request, now, reason, delivered)

    def tick(self, now: float) -> list[Forward | Refused]:
        """Time has passed: what has waited too long ends, and replicas are trusted again."""
        expired: list[Forward | Refused] = []
        for name, state in list(self._models.items()):
            route = self._route.get(name)
            while route and state.waiting and now >= state.waiting[0].arrived_at + route.hold_s:
                request = state.waiting[0]
                self._leave(request, now)
                expired.append(_held_too_long(request, route))
        self._breaker.tick(now)
        return expired + self._release(now)

    # -------------------------------------------------------------------------------- questions

    def find(self, model: str) -> ModelRoute | None:
        """The route `model`, a name or an alias, stands for."""
        return self._route.get(model)

    def due_at(self) -> float | None:
        """When `tick` next has something to do; None while nothing waits."""
        deadlines = [
            state.waiting[0].arrived_at + self._route[name].hold_s
            for name, state in self._models.items()
            if state.waiting
        ]
        if not deadlines:
            return None
        return min(deadlines + self._breaker.rests_end())

    def waiting(self, model: str) -> int:
        """How many requests wait for the model of that (exact) name."""
        state = self._models.get(model)
        return len(state.waiting) if state else 0

    def demand(self, now: float) -> tuple[ModelDemand, ...]:
        """Whole demand, one entry for each model that was ever asked for and still has a route
        or a request."""
        return tuple(
            ModelDemand(
                model=name,
                waiting=len(state.waiting),
                in_flight=state.in_flight,
                oldest_wait_s=now - state.waiting[0].arrived_at if state.waiting else 0.0,
                idle_for_s=now - state.active_at,
                arrived=self._arrived[name],
                first_token_s=state.first_token_s,
                ttft_p95_s=state.ttft.quantile(0.95, now),
            )
            for name, state in self._models.items()
        )

    def in_flight(self) -> dict[str, int]:
        """Requests in flight by replica id; replicas with none are left out."""
        return dict(self._replica_in_flight)

    def check_invariants(self) -> None:
        """Raises AssertionError where the rules above do not hold."""
        waiting = [r for state in self._models.values() for r in state.waiting]
        flying = [r for r in self._requests.values() if r.replica_id is not None]
        assert len({r.request_id for r in waiting}) == len(waiting)
        assert {r.request_id for r in waiting}.isdisjoint(r.request_id for r in flying)
        assert {r.request_id for r in waiting + flying} == set(self._requests)
        assert Counter(r.replica_id for r in flying) == self._replica_in_flight
        assert all(count > 0 for count in self._replica_in_flight.values())
        for name, state in self._models.items():
            assert state.in_flight == sum(r.model == name for r in flying)
            assert state.waiting == sorted(state.waiting, key=_by_arrival)
            assert all(r.replica_id is None and r.model == name for r in state.waiting)
            assert name in self._route or state.in_flight, f"{name} has neither route nor request"
            assert name in self._route or not state.waiting, f"requests wait for unknown {name}"

    # -------------------------------------------------------------------------------- inside

    def _choose(self, route: ModelRoute, state: _Model, now: float) -> Endpoint | None:
        """The trusted replica with the fewest requests; ties go round."""
        if not self._breaker:
            return self._least_loaded(route, state, now, None)
        breaker = self._breaker
        endpoint = self._least_loaded(route, state, now, breaker.avoided)
        return endpoint or self._least_loaded(route, state, now, breaker.rests)

    def _least_loaded(
        self,
        route: ModelRoute,
        state: _Model,
        now: float,
        shunned: Callable[[str, float], bool] | None,
    ) -> Endpoint | None:
        endpoints = route.endpoints
        best, best_load, count = -1, 0, len(endpoints)
        for step in range(count):
            index = (state.turn + step) % count
            replica_id = endpoints[index].replica_id
            if shunned is not None and shunned(replica_id, now):
                continue
            load = self._replica_in_flight.get(replica_id, 0)
            if load >= self._max_in_flight:
                continue
            if best < 0 or load < best_load:
                best, best_load = index, load
        if best < 0:
            return None
        state.turn = best + 1
        return endpoints[best]

    def _forward(self, request: _Request, state: _Model, endpoint: Endpoint, now: float) -> Forward:
        request.replica_id = endpoint.replica_id
        request.sent_at = now
        if self._breaker:
            self._breaker.chosen(endpoint.replica_id, now)
        state.in_flight += 1
        self._replica_in_flight[endpoint.replica_id] += 1
        return Forward(request.request_id, endpoint)

    def _unassign(self, request: _Request) -> None:
        replica_id = request.replica_id
        assert replica_id is not None
        request.replica_id = None
        self._models[request.model].in_flight -= 1
        self._replica_in_flight[replica_id] -= 1
        if not self._replica_in_flight[replica_id]:
            del self._replica_in_flight[replica_id]

    def _leave(self, request: _Request, now: float) -> None:
        state = self._models[request.model]
        if request.replica_id is not None:
            self._unassign(request)
        else:
            index = bisect.bisect_left(state.waiting, request.seq, key=_by_arrival)
            if index < len(state.waiting) and state.waiting[index] is request:
                del state.waiting[index]
        del self._requests[request.request_id]
        state.active_at = now
        if request.model not in self._route:
            self._forget_if_unused(request.model)

    def _forget_if_unused(self, name: str) -> None:
        state = self._models[name]
        if not state.waiting and not state.in_flight:
            del self._models[name]

    def _again(self, request: _Request, now: float, reason: str, delivered: bool) -> Decision:
        """What becomes of a request whose replica failed."""
        state = self._models[request.model]
        route = self._route.get(request.model)
        if route is None:
            self._leave(request, now)
            return _removed(request)
        if route.refusal is not None:
            self._leave(request, now)
            return _refusal(request.request_id, route)
        endpoint = self._choose(route, state, now)
        spent = endpoint is not None and delivered and request.retried
        if spent or request.attempts >= MAX_ATTEMPTS:
            self._leave(request, now)
            return _gave_up(request, reason)
        if endpoint is None:
            request.held = True
            bisect.insort(state.waiting, request, key=_by_arrival)
            return Held(request.request_id)
        if delivered and not self._budget.take(now):
            self._leave(request, now)
            return _no_budget(request, reason)
        request.retried |= delivered
        return self._forward(request, state, endpoint, now)

    def _release(self, now: float) -> list[Forward | Refused]:
        """End or send everything that waits for a model which changed."""
        out: list[Forward | Refused] = []
        for name, state in list(self._models.items()):
            if state.waiting:
                out += self._release_model(name, state, now)
        return out

    def _release_model(self, name: str, state: _Model, now: float) -> list[Forward | Refused]:
        out: list[Forward | Refused] = []
        route = self._route.get(name)
        if route is None or route.refusal is not None:
            for request in list(state.waiting):
                self._leave(request, now)
                out.append(_refusal(request.request_id, route) if route else _removed(request))
            return out
        while state.waiting and (endpoint := self._choose(route, state, now)):
            out.append(self._forward(state.waiting.pop(0), state, endpoint, now))
        return out

    def _unknown(self, request_id: str, model: str) -> Refused:
        if self.table is None:
            return Refused(
                request_id, 503, "no_routes",
                "this router has not heard from the scheduler yet", 1.0,
            )  # fmt: skip
        message = unknown_model(model, self._route)
        return Refused(request_id, 404, "model_not_found", message, None, "model")


def unknown_model(model: str, known: Iterable[str]) -> str:
    """What a caller is told who asked for `model`, with the names they may have meant."""
    close = close_names(model, known)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"there is no model {model!r}{hint}"


def _wait_s(route: ModelRoute) -> float:
    if route.retry_after_s is not None:
        return route.retry_after_s
    return RETRY_AFTER_S if route.eta_s is None else route.eta_s


def _refusal(request_id: str, route: ModelRoute) -> Refused:
    message = f"model {route.name!r} cannot be served: {route.refusal}"
    return Refused(request_id, 503, "model_unavailable", message, _wait_s(route))


def _queue_full(request_id: str, route: ModelRoute) -> Refused:
    message = (
        f"{route.max_queue} requests already wait for model {route.name!r}, its max_queue; "
        "try again later"
    )
    return Refused(request_id, 429, "queue_full", message, _wait_s(route))


def _held_too_long(request: _Request, route: ModelRoute) -> Refused:
    state = f" ({route.waiting_for})" if route.waiting_for else ""
    message = f"model {route.name!r} was not ready within its hold_s of {route.hold_s:g}s{state}"
    return Refused(request.request_id, 504, "hold_timeout", message, _wait_s(route))


def _removed(request: _Request) -> Refused:
    message = f"model {request.model!r} was removed while the request waited"
    return Refused(request.request_id, 404, "model_not_found", message, None, "model")


def _no_budget(request: _Request, reason: str) -> Refused:
    message = (
        f"model {request.model!r}: {reason}; not tried again, too many requests already were in "
        "the last seconds"
    )
    return Refused(request.request_id, 503, "retry_budget_spent", message, 1.0)


def _gave_up(request: _Request, reason: str) -> Refused:
    message = (
        f"model {request.model!r}: {reason}; gave up after {request.attempts} attempts "
        "that produced no answer"
    )
    return Refused(request.request_id, 502, "replica_failed", message)
