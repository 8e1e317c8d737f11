"""What goes down to make room, and how far. Pure policy.

Rules this file keeps:
- never pinned, needed for min_replicas or a floor, or ready for less than the dwell time;
- with work in flight or requests waiting only for a model of higher standing, and then it ends its
  requests first: standing is priority plus one for each AGING_S its oldest request has waited, so
  that no model waits forever, and a replica that was given its turn keeps it for TURN_S;
- never a sleeper that is waited for;
- cheapest first: idle before busy, lower priority, then clearly less expected waiting
  (scheduler/policy/ladder.py; within ALIKE times the least is alike), then the one idle longest;
  one that can sleep sleeps rather than stops, while the host has memory for it;
- the set is minimal: none in it could stay where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scheduler.policy.autoscale import floor
from scheduler.policy.ladder import Descent, climb_s, descents
from scheduler.state.cluster import ClusterState, Model, Node, Replica, Stage

SAME_WAIT_S = 10.0  # expected waits up to this are alike
ALIKE = 4.0  # and those up to so many times the least: so much slower is a start on a busy host
AGING_S = 30.0  # of waiting raise a model's standing by one class of priority
LONG_WAKE_S = 5.0  # what still lasts so long is not waited for
TURN_S = 30.0  # a busy replica serves at least so long before another model takes its place
UNWANTED = ", and nobody waits for it any more"  # in the reason why a `given_up` one ends
Rank = tuple[bool, int, int, float]


def standing(state: ClusterState, model: Model) -> int:
    """A model's priority, raised by how long its oldest request has waited.

    Worked example: priority 0, waiting for 65 s with AGING_S 30: 2.
    """
    return model.spec.priority + int(state.demand(model.name).oldest_wait_s // AGING_S)


def evictable(
    state: ClusterState, replica: Replica, now: float, min_dwell_s: float, rank_of: int | None
) -> bool:
    """Whether this replica may go down for another model's sake.

    `rank_of` is that model's standing; None: only replicas without requests may go.
    """
    model = state.models.get(replica.model)
    if model is None or model.pinned:
        return False  # of a removed model: it is on its way out already
    if replica.stage is Stage.ASLEEP:
        # One that is waited for wakes in a fraction of what its new start would take.
        return model.may_stop(replica) and not state.demand(replica.model).waiting
    if model.floor == "hot" and not model.may_stop(replica):
        return False
    if given_up(state, replica, now):
        return True
    if replica.stage is not Stage.READY:
        return False
    age_s = now - (replica.ready_at or now)
    outranked = rank_of is not None and rank_of > model.spec.priority
    if age_s < min_dwell_s or _needed(model, replica):
        return False
    if _loaded_for_later(model, replica, now) and not outranked:
        return False
    return not busy(state, replica) or (outranked and age_s >= TURN_S)


def given_up(state: ClusterState, replica: Replica, now: float) -> bool:
    """Whether it starts and nobody waits for it any more: no caller, no operator, no floor.

    A wake can't be broken off: its engine would be stopped, and the next caller wait for a start.
    So it gives way only where it would go on for LONG_WAKE_S.
    """
    model = state.models.get(replica.model)
    if model is None or replica.stage not in (Stage.SENT, Stage.STARTING, Stage.WAKING):
        return False
    if replica.stage is Stage.WAKING and _wake_left_s(model, replica, now) < LONG_WAKE_S:
        return False
    demand = state.demand(replica.model)
    least, why = floor(model, now)
    return not (demand.waiting or demand.in_flight) and (not least or why == "forecast")


def _wake_left_s(model: Model, replica: Replica, now: float) -> float:
    """How long it still takes to wake; one that is late takes as long again as it took so far.

    Example: 3 s were measured, and it has been waking for 6 s: 6 s more.
    """
    expected_s, took_s = climb_s(model, replica.sleep_level), now - replica.since
    return expected_s - took_s if took_s <= expected_s else took_s


def busy(state: ClusterState, replica: Replica) -> bool:
    """Whether it has requests, or some wait for its model; what is in no hurry does not count."""
    demand = state.demand(replica.model)
    if demand.background and not demand.urgent:
        return False
    return bool(state.in_flight(replica) or demand.waiting)


def _needed(model: Model, replica: Replica) -> bool:
    others = sum(1 for r in model.ready() if r is not replica)
    return others < model.spec.min_replicas


def _loaded_for_later(model: Model, replica: Replica, now: float) -> bool:
    """An operator asked for it, and it was not used yet: only long waiting outranks that."""
    others = sum(1 for r in model.ready() if r is not replica)
    return (
        now < model.asked_until
        and others < model.asked_replicas
        and replica.used_at <= (replica.ready_at or 0)
    )


def rank(state: ClusterState, descent: Descent, now: float, need: int, least_s: float) -> Rank:
    """Orders ways down, cheapest first: busy, priority, expected waiting per byte, idle longest.

    Bytes beyond `need` count for nothing. Waiting counts by how many times it is `least_s` (the
    least of those to choose from, see `wait_s`), in powers of ALIKE: a start takes several times as
    long on a busy host as on a quiet one, and such noise must not outweigh who was called last.
    Worked example, 20 GiB needed: a hot model that can sleep frees 19 GiB for 2 s: 2.1 s for
    20 GiB, so SAME_WAIT_S is the least: power 0. A sleeper frees 1 GiB for 5 s: 100 s for 20 GiB,
    so 1: it sleeps on. Two that start in 15 s and 40 s are alike: the one idle longest goes.
    """
    times = wait_s(descent, need) / max(least_s, SAME_WAIT_S)
    power = max(0, math.floor(math.log(times, ALIKE)))
    priority = state.models[descent.replica.model].spec.priority
    return descent.busy, priority, power, -(now - descent.replica.used_at)


def wait_s(descent: Descent, need: int) -> float:
    """Expected waiting of a descent, for all of `need` bytes at the price of those it frees."""
    share = min(1.0, descent.frees / max(1, need))
    return max(descent.cost, 0.1) / max(share, 1e-3)


def cheapest_descents(
    state: ClusterState, node: Node, candidates: Sequence[Replica], bytes_needed: int, now: float
) -> list[Descent] | None:
    """The cheapest minimal set that frees `bytes_needed` on one device; None if none does.

    Each candidate is first offered its cheapest way down that frees anything; where that is not
    enough in sum, they stop instead of sleeping, the cheapest first.
    """
    host_free = node.host_free() + node.host_held()
    chosen: list[Descent] = []
    options = {r.replica_id: ways for r in candidates if (ways := _open(state, node, r, now))}

    least_s = min((wait_s(ways[0], bytes_needed) for ways in options.values()), default=0.0)

    def order(way: Descent) -> Rank:
        return rank(state, way, now, bytes_needed, least_s)

    for ways in sorted(options.values(), key=lambda w: order(w[0])):
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
    for way in sorted(chosen, key=order, reverse=True):
        if freed - way.frees >= bytes_needed:
            chosen.remove(way)
            freed -= way.frees
    return chosen


def _open(state: ClusterState, node: Node, replica: Replica, now: float) -> list[Descent]:
    ways = descents(state, state.models[replica.model], node, replica, now)
    works = busy(state, replica)
    price = 1 + state.in_flight(replica) if works else 1
    return [
        replace(way, busy=works, cost=way.cost * price) if works else way
        for way in ways
        if way.frees > 0
    ]
