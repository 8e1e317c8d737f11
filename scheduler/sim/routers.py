"""A router of the mind: the production Admission, and the life of each request. Pure.

It does what runtime/router/{gate,proxy}.py do with sockets.

Rules this file keeps:
- a request ends once; how, `Outcomes` is told;
- a replica that refuses the connection was not delivered to; one that dies before the first token
  was; one that dies later breaks the answer off;
- an engine whose door is shut answers 503, which the proxy hands to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from runtime.router.admission import Admission, Decision, Forward, Held
from runtime.router.refusals import Refused
from runtime.sim.loop import Loop
from runtime.sim.witness import Job
from runtime.wire import DemandReport, RouteTable
from scheduler.sim.control import Control
from scheduler.sim.links import RouterLink
from scheduler.sim.network import Network


class Target(Protocol):
    """What a router needs of a node."""

    def submit(self, replica_id: str, job: Job) -> Literal["taken", "refused", "closed"]: ...

    def drop(self, replica_id: str, job: Job) -> None: ...


class Request:
    """One request. `first_at`: when its first token came."""

    __slots__ = (
        "arrived_at", "ended", "first_at", "held", "model", "name", "output_tokens",
        "prompt_tokens", "replica_id", "router",
    )  # fmt: skip

    def __init__(
        self, router: Router, name: str, model: str, arrived_at: float, prompt: int, output: int
    ) -> None:
        self.router = router
        self.name = name
        self.model = model
        self.arrived_at = arrived_at
        self.prompt_tokens = prompt
        self.output_tokens = output
        self.replica_id: str | None = None
        self.first_at: float | None = None
        self.held = False
        self.ended: str | None = None

    def done(self, first_at: float) -> None:
        """As runtime.sim.witness.Job."""
        self.first_at = first_at
        self.router.leave(self, "answered")

    def broken(self, first_at: float | None) -> None:
        """As runtime.sim.witness.Job."""
        if first_at is None:
            self.router.failed(self, "its engine died", delivered=True)
        else:
            self.first_at = first_at
            self.router.leave(self, "broken_off")


class Router:
    """One router and the requests it has."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        control: Control,
        name: str,
        nodes: Mapping[str, Target],
        ended: Callable[[Request], object],
        transit_s: float = 0.0,
    ) -> None:
        """`ended` is told of each request that is over; `transit_s`: from router to engine."""
        self.name = name
        self.admission = Admission()
        self.open: dict[str, Request] = {}
        self.boot_id = 1
        self._loop = loop
        self._nodes = nodes
        self._ended = ended
        self._transit_s = transit_s
        self._made = 0
        self._timer_at: float | None = None
        self.link = RouterLink(loop, network, control, name, self._report, self._take)

    def arrive(
        self, model: str, prompt: int, output: int, patience_s: float | None = None
    ) -> Request:
        """A caller asks; `patience_s`: when it hangs up if no answer has ended by then."""
        self._made += 1
        name = f"{self.name}-{self._made}"
        now = self._loop.now
        request = Request(self, name, model, now, prompt, output)
        self.open[name] = request
        self._decide(request, self.admission.arrive(name, model, now))
        self._hand_out(self.admission.shed())
        if patience_s is not None:
            self._loop.after(patience_s, self._hang_up, request)
        return request

    def failed(self, request: Request, reason: str, delivered: bool) -> None:
        """Its replica failed before the first token."""
        if request.ended is None:
            request.replica_id = None
            decision = self.admission.failed(request.name, self._loop.now, reason, delivered)
            self._decide(request, decision)

    def leave(self, request: Request, outcome: str) -> None:
        """It is over."""
        if request.ended is None:
            released = self.admission.finished(request.name, self._loop.now)
            self._end(request, outcome)
            self._hand_out(released)
            self._arm()

    def waiting(self) -> int:
        """Requests that are held now, of all models."""
        return sum(1 for request in self.open.values() if request.replica_id is None)

    # -------------------------------------------------------------------- decisions

    def _decide(self, request: Request, decision: Decision) -> None:
        match decision:
            case Forward(_, endpoint):
                request.replica_id = endpoint.replica_id
                node = self._nodes[endpoint.base_url.split("/")[2]]
                if self._transit_s:
                    self._loop.after(self._transit_s, self._submit, request, node)
                else:
                    self._submit(request, node)
            case Held():
                request.held = True
                self._arm()
                if self.admission.waiting(request.model) == 1:
                    self.link.report_soon()
            case Refused():
                self._end(request, decision.code)

    def _submit(self, request: Request, node: Target) -> None:
        if request.ended is not None or request.replica_id is None:
            return
        answer = node.submit(request.replica_id, request)
        if answer == "refused":
            self.failed(request, "the replica refused the connection", delivered=False)
        elif answer == "closed":
            self.failed(request, "its door is closed", delivered=False)

    def _hang_up(self, request: Request) -> None:
        if request.ended is None:
            replica_id = request.replica_id
            self.leave(request, "hung_up")
            if replica_id is not None:
                for node in self._nodes.values():
                    node.drop(replica_id, request)

    def _end(self, request: Request, outcome: str) -> None:
        request.ended = outcome
        del self.open[request.name]
        self._ended(request)

    def _hand_out(self, decisions: Iterable[Forward | Refused]) -> None:
        for decision in decisions:
            self._decide(self.open[decision.request_id], decision)

    # -------------------------------------------------------------------- as the gate

    def _arm(self) -> None:
        due = self.admission.due_at()
        if due is not None and due != self._timer_at:
            self._timer_at = due
            self._loop.at(due, self._tick, due)
        elif due is None:
            self._timer_at = None

    def _tick(self, due: float) -> None:
        if due == self._timer_at:
            self._timer_at = None
            self._hand_out(self.admission.tick(self._loop.now))
            self._arm()

    def _take(self, table: RouteTable) -> None:
        self._hand_out(self.admission.routes(table, self._loop.now))
        self._arm()

    def _report(self, seq: int) -> DemandReport:
        table = self.admission.table
        return DemandReport(
            router_id=self.name,
            boot_id=self.boot_id,
            seq=seq,
            routes_version=table.version if table else 0,
            models=self.admission.demand(self._loop.now),
            in_flight=self.admission.in_flight(),
            idle_s=self.admission.idle_s(self._loop.now, float("inf")),
            sent_s=self._loop.now,
        )
