"""What the scheduler's core costs as the cluster grows, and a placement against a naive first fit.

    python bench/scheduler_scale.py [--quick] [--json]

A cluster of 8-GPU nodes is played in virtual time: every node heartbeats each second, four routers
report their demand each second, the clock ticks twice a second, and each second some models are
called that do not run while others fall idle. Only the CPU time inside `Core.handle` counts. Each
placement is timed inside the run, and right after it, on the same state, a naive scan that sums
every booking again. --quick plays fewer seconds.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.report import Row, print_report
from runtime.wire.agent_messages import (
    CachedModel,
    DeviceReport,
    Heartbeat,
    MemoryEstimate,
    ReplicaReport,
    SleepReplica,
    StageModels,
    StartReplica,
    WakeReplica,
)
from runtime.wire.model_spec import ModelSpec
from runtime.wire.routes import DemandReport, ModelDemand
from scheduler.core.decisions import Core
from scheduler.policy.placement import Answer
from scheduler.policy.production import Production
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, Model

GIB = 2**30
DEVICES = 8
ROUTERS = 4
CALLED_SHARE = 0.01  # of the models called each second
WARM_SHARE = 0.6  # of the models have replicas at the beginning
REPLICAS_PER_NODE = 14  # hot and asleep, several on a device


@dataclass
class Engine:
    """One replica on a node: enough of an agent to answer the scheduler."""

    start: StartReplica
    phase: str = "starting"
    due: float = 0.0  # when the phase under way ends
    level: int = 0
    in_flight: int = 0


@dataclass
class Host:
    """One node's truth, told as a heartbeat."""

    node_id: str
    devices: tuple[DeviceReport, ...]
    cached: tuple[CachedModel, ...]
    seq: int = 0
    engines: dict[str, Engine] = field(default_factory=dict)
    staged: tuple[str, ...] = ()

    def obey(self, command: object, now: float) -> None:
        match command:
            case StartReplica():
                engine = Engine(command, due=now + 8.0)
                self.engines.setdefault(command.replica_id, engine)
            case StageModels():
                self.staged = tuple(s.source for s in command.models)
            case SleepReplica() if command.replica_id in self.engines:
                engine = self.engines[command.replica_id]
                engine.phase, engine.level, engine.due = "sleeping", command.level, now + 1.0
            case WakeReplica() if command.replica_id in self.engines:
                engine = self.engines[command.replica_id]
                engine.phase, engine.due = "waking", now + 1.0
            case _:
                self.engines.pop(command.replica_id, None)  # type: ignore[attr-defined]

    def heartbeat(self, now: float) -> Heartbeat:
        self.seq += 1
        for engine in self.engines.values():
            if engine.due <= now and engine.phase in ("starting", "waking"):
                engine.phase, engine.level = "ready", 0
            elif engine.due <= now and engine.phase == "sleeping":
                engine.phase = "asleep"
        return Heartbeat(
            node_id=self.node_id, boot_id=1, seq=self.seq, address=f"http://{self.node_id}",
            devices=self.devices, cached=self.cached, staged=self.staged,
            host_memory_total_bytes=1024 * GIB, host_budget_bytes=512 * GIB,
            engines={"stub": "1"},
            replicas=tuple(_report(self.node_id, e, now) for e in self.engines.values()),
        )  # fmt: skip


def _report(node_id: str, engine: Engine, now: float) -> ReplicaReport:
    start = engine.start
    return ReplicaReport(
        replica_id=start.replica_id, epoch=start.epoch, model=start.spec.name,
        launch_key=start.spec.launch_key(), device_ids=start.device_ids,
        device_bytes=start.device_bytes, phase=engine.phase,  # type: ignore[arg-type]
        phase_age_s=0.0, base_url=f"http://{node_id}/{start.replica_id}", key="k",
        in_flight=engine.in_flight, idle_for_s=None if engine.in_flight else 1.0,
        memory_used_bytes=start.device_bytes, host_bytes=GIB, start_s=8.0, wake_s=1.0,
        sleep_level=engine.level if engine.phase in ("sleeping", "asleep", "waking") else 0,
        residue_bytes=GIB if engine.phase == "asleep" else 0, rungs=(1, 2), engine="stub",
    )  # fmt: skip


