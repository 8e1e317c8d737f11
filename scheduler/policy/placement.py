"""Which devices a replica gets, new or asleep, and what must go down first. Pure policy.

Each candidate has a price in seconds, and the cheapest wins:

    price = expected time to first token there + expected cost of what it moves down + preferences

    time to first token   the climb from the rung the model has there (asleep, in the engine of
                          another model that can serve it, staged, cached, remote), plus the
                          starts that go before it on those devices, plus the time until what
                          must leave first has ended its requests
    what it moves down    expected seconds of waiting (scheduler/policy/ladder.py), doubled for each
                          class of priority above the model's own
    preferences           PRESSURE_S x utilization of the device; SPREAD_S for each replica of the
                          model on that node; SPOT_S for a preemptible node (less than nothing for
                          a model of low priority)

Worked example: a start takes 40 s from disk and 55 s from the shared store. Node a has the model on
disk but an idle model must leave (EVICT_S 3 + cost 8 s): 51 s. Node b is free: 55 s. a wins.

Rules this file keeps:
- "would it fit if everything were evicted?" is asked first; if not, the answer is `Never` with the
  reason, not a loop;
- prices within SAME_S are alike: then nothing moves down before something does, the longest idle
  goes, and the devices that are left with the least room are taken, so that large holes stay whole;
- of a large cluster LOOKED_AT nodes are priced: those that have the model, the tightest with room,
  and a sample of the rest that moves on with each placement.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from runtime.sizes import size
from scheduler.policy.device_turns import (
    drain_s,
    memory_s,
    must_be_alone,
    queue_s,
    slower_by_s,
    start_waits_s,
)
from scheduler.policy.eviction import cheapest_descents, evictable, standing
from scheduler.policy.feasibility import (
    allowed_devices,
    could_run,
    has_labels,
    runs_engine,
    together,
    why_never,
)
from scheduler.policy.ladder import EVICT_S, HORIZON_S, Descent, chance, climb_s, repoint_s
from scheduler.policy.shells import lost, shells
from scheduler.state.cluster import COMING, ClusterState, Model, Node, Replica, Stage

PRESSURE_S = 2.0  # a device that computes all the time halves a newcomer's speed: assumed
SPREAD_S = 5.0
SPOT_S = 2.0
SAME_S = 0.5
TIGHT_S = 1.0  # of waiting are worth taking the device that is left with the least room
MOVE_S = 3.0  # a victim whose stop costs less is not worth starting again elsewhere
LOOKED_AT = 24
RUNNERS_UP = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """Place it here, or wake `riser` where it is. With `victims`, once they are down."""

    node_id: str
    device_ids: tuple[str, ...]
    victims: tuple[Descent, ...] = field(default=())
    riser: Replica | None = None
    shell: Descent | None = None  # point this replica's engine at the model, where it is
    rung: str = "cached"  # what a start begins from
    wait_s: float = 0.0  # expected until it serves
    price: float = 0.0
    considered: tuple[str, ...] = ()  # the runners-up, in words


@dataclass(frozen=True, slots=True)
class NotNow:
    """The model fits this cluster, but what is in its place is busy, pinned or too fresh to go."""

    reason: str


@dataclass(frozen=True, slots=True)
class Never:
    """No node could run it even if everything else were evicted."""

    reason: str


Answer = Fit | NotNow | Never
Key = tuple[int, int, bool, float, int, str]


def place(
    state: ClusterState, model: Model, now: float, min_dwell_s: float, may_evict: bool = True
) -> Answer:
    """Where one more replica of `model` serves from. Its spec must have its size."""
    state.refresh_index()
    fits = [
        fit
        for riser in model.asleep()
        if (fit := _rise(state, model, riser, now, min_dwell_s, may_evict))
    ]
    need, full = model.booked_bytes(), []
    for node in _candidates(state, model):
        devices = _room(state, node, model, need, now)
        if devices is None:
            full.append(node)
        else:
            fits.append(_priced(state, node, model, devices, now))
    if may_evict:
        bound = min((fit.price for fit in fits), default=float("inf"))
        fits += _evictions(state, full, model, need, now, min_dwell_s, bound)
        fits += _shells(state, model, now, min_dwell_s)
    found = [(_key(state, model, fit, now), fit) for fit in fits]
    if found:
        found.sort(key=lambda one: one[0])
        best = found[0][1]
        runners = tuple(_words(fit) for _, fit in found[1 : 1 + RUNNERS_UP])
        return replace(_with_moves(state, best, now), considered=runners)
    never = why_never(state, model)
    if never is not None:
        return Never(never)
    needed = size(model.booked_bytes())
    return NotNow(f"waiting for {needed} on a device: {_holders(state, model, now, min_dwell_s)}")


def free_place(
    state: ClusterState, model: Model, not_on: str, now: float
) -> tuple[str, tuple[str, ...]] | None:
    """(node, devices) with room for one more replica, nothing moved down; None if there is none."""
    state.refresh_index()
    for node in _candidates(state, model):
        if node.node_id == not_on:
            continue
        if devices := _room(state, node, model, model.booked_bytes(), now):
            return node.node_id, devices
    return None


# ------------------------------------------------------------------------------- candidates


def _candidates(state: ClusterState, model: Model) -> Iterator[Node]:
    """Nodes to price: all of a small cluster, the promising ones of a large one."""
    spec, need = model.spec, model.booked_bytes()
    if state.index.open_count > LOOKED_AT:
        nodes = _promising(state, model, need)
    else:
        nodes = [state.nodes[name] for name in state.index.open_nodes()]
        nodes = [node for node in nodes if could_run(node, spec, need)]
    fitting = [node for node in nodes if _spread_ok(node, model)]
    if _only_reliable(state, model) and any(not n.preemptible for n in fitting):
        fitting = [n for n in fitting if not n.preemptible]
    yield from fitting


def _promising(state: ClusterState, model: Model, need: int) -> list[Node]:
    """At most LOOKED_AT: a third each of those that have it, have room, or come by turns.

    Where none of those could run it at all, every node is looked at.
    """
    index, share = state.index, LOOKED_AT // 3
    index.turn += 1  # so that who is refused now is shown other nodes the next time
    chosen: dict[str, Node] = {}
    caching = sorted(index.cached_on.get(model.spec.source, ()))
    for names in (caching, index.roomy(need), index.sample(share)):
        _first_able(state, model, names, need, share, chosen)
    if not chosen:
        _first_able(state, model, index.open_nodes(), need, LOOKED_AT, chosen)
    return list(chosen.values())


def _first_able(
    state: ClusterState, model: Model, names: Iterable[str], need: int, most: int,
    chosen: dict[str, Node],
) -> None:  # fmt: skip
    count = 0
    for name in names:
        node = state.nodes[name]
        if name not in chosen and node.schedulable and could_run(node, model.spec, need):
            chosen[name] = node
            count += 1
            if count == most:
                return


def _only_reliable(state: ClusterState, model: Model) -> bool:
    """Whether min_replicas are not on reliable nodes yet."""
    least = model.spec.min_replicas
    if not least:
        return False
    safe = sum(1 for r in model.coming() if not state.nodes[r.node_id].preemptible)
    return safe < least


def _spread_ok(node: Node, model: Model) -> bool:
    if model.spec.placement.spread != "node":
        return True
    return not any(r.model == model.name and r.stage in COMING for r in node.replicas.values())


def _room(
    state: ClusterState, node: Node, model: Model, need: int, now: float
) -> tuple[str, ...] | None:
    """The devices of a node with room for `need` bytes each where it is served first, the tightest
    of those alike; None if too few have room."""
    plannable = node.rooms().plannable
    constrained = bool(model.spec.placement.devices or model.spec.placement.min_compute_capability)
    allowed = allowed_devices(node, model.spec) if constrained else plannable
    start_s = climb_s(model, 0, node.start_rung(model.spec.source))
    rooms = [
        (
            start_waits_s(state, node, d, model, start_s, now)
            + TIGHT_S * (plannable[d] - need) / max(1, node.capacity(d)),
            d,
        )
        for d in allowed
        if plannable[d] >= need
    ]
    count = model.spec.tensor_parallel_size
    return together(node, rooms, count) if len(rooms) >= count else None


def _evictions(
    state: ClusterState, nodes: Iterable[Node], model: Model, need: int, now: float,
    min_dwell_s: float, bound: float,
) -> Iterator[Fit]:  # fmt: skip
    """What full nodes have to offer, but for those that can't be cheaper than `bound`."""
    for node in nodes:
        rung = node.start_rung(model.spec.source)
        if climb_s(model, 0, rung) + EVICT_S - SPOT_S > bound:
            continue
        cleared = _evict_on(state, node, model, need, now, min_dwell_s)
        if cleared is not None:
            devices, victims = cleared
            yield _priced(state, node, model, devices, now, victims)


