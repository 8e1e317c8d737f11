"""A simulated router: the production Admission, and the life of each request. Pure.

It does what runtime/router/{gate,proxy}.py do with sockets.

Rules this file keeps:
- a request ends once; how, `Outcomes` is told;
- a replica that refuses the connection was not delivered to; one that dies before the first token
  was; one that dies later breaks the answer off;
- one whose host vanishes says nothing: its requests end so when the table calls the host lost, or
  when TCP does. A request that has no token yet ends so too where only the table says it;
- an engine whose door is shut answers 503, which the proxy hands to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from runtime.router.admission.decisions import Admission, Decision, Forward, Held
from runtime.router.admission.refusals import Refused
from runtime.sim.loop import Loop
from runtime.sim.observer import Job
from runtime.sockets import GONE_S, SILENT_S
from runtime.wire.routes import DemandReport, RouteTable
from scheduler.sim.control_plane import Control
from scheduler.sim.links import RouterLink
from scheduler.sim.network import Network

Answer = Literal["taken", "refused", "closed", "silent", "stranger"]


class Target(Protocol):
    """The parts of a node that a router uses."""

    def submit(self, replica_id: str, job: Job) -> Answer:
        """Send a request to a replica."""

    def drop(self, replica_id: str, job: Job) -> None:
        """Hang up on a request."""


class Request:
    """One request. `first_at`: when its first token came."""

    __slots__ = (
        "arrived_at", "base_url", "ended", "first_at", "first_due", "held", "model", "name",
        "output_tokens", "prompt_tokens", "replica_id", "router", "silent_since",
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
        self.base_url = ""
        self.first_due: float | None = None
        self.silent_since: float | None = None
        self.first_at: float | None = None
        self.held = False
        self.ended: str | None = None

    def done(self, first_at: float) -> None:
        """As runtime.sim.observer.Job."""
        self.first_at = first_at
        self.router.leave(self, "answered")

    def broken(self, first_at: float | None) -> None:
        """As runtime.sim.observer.Job."""
        if first_at is None:
            self.router.failed(self, "its engine died", delivered=True)
        else:
            self.first_at = first_at
            self.router.leave(self, "broken_off")

    def silent(self) -> None:
        """As runtime.sim.observer.Job."""
        self.router.silent(self)

    def begun_by(self, now: float) -> float | None:
        """When its first token came; None: it has not."""
        heard = now if self.silent_since is None else self.silent_since
        return self.first_due if self.first_due is not None and self.first_due <= heard else None

    def still_comes(self, now: float) -> bool:
        """Whether tokens came lately: then its host is there, whatever the scheduler says."""
        silent_s = 0.0 if self.silent_since is None else now - self.silent_since
        return self.begun_by(now) is not None and silent_s < SILENT_S


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
        self._lost: frozenset[str] = frozenset()  # hosts, by the table
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
        """Note that a request's replica failed before the first token."""
        if request.ended is None:
            request.replica_id = request.silent_since = None
            decision = self.admission.failed(request.name, self._loop.now, reason, delivered)
            self._decide(request, decision)

    def silent(self, request: Request) -> None:
        """Nothing more comes of it; TCP notices it after a while."""
        request.silent_since = self._loop.now
        self._loop.after(GONE_S, self._gone, request, request.silent_since)

    def _gone(self, request: Request, since: float) -> None:
        if request.ended is None and request.silent_since == since:
            request.broken(request.begun_by(self._loop.now))

    def leave(self, request: Request, outcome: str) -> None:
        """End a request with this outcome."""
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
                request.replica_id, request.base_url = endpoint.replica_id, endpoint.base_url
                request.first_due = request.silent_since = None
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
        elif answer == "stranger":
            self.failed(request, "the replica refused this router's key", delivered=True)
        elif answer == "silent":
            self.silent(request)

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
        news, self._lost = frozenset(table.lost) - self._lost, frozenset(table.lost)
        sent = [r for r in self.open.values() if r.replica_id is not None and r.base_url in news]
        self._hand_out(self.admission.routes(table, self._loop.now))
        for request in sent:
            self._host_lost(request)
        self._arm()

    def _host_lost(self, request: Request) -> None:
        """The table calls its host lost."""
        now, replica_id = self._loop.now, request.replica_id
        if request.ended is None and replica_id is not None and not request.still_comes(now):
            self._nodes[request.base_url.split("/")[2]].drop(replica_id, request)
            request.broken(request.begun_by(now))

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
