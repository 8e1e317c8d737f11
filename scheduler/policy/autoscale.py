"""How many replicas a model should have, all reasons together. Pure policy.

    by demand   scheduler/signals/replica_target.py: metrics, targets, windows, policies, panic;
                a model of one replica has it while anything waits or is in flight
    floor       min_replicas, a pin, an operator's `load`, a floor of hot, a forecast

Worked example: 40 requests wait, 8 are in flight, target_concurrency 16, max_replicas 2, nothing
runs: ceil(48 / 16) = 3, so 2 replicas are wanted, at once.

Rules this file keeps: what replicas on their way out are finishing asks for no other; the last
replica goes by its own idleness (`idle_replicas`), so a dip in demand stops nothing that was useful
a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduler.signals.replica_target import Desired, Sample, desired_replicas
from scheduler.state.cluster import ClusterState, Demand, Model, Node, Replica, Stage


def decide(state: ClusterState, model: Model, demand: Demand, now: float) -> Desired:
    """Replicas the model should have now. Remembers in `model.scaling`: ask once an event."""
    least, why = floor(model, now)
    if model.spec.max_replicas == 1 and not model.spec.autoscale.metrics:
        by_demand = Desired(min(1, _need(demand)), "demand")
    else:
        by_demand = desired_replicas(model.spec, _sample(state, model, demand, now), model.scaling)
    if by_demand.replicas > 0 and _need(demand) == 0 and not model.coming():
        by_demand = Desired(0, "no demand")
    return by_demand if by_demand.replicas >= least else Desired(least, why)


def floor(model: Model, now: float) -> tuple[int, str]:
    """Replicas it has whatever the demand, and why."""
    spec = model.spec
    reasons = [(spec.min_replicas, "min_replicas")]
    if now < model.asked_until:
        reasons.append((model.asked_replicas, "operator asked"))
    # A model that must stay asleep has to be started once, to be put to sleep.
    if model.floor == "hot" or (model.floor == "asleep" and not model.asleep()):
        reasons.append((1, f"prewarm: {model.floor}"))
    if model.pinned:
        reasons.append((1, "pinned"))
    if now < model.warm_until and model.coming():
        reasons.append((1, "forecast"))
    return max(reasons, key=lambda reason: reason[0])


def idle_replicas(
    state: ClusterState, model: Model, now: float, idle_s: Callable[[Model, Replica], float]
) -> list[Replica]:
    """Ready replicas nobody used for their `idle_s`, longest idle first, sparing the wanted."""
    demand = state.demand(model.spec.name)
    least, why = floor(model, now)
    if why == "forecast":  # whether that still holds is asked of each that is idle
        least = 0
    spare = len(model.coming()) - max(least, min(1, _need(demand)))
    if demand.waiting:
        return []
    if model.floor == "asleep" and not model.asleep():
        spare = max(spare, len(model.ready()) - model.spec.min_replicas - int(model.pinned))
    idle = [
        r
        for r in model.replicas.values()
        if r.stage is Stage.READY
        and not state.in_flight(r)
        and now - max(r.used_at, r.ready_at or now) >= idle_s(model, r)
    ]
    return sorted(idle, key=lambda r: r.used_at)[: max(0, spare)]


def _need(demand: Demand) -> int:
    return demand.waiting + demand.in_flight - demand.ending


def _sample(state: ClusterState, model: Model, demand: Demand, now: float) -> Sample:
    ready = model.ready()
    coming = [r for r in model.coming() if not r.plan]
    used = (_utilization(state.nodes[r.node_id], r) for r in ready)
    kv = (r.report.kv_cache_usage for r in ready if r.report)
    return Sample(
        now=now,
        ready=len(ready),
        coming=max(len(ready), len(coming)),
        waiting=demand.waiting,
        in_flight=demand.in_flight - demand.ending,
        gpu_utilization=_mean(used),
        kv_cache_usage=_mean(kv),
        ttft_p95_s=state.ttft_p95_s(model.name),
    )


def _utilization(node: Node, replica: Replica) -> float | None:
    return _mean(node.devices[d].utilization for d in replica.device_ids if d in node.devices)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