def _evict_on(
    state: ClusterState, node: Node, model: Model, need: int, now: float, min_dwell_s: float
) -> tuple[tuple[str, ...], tuple[Descent, ...]] | None:
    """(devices, victims), the cheapest of one node. A victim that spans devices counts once."""
    count = model.spec.tensor_parallel_size
    start_s = climb_s(model, 0, node.start_rung(model.spec.source))
    cleared: dict[str, list[Descent]] = {}
    prices = []
    for device_id in allowed_devices(node, model.spec):
        if node.capacity(device_id) < need:
            continue
        victims = _clear(state, node, device_id, need, model, now, min_dwell_s)
        if victims is not None:
            cleared[device_id] = victims
            turn_s = start_waits_s(state, node, device_id, model, start_s, now)
            prices.append((turn_s + sum(_weight(state, model, v) for v in victims), device_id))
    if len(prices) < count:
        return None
    chosen = together(node, prices, count)
    if chosen is None:
        return None
    return chosen, _merged(cleared[d] for d in chosen)


def _merged(sets: Iterable[list[Descent]]) -> tuple[Descent, ...]:
    by_id: dict[str, Descent] = {}
    for victims in sets:
        for way in victims:
            known = by_id.get(way.replica.replica_id)
            # One device may need it to stop where another would let it sleep.
            if known is None or way.frees > known.frees:
                by_id[way.replica.replica_id] = way
    return tuple(by_id.values())


