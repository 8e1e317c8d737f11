"""How many replicas a model should have. Pure policy.

    need   = waiting + in_flight - those that replicas on their way out are finishing
    wanted = clamp(ceil(need / target_concurrency), min_replicas, max_replicas)

Worked example: 40 requests wait, 8 are in flight, target_concurrency 16, max_replicas 2:
ceil(48 / 16) = 3, so 2 replicas are wanted.

Rules this file keeps: it only ever asks for *more*; a replica goes away by its own idleness
(`idle_replicas`), so a dip in demand stops nothing that was useful a moment ago.
"""

from __future__ import annotations

import math

from scheduler.state import ClusterState, Demand, Model, Replica, Stage


def wanted_replicas(model: Model, demand: Demand, now: float) -> int:
    """Replicas the model should have now, by demand, `min_replicas`, pins and `load`."""
    spec = model.spec
    need = demand.waiting + demand.in_flight - demand.ending
    by_demand = math.ceil(need / spec.target_concurrency)
    asked = model.asked_replicas if now < model.asked_until else 0
    floor = max(spec.min_replicas, 1 if model.pinned else 0, asked)
    # A model that must stay asleep has to be started once, to be put to sleep.
    if model.floor == "hot" or (model.floor == "asleep" and not model.asleep()):
        floor = max(floor, 1)
    return max(floor, min(by_demand, spec.max_replicas))


def idle_replicas(state: ClusterState, model: Model, now: float) -> list[Replica]:
    """Ready replicas nobody used for `idle_s`, longest idle first, sparing the wanted ones."""
    demand = state.demand(model.spec.name)
    spare = len(model.coming()) - wanted_replicas(model, demand, now)
    if demand.waiting:
        return []
    if model.floor == "asleep" and not model.asleep():
        spare = max(spare, len(model.ready()) - model.spec.min_replicas - int(model.pinned))
    idle = [
        r
        for r in model.replicas.values()
        if r.stage is Stage.READY
        and not state.in_flight(r)
        and now - max(r.used_at, r.ready_at or now) >= model.spec.idle_s
    ]
    return sorted(idle, key=lambda r: r.used_at)[: max(0, spare)]
