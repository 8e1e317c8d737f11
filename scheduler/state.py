"""What the scheduler knows, and questions about it. Pure.

Rules this file keeps:
- a replica's bytes are *committed* on its devices from the moment it is planned until it begins to
  leave, and *physical* from the moment it is sent until its agent has seen the memory free; of one
  that goes to sleep only what it keeps (its residue) stays committed;
- neither sum ever exceeds what the device can give, nor host memory booked for sleepers what the
  node may give (`check_invariants`);
- nothing here decides.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from runtime.footprints import Footprint, Key
from runtime.wire import (
    DeviceReport,
    Floor,
    Heartbeat,
    ModelDemand,
    ModelSpec,
    ReplicaReport,
)
from scheduler.messages import ColdStart, Decided, StoredModel


class Stage(enum.StrEnum):
    """Where a replica is in its life, as the scheduler sees it (docs/states.md)."""

    PLANNED = "planned"  # committed; waits for room or for its turn
    SENT = "sent"  # its agent was told to start it
    STARTING = "starting"
    READY = "ready"
    RISING = "rising"  # asleep; committed to wake as soon as its memory is free
    WAKING = "waking"  # its agent was told to wake it
    ASLEEP = "asleep"
    SLEEPING = "sleeping"  # its agent was told to put it to sleep
    UNROUTING = "unrouting"  # out of the table; routers have not all confirmed yet
    STOPPING = "stopping"  # its agent was told to stop it
    BACKOFF = "backoff"  # it died; its agent will start it again
    UNKNOWN = "unknown"  # its node is lost


# On the way down: to nothing, or to sleep.
LEAVING = frozenset({Stage.UNROUTING, Stage.STOPPING, Stage.SLEEPING})
# Those that serve or will, without the scheduler deciding anything more.
COMING = frozenset(
    {
        Stage.PLANNED, Stage.SENT, Stage.STARTING, Stage.READY, Stage.BACKOFF,
        Stage.RISING, Stage.WAKING,
    }
)  # fmt: skip


@dataclass(slots=True)
class Climb:
    """A replica's way up that is not over yet: the draft of a ColdStart."""

    rung: str
    planned_at: float
    waited_s: float  # the longest wait when it was planned
    cause: str
    reason: str
    moved_down: tuple[str, ...]
    sent_at: float | None = None


@dataclass(slots=True)
class Replica:
    """One replica. `bytes` is booked on each of its devices."""

    replica_id: str
    model: str
    node_id: str
    device_ids: tuple[str, ...]
    bytes: int
    launch_key: str
    stage: Stage
    since: float
    reason: str
    cause: str = ""
    spec: ModelSpec | None = None  # None: adopted from a heartbeat
    report: ReplicaReport | None = None
    ready_at: float | None = None
    used_at: float = 0.0  # when it last had a request, as far as anyone told
    retry_at: float = 0.0  # when to repeat the last command, if nothing shows its effect
    confirmed: tuple[int, int] | None = None  # (boot_id, seq) whose heartbeats show the command
    unrouted_version: int = 0
    unrouted_deadline: float = 0.0
    sleep_level: int = 0  # going to sleep, asleep or rising: at which level; 0: going for good
    residue: int = 0  # asleep: bytes it keeps on each device, expected and then measured
    host_booked: int = 0  # host memory booked for its sleep
    climb: Climb | None = None

    def move(self, stage: Stage, now: float) -> None:
        """Enter `stage`; entering the one it is in keeps `since`."""
        if stage is not self.stage:
            self.stage = stage
            self.since = now

    @property
    def physical(self) -> int:
        """Bytes it may hold on each of its devices now."""
        if self.stage is Stage.PLANNED:
            return 0
        return self.residue if self.stage in (Stage.ASLEEP, Stage.RISING) else self.bytes

    @property
    def committed(self) -> int:
        """Bytes that are spoken for on each of its devices, now and later."""
        if self.stage in LEAVING:
            return self.residue if self.sleep_level else 0
        return self.residue if self.stage is Stage.ASLEEP else self.bytes

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out of the routes, or out of them for good."""
        return self.stage in LEAVING

    def rungs(self) -> tuple[int, ...]:
        """The sleep levels it could take, by its agent's word."""
        if self.report is None:
            return ()
        return tuple(n for n in self.report.rungs if f"asleep-{n}" not in self.report.disabled)


@dataclass(slots=True)
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
    footprints: dict[Key, Footprint] = field(default_factory=dict)
    footprint: Footprint | None = None  # the one that was measured last for this launch key
    unfit: str | None = None  # why no node could ever run it
    waiting_for: str | None = None  # why it is not placed yet

    def coming(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.stage in COMING]

    def ready(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.stage is Stage.READY]

    def asleep(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.stage is Stage.ASLEEP]

    def may_stop(self, replica: Replica) -> bool:
        """Whether its floor allows `replica` to go: another one must hold it."""
        if self.floor is None:
            return True
        held = self.coming() if self.floor == "hot" else [*self.coming(), *self.asleep()]
        return any(r is not replica for r in held)

    def weights_bytes(self, replica: Replica) -> int:
        """Host bytes that level-1 sleep of one replica takes: its weights, at most all it has."""
        whole = replica.bytes * len(replica.device_ids)
        estimate = self.stored.estimate
        return min(whole, estimate.weights_bytes) if estimate else whole

    def measured_s(self, step: str) -> float | None:
        """The median seconds of "start", "wake-1" or "wake-2", if it was ever measured."""
        return self.footprint.median_s(step) if self.footprint else None


