"""A simulated cluster: the real scheduler core, with agents and a router that are dictionaries.

Virtual time. Commands reach agents at once unless `lossy` drops them; agents report every second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from msgspec.structs import replace

from runtime.contract.footprint_ledger import Footprint, Key
from runtime.wire.agent_messages import (
    CachedModel,
    DeviceReport,
    Heartbeat,
    ReplicaReport,
    RepointReplica,
    SleepReplica,
    StageModels,
    StartReplica,
    WakeReplica,
)
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import DemandReport, ModelDemand, ModelRoute, RouteTable
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.signals.forecast import StoredArrivals
from scheduler.state import messages as m
from scheduler.state.cluster import check_invariants

GIB = 2**30


def spec(name: str, gib: float = 8, **fields: object) -> ModelSpec:
    return ModelSpec(
        name=name,
        source="/models/x",
        engine="stub",
        device_memory_bytes=int(gib * GIB),
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class FakeReplica:
    start: StartReplica
    phase: str = "starting"
    since: float = 0.0
    restarts: int = 0
    reason: str | None = None
    died: str | None = None
    in_flight: int = 0
    used_at: float | None = None
    sleep_level: int = 0
    wake_s: float | None = None
    engine_waiting: int | None = None
    repoint: RepointReplica | None = None

    def become(self, command: RepointReplica, now: float) -> None:
        self.start = replace(self.start, spec=command.spec)
        self.phase, self.since = "waking", now


@dataclass
class FakeNode:
    node_id: str
    devices: dict[str, int]
    kind: str = "simulated"
    boot_id: int = 1
    seq: int = 0
    up: bool = True
    start_s: float = 2.0
    stop_s: float = 1.0
    sleep_s: float = 0.5
    wake_s: float = 0.5
    rungs: tuple[int, ...] = ()
    residue: int = 0
    host_budget: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    foreign: dict[str, int] = field(default_factory=dict)
    replicas: dict[str, FakeReplica] = field(default_factory=dict)
    fails: dict[str, str] = field(default_factory=dict)  # model -> why its starts fail
    fail_kind: str = "crash"  # as in ReplicaReport.exit_kind
    started: list[str] = field(default_factory=list)
    preemptible: bool = False
    preempted_in_s: float | None = None
    xid: dict[str, int] = field(default_factory=dict)
    links: dict[str, tuple[str, ...]] = field(default_factory=dict)
    disabled: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> rungs
    cached: tuple[CachedModel, ...] = ()
    staged: tuple[str, ...] = ()
    deaf_to_staging: bool = False
    engines: dict[str, str] = field(default_factory=lambda: {"stub": "1"})
    shells: dict[str, str] = field(default_factory=dict)  # launch key -> shell key
    repoint_s: float = 0.2
    refuses_repoint: str | None = None
    keeps: bool = False  # a re-point is taken, and not done

    def obey(self, command: object, now: float) -> str | None:
        """Why it does not; None: it does."""
        if isinstance(command, RepointReplica) and self.refuses_repoint:
            return self.refuses_repoint
        self._obey(command, now)
        return None

    def _obey(self, command: object, now: float) -> None:
        if isinstance(command, StartReplica):
            if command.replica_id not in self.replicas:
                self.replicas[command.replica_id] = FakeReplica(command, since=now)
                self.started.append(command.replica_id)
            return
        if isinstance(command, StageModels):
            if not self.deaf_to_staging:
                self.staged = tuple(s.source for s in command.models)
            return
        replica = self.replicas.get(command.replica_id)  # type: ignore[attr-defined]
        if replica is None:
            return
        if isinstance(command, SleepReplica):
            if replica.phase == "ready":
                replica.phase, replica.since = "draining", now
                replica.sleep_level = command.level
        elif isinstance(command, WakeReplica):
            if replica.phase == "asleep":
                replica.phase, replica.since = "waking", now
        elif isinstance(command, RepointReplica):
            if replica.phase in ("ready", "asleep") and not self.keeps:
                replica.repoint = command
                if replica.phase == "asleep":
                    replica.become(command, now)
                else:
                    replica.phase, replica.since = "draining", now
        elif replica.phase != "stopping" and (replica.phase != "draining" or replica.sleep_level):
            replica.phase, replica.since, replica.sleep_level = "draining", now, 0

    def advance(self, now: float) -> None:
        for replica_id, replica in list(self.replicas.items()):
            age = now - replica.since
            why = self.fails.get(replica.start.spec.name)
            if replica.phase == "starting" and age >= self.start_s:
                replica.phase = "failed" if why else "ready"
                replica.reason, replica.since = why, now
            elif replica.phase == "draining" and not replica.in_flight and replica.repoint:
                replica.become(replica.repoint, now)
            elif replica.phase == "waking" and replica.repoint:
                if age >= self.repoint_s:
                    replica.phase, replica.since, replica.wake_s = "ready", now, age
                    replica.repoint, replica.sleep_level = None, 0
            elif replica.phase == "draining" and not replica.in_flight:
                replica.phase = "sleeping" if replica.sleep_level else "stopping"
                replica.since = now
            elif replica.phase == "sleeping" and age >= self.sleep_s:
                replica.phase, replica.since = "asleep", now
            elif replica.phase == "waking" and age >= self.wake_s:
                replica.phase, replica.since, replica.wake_s = "ready", now, age
                replica.sleep_level = 0
            elif replica.phase == "stopping" and age >= self.stop_s:
                del self.replicas[replica_id]

    def heartbeat(self, now: float) -> Heartbeat:
        self.seq += 1
        return Heartbeat(
            node_id=self.node_id,
            boot_id=self.boot_id,
            seq=self.seq,
            address=f"http://{self.node_id}",
            engines=self.engines,
            host_budget_bytes=self.host_budget,
            preemptible=self.preemptible,
            preempted_in_s=self.preempted_in_s,
            cached=self.cached,
            staged=self.staged,
            shells=self.shells,
            devices=tuple(
                DeviceReport(
                    device_id=device_id, index=i, kind=self.kind, name="d",  # type: ignore[arg-type]
                    memory_total_bytes=total,
                    memory_used_bytes=self.foreign.get(device_id, 0),
                    foreign_bytes=self.foreign.get(device_id, 0),
                    xid=self.xid.get(device_id), healthy=device_id not in self.xid,
                    nvlink_peers=self.links.get(device_id, ()),
                )
                for i, (device_id, total) in enumerate(self.devices.items())
            ),
            replicas=tuple(
                ReplicaReport(
                    replica_id=replica_id, epoch=r.start.epoch, model=r.start.spec.name,
                    launch_key=r.start.spec.launch_key(), device_ids=r.start.device_ids,
                    device_bytes=r.start.device_bytes,
                    phase=r.phase,  # type: ignore[arg-type]
                    phase_age_s=now - r.since, base_url=f"http://{self.node_id}/{replica_id}",
                    key="k", in_flight=r.in_flight, reason=r.reason, died=r.died,
                    restarts=r.restarts, exit_kind=self.fail_kind if r.phase == "failed" else None,
                    idle_for_s=None if r.used_at is None else now - r.used_at,
                    start_s=self.start_s, phases=self.phases,
                    rungs=self.rungs, sleep_level=r.sleep_level, wake_s=r.wake_s,
                    residue_bytes=self.residue if r.phase == "asleep" else 0,
                    disabled=self.disabled.get(r.start.spec.name, {}),
                    engine_waiting=r.engine_waiting,
                    shell_key=self.shells.get(r.start.spec.launch_key()),
                )
                for replica_id, r in self.replicas.items()
            ),
        )  # fmt: skip


def one_gpu(gib: int = 24) -> FakeNode:
    """A node with one device."""
    return FakeNode("n1", {"g0": gib * GIB})


class World:
    """Drive it with `put`, `wait_for`, `serve`, `run`; look at `core.state` and `table`."""

    def __init__(self, *nodes: FakeNode, lossy: Random | None = None, **settings: Any) -> None:
        self.settings = Settings(**{"min_dwell_s": 0.0, **settings})
        self.now = 1000.0
        self.nodes = {node.node_id: node for node in nodes}
        self.lossy = lossy
        self.term = 0
        self.table: RouteTable | None = None
        self.waiting: dict[str, int] = {}
        self.flying: dict[str, int] = {}  # replica_id -> requests
        self.used: dict[str, float] = {}  # replica_id -> when the router last used it
        self.background: set[str] = set()  # models whose requests are all in no hurry
        self.router_seq = 0
        self.router_acks = True
        self.decided: list[m.Decided] = []
        self.cold_starts: list[m.ColdStart] = []
        self.learned: dict[Key, Footprint] = {}
        self.sent: list[object] = []
        self.quarantined: dict[tuple[str, str], str] = {}
        self.wait_s: dict[str, float] = {}
        self.sketches: dict[str, StoredArrivals] = {}
        self._later: list[m.CommandDone] = []
        self.core = Core(self.settings)
        self.elect()

    def elect(
        self,
        models: tuple[m.StoredModel, ...] = (),
        cordoned: tuple[str, ...] = (),
        footprints: tuple[Footprint, ...] = (),
        quarantined: tuple[tuple[str, str, str], ...] = (),
        sketches: dict[str, StoredArrivals] | None = None,
    ) -> None:
        """A scheduler (re)starts and takes the lead."""
        self.term += 1
        self.core = Core(self.settings)
        known = tuple(n.node_id for n in self.nodes.values() if n.up)
        self.apply(
            m.Elected(
                now=self.now,
                term=self.term,
                models=models,
                known_nodes=known,
                cordoned=cordoned,
                footprints=footprints,
                quarantined=quarantined,
                sketches=sketches or {},
            )
        )
        self.run(2.5)

    def apply(self, event: m.Event) -> None:
        for command in self.core.handle(event):
            match command:
                case m.Send():
                    self.sent.append(command.command)
                    self._deliver(command)
                case m.Publish():
                    assert self.table is None or command.table.version > self.table.version
                    self.table = command.table
                case m.Decided():
                    self.decided.append(command)
                case m.ColdStart():
                    self.cold_starts.append(command)
                case m.Learned():
                    self.learned[command.footprint.key] = command.footprint
                case m.Sketched():
                    self.sketches[command.model] = command.sketch
                case m.Quarantined(reason=None):
                    self.quarantined.pop((command.node_id, command.device_id), None)
                case m.Quarantined():
                    self.quarantined[command.node_id, command.device_id] = str(command.reason)
        check_invariants(self.core.state)

    def _deliver(self, send: m.Send) -> None:
        node = self.nodes[send.node_id]
        lost = not node.up or (self.lossy is not None and self.lossy.random() < 0.3)
        refused = None if lost else node.obey(send.command, self.now)
        # A reply may be lost although the command arrived.
        if lost or (self.lossy is not None and self.lossy.random() < 0.2):
            return
        kind = str(send.command.__struct_config__.tag)
        replica_id = getattr(send.command, "replica_id", "")  # staging is not about one
        self._later.append(
            m.CommandDone(
                now=self.now, node_id=node.node_id, replica_id=replica_id, kind=kind,
                delivered=True, ok=refused is None, error=refused, boot_id=node.boot_id,
                seq=node.seq + 1,
            )
        )  # fmt: skip

    def put(self, *specs: ModelSpec) -> None:
        for one in specs:
            self.apply(m.ModelPut(now=self.now, model=m.StoredModel(spec=one)))

    def want(self, model: str, count: int = 1, wait_s: float = 0.0) -> None:
        """`count` requests wait at the router now, the oldest for `wait_s` seconds."""
        self.waiting[model] = count
        self.wait_s[model] = wait_s
        self.report()

    def report(self) -> None:
        """The router's demand: requests whose model serves stop waiting and are answered."""
        for route in self.table.models if self.table else ():
            if route.endpoints or route.refusal:
                self.waiting.pop(route.name, None)
        self.router_seq += 1
        owner = {r.replica_id: r.model for r in self.core.state.replicas.values()}
        flying: dict[str, int] = {}
        for replica_id, count in self.flying.items():
            if replica_id in owner:
                flying[owner[replica_id]] = flying.get(owner[replica_id], 0) + count
        names = self.waiting.keys() | flying.keys()
        self.apply(
            m.DemandSeen(
                now=self.now,
                report=DemandReport(
                    router_id="r", boot_id=1, seq=self.router_seq,
                    routes_version=self.table.version if self.table and self.router_acks else 0,
                    models=tuple(
                        ModelDemand(
                            model=n, waiting=self.waiting.get(n, 0), in_flight=flying.get(n, 0),
                            idle_for_s=0.0, oldest_wait_s=self.wait_s.get(n, 0.0),
                            background=(n in self.background)
                            * (self.waiting.get(n, 0) + flying.get(n, 0)),
                        )
                        for n in sorted(names)
                    ),
                    in_flight=dict(self.flying),
                    idle_s={r: self.now - at for r, at in self.used.items()}
                    | dict.fromkeys(self.flying, 0.0),
                    sent_s=self.now,
                ),
            )
        )  # fmt: skip

    def run(self, seconds: float, step: float = 0.5) -> None:
        """Let time pass: agents act and report, the router reports, the scheduler ticks."""
        until = self.now + seconds
        while self.now < until:
            self.now += step
            later, self._later = self._later, []
            for done in later:
                self.apply(done)
            for node in self.nodes.values():
                if not node.up:
                    continue
                node.advance(self.now)
                for replica_id, replica in node.replicas.items():
                    replica.in_flight = self.flying.get(replica_id, 0)
                    if replica.in_flight:
                        replica.used_at = self.used[replica_id] = self.now
                if self.lossy is None or self.lossy.random() > 0.2:
                    self.apply(m.HeartbeatSeen(now=self.now, heartbeat=node.heartbeat(self.now)))
            if self.lossy is None or self.lossy.random() > 0.2:
                self.report()
            self.apply(m.Tick(now=self.now))

    def route(self, name: str) -> ModelRoute | None:
        return next((r for r in self.table.models if r.name == name), None)

    def hot(self) -> set[str]:
        """Models that a router would serve at once."""
        return {r.name for r in self.table.models if r.endpoints}

    def actions(self) -> list[tuple[str, str]]:
        return [(d.action, d.model) for d in self.decided]
