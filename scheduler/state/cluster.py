"""What the scheduler knows of the cluster, and questions about it. Pure.

Rules this file keeps:
- neither committed nor physical bytes of a device ever exceed what it has, nor host memory booked
  for sleepers and staged weights what the node may give (`check_invariants`);
- nothing here decides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.contract.footprint_ledger import Footprint, Key
from runtime.wire.model_spec import ModelSpec
from runtime.wire.names import Floor
from runtime.wire.routes import ModelDemand, RouteRule
from scheduler.signals.climb_times import ClimbTimes
from scheduler.signals.forecast import Arrivals
from scheduler.signals.replica_target import ScaleHistory
from scheduler.state.bookings import Books, Index
from scheduler.state.clocks import RemoteClock
from scheduler.state.messages import ColdStart, Decided, StoredModel
from scheduler.state.node import Drain, Hold, Node
from scheduler.state.prewarm_stats import Prewarms
from scheduler.state.replica import Climb, Former, Replica
from scheduler.state.stages import BUSY, COMING, LEAVING, Stage

__all__ = [
    "BUSY", "COMING", "LEAVING", "Climb", "ClusterState", "Demand", "Drain", "Former", "Hold",
    "Model", "Node", "Replica", "Router", "Stage", "check_invariants",
]  # fmt: skip

USUAL_S = 10.0  # of a request, until some were seen
FORGET = 200
MARGIN = 0.05  # on a measured footprint: allocators and drivers vary from start to start


@dataclass(slots=True, eq=False)
class Model:
    """One declared model and what is learnt about it."""

    stored: StoredModel
    spec: ModelSpec
    launch_key: str
    pinned: bool = False
    floor: Floor | None = None  # by schedule or on request: never colder than this
    replicas: dict[str, Replica] = field(default_factory=dict)
    asked_replicas: int = 0  # by an operator's `load`
    asked_until: float = 0.0
    active_at: float | None = None  # when a request last arrived or ended
    failures: int = 0  # failed starts in a row
    blocked_until: float = 0.0
    problem: str | None = None  # why the last start failed
    problem_final: bool = False  # and the next one will, whatever else runs
    spares_s: float = 0.0  # after failed starts: what was used within so long is not moved down
    footprints: dict[Key, Footprint] = field(default_factory=dict)
    footprint: Footprint | None = None  # the one that was measured last for this launch key
    unfit: str | None = None  # why no node could run it
    unfit_final: bool = False  # nor could any known one, were all of them up, healthy and open
    waiting_for: str | None = None  # why it is not placed yet
    looked_at: float = -math.inf  # when the planner last did
    patient_until: float = 0.0  # till then only free room is of use to it
    own_engine_until: float = 0.0  # till then no other model's engine is pointed at it
    first_token_s: float | None = None  # of the last request that was held, as a router told
    first_token_at: float = 0.0  # when it told
    rest_at: float = 0.0  # before this no idle timer of it can be over
    wanted: int = 0  # replicas, as last decided, and why
    wanted_why: str = ""
    scaling: ScaleHistory = field(default_factory=ScaleHistory)
    scale_at: float = math.inf  # when to look at its scale again though nothing happened to it
    arrivals: Arrivals | None = None  # None: never called, or its spec wants no forecast
    odds: tuple[float, float] = (-1e9, 0.0)  # (at, chance of a call), worked out not long ago
    forecast_at: float = 0.0  # when to ask the forecast again
    warm_until: float = 0.0  # it was warmed ahead of a call, or pays to be kept warm
    sketched_at: float = 0.0
    busy_s: float = (
        0.0  # requests in flight, by time: half of it forgotten with each FORGET requests
    )
    served: float = 0.0  # requests that came in that time, likewise
    staged_on: set[str] = field(default_factory=set)  # nodes that hold its weights
    sizes_itself: bool = False  # it ran out of memory with the KV cache it was told
    climb_times: ClimbTimes = field(default_factory=ClimbTimes)  # of all models

    @property
    def name(self) -> str:
        """The name in its spec."""
        return self.spec.name

    def forgive(self) -> None:
        """Forget failed starts: the model serves, or deserves a fresh try."""
        self.failures, self.blocked_until, self.spares_s = 0, 0.0, 0.0
        self.problem, self.problem_final = None, False

    def coming(self) -> list[Replica]:
        """Replicas that serve or will; one that must leave its place is counted out already."""
        return [r for r in self.replicas.values() if r.stage in COMING and r.doomed_at is None]

    def ready(self) -> list[Replica]:
        """Replicas that serve."""
        return [r for r in self.replicas.values() if r.stage is Stage.READY]

    def asleep(self) -> list[Replica]:
        """Replicas that sleep, less those that must leave their place."""
        return [
            r for r in self.replicas.values() if r.stage is Stage.ASLEEP and r.doomed_at is None
        ]

    def may_stop(self, replica: Replica) -> bool:
        """Whether its floor allows `replica` to go: another one must hold it."""
        if self.floor is None or self.floor == "staged":
            return True
        held = self.coming() if self.floor == "hot" else [*self.coming(), *self.asleep()]
        return any(r is not replica for r in held)

    def weights_bytes(self, replica: Replica) -> int:
        """Host bytes that level-1 sleep of one replica takes: its weights, at most all it has."""
        whole = replica.bytes * len(replica.device_ids)
        estimate = self.stored.estimate
        return min(whole, estimate.weights_bytes) if estimate else whole

    def measured_s(self, step: str) -> float | None:
        """The median seconds of a step of the ledger, if it was ever measured."""
        return self.footprint.median_s(step) if self.footprint else None

    def expected_s(self, step: str) -> float | None:
        """Seconds of a step as other models of its size took; None: too few are known."""
        estimate = self.stored.estimate
        weights = estimate.weights_bytes if estimate else self.spec.device_memory_bytes or 0
        return self.climb_times.expect_s(step, weights // self.spec.tensor_parallel_size)

    def saw(self, requests: int, in_flight: int, seconds: float) -> None:
        """So many requests came while so many were in flight."""
        self.busy_s += in_flight * seconds
        self.served += requests
        if self.served > FORGET:
            self.busy_s, self.served = self.busy_s / 2, self.served / 2

    @property
    def request_s(self) -> float:
        """How long its requests are in flight, in the mean: their number by time over how many
        came (Little's law), and one of USUAL_S, so that few say little.

        Worked example: 3 in flight for 100 s in which 29 came: (300 + 10) / (29 + 1) = 10.3 s.
        """
        return (self.busy_s + USUAL_S) / (self.served + 1)

    def kv_bytes(self) -> int | None:
        """Bytes of KV cache on each device that a start is told; None: the engine finds out.

        Worked example: estimated weights 16, KV cache 4, overhead 3, together 23 GiB; declared
        30 GiB: 4 + 7 = 11 GiB. Declared 20 GiB: less than estimated, so only the engine can tell.
        """
        estimate, parallel = self.stored.estimate, self.spec.tensor_parallel_size
        if estimate is None or self.sizes_itself:
            return None
        spare = self.spec.booked_bytes() * parallel - estimate.total_bytes
        return None if spare < 0 else (estimate.kv_bytes + spare) // parallel

    def booked_bytes(self) -> int:
        """Bytes that one replica books on each of its devices.

        A declared size is a budget that vLLM fills with KV cache, so a measurement may only raise
        it; an estimated size gives way to the measured one, larger or smaller, on GPUs. A CPU
        engine's memory is touched as it is used, so what is measured there may only raise it too.
        Worked example, MARGIN 5 %: estimated 20 GiB, measured 10 GiB: 10.5 GiB; declared 20 GiB,
        measured 10 GiB: 20 GiB; declared 8 GiB, measured 10 GiB: 10.5 GiB. The margin alone asks
        for no more than the budget: estimated and measured 78 GiB on a device of 80: 78 GiB.
        """
        budget = self.spec.booked_bytes()
        known = self.footprint
        if known is None or not known.device_bytes or self.spec.engine == "stub":
            return budget
        learned = int(known.device_bytes * (1 + MARGIN))
        if known.device_bytes <= budget:
            learned = min(learned, budget)
        estimated = self.stored.spec.device_memory_bytes is None
        if estimated and known.key.device_kind == "nvml":
            return learned
        return max(budget, learned)


@dataclass(slots=True)
class Router:
    """One router's last demand report."""

    router_id: str
    boot_id: int
    seq: int
    seen_at: float
    routes_version: int
    models: dict[str, ModelDemand]
    in_flight: dict[str, int]
    clock: RemoteClock = field(default_factory=RemoteClock)


@dataclass(slots=True, frozen=True)
class Demand:
    """All routers' demand for one model."""

    waiting: int = 0
    in_flight: int = 0
    ending: int = 0  # of those in flight, with replicas that are leaving: they need no other
    oldest_wait_s: float = 0.0
    background: int = 0  # of all these: in no hurry at all

    @property
    def urgent(self) -> bool:
        """Whether any of it is in a hurry."""
        return self.waiting + self.in_flight > self.background


@dataclass(slots=True)
class ClusterState:
    """Everything the core knows."""

    term: int = 0
    started_at: float = 0.0
    recovering: bool = True
    awaited_nodes: set[str] = field(default_factory=set)
    models: dict[str, Model] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    routers: dict[str, Router] = field(default_factory=dict)
    decisions: deque[Decided] = field(default_factory=lambda: deque(maxlen=2000))
    cold_starts: deque[ColdStart] = field(default_factory=lambda: deque(maxlen=1000))
    replica_count: int = 0
    decision_count: int = 0
    cold_start_count: int = 0
    routes_version: int = 0
    rules: tuple[RouteRule, ...] = ()
    rules_changed: bool = False  # and not published yet
    wall_offset_s: float = 0.0  # unix time less the clock of the events
    starts_at_once: int = 1  # on one device, where that is a gain
    shells: bool = True  # engines may be pointed at other models
    climb_times: ClimbTimes = field(default_factory=ClimbTimes)
    prewarms: Prewarms = field(default_factory=Prewarms)
    index: Index = field(default_factory=Index)
    _demands: dict[str, Demand] = field(default_factory=dict)
    _demands_of: int = -1

    def node(self, node_id: str) -> Node:
        """The node, met for the first time or not."""
        known = self.nodes.get(node_id)
        if known is None:
            known = self.nodes[node_id] = Node(node_id, Books(node_id, self.index))
        return known

    def new_event(self) -> None:
        """Forget what was summed up in an earlier event, or before a router's report."""
        self._demands.clear()

    def demand(self, model: str) -> Demand:
        """The requests for a model, summed over all routers; once an event, since many ask."""
        if self._demands_of != self.index.moves:
            self._demands.clear()
            self._demands_of = self.index.moves
        known = self._demands.get(model)
        if known is None:
            known = self._demands[model] = self._demand(model)
        return known

    def _demand(self, model: str) -> Demand:
        waiting = in_flight = ending = background = 0
        oldest = 0.0
        known = self.models.get(model)
        leaving = [r for r in known.replicas.values() if r.leaving] if known else []
        for router in self.routers.values():
            part = router.models.get(model)
            if part is not None:
                waiting += part.waiting
                in_flight += part.in_flight
                background += part.background
                oldest = max(oldest, part.oldest_wait_s)
                ending += sum(router.in_flight.get(r.replica_id, 0) for r in leaving)
        return Demand(waiting, in_flight, min(ending, in_flight), oldest, background)

    def ttft_p95_s(self, model: str) -> float | None:
        """The worst router's; None where none measured it of late."""
        parts = (router.models.get(model) for router in self.routers.values())
        seen = [p.ttft_p95_s for p in parts if p is not None and p.ttft_p95_s is not None]
        return max(seen, default=None)

    def in_flight(self, replica: Replica) -> int:
        """Requests it has, by the routers' count or its own, whichever is more."""
        routed = 0
        for router in self.routers.values():
            routed += router.in_flight.get(replica.replica_id, 0)
        return max(routed, replica.report.in_flight if replica.report else 0)

    def add(self, replica: Replica) -> None:
        """Add a replica to its node and its model."""
        self.replicas[replica.replica_id] = replica
        self.node(replica.node_id).books.add(replica)
        if replica.model in self.models:
            self.models[replica.model].replicas[replica.replica_id] = replica

    def drop(self, replica: Replica) -> None:
        """Remove a replica from its node and its model."""
        self.replicas.pop(replica.replica_id, None)
        self.nodes[replica.node_id].books.drop(replica)
        if replica.model in self.models:
            self.models[replica.model].replicas.pop(replica.replica_id, None)

    def reassign(self, replica: Replica, model: str) -> None:
        """Make it another model's."""
        if replica.model in self.models:
            self.models[replica.model].replicas.pop(replica.replica_id, None)
        replica.model = model
        if model in self.models:
            self.models[model].replicas[replica.replica_id] = replica
        self.index.moves += 1  # demand was summed with the other owner

    def schedulable_nodes(self) -> Iterable[Node]:
        """The nodes that may get new replicas."""
        return (node for node in self.nodes.values() if node.schedulable)

    def refresh_index(self) -> None:
        """Sort in again whatever was touched."""
        index = self.index
        while index.touched:
            node_id = index.touched.pop()
            index.changed.add(node_id)
            index.place_node(node_id, self.nodes[node_id].most_room())


def check_invariants(state: ClusterState) -> None:
    """Raise AssertionError naming the first broken rule."""
    for replica in state.replicas.values():
        node = state.nodes[replica.node_id]
        assert node.replicas.get(replica.replica_id) is replica, (
            f"{replica.replica_id}: not on node"
        )
        assert (replica.replica_id in state.index.plans) == replica.plan, replica.replica_id
        model = state.models.get(replica.model)
        if model is not None:
            assert model.replicas.get(replica.replica_id) is replica, replica.replica_id
        elif not state.recovering:
            assert replica.stage in LEAVING or replica.stage is Stage.UNKNOWN, (
                f"{replica.replica_id}: its model is gone, yet it is {replica.stage}"
            )
    for node in state.nodes.values():
        _check_node(state, node)


def _check_node(state: ClusterState, node: Node) -> None:
    for replica in node.replicas.values():
        assert state.replicas.get(replica.replica_id) is replica, replica.replica_id
    for device_id in node.devices:
        there = list(node.on_device(device_id))
        assert node.committed(device_id) == sum(r.committed for r in there), "books: committed"
        assert node.physical(device_id) == sum(r.physical for r in there), "books: physical"
    if not node.live:
        return
    adopted = any(r.spec is None for r in node.replicas.values())
    if node.heartbeat and not adopted:
        assert node.host_free() >= 0, f"{node.node_id}: host memory over-committed"
    for device_id, device in node.devices.items():
        if any(r.spec is None for r in node.on_device(device_id)):
            continue  # an adopted booking was another leader's decision
        # What others take may grow after a plan was made; our plans never exceed the device.
        for what, used in (
            ("committed", node.committed(device_id)),
            ("physical", node.physical(device_id)),
        ):
            total = device.memory_total_bytes
            assert used <= total, f"{node.node_id}/{device_id}: {what} {used} of {total} bytes"