def _rise(
    state: ClusterState, model: Model, replica: Replica, now: float, min_dwell_s: float,
    may_evict: bool,
) -> Fit | None:  # fmt: skip
    """Waking `replica` on its own devices; None if they can't be cleared now."""
    node = state.nodes[replica.node_id]
    if not node.schedulable or replica.launch_key != model.launch_key:
        return None
    if not all(map(node.usable, replica.device_ids)):
        return None
    need = replica.bytes - replica.residue
    sets = []
    for device_id in replica.device_ids:
        found = _clear(state, node, device_id, need, model, now, min_dwell_s)
        if found is None or (found and not may_evict):
            return None
        sets.append(found)
    return _priced(state, node, model, replica.device_ids, now, _merged(sets), replica)


def _shells(state: ClusterState, model: Model, now: float, min_dwell_s: float) -> Iterator[Fit]:
    """Engines of other models that could serve this one as they are."""
    rank_of = standing(state, model)
    for node, replica in shells(state, model, now):
        if not evictable(state, replica, now, min_dwell_s, rank_of) or _spared(model, replica, now):
            continue
        sets, need = [], replica.bytes - replica.residue if replica.stage is Stage.ASLEEP else 0
        for device_id in replica.device_ids:
            found = _clear(state, node, device_id, need, model, now, min_dwell_s, but=replica)
            if found is None:
                break
            sets.append(found)
        else:
            way = lost(state, node, replica, now)
            yield _priced(state, node, model, replica.device_ids, now, _merged(sets), shell=way)


