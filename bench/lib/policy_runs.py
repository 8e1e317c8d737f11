"""One policy on one workload in the simulator: who competes, on what cluster, with what figures.

Used by bench/policy.py for its named workloads and for the family (bench/lib/family_runs.py).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest.mock import patch

from bench.policies import workloads as w
from bench.policies.clairvoyant import Belady, Clairvoyant
from bench.policies.gdsf import Gdsf
from bench.policies.lru_sleep import LruSleep
from bench.policies.simple import Dedicated, Knative, Locality, Lru
from cli.simulation import make_node
from runtime.sim.profile import Host
from runtime.sizes import GIB
from runtime.wire.model_spec import Autoscale, ScaleRules
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.policy import eviction
from scheduler.policy.choices import Choices
from scheduler.policy.ladder import Descent
from scheduler.policy.production import Production
from scheduler.sim.catalog import facts
from scheduler.sim.policy import PolicyFactory
from scheduler.sim.report import OBJECTIVE_S, Report, percentile
from scheduler.sim.rule_checker import OCCUPIES
from scheduler.sim.simulator import NodePlan, Scenario, Simulation
from scheduler.state.cluster import ClusterState

HOLD_S = 300.0
LEAD_S = 5.0
STARTS = ("staged", "cached", "remote")
DISK = ("cached", "remote")
COMMON: dict[str, Any] = {"hold_s": HOLD_S, "target_concurrency": 32}
NO_SLEEP: dict[str, Any] = {"sleep": "off", "forecast": "off"}
KPA = Autoscale(up=ScaleRules(), down=ScaleRules())


@dataclass(frozen=True)
class Contender:
    """A policy, what its models' specs say beside COMMON, and its core's settings."""

    choices: Callable[[w.Case], Choices | None] = lambda one: None  # None: production's
    spec: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # beside those of the world
    by_lru: bool = False  # an ablation: eviction.rank replaced

    def factory(self, one: w.Case, world: dict[str, Any]) -> PolicyFactory:
        """Makes its core. `world`: settings that every policy's core gets."""
        settings = replace(Settings(), **(world | self.settings))
        return lambda: Core(settings, self.choices(one))


def rank_by_lru(
    state: ClusterState, descent: Descent, now: float, need: int, least_s: float
) -> tuple[bool, int, int, float]:
    """The least recently used first, whatever it costs: for `scheduler.policy.eviction.rank`."""
    priority = state.models[descent.replica.model].spec.priority
    return descent.busy, priority, 0, -(now - descent.replica.used_at)


STAND_BY = {"stand_by": True}
POLICIES: dict[str, Contender] = {
    "dedicated": Contender(
        lambda one: Dedicated(), NO_SLEEP | {"min_replicas": 1, "max_replicas": 1}
    ),
    "lru": Contender(lambda one: Lru(), NO_SLEEP | {"idle_s": 300.0, "max_replicas": 1}),
    "knative": Contender(lambda one: Knative(), NO_SLEEP | {"idle_s": 60.0, "autoscale": KPA}),
    "locality": Contender(lambda one: Locality(), NO_SLEEP | {"idle_s": 300.0}),
    "gdsf": Contender(lambda one: Gdsf(), NO_SLEEP | {"idle_s": 3600.0, "max_replicas": 1}),
    "lru-sleep": Contender(lambda one: LruSleep(), {"forecast": "off"}),
    "belady": Contender(lambda one: Belady(one.workload.arrivals, LEAD_S), {"forecast": "off"}),
    "clairvoyant": Contender(
        lambda one: Clairvoyant(one.workload.arrivals, LEAD_S), {"forecast": "off"}
    ),
    "ours": Contender(settings=STAND_BY),
}
ABLATIONS: dict[str, Contender] = {
    "ours, no forecast": Contender(spec={"forecast": "off"}, settings=STAND_BY),
    "ours, no sleep": Contender(spec={"sleep": "off"}, settings=STAND_BY),
    "ours, no staging": Contender(lambda one: Production(stand_by=True, staging=False)),
    "ours, no stand-by": Contender(),
    "ours, LRU for cost": Contender(settings=STAND_BY, by_lru=True),
}


