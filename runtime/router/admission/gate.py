"""Admission with a clock and an event loop: requests await their turn here.

Decides nothing: every answer is `Admission`'s. Single-threaded, owned by one event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from runtime.router.admission.decisions import DEFAULT_PROFILE, Admission, Decision, Forward, Held
from runtime.router.admission.fairness import RequestProfile
from runtime.router.admission.refusals import Refused
from runtime.router.admission.route_choice import Versions
from runtime.wire.routes import ModelDemand, ModelRoute, RouteTable


class Gate:
    """The one place that calls `Admission`.

    `on_first_wait` is called when a model goes from no waiting request to one, `on_routes` with
    each table before it is put in force.
    """

    def __init__(self, max_in_flight: int | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._admission = Admission(max_in_flight)
        self.versions = Versions()
        self._turns: dict[str, asyncio.Future[Forward | Refused]] = {}
        self._ids = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0.0  # when the timer rings
        self.on_first_wait: Callable[[], None] = lambda: None
        self.on_routes: Callable[[RouteTable], None] = lambda table: None

    @property
    def table(self) -> RouteTable | None:
        """The route table in force."""
        return self._admission.table

    def find(self, model: str) -> ModelRoute | None:
        """The route of a name or alias."""
        return self._admission.find(model)

    def waiting(self, model: str) -> int:
        """How many requests wait for the model of that (exact) name."""
        return self._admission.waiting(model)

    def demand(self) -> tuple[tuple[ModelDemand, ...], dict[str, int]]:
        """Whole demand by model, and requests in flight by replica id."""
        return self._admission.demand(self.loop.time()), self._admission.in_flight()

    def idle_s(self, within_s: float) -> dict[str, float]:
        """How long each replica is idle that was used within so many seconds."""
        return self._admission.idle_s(self.loop.time(), within_s)

    def routes(self, table: RouteTable) -> None:
        """Put `table` in force and send those on who waited for it."""
        self.on_routes(table)
        self.versions.take(table.rules)
        self._hand_out(self._admission.routes(table, self.loop.time()))
        self._arm()

    def arrive(self, model: str, profile: RequestProfile = DEFAULT_PROFILE) -> Decision:
        """Let a request in. The decision's `request_id` is what the other methods take."""
        request_id = str(next(self._ids))
        decision = self._admission.arrive(request_id, model, self.loop.time(), profile)
        self._hand_out(self._admission.shed())
        return self._noting_wait(decision, model)

    def failed(self, request_id: str, model: str, reason: str, delivered: bool) -> Decision:
        """Note that its replica failed before the first byte of an answer."""
        now = self.loop.time()
        decision = self._admission.failed(request_id, now, reason, delivered)
        return self._noting_wait(decision, model)

    def hedge(self, request_id: str) -> Forward | None:
        """Send it to a second replica as well, under an id of its own, if that may be."""
        return self._admission.hedge(request_id, str(next(self._ids)), self.loop.time())

    def answered(self, request_id: str, status: int) -> None:
        """The first byte of its answer came."""
        released = self._admission.answered(request_id, self.loop.time(), status)
        if released:
            self._hand_out(released)
            self._arm()

    def turn(self, request_id: str) -> asyncio.Future[Forward | Refused]:
        """Done when the request that was just held may go on or is refused."""
        return self._turns[request_id]

    def leave(self, request_id: str) -> None:
        """The request is over, however it went. Idempotent."""
        if self._turns:
            self._turns.pop(request_id, None)
        released = self._admission.finished(request_id, self.loop.time())
        if released:
            self._hand_out(released)
            self._arm()

    def check_invariants(self) -> None:
        """Raises AssertionError if the counts are wrong."""
        self._admission.check_invariants()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _noting_wait(self, decision: Decision, model: str) -> Decision:
        if isinstance(decision, Held):
            self._turns[decision.request_id] = self.loop.create_future()
            self._arm()
            route = self._admission.find(model)
            if route is not None and self.waiting(route.name) == 1:
                self.on_first_wait()
        return decision

    def _hand_out(self, decisions: Sequence[Forward | Refused]) -> None:
        for decision in decisions:
            turn = self._turns.pop(decision.request_id)
            if not turn.done():  # its handler may have been cancelled and not yet have run
                turn.set_result(decision)

    def _arm(self) -> None:
        """Wake up when the admission next has something to do."""
        due_at = self._admission.due_at()
        if self._timer is not None:
            # Not by its `when`: what is due already is, on uvloop, a handle without one.
            if due_at == self._armed_for:
                return
            self._timer.cancel()
            self._timer = None
        if due_at is not None:
            self._timer, self._armed_for = self.loop.call_at(due_at, self._tick), due_at

    def _tick(self) -> None:
        self._timer = None
        self._hand_out(self._admission.tick(self.loop.time()))
        self._arm()