def _spared(model: Model, replica: Replica, now: float) -> bool:
    """Whether a model whose last start failed must leave it alone: what may fail again does no
    harm to what serves. It may take free room, and, where the failure may pass, what is idle."""
    return bool(model.failures) and now - replica.used_at < model.spares_s


def _clear(
    state: ClusterState, node: Node, device_id: str, need: int, model: Model, now: float,
    min_dwell_s: float, but: Replica | None = None,
) -> list[Descent] | None:  # fmt: skip
    """What must go down for `need` bytes more on one device, `but` excepted; [] if nothing, None if
    it can't be."""
    missing = need - node.plannable(device_id)
    if missing <= 0:
        return []
    rank_of = standing(state, model)
    there = [
        r
        for r in node.on_device(device_id)
        if r.model != model.name
        and r is not but
        and evictable(state, r, now, min_dwell_s, rank_of)
        and not _spared(model, r, now)
    ]
    if sum(r.committed for r in there) < missing:
        return None
    return cheapest_descents(state, node, there, missing, now)


# ------------------------------------------------------------------------------- prices


def _priced(
    state: ClusterState, node: Node, model: Model, device_ids: tuple[str, ...], now: float,
    victims: tuple[Descent, ...] = (), riser: Replica | None = None, shell: Descent | None = None,
) -> Fit:  # fmt: skip
    rung = node.start_rung(model.spec.source)
    rises = riser if shell is None else shell.replica
    if shell is not None:
        wait_s = repoint_s(model, rung)
    elif riser is not None:
        wait_s = climb_s(model, riser.sleep_level)
    else:
        wait_s = climb_s(model, 0, rung)
    more = model.booked_bytes() if rises is None else rises.bytes - rises.physical
    alone = rises is None and must_be_alone(node, model, device_ids)
    turn_s, slower_s = 0.0, 0.0
    leaving_s = max((drain_s(state, way.replica) for way in victims), default=0.0)
    for device_id in device_ids:
        wake = rises is not None
        turn_s = max(turn_s, queue_s(state, node, device_id, now, alone=alone, wake=wake))
        if rises is None and not alone:
            slower_s = max(slower_s, slower_by_s(state, node, device_id, wait_s))
        leaving_s = max(leaving_s, memory_s(state, node, device_id, more))
    wait_s += turn_s + slower_s + leaving_s
    # Company makes the other one slower too.
    price = wait_s + slower_s + _preference(node, model, device_ids, rises)
    if alone:
        price += _blocked_s(state, node, model, device_ids, climb_s(model, 0, rung), now)
    for way in victims if shell is None else (*victims, shell):
        price += _weight(state, model, way)
    return Fit(node.node_id, device_ids, victims, riser, shell, rung, wait_s, price)


def _blocked_s(
    state: ClusterState, node: Node, model: Model, device_ids: tuple[str, ...], start_s: float,
    now: float,
) -> float:  # fmt: skip
    """Expected waiting of the sleepers on these devices, which cannot wake during the start.

    Each is called within it with its chance x start_s / HORIZON_S, and then waits half of it.
    Worked example, a start of 60 s beside four sleepers of chance 0.5: 4 x 0.5 x 0.1 x 30 = 6 s.
    """
    sleepers = {
        r.replica_id: r
        for device_id in device_ids
        for r in node.on_device(device_id)
        if r.stage is Stage.ASLEEP and r.model != model.name
    }
    odds = sum(
        chance(state, state.models[r.model], r.used_at, now)
        for r in sleepers.values()
        if r.model in state.models
    )
    return odds * min(1.0, start_s / HORIZON_S) * start_s / 2


def _weight(state: ClusterState, model: Model, way: Descent) -> float:
    """The expected waiting a victim costs, doubled for each class of priority above ours."""
    classes = state.models[way.replica.model].spec.priority - model.spec.priority
    return way.cost * 2.0 ** max(-10, min(10, classes))


