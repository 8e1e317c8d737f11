"""Scheduling policies against each other in the simulator: ours, five baselines, ablations.

    python bench/policy.py [--quick] [--json] [--workload NAME ...] [--policy NAME ...] [--seed N]
                           [--traces DIR] [--gpus-for-99]

Every policy leads the same simulated cluster: production agents, router admission, network, H100
nodes of 8 with 1 TiB of memory and 7 TB of disk, timings by runtime/sim/profile.py; only what
decides differs (bench/policies/). bench/policies/workloads.py says what the workloads are. Figures
are of requests that arrive after the warm-up; one that is never answered counts as HOLD_S.

A cold start is a replica that becomes hot, by the rung it came from: asleep-1, asleep-2 (a wake);
staged (page cache), cached (disk), remote (a start). GPU-hours *occupied*: devices on which a
replica starts, wakes, serves, drains or goes to sleep; *held*: bytes really held, in devices.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lib.report import Row, print_report
from bench.policies import workloads as w
from bench.policies.clairvoyant import Clairvoyant
from bench.policies.simple import Dedicated, Knative, Locality, Lru
from cli.simulation import make_node
from runtime.wire.model_spec import Autoscale, ScaleRules
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.policy import eviction
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
BASELINES = ("lru", "knative", "locality")  # that share the cluster: the best of them counts
COMMON: dict[str, Any] = {"hold_s": HOLD_S, "target_concurrency": 32}
NO_SLEEP: dict[str, Any] = {"sleep": "off", "forecast": "off"}
KPA = Autoscale(up=ScaleRules(), down=ScaleRules())


@dataclass(frozen=True)
class Contender:
    """A policy, and what its models' specs say beside COMMON."""

    make: Callable[[w.Case], PolicyFactory]
    spec: dict[str, Any]
    by_lru: bool = False  # an ablation: eviction.rank replaced


def _core(one: w.Case) -> PolicyFactory:
    return lambda: Core(Settings(stand_by=True))


def _no_stand_by(one: w.Case) -> PolicyFactory:
    return lambda: Core(Settings())


def _all_warm(one: w.Case) -> PolicyFactory:
    return lambda: Core(choices=Clairvoyant(one.workload.arrivals, LEAD_S))


def _no_staging(one: w.Case) -> PolicyFactory:
    return lambda: Core(choices=Production(stand_by=True, staging=False))


def rank_by_lru(
    state: ClusterState, descent: Descent, now: float, need: int
) -> tuple[bool, int, int, float]:
    """In place of scheduler.eviction.rank: the least recently used first, whatever it costs."""
    priority = state.models[descent.replica.model].spec.priority
    return descent.busy, priority, 0, -(now - descent.replica.used_at)


POLICIES: dict[str, Contender] = {
    "dedicated": Contender(
        lambda one: lambda: Core(choices=Dedicated()),
        NO_SLEEP | {"min_replicas": 1, "max_replicas": 1},
    ),
    "lru": Contender(
        lambda one: lambda: Core(choices=Lru()), NO_SLEEP | {"idle_s": 300.0, "max_replicas": 1}
    ),
    "knative": Contender(
        lambda one: lambda: Core(choices=Knative()), NO_SLEEP | {"idle_s": 60.0, "autoscale": KPA}
    ),
    "locality": Contender(
        lambda one: lambda: Core(choices=Locality()), NO_SLEEP | {"idle_s": 300.0}
    ),
    "clairvoyant": Contender(_all_warm, {"forecast": "off"}),
    "ours": Contender(_core, {}),
}
ABLATIONS: dict[str, Contender] = {
    "ours, no forecast": Contender(_core, {"forecast": "off"}),
    "ours, no sleep": Contender(_core, {"sleep": "off"}),
    "ours, no staging": Contender(_no_staging, {}),
    "ours, no stand-by": Contender(_no_stand_by, {}),
    "ours, LRU for cost": Contender(_core, {}, by_lru=True),
}


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
        return sum(self.by_rung.get(rung, 0.0) for rung in rungs)


