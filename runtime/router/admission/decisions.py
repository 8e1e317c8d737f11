"""Who is served now, who waits and who is refused: all that the router decides. Pure.

Rules this file keeps (`check_invariants` checks them):
- a request is in exactly one place: waiting for its model, or in flight at one replica;
- every request that `arrive` lets in ends exactly once: by `finished` or by a Refused;
- waiting requests leave in the order that `fairness.py` says; one whose replica failed goes back to
  the place its arrival gave it there, and `hold_s` counts from its arrival;
- one that could not be served within `hold_s`, or while its caller waits, is refused at once, as
  far as that is known; it is reported as demand all the same, so that a later one can be served;
- a replica that begins to serve gets `target_concurrency` requests, and one more with each answer
  that begins; one whose engine has a queue of its own gets no more than it has;
- what is in the background is sent where fewer than `target_concurrency` requests are in flight,
  and only while nobody else waits;
- a replica that failed is left alone as `breaker.py` says, or until a table no longer lists it;
- only a request that may have reached a replica counts against MAX_ATTEMPTS: one that kills
  engines must not kill them all, one that found a dead host just waits for a live one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from runtime.router.admission import refusals
from runtime.router.admission.affinity import Affinity
from runtime.router.admission.breaker import REST_S, Breaker, RetryBudget
from runtime.router.admission.fairness import BACKGROUND, FairQueue, RequestProfile
from runtime.router.admission.percentiles import SlidingPercentiles
from runtime.router.admission.refusals import Refused
from runtime.wire.routes import Endpoint, ModelDemand, ModelRoute, RouteTable

SUSPECT_S = REST_S  # how long a replica is left alone after its first failure
MAX_ATTEMPTS = 3
DEFAULT_PROFILE = RequestProfile()
NEVER = float("-inf")


class Forward(NamedTuple):
    """Send the request to this replica now."""

    request_id: str
    endpoint: Endpoint


class Held(NamedTuple):
    """The request waits; a later call returns its Forward or Refused."""

    request_id: str


Decision = Forward | Held | Refused


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    seq: int
    model: str
    arrived_at: float
    profile: RequestProfile
    attempts: int = 0
    retried: bool = False  # its one immediate retry at another live replica is spent
    replica_id: str | None = None  # None: it waits
    sent_at: float = 0.0
    held: bool = False
    answered: bool = False

    def deadline(self, route: ModelRoute) -> float:
        """Until when it may wait."""
        wait_s = self.profile.wait_s
        limit_s = route.hold_s if wait_s is None else min(route.hold_s, wait_s)
        return self.arrived_at + limit_s


@dataclass(slots=True)
class _Model:
    waiting: FairQueue[_Request] = field(default_factory=FairQueue)
    wanted_until: float = 0.0  # one was turned away that would have waited longer than it can
    in_flight: int = 0
    background: int = 0  # of those in flight
    active_at: float = 0.0
    turn: int = 0  # where the next choice among equally loaded replicas starts
    ttft: SlidingPercentiles = field(
        default_factory=SlidingPercentiles
    )  # of requests that were not held
    first_token_s: float | None = None  # of the last that was held, from when it was sent on


@dataclass(slots=True)
class _Load:
    """What is in flight at one replica; kept while a table lists it."""

    requests: int = 0
    tokens: int = 0
    limit: int = sys.maxsize  # of requests
    full: bool = False  # its engine has a queue of its own
    used_at: float = NEVER  # when a request was last sent there or ended


_NO_LOAD = _Load()


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
        self._loads: dict[str, _Load] = {}  # by replica id
        self._arrived: Counter[str] = Counter()  # by model; outlives its route: it only grows
        self._breaker = Breaker()
        self._affinity = Affinity()
        self._budget = RetryBudget()
        self._shed: list[Refused] = []
        self._seq = 0

    # -------------------------------------------------------------------------------- events

    def routes(self, table: RouteTable, now: float) -> list[Forward | Refused]:
        """Route by `table` from now on; what no longer has to wait is returned, oldest first."""
        self.table, before = table, self._route
        self._route = {
            name: route for route in table.models for name in (*route.aliases, *route.adapters)
        }
        self._route |= {route.name: route for route in table.models}
        listed = {e.replica_id for route in table.models for e in route.endpoints}
        self._breaker.keep_only(listed)
        self._affinity.keep_only(listed)
        self._loads = {r: load for r, load in self._loads.items() if load.requests or r in listed}
        for route in table.models:
            self._limit(route)
            self._move_deadlines(route, before.get(route.name))
        released = self._release(now)
        for name in [n for n in self._models if n not in self._route]:
            self._forget_if_unused(name)
        return released

    def arrive(
        self, request_id: str, model: str, now: float, profile: RequestProfile = DEFAULT_PROFILE
    ) -> Decision:
        """A new request for `model` (a name or an alias); `request_id` must not be in use."""
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already in use")
        route = self._route.get(model)
        if route is None:
            if self.table is None:
                return refusals.no_table(request_id)
            return refusals.unknown(request_id, model)
        name = route.name
        self._arrived[name] += 1
        self._budget.request(now)
        if route.refusal is not None:
            return refusals.unavailable(request_id, route)
        state = self._models.get(name)
        if state is None:
            state = self._models[name] = _Model()
        endpoint = None
        if profile.priority > BACKGROUND or not state.waiting:
            endpoint = self._choose(route, state, now, profile)
        if endpoint is None:
            refused = self._no_use_waiting(request_id, route, state, profile, now)
            if refused is not None:
                return refused
        self._seq += 1
        request = _Request(request_id, self._seq, name, now, profile)
        self._requests[request_id] = request
        state.active_at = now
        if endpoint is None:
            return self._hold(request, route, state)
        return self._forward(request, state, endpoint, now)

    def shed(self) -> list[Refused]:
        """Requests that had to leave the queue for those that `arrive` let in since last asked."""
        if not self._shed:
            return []
        shed, self._shed = self._shed, []
        return shed

    def hedge(self, request_id: str, second_id: str, now: float) -> Forward | None:
        """Send a request that is in flight to another replica too, as `second_id`; None: there is
        none free, or too many were sent twice already. It is over with `finished`."""
        request = self._requests[request_id]
        route, state = self._route.get(request.model), self._models[request.model]
        if route is None or request.replica_id is None or state.waiting:
            return None
        first = request.replica_id
        breaker = self._breaker

        def excluded(replica_id: str, now: float) -> bool:
            return replica_id == first or breaker.avoided(replica_id, now)

        endpoint = self._least_loaded(route, state, now, _most(route, request.profile), excluded)
        if endpoint is None or not self._budget.take(now):
            return None
        self._seq += 1
        second = _Request(second_id, self._seq, request.model, now, request.profile)
        self._requests[second_id] = second
        return self._forward(second, state, endpoint, now)

    def answered(self, request_id: str, now: float, status: int) -> list[Forward | Refused]:
        """Note the first byte of its answer, with this HTTP status; return who may go on now.

        Optional: without it no replica is known to fail with 5xx, and `ttft_p95_s` is None.
        """
        request = self._requests[request_id]
        if request.replica_id is None:
            raise ValueError(f"request {request_id!r} is not in flight")
        state = self._models[request.model]
        request.answered = True
        grew = self._grow(request.replica_id)
        if status < 400 and request.held:
            state.first_token_s = now - request.sent_at
        elif status < 400:
            state.ttft.add(now - request.arrived_at, now)
        if status < 500 and not self._breaker:
            waits = grew and state.waiting
            return self._release_model(request.model, state, now) if waits else []
        changed = self._breaker.answered(request.replica_id, now, status >= 500)
        return self._release(now) if changed or grew else []

    def finished(self, request_id: str, now: float) -> list[Forward | Refused]:
        """The request is over, answered or not, or its caller has gone: waiting or in flight, it
        leaves. An id that already ended is fine. What may go on in its place is returned."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        if request.replica_id is not None and not request.answered:
            self._grow(request.replica_id)
        self._leave(request, now)
        state = self._models.get(request.model)
        return self._release_model(request.model, state, now) if state and state.waiting else []

    def failed(self, request_id: str, now: float, reason: str, delivered: bool) -> Decision:
        """Note that its replica failed before the answer's first byte; what happens to it next.

        `delivered`: the request may have reached the replica. `reason` is shown to the caller.
        """
        request = self._requests[request_id]
        if request.replica_id is None:
            raise ValueError(f"request {request_id!r} is not in flight")
        self._breaker.failed(request.replica_id, request.sent_at, now)
        self._unassign(request, now)
        request.attempts += delivered
        return self._again(request, now, reason, delivered)

    def tick(self, now: float) -> list[Forward | Refused]:
        """Time has passed: what has waited too long ends, and replicas are trusted again."""
        expired: list[Forward | Refused] = []
        for name, state in list(self._models.items()):
            route = self._route.get(name)
            for request in state.waiting.late(now) if route and state.waiting else ():
                assert route is not None
                self._leave(request, now)
                expired.append(refusals.held_too_long(request.request_id, route, request.profile))
        self._breaker.tick(now)
        return expired + self._release(now)

    # -------------------------------------------------------------------------------- questions

    def find(self, model: str) -> ModelRoute | None:
        """The route `model`, a name or an alias, stands for."""
        return self._route.get(model)

    def due_at(self) -> float | None:
        """When `tick` next has something to do; None while nothing waits."""
        found = (s.waiting.next_deadline() for s in self._models.values() if s.waiting)
        deadlines = [deadline for deadline in found if deadline is not None]
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
                waiting=len(state.waiting) or int(now < state.wanted_until),
                background=state.waiting.background + state.background,
                in_flight=state.in_flight,
                oldest_wait_s=now - state.waiting.oldest.arrived_at if state.waiting else 0.0,
                idle_for_s=now - state.active_at,
                arrived=self._arrived[name],
                first_token_s=state.first_token_s,
                ttft_p95_s=state.ttft.quantile(0.95, now),
            )
            for name, state in self._models.items()
        )

    def in_flight(self) -> dict[str, int]:
        """Requests in flight by replica id; replicas with none are left out."""
        return {r: load.requests for r, load in self._loads.items() if load.requests}

    def idle_s(self, now: float, within_s: float) -> dict[str, float]:
        """Seconds since a request was sent to a replica or ended there, by replica id; those that
        were used within so many seconds, and 0 where one is in flight."""
        since = now - within_s
        return {
            r: 0.0 if load.requests else now - load.used_at
            for r, load in self._loads.items()
            if load.requests or since <= load.used_at > NEVER
        }

    def check_invariants(self) -> None:
        """Raises AssertionError where the rules above do not hold."""
        waiting = [r for state in self._models.values() for r in state.waiting]
        flying = [r for r in self._requests.values() if r.replica_id is not None]
        assert len({r.request_id for r in waiting}) == len(waiting)
        assert {r.request_id for r in waiting}.isdisjoint(r.request_id for r in flying)
        assert {r.request_id for r in waiting + flying} == set(self._requests)
        there = {r: replace(load, requests=0, tokens=0) for r, load in self._loads.items()}
        for request in flying:
            assert request.replica_id in there, f"{request.replica_id} has lost its count"
            there[request.replica_id].requests += 1
            there[request.replica_id].tokens += request.profile.tokens
        assert there == self._loads
        for name, state in self._models.items():
            mine = [r for r in flying if r.model == name]
            assert state.in_flight == len(mine)
            assert state.background == sum(r.profile.priority <= BACKGROUND for r in mine)
            state.waiting.check()
            assert all(r.replica_id is None and r.model == name for r in state.waiting)
            assert name in self._route or state.in_flight, f"{name} has neither route nor request"
            assert name in self._route or not state.waiting, f"requests wait for unknown {name}"

    # -------------------------------------------------------------------------------- inside

    def _choose(
        self, route: ModelRoute, state: _Model, now: float, profile: RequestProfile
    ) -> Endpoint | None:
        """The trusted replica that has read the prompt's beginning before, as affinity.py says, or
        else the one with the fewest tokens in flight, then requests; ties go round."""
        if profile.affinity and len(route.endpoints) > 1:
            endpoint = self._by_affinity(route, now, profile)
            if endpoint is not None:
                return endpoint
        most = _most(route, profile)
        if not self._breaker:
            return self._least_loaded(route, state, now, most, None)
        breaker = self._breaker
        endpoint = self._least_loaded(route, state, now, most, breaker.avoided)
        return endpoint or self._least_loaded(route, state, now, most, breaker.rests)

    def _by_affinity(
        self, route: ModelRoute, now: float, profile: RequestProfile
    ) -> Endpoint | None:
        """Where the prompt's beginning was read or has its home; None: the load decides."""
        avoided = self._breaker.avoided if self._breaker else None
        loads: dict[str, int] = {}
        most = _most(route, profile)
        for endpoint in route.endpoints:
            replica_id = endpoint.replica_id
            load = self._loads.get(replica_id, _NO_LOAD)
            if load.requests < min(load.limit, most) and not (avoided and avoided(replica_id, now)):
                loads[replica_id] = load.tokens
        chosen = self._affinity.pick(profile.affinity, loads, profile.tokens) if loads else None
        return next((e for e in route.endpoints if e.replica_id == chosen), None)

    def _least_loaded(
        self,
        route: ModelRoute,
        state: _Model,
        now: float,
        most: int,
        excluded: Callable[[str, float], bool] | None,
    ) -> Endpoint | None:
        endpoints, loads = route.endpoints, self._loads
        best, least, count = -1, _NO_LOAD, len(endpoints)
        for step in range(count):
            index = (state.turn + step) % count
            replica_id = endpoints[index].replica_id
            if excluded is not None and excluded(replica_id, now):
                continue
            load = loads.get(replica_id, _NO_LOAD)
            if load.requests >= load.limit or load.requests >= most:
                continue
            if (
                best < 0
                or load.tokens < least.tokens
                or (load.tokens == least.tokens and load.requests < least.requests)
            ):
                best, least = index, load
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
        state.background += request.profile.priority <= BACKGROUND
        if state.waiting:
            state.waiting.sent(request.profile)
        load = self._loads[endpoint.replica_id]
        load.requests += 1
        load.tokens += request.profile.tokens
        load.used_at = now
        if request.profile.affinity:
            self._affinity.sent(request.profile.affinity, endpoint.replica_id)
        return Forward(request.request_id, endpoint)

    def _unassign(self, request: _Request, now: float) -> None:
        replica_id = request.replica_id
        assert replica_id is not None
        request.replica_id = None
        state = self._models[request.model]
        state.in_flight -= 1
        state.background -= request.profile.priority <= BACKGROUND
        load = self._loads[replica_id]
        load.requests -= 1
        load.tokens -= request.profile.tokens
        load.used_at = now

    def _leave(self, request: _Request, now: float) -> None:
        state = self._models[request.model]
        if request.replica_id is not None:
            self._unassign(request, now)
        elif request in state.waiting:
            state.waiting.remove(request)
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
            return refusals.removed(request.request_id, request.model)
        if route.refusal is not None:
            self._leave(request, now)
            return refusals.unavailable(request.request_id, route)
        endpoint = self._choose(route, state, now, request.profile)
        spent = endpoint is not None and delivered and request.retried
        if spent or request.attempts >= MAX_ATTEMPTS:
            self._leave(request, now)
            return refusals.gave_up(request.request_id, request.model, reason, request.attempts)
        if endpoint is None:
            return self._hold(request, route, state)
        if delivered and not self._budget.take(now):
            self._leave(request, now)
            return refusals.no_budget(request.request_id, request.model, reason)
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
                out.append(
                    refusals.unavailable(request.request_id, route)
                    if route
                    else refusals.removed(request.request_id, name)
                )
            return out
        while state.waiting:
            request = state.waiting.first()
            endpoint = self._choose(route, state, now, request.profile)
            if endpoint is None:
                break
            out.append(self._forward(request, state, endpoint, now))
            state.waiting.remove(request)
        return out

    # -- waiting

    def _hold(self, request: _Request, route: ModelRoute, state: _Model) -> Held:
        request.held = True
        state.waiting.add(request, request.deadline(route))
        return Held(request.request_id)

    def _no_use_waiting(
        self, request_id: str, route: ModelRoute, state: _Model, profile: RequestProfile, now: float
    ) -> Refused | None:
        """Why a new request is not let in; where it is, one that waits may have to leave."""
        limit_s = route.hold_s if profile.wait_s is None else min(route.hold_s, profile.wait_s)
        if not route.endpoints and route.eta_s is not None and route.eta_s > limit_s:
            state.active_at = now
            state.wanted_until = now + min(route.eta_s, route.hold_s)
            return refusals.not_in_time(request_id, route, profile)
        if len(state.waiting) < route.max_queue:
            return None
        loser = state.waiting.loser(profile)
        if loser is None:
            return refusals.queue_full(request_id, route)
        self._leave(loser, now)
        self._shed.append(refusals.shed(loser.request_id, route))
        return None

    def _move_deadlines(self, route: ModelRoute, before: ModelRoute | None) -> None:
        """Where `hold_s` is another than it was."""
        state = self._models.get(route.name)
        if state and state.waiting and (before is None or before.hold_s != route.hold_s):
            state.waiting.set_deadlines(lambda request: request.deadline(route))

    # -- how much one replica gets

    def _limit(self, route: ModelRoute) -> None:
        """What the table says of how busy its replicas are."""
        for endpoint in route.endpoints:
            load = self._loads.get(endpoint.replica_id)
            if load is None:
                least = min(route.target_concurrency, self._max_in_flight)
                self._loads[endpoint.replica_id] = _Load(limit=least, full=endpoint.full)
                continue
            if endpoint.full and not load.full:
                load.limit = max(1, load.requests)
            load.full = endpoint.full

    def _grow(self, replica_id: str) -> bool:
        """Let a replica that has begun an answer have one request more; whether it may."""
        load = self._loads[replica_id]
        if load.full or load.limit >= self._max_in_flight:
            return False
        load.limit += 1
        return True


def _most(route: ModelRoute, profile: RequestProfile) -> int:
    """Requests that one replica may have for this one to be sent there."""
    return route.target_concurrency if profile.priority <= BACKGROUND else sys.maxsize