class Cluster:
    """`nodes` hosts and the core that schedules them, played second by second."""

    def __init__(self, nodes: int, models: int, seed: int = 1) -> None:
        self.random = Random(seed)
        self.now = 1000.0
        self.choices = TimedProduction()
        self.core = Core(choices=self.choices)
        self.specs = [self._spec(i) for i in range(models)]
        self.hosts = {f"n{i:04d}": self._host(f"n{i:04d}") for i in range(nodes)}
        self.calls: dict[str, float] = {}  # model -> called until
        self.handle_s = 0.0
        self.events = 0
        self.place_s: list[float] = []
        self.naive_s: list[float] = []
        self.demand_seq = 0
        self.known = 0

    def _spec(self, index: int) -> m.StoredModel:
        gib = self.random.choice([8, 16, 24, 40, 70])
        parallel = 2 if gib == 70 else 1
        spec = ModelSpec(
            name=f"m{index:04d}", source=f"/models/m{index:04d}", engine="stub",
            device_memory_bytes=gib * GIB * parallel, tensor_parallel_size=parallel,
            idle_s=20.0, asleep_s=60.0, max_replicas=4,
        )  # fmt: skip
        estimate = MemoryEstimate(
            weights_bytes=gib * GIB * parallel * 2 // 3, kv_bytes=0, overhead_bytes=0,
            total_bytes=gib * GIB * parallel, explanation="",
        )  # fmt: skip
        return m.StoredModel(spec=spec, estimate=estimate)

    def _host(self, node_id: str) -> Host:
        devices = tuple(
            DeviceReport(
                device_id=f"{node_id}-g{j}", index=j, kind="nvml", name="H100",
                memory_total_bytes=80 * GIB, memory_used_bytes=0, utilization=0.2,
            )
            for j in range(DEVICES)
        )  # fmt: skip
        some = self.random.sample(self.specs, min(len(self.specs), 12))
        cached = tuple(CachedModel(source=s.spec.source, disk_bytes=20 * GIB) for s in some)
        return Host(node_id, devices, cached)

    def apply(self, event: m.Event) -> None:
        began = time.thread_time()
        commands = self.core.handle(event)
        self.handle_s += time.thread_time() - began
        self.events += 1
        for command in commands:
            if isinstance(command, m.Send):
                self.hosts[command.node_id].obey(command.command, self.now)

    def set_up(self) -> None:
        nodes = tuple(self.hosts)
        self.apply(m.Elected(now=self.now, term=1, models=tuple(self.specs), known_nodes=nodes))
        # a cluster that has worked for a while: a few replicas on each node
        for host in self.hosts.values():
            warm = self.specs[: max(1, int(len(self.specs) * WARM_SHARE))]
            for stored in self.random.choices(warm, k=REPLICAS_PER_NODE):
                self._seed_replica(host, stored)
        for _ in range(4):
            self.second()

    def _seed_replica(self, host: Host, stored: m.StoredModel) -> None:
        spec = stored.spec
        first = self.random.randrange(DEVICES - 1)
        devices = tuple(
            d.device_id for d in host.devices[first : first + spec.tensor_parallel_size]
        )
        for device_id in devices:
            there = (e.start for e in host.engines.values() if device_id in e.start.device_ids)
            if sum(s.device_bytes for s in there) + spec.booked_bytes() > 80 * GIB:
                return
        start = StartReplica(
            replica_id=f"{spec.name}-0-{host.node_id}", epoch=1, spec=spec, device_ids=devices,
            device_bytes=spec.booked_bytes(), reason="",
        )  # fmt: skip
        host.engines[start.replica_id] = Engine(start, phase="ready")

    def second(self) -> None:
        """Heartbeats spread over the second, two ticks, a report of each router."""
        names = [s.spec.name for s in self.specs]
        for name in self.random.sample(names, max(1, int(len(names) * CALLED_SHARE))):
            self.calls[name] = self.now + self.random.uniform(1, 30)
        for index, host in enumerate(list(self.hosts.values())):
            self.now += 1.0 / len(self.hosts)
            self.apply(m.HeartbeatSeen(now=self.now, heartbeat=host.heartbeat(self.now)))
            if index % max(1, len(self.hosts) // ROUTERS) == 0:
                self._router(index)
            if index % max(1, len(self.hosts) // 2) == 0:
                self.apply(m.Tick(now=self.now))

    def _router(self, index: int) -> None:
        router = f"r{index * ROUTERS // len(self.hosts)}"
        self.demand_seq += 1
        state = self.core.state
        models, flying = [], {}
        for name, until in list(self.calls.items()):
            if until < self.now:
                del self.calls[name]
                for r in state.models[name].replicas.values():
                    self._set_flying(r.node_id, r.replica_id, 0)
                continue
            ready = state.models[name].ready()
            for r in ready:
                flying[r.replica_id] = 2
                self._set_flying(r.node_id, r.replica_id, 2)
            models.append(
                ModelDemand(
                    model=name, waiting=0 if ready else 1, in_flight=2 * len(ready),
                    oldest_wait_s=0.5, idle_for_s=0.0,
                )
            )  # fmt: skip
        report = DemandReport(
            router_id=router, boot_id=1, seq=self.demand_seq, routes_version=state.routes_version,
            models=tuple(models), in_flight=flying,
        )  # fmt: skip
        self.apply(m.DemandSeen(now=self.now, report=report))

    def _set_flying(self, node_id: str, replica_id: str, count: int) -> None:
        engine = self.hosts[node_id].engines.get(replica_id)
        if engine is not None:
            engine.in_flight = count

    def play(self, seconds: int) -> None:
        """With every placement timed, and the naive one on the same state."""
        self.handle_s, self.events = 0.0, 0
        gc.collect()
        self.choices.timed = self
        for _ in range(seconds):
            self.second()
        self.choices.timed = None


class TimedProduction(Production):
    """Production's policy; placements of the `timed` cluster are measured."""

    timed: Cluster | None = None

    def place(
        self, state: ClusterState, model: Model, now: float, evict: bool, extra: bool
    ) -> Answer:
        if self.timed is None:
            return super().place(state, model, now, evict, extra)
        began = time.thread_time()
        answer = super().place(state, model, now, evict, extra)
        middle = time.thread_time()
        naive_first_fit(state, model)
        ended = time.thread_time()
        self.timed.place_s.append(middle - began)
        self.timed.naive_s.append(ended - middle)
        self.timed.handle_s -= ended - middle  # the baseline is not the core's work
        return answer


def naive_first_fit(state: ClusterState, model: Model) -> tuple[str, tuple[str, ...]] | None:
    """What a first version does: every node, every device, every replica, each time.

    It looks for the best fit without eviction, as ours does, by summing bookings again.
    """
    need, count = model.spec.booked_bytes(), model.spec.tensor_parallel_size
    best = None
    for node in state.nodes.values():
        if not node.schedulable:
            continue
        rooms = []
        for device_id in node.devices:
            booked = sum(r.committed for r in node.replicas.values() if device_id in r.device_ids)
            device = node.devices[device_id]
            left = device.memory_total_bytes - device.foreign_bytes - booked - need
            if left >= 0:
                rooms.append((left, device_id))
        if len(rooms) >= count:
            rooms.sort()
            key = (sum(left for left, _ in rooms[:count]), node.node_id)
            if best is None or key < best[0]:
                best = (key, (node.node_id, tuple(d for _, d in rooms[:count])))
    return best[1] if best else None


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds = 4 if options.quick else 20
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    per_event: dict[int, float] = {}
    for nodes, models in ((10, 20), (100, 200), (1000, 2000)):
        cluster = Cluster(nodes, models)
        cluster.set_up()
        cluster.play(seconds * max(1, min(20, 200 // nodes)))
        per_event[nodes] = cluster.handle_s / cluster.events
        if not options.json:
            print(
                f"{nodes} nodes, {models} models: {cluster.events} events,"
                f" {1 / per_event[nodes]:,.0f}/s, {len(cluster.place_s)} placements, p99"
                f" {p99(cluster.place_s) * 1e3:.2f} ms, replicas {len(cluster.core.state.replicas)}"
            )
    after_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours_s, naive_s = statistics.median(cluster.place_s), statistics.median(cluster.naive_s)
    growth = per_event[1000] / per_event[10]
    rows = [
        Row("events/s in one process, 1,000 nodes", 1 / per_event[1000], 10_000, "target", ">= 1"),
        Row("ms a placement, p99, 1,000 nodes", p99(cluster.place_s) * 1e3, 5.0, "target", "<= 1"),
        Row("MB of memory, 1,000 nodes", (after_kb - before_kb) / 1024, 1000.0, "target", "<= 1"),
        Row("us an event, 1,000 nodes", per_event[1000] * 1e6, per_event[10] * 1e6,
            "10 nodes", "<= 2"),
        Row("ms a placement, median, 1,000 nodes", ours_s * 1e3, naive_s * 1e3,
            "naive full scan", "<= 0.05"),
    ]  # fmt: skip
    assert growth > 0
    print_report("scheduler_scale", rows, options.json)


if __name__ == "__main__":
    main()