def scenario(one: w.Case, contender: Contender, gpus: int, seed: int) -> Scenario:
    spec = COMMON | {"max_replicas": one.max_replicas} | contender.spec
    stored = w.models(one, **spec)
    nodes = [
        NodePlan(f"n{i:02d}", devices=min(w.NODE_GPUS, gpus - i * w.NODE_GPUS))
        for i in range(-(-gpus // w.NODE_GPUS))
    ]
    return Scenario(
        nodes=nodes, models=stored, arrivals=one.workload.arrivals, seed=seed, facts=facts(stored),
        on_disk="none", duration_s=one.workload.duration_s, lead_s=LEAD_S, settle_s=HOLD_S + 30,
        check=False, strict=False,
    )  # fmt: skip


def run(
    one: w.Case, name: str, contender: Contender, seed: int, gpus: int | None = None
) -> tuple[Figures, Report]:
    """Simulate it."""
    if gpus is None:
        gpus = w.packed(one) if name == "dedicated" else one.gpus
    began = time.perf_counter()
    simulation = Simulation(scenario(one, contender, gpus, seed), make_node, contender.make(one))
    if contender.by_lru:
        with patch.object(eviction, "rank", rank_by_lru):
            report = simulation.run()
    else:
        report = simulation.run()
    return figures(one, name, gpus, report, time.perf_counter() - began), report


def figures(one: w.Case, name: str, gpus: int, r: Report, wall_s: float) -> Figures:
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
    total = 0.0
    for changes in edges.values():
        count, since = 0, 0.0
        for at, change in sorted(changes):
            if count == 0:
                since = at
            count += change
            if count == 0:
                total += at - since
    return total


def gpus_for_99(one: w.Case, most: int, seed: int) -> Figures | None:
    """Ours on the smallest cluster that answers 99 % within the objective, by quarters."""
    gpus = one.gpus
    while gpus < most:
        found, _ = run(one, "ours", POLICIES["ours"], seed, gpus)
        print(f"  {one.name}: {gpus} GPUs: {found.within:.4f}", file=sys.stderr, flush=True)
        if found.within >= 0.99:
            return found
        gpus += max(1, gpus // 4)
    return None


def rows(found: dict[tuple[str, str], Figures]) -> list[Row]:
    """Ours against the best baseline of each figure, and against the bound."""
    made = []
    for name in dict.fromkeys(workload for workload, _ in found):
        of = {policy: f for (workload, policy), f in found.items() if workload == name}
        ours = of.get("ours")
        others = [of[b] for b in BASELINES if b in of]
        if ours is None:
            continue

        def row(
            what: str, figure: Callable[[Figures], float], target: str | None,
            ours: Figures = ours, others: list[Figures] = others, name: str = name,
        ) -> None:  # fmt: skip
            best = min(others, key=figure)
            made.append(Row(f"{name}: {what}", figure(ours), figure(best), best.policy, target))

        if others:
            row("TTFT p99, s", lambda f: f.p99_s, "<= 0.5")
            row("TTFT p95, s", lambda f: f.p95_s, None)
            row("TTFT mean, s", lambda f: f.mean_s, None)
            row("beyond 5 s, share", lambda f: 1 - f.within, None)
            row("starts from disk / 1,000", lambda f: f.cold(DISK), "<= 0.5")
            row("starts of any kind / 1,000", lambda f: f.cold(STARTS), None)
            row("GPU-hours occupied", lambda f: f.gpu_hours_occupied, None)
        if bound := of.get("clairvoyant"):
            made.append(
                Row(f"{name}: TTFT mean, s", ours.mean_s, bound.mean_s, bound.policy, "<= 1.25")
            )
        dedicated = of.get("dedicated")
        enough = of.get("ours, for 99 %")
        if dedicated and enough:
            made.append(
                Row(
                    f"{name}: GPU-hours for 99 % within 5 s", enough.gpu_hours_there,
                    dedicated.gpu_hours_there, dedicated.policy, "<= 0.2",
                )
            )  # fmt: skip
    return made


def table(found: list[Figures]) -> str:
    """All figures, as a table of Markdown."""
    lines = [
        "| policy | GPUs | TTFT mean | p50 | p95 | p99 | within 5 s | asleep-1 | asleep-2 | staged"
        " | cached | remote | GPU-h occupied | held | unanswered |",
        "| --- " * 15 + "|",
    ]
    for f in found:
        rungs = " | ".join(f"{f.by_rung.get(r, 0):.1f}" for r in ("asleep-1", "asleep-2", *STARTS))
        lines.append(
            f"| {f.policy} | {f.gpus} | {f.mean_s:.2f} | {f.p50_s:.3f} | {f.p95_s:.2f} |"
            f" {f.p99_s:.1f} | {100 * f.within:.2f} % | {rungs} | {f.gpu_hours_occupied:.1f} |"
            f" {f.gpu_hours_held:.1f} | {f.requests - f.answered} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--workload", nargs="+", choices=w.NAMES, default=list(w.NAMES))
    parser.add_argument("--policy", nargs="+", choices=[*POLICIES, *ABLATIONS])
    parser.add_argument(
        "--gpus-for-99", action="store_true", help="enlarge ours until 99 %% is met"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small clusters, 10 minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="write all figures to this file, as JSON lines")
    o = parser.parse_args()
    chosen = {**POLICIES, **ABLATIONS}
    names = o.policy or (list(POLICIES) if o.quick else list(chosen))
    found: dict[tuple[str, str], Figures] = {}
    for workload in o.workload:
        one = w.case(workload, o.traces, o.seed, o.quick)
        if not o.json:
            print(
                f"\n{workload}: {len(one.sizes)} models, {len(one.workload.arrivals)} requests in"
                f" {one.workload.duration_s:.0f} s, {one.gpus} GPUs; models called within 60 s take"
                f" {100 * w.working_set(one, 60):.0f} % of the memory", flush=True,
            )  # fmt: skip
        for name in names:
            f, _ = run(one, name, chosen[name], o.seed)
            found[workload, name] = f
            print(
                f"  {name}: {f.wall_s:.0f} s, mean {f.mean_s:.2f} p95 {f.p95_s:.2f} p99"
                f" {f.p99_s:.1f}, violations {f.violations}", file=sys.stderr, flush=True,
            )  # fmt: skip
        if o.gpus_for_99 and (workload, "dedicated") in found:
            most = found[workload, "dedicated"].gpus
            if (enough := gpus_for_99(one, most, o.seed)) is not None:
                found[workload, "ours, for 99 %"] = enough
        if not o.json:
            print(table([f for (name, _), f in found.items() if name == workload]))
        if o.save:
            with o.save.open("a") as file:
                for (name, policy), f in found.items():
                    if name == workload:
                        file.write(json.dumps(asdict(f) | {"policy": policy}) + "\n")
    print_report("bench/policy.py", rows(found), o.json)


if __name__ == "__main__":
    main()
