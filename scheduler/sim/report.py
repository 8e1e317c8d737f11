"""What one simulated run came to. Pure.

Rules this file keeps: a figure is of answered requests unless it says otherwise; a request that was
refused, timed out, broke off or was hung up on never counts as within the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scheduler.sim.rule_checker import Segment, Truth
from scheduler.state import messages as m

OBJECTIVE_S = 5.0


@dataclass
class Report:
    """Seconds and counts. `ttft` is in order of the requests' end, `arrived` beside it."""

    seed: int
    duration_s: float
    devices: int
    models: int
    requests: int
    outcomes: dict[str, int]
    ttft: list[float]
    arrived: list[float]
    held: int  # answered requests that had waited at a router
    mean_ttft_s: float
    p50_ttft_s: float
    p95_ttft_s: float
    p99_ttft_s: float
    objective_s: float
    within_objective: float  # share of all requests
    climbs: dict[str, int]  # rung -> replicas that became hot from it
    cold_starts_per_1000: dict[str, float]  # the same, per 1000 requests
    evictions: int
    actions: dict[str, int]
    gpu_hours_occupied: float  # devices with a hot, starting, waking or falling replica
    gpu_hours_held: float  # bytes really held, in device sizes
    gpu_hours_there: float  # all devices, all the time
    cut_off: int
    violations: list[str]
    events: int
    by_model: dict[str, tuple[int, float, float]]  # answered, mean and worst TTFT
    decisions: list[m.Decided] = field(default_factory=list)
    cold_starts: list[m.ColdStart] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    climb_times: list[tuple[float, str]] = field(default_factory=list)
    queue: list[tuple[float, int]] = field(default_factory=list)
    memory: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def within(self, objective_s: float) -> float:
        """The share of all requests answered with a first token within `objective_s`."""
        hits = sum(1 for t in self.ttft if t <= objective_s)
        return hits / self.requests if self.requests else 1.0

    def summary(self) -> dict[str, Any]:
        """All but the long lists, for JSON."""
        left_out = {
            "ttft", "arrived", "decisions", "cold_starts", "segments", "climb_times", "queue",
            "memory", "sizes", "by_model",
        }  # fmt: skip
        shown = {k: v for k, v in vars(self).items() if k not in left_out}
        return {
            k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in shown.items()
        }

    def full(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {
            "decisions": [_record(d) for d in self.decisions],
            "cold_starts": [_record(c) for c in self.cold_starts],
        }

    def log(self) -> list[str]:
        """Every decision as one line: two runs of one seed give the same."""
        return [
            f"{d.at:.6f} {d.action} {d.model} {d.replica_id or '-'} {d.node_id or '-'}:"
            f" {d.reason} ({d.cause})"
            for d in self.decisions
        ]


def _record(struct: m.Decided | m.ColdStart) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank of sorted values: of (1, 2, 3, 4), 0.5 gives 2, 0.95 gives 4; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def make_report(
    truth: Truth, *, seed: int, duration_s: float, models: int, events: int,
    objective_s: float = OBJECTIVE_S,
) -> Report:  # fmt: skip
    """Of a run that is over (`truth.close()` was called)."""
    ttft = list(truth.ttft)
    ordered = sorted(ttft)
    hits = sum(1 for t in ttft if t <= objective_s)
    requests = truth.requests
    return Report(
        seed=seed, duration_s=duration_s, devices=len(truth.sizes), models=models,
        requests=requests, outcomes=dict(sorted(truth.outcomes.items())),
        ttft=ttft, arrived=list(truth.arrived), held=len(truth.held_ttft),
        mean_ttft_s=sum(ttft) / len(ttft) if ttft else math.nan,
        p50_ttft_s=percentile(ordered, 0.5), p95_ttft_s=percentile(ordered, 0.95),
        p99_ttft_s=percentile(ordered, 0.99),
        objective_s=objective_s, within_objective=hits / requests if requests else 1.0,
        climbs=dict(sorted(truth.climbs.items())),
        cold_starts_per_1000={
            rung: 1000 * count / requests if requests else 0.0
            for rung, count in sorted(truth.climbs.items())
        },
        evictions=truth.actions["evict"], actions=dict(sorted(truth.actions.items())),
        gpu_hours_occupied=truth.occupied_s / 3600, gpu_hours_held=truth.held_s / 3600,
        gpu_hours_there=len(truth.sizes) * duration_s / 3600,
        cut_off=truth.cut, violations=list(truth.violations), events=events,
        by_model={
            name: (int(n), total / n, worst)
            for name, (n, total, worst) in sorted(truth.by_model.items())
        },
        decisions=truth.decisions, cold_starts=truth.cold_starts, segments=truth.segments,
        climb_times=truth.climb_times, queue=truth.queue, memory=truth.memory,
        sizes=dict(truth.sizes),
    )  # fmt: skip