@dataclass(frozen=True)
class Cluster:
    """What a workload runs on: nodes alike, with H100s."""

    gpus: int
    node_gpus: int = w.NODE_GPUS
    host_gib: int = 1024
    on_disk: Literal["all", "none"] = "none"  # which models' files every node has at the start
    architectures: tuple[str, ...] = ()  # by model; (): each its own

    def nodes(self) -> list[NodePlan]:
        """Full nodes, the last with what is left."""
        host = Host(memory_bytes=self.host_gib * GIB)
        return [
            NodePlan(f"n{i:02d}", min(self.node_gpus, self.gpus - i * self.node_gpus), host=host)
            for i in range(-(-self.gpus // self.node_gpus))
        ]


@dataclass
class Figures:
    """What one policy came to on one workload, of what arrived after the warm-up."""

    workload: str
    policy: str
    gpus: int
    requests: int
    answered: int
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    within: float
    by_rung: dict[str, float]  # cold starts per 1,000 requests
    gpu_hours_occupied: float
    gpu_hours_held: float
    gpu_hours_there: float
    evictions: int
    violations: int
    wall_s: float

    def cold(self, rungs: tuple[str, ...]) -> float:
        """Cold starts from those rungs."""
        return sum(self.by_rung.get(rung, 0.0) for rung in rungs)


def scenario(one: w.Case, contender: Contender, cluster: Cluster, seed: int) -> Scenario:
    """The same world for whoever leads it."""
    stored = w.models(one, **(COMMON | {"max_replicas": one.max_replicas} | contender.spec))
    return Scenario(
        nodes=cluster.nodes(), models=stored, arrivals=one.workload.arrivals, seed=seed,
        facts=facts(stored, cluster.architectures), on_disk=cluster.on_disk,
        duration_s=one.workload.duration_s, lead_s=LEAD_S, settle_s=HOLD_S + 30,
        check=False, strict=False,
    )  # fmt: skip


def run(
    one: w.Case, name: str, contender: Contender, cluster: Cluster, seed: int,
    world: dict[str, Any] | None = None,
) -> Figures:  # fmt: skip
    """Simulate it."""
    began = time.perf_counter()
    policy = contender.factory(one, world or {})
    simulation = Simulation(scenario(one, contender, cluster, seed), make_node, policy)
    with _rank(contender):
        report = simulation.run()
    return figures(one, name, cluster.gpus, report, time.perf_counter() - began)


@contextmanager
def _rank(contender: Contender) -> Iterator[None]:
    if not contender.by_lru:
        yield
        return
    with patch.object(eviction, "rank", rank_by_lru):
        yield


def figures(one: w.Case, name: str, gpus: int, r: Report, wall_s: float) -> Figures:
    """What a report comes to, of what arrived after the warm-up."""
    begins = LEAD_S + one.warm_s
    ends = LEAD_S + one.workload.duration_s
    arrivals = one.workload.arrivals
    requests = len(arrivals) - bisect_left(arrivals, one.warm_s, key=lambda a: a.at_s)
    answered = [t for t, at in zip(r.ttft, r.arrived, strict=True) if at >= begins]
    ttft = sorted([*answered, *[HOLD_S] * (requests - len(answered))])
    climbs = Counter(rung for at, rung in r.climb_times if at >= begins)
    seen = [used for at, used in r.memory if begins <= at <= ends]
    held = sum(sum(u.values()) for u in seen) / max(1, len(seen)) / w.GPU_BYTES
    hours = (ends - begins) / 3600
    return Figures(
        one.name, name, gpus, requests, len(answered), sum(ttft) / len(ttft),
        percentile(ttft, 0.5), percentile(ttft, 0.95), percentile(ttft, 0.99),
        sum(1 for t in ttft if t <= OBJECTIVE_S) / requests,
        {rung: 1000 * n / requests for rung, n in sorted(climbs.items())},
        _occupied_s(r, begins, ends) / 3600, held * hours, gpus * hours,
        r.evictions, len(r.violations), wall_s,
    )  # fmt: skip


def _occupied_s(r: Report, begins: float, ends: float) -> float:
    """Device-seconds between the two with at least one replica that is not asleep."""
    edges: dict[str, list[tuple[float, int]]] = {}
    for s in r.segments:
        if s.state.split("-")[0] in OCCUPIES and s.to_s > begins and s.from_s < ends:
            for device_id in s.device_ids:
                edges.setdefault(device_id, []).append((max(begins, s.from_s), 1))
                edges[device_id].append((min(ends, s.to_s), -1))
    return sum(map(_covered_s, edges.values()))


def _covered_s(changes: list[tuple[float, int]]) -> float:
    """Seconds within at least one of the spans whose edges these are."""
    total, count, since = 0.0, 0, 0.0
    for at, change in sorted(changes):
        if count == 0:
            since = at
        count += change
        if count == 0:
            total += at - since
    return total