@dataclass(slots=True)
class Node:
    """One host and its last heartbeat."""

    node_id: str
    heartbeat: Heartbeat | None = None
    seen_at: float = 0.0
    lost: bool = False
    cordoned: bool = False
    draining: bool = False
    devices: dict[str, DeviceReport] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.heartbeat is not None and not self.lost

    @property
    def schedulable(self) -> bool:
        """Whether new replicas may be placed here."""
        return (
            self.heartbeat is not None
            and not self.lost
            and not self.cordoned
            and not self.draining
            and not self.heartbeat.draining
        )

    def on_device(self, device_id: str) -> Iterator[Replica]:
        return (r for r in self.replicas.values() if device_id in r.device_ids)

    def capacity(self, device_id: str) -> int:
        """Bytes that Stoker's replicas may take there: the total less what others hold."""
        device = self.devices.get(device_id)
        if device is None or not device.healthy:
            return 0
        return max(0, device.memory_total_bytes - device.foreign_bytes)

    def committed(self, device_id: str) -> int:
        return sum(r.committed for r in self.on_device(device_id))

    def physical(self, device_id: str) -> int:
        return sum(r.physical for r in self.on_device(device_id))

    def plannable(self, device_id: str) -> int:
        """Bytes a new plan may take, counting those that leave as gone already."""
        return self.capacity(device_id) - self.committed(device_id)

    def host_free(self) -> int:
        """Host bytes that may still be booked for sleep."""
        budget = self.heartbeat.host_budget_bytes if self.heartbeat else 0
        return budget - sum(r.host_booked for r in self.replicas.values())


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


@dataclass(slots=True, frozen=True)
class Demand:
    """All routers' demand for one model."""

    waiting: int = 0
    in_flight: int = 0
    ending: int = 0  # of those in flight, with replicas that are leaving: they need no other
    oldest_wait_s: float = 0.0


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

    def demand(self, model: str) -> Demand:
        waiting = in_flight = ending = 0
        oldest = 0.0
        known = self.models.get(model)
        leaving = [r for r in known.replicas.values() if r.leaving] if known else []
        for router in self.routers.values():
            part = router.models.get(model)
            if part is not None:
                waiting += part.waiting
                in_flight += part.in_flight
                oldest = max(oldest, part.oldest_wait_s)
                ending += sum(router.in_flight.get(r.replica_id, 0) for r in leaving)
        return Demand(waiting, in_flight, min(ending, in_flight), oldest)

    def in_flight(self, replica: Replica) -> int:
        """Requests it has, by the routers' count or its own, whichever is more."""
        routed = sum(
            router.in_flight.get(replica.replica_id, 0) for router in self.routers.values()
        )
        return max(routed, replica.report.in_flight if replica.report else 0)

    def add(self, replica: Replica) -> None:
        self.replicas[replica.replica_id] = replica
        self.nodes.setdefault(replica.node_id, Node(replica.node_id)).replicas[
            replica.replica_id
        ] = replica
        if replica.model in self.models:
            self.models[replica.model].replicas[replica.replica_id] = replica

    def drop(self, replica: Replica) -> None:
        self.replicas.pop(replica.replica_id, None)
        self.nodes[replica.node_id].replicas.pop(replica.replica_id, None)
        if replica.model in self.models:
            self.models[replica.model].replicas.pop(replica.replica_id, None)

    def schedulable_nodes(self) -> Iterable[Node]:
        return (node for node in self.nodes.values() if node.schedulable)


def check_invariants(state: ClusterState) -> None:
    """Raise AssertionError naming the first broken rule."""
    for replica in state.replicas.values():
        node = state.nodes[replica.node_id]
        assert node.replicas.get(replica.replica_id) is replica, (
            f"{replica.replica_id}: not on node"
        )
        model = state.models.get(replica.model)
        if model is not None:
            assert model.replicas.get(replica.replica_id) is replica, replica.replica_id
        elif not state.recovering:
            assert replica.stage in LEAVING or replica.stage is Stage.UNKNOWN, (
                f"{replica.replica_id}: its model is gone, yet it is {replica.stage}"
            )
    for node in state.nodes.values():
        for replica in node.replicas.values():
            assert state.replicas.get(replica.replica_id) is replica, replica.replica_id
        if not node.live:
            continue
        if node.heartbeat and all(r.spec is not None for r in node.replicas.values()):
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
