"""What goes down to make room, and how far. Pure policy.

Rules this file keeps:
- never a replica with work in flight, with requests waiting for its model, pinned, needed for
  min_replicas, or ready for less than the dwell time;
- cheapest first: lower priority, then clearly less expected waiting (scheduler/ladder.py), then the
  one idle longest; one that can sleep sleeps rather than stops, while the host has memory for it;
- the set is minimal: none in it could stay where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scheduler.ladder import Descent, descents
from scheduler.state import ClusterState, Node, Replica, Stage

SAME_WAIT_S = 10.0  # expected waits up to this are alike


def evictable(state: ClusterState, replica: Replica, now: float, min_dwell_s: float) -> bool:
    """Whether this replica may go down for another model's sake."""
    model = state.models.get(replica.model)
    if model is None:
        return False  # it is on its way out already
    if replica.stage is Stage.ASLEEP:
        return not model.pinned and model.may_stop(replica)
    if model.floor == "hot" and not model.may_stop(replica):
        return False
    if replica.stage is not Stage.READY or state.in_flight(replica):
        return False
    if now - (replica.ready_at or now) < min_dwell_s:
        return False
    demand = state.demand(replica.model)
    others = sum(1 for r in model.ready() if r is not replica)
    if demand.waiting or others < model.spec.min_replicas:
        return False
    if (
        now < model.asked_until
        and others < model.asked_replicas
        and replica.used_at <= (replica.ready_at or 0)
    ):
        return False  # loaded on request and not used yet
    return not model.pinned


def rank(state: ClusterState, descent: Descent, now: float) -> tuple[int, int, float]:
    """Orders ways down, cheapest first: priority, expected waiting, then least recently used.

    Waiting counts by doublings above 10 s (up to 10 s: 0, to 20 s: 1, to 40 s: 2 …): start times
    vary by tens of per cent from run to run, and such noise must not outweigh who was called last.
    """
    replica = descent.replica
    doublings = max(0, math.ceil(math.log2(max(descent.cost, 1.0) / SAME_WAIT_S)))
    return state.models[replica.model].spec.priority, doublings, -(now - replica.used_at)


def cheapest_descents(
    state: ClusterState, node: Node, candidates: Sequence[Replica], bytes_needed: int, now: float
) -> list[Descent] | None:
    """The cheapest minimal set that frees `bytes_needed` on one device; None if none does.

    Each candidate is first offered its cheapest way down that frees anything; where that is not
    enough in sum, they stop instead of sleeping, the cheapest first.
    """
    host_free = node.host_free()
    chosen: list[Descent] = []
    options = {r.replica_id: _open(state, node, r, now) for r in candidates}
    for ways in sorted(options.values(), key=lambda w: rank(state, w[0], now) if w else (0, 0, 0)):
        if sum(d.frees for d in chosen) >= bytes_needed:
            break
        way = next((d for d in ways if d.host_bytes <= host_free), None)
        if way is not None:
            host_free -= way.host_bytes
            chosen.append(way)
    for index, way in enumerate(chosen):
        if sum(d.frees for d in chosen) >= bytes_needed:
            break
        stop = [d for d in options[way.replica.replica_id] if d.level == 0]
        chosen[index] = stop[0] if stop else way
    freed = sum(d.frees for d in chosen)
    if freed < bytes_needed:
        return None
    # The last one taken may free enough to make earlier, smaller ones unnecessary: spare the
    # dearest of those first.
    for way in sorted(chosen, key=lambda d: rank(state, d, now), reverse=True):
        if freed - way.frees >= bytes_needed:
            chosen.remove(way)
            freed -= way.frees
    return chosen


def _open(state: ClusterState, node: Node, replica: Replica, now: float) -> list[Descent]:
    ways = descents(state.models[replica.model], node, replica, now)
    return [way for way in ways if way.frees > 0]