def _preference(
    node: Node, model: Model, device_ids: tuple[str, ...], riser: Replica | None
) -> float:
    used = max((node.devices[d].utilization or 0.0 for d in device_ids), default=0.0)
    total = PRESSURE_S * used
    if riser is None and model.replicas and model.spec.placement.spread != "off":
        total += SPREAD_S * sum(1 for r in model.coming() if r.node_id == node.node_id)
    if node.preemptible:
        total += SPOT_S if model.spec.priority >= 0 else -SPOT_S
    return total


def _key(state: ClusterState, model: Model, fit: Fit, now: float) -> Key:
    """Orders candidates, the best first."""
    node = state.nodes[fit.node_id]
    classes = (state.models[v.replica.model].spec.priority for v in fit.victims)
    above = max((max(0, c - model.spec.priority) for c in classes), default=0)
    above += any(v.busy for v in fit.victims)
    idle_s = max((now - v.replica.used_at for v in fit.victims), default=0.0)
    left = sum(node.plannable(d) for d in fit.device_ids)
    return above, round(fit.price / SAME_S), bool(fit.victims), -idle_s, left, fit.node_id


def _words(fit: Fit) -> str:
    how = f"wake {fit.riser.replica_id}" if fit.riser else f"start ({fit.rung})"
    if fit.shell is not None:
        how = f"point {fit.shell.replica.replica_id} at it"
    moved = f", moving {', '.join(v.replica.model for v in fit.victims)}" if fit.victims else ""
    return f"{fit.node_id}: {how} in {fit.wait_s:.1f} s{moved}, price {fit.price:.1f} s"


# ------------------------------------------------------------------------------- defragmentation


def _with_moves(state: ClusterState, fit: Fit, now: float) -> Fit:
    """Victims that would stop but have room elsewhere move there instead, where that is cheaper."""
    if not any(way.level == 0 and way.cost > MOVE_S and not way.busy for way in fit.victims):
        return fit
    victims = []
    taken: set[str] = set()
    for way in fit.victims:
        owner = state.models[way.replica.model]
        place_there = None
        if way.level == 0 and way.cost > MOVE_S and not way.busy:
            place_there = free_place(state, owner, fit.node_id, now)
        if place_there and taken.isdisjoint(f"{place_there[0]}/{d}" for d in place_there[1]):
            taken.update(f"{place_there[0]}/{d}" for d in place_there[1])
            way = replace(way, elsewhere=place_there)
        victims.append(way)
    return replace(fit, victims=tuple(victims))


def _holders(state: ClusterState, model: Model, now: float, min_dwell_s: float) -> str:
    """Who holds the devices and why they stay, in words."""
    there: dict[str, Replica] = {}
    for node in state.schedulable_nodes():
        if not runs_engine(node, model.spec) or not has_labels(node, model.spec):
            continue
        for r in node.replicas.values():
            if r.model != model.name:
                there.setdefault(r.model, r)
    if not there:
        return "the node's memory is in use"
    first = heapq.nsmallest(3, there)
    shown = [f"{name} {_why_stays(state, model, there[name], now, min_dwell_s)}" for name in first]
    return ", ".join(shown) + (f" and {len(there) - 3} more" if len(there) > 3 else "")


def _why_stays(
    state: ClusterState, asking: Model, replica: Replica, now: float, min_dwell_s: float
) -> str:
    model = state.models.get(replica.model)
    if model is None or replica.leaving:
        return "leaving"
    if model.pinned:
        return "pinned"
    if state.in_flight(replica) or state.demand(replica.model).waiting:
        return "in use"
    if _spared(asking, replica, now):
        return "stays, since the last start failed"
    if replica.ready_at is not None and now - replica.ready_at < min_dwell_s:
        return "just started"
    return "kept by min_replicas or a floor" if model.spec.min_replicas or model.floor else "in use"
