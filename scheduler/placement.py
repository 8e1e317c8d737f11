"""Which devices a replica gets, new or asleep, and what must go down first. Pure policy.

Each candidate has a price in seconds, and the cheapest wins:

    price = expected time to first token there + expected cost of what it moves down + preferences

    time to first token   the climb from the rung the model has there (asleep, staged, cached,
                          remote), plus the starts that go before it on those devices, plus EVICT_S
                          where something must leave first
    what it moves down    expected seconds of waiting (scheduler/ladder.py), doubled for each class
                          of priority above the model's own
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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from scheduler.eviction import cheapest_descents, evictable, standing
from scheduler.fitness import (
    allowed_devices,
    could_run,
    format_bytes,
    has_labels,
    runs_engine,
    together,
    why_never,
)
from scheduler.ladder import EVICT_S, Descent, climb_s
from scheduler.state import BUSY, COMING, ClusterState, Model, Node, Replica

PRESSURE_S = 2.0  # a device that computes all the time halves a newcomer's speed: assumed
SPREAD_S = 5.0
SPOT_S = 2.0
SAME_S = 0.5
MOVE_S = 3.0  # a victim whose stop costs less is not worth starting anew elsewhere
LOOKED_AT = 48
RUNNERS_UP = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """Place it here, or wake `riser` where it is. With `victims`, once they are down."""

    node_id: str
    device_ids: tuple[str, ...]
    victims: tuple[Descent, ...] = field(default=())
    riser: Replica | None = None
    rung: str = "cached"  # what a start begins from
    wait_s: float = 0.0  # expected until it serves
    price: float = 0.0
    considered: tuple[str, ...] = ()  # the runners-up, in words


@dataclass(frozen=True, slots=True)
class NotNow:
    """It fits this cluster, but what is in its place is busy, pinned or too fresh to go."""

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
    found: list[tuple[Key, Fit]] = []
    for riser in model.asleep():
        if fit := _rise(state, model, riser, now, min_dwell_s, may_evict):
            found.append((_key(state, model, fit, now), fit))
    for node in _candidates(state, model):
        fit = _on(state, node, model, now, min_dwell_s, may_evict)
        if fit is not None:
            found.append((_key(state, model, fit, now), fit))
    if found:
        found.sort(key=lambda one: one[0])
        best = found[0][1]
        runners = tuple(_words(fit) for _, fit in found[1 : 1 + RUNNERS_UP])
        return replace(_with_moves(state, best, now), considered=runners)
    never = why_never(state, model)
    if never is not None:
        return Never(never)
    size = format_bytes(model.booked_bytes())
    return NotNow(f"waiting for {size} on a device: {_holders(state, model, now, min_dwell_s)}")


def free_place(
    state: ClusterState, model: Model, not_on: str
) -> tuple[str, tuple[str, ...]] | None:
    """(node, devices) with room for one more replica, nothing moved down; None if there is none."""
    state.refresh_index()
    for node in _candidates(state, model):
        if node.node_id != not_on and (devices := _room(node, model, model.booked_bytes())):
            return node.node_id, devices
    return None


# ------------------------------------------------------------------------------- candidates


def _candidates(state: ClusterState, model: Model) -> Iterator[Node]:
    """Nodes to price: all of a small cluster, the promising ones of a large one."""
    spec, need = model.spec, model.booked_bytes()
    names = state.index.open_nodes()
    if len(names) > LOOKED_AT:
        names = _promising(state, model, names, need)
    reliable = _only_reliable(state, model)
    nodes = [state.nodes[n] for n in names]
    fitting = [n for n in nodes if could_run(n, spec, need) and _spread_ok(n, model)]
    if reliable and any(not n.preemptible for n in fitting):
        fitting = [n for n in fitting if not n.preemptible]
    yield from fitting


def _promising(state: ClusterState, model: Model, names: list[str], need: int) -> list[str]:
    """At most LOOKED_AT: a third each of those that have it, have room, or come by turns.

    Where none of them could run it at all, every node is looked at.
    """
    share = LOOKED_AT // 3
    open_names = set(names)
    chosen: dict[str, None] = {}
    for name in sorted(state.index.cached_on.get(model.spec.source, ())):
        if len(chosen) >= share:
            break
        if name in open_names:
            chosen[name] = None
    for name in _first_able(state, model, state.index.roomy(need), need, share):
        chosen[name] = None
    stride = max(1, len(names) // share)
    state.index.turn += 1  # so that who is refused now is shown other nodes the next time
    offset = state.index.turn % stride
    turn = names[offset::stride]
    for name in _first_able(state, model, turn, need, share):
        chosen[name] = None
    return list(chosen) or names


def _first_able(
    state: ClusterState, model: Model, names: Iterable[str], need: int, most: int
) -> Iterator[str]:
    count = 0
    for name in names:
        if could_run(state.nodes[name], model.spec, need):
            yield name
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


def _room(node: Node, model: Model, need: int) -> tuple[str, ...] | None:
    """The tightest devices of a node with room for `need` bytes each; None if too few have it."""
    rooms = [
        (float(left), d)
        for d in allowed_devices(node, model.spec)
        if (left := node.plannable(d) - need) >= 0
    ]
    count = model.spec.tensor_parallel_size
    return together(node, rooms, count) if len(rooms) >= count else None


def _on(
    state: ClusterState, node: Node, model: Model, now: float, min_dwell_s: float, may_evict: bool
) -> Fit | None:
    """The best a node has to offer for a new replica."""
    need = model.booked_bytes()
    devices = _room(node, model, need)
    rung = node.start_rung(model.spec.source)
    if devices is not None:
        return _priced(state, node, model, Fit(node.node_id, devices, rung=rung), now)
    if not may_evict:
        return None
    fit = _evict_on(state, node, model, need, now, min_dwell_s)
    return None if fit is None else _priced(state, node, model, replace(fit, rung=rung), now)


def _evict_on(
    state: ClusterState, node: Node, model: Model, need: int, now: float, min_dwell_s: float
) -> Fit | None:
    """The cheapest devices of one node to clear. A victim that spans devices counts once."""
    count = model.spec.tensor_parallel_size
    cleared: dict[str, list[Descent]] = {}
    prices = []
    for device_id in allowed_devices(node, model.spec):
        if node.capacity(device_id) < need:
            continue
        victims = _clear(state, node, device_id, need, model, now, min_dwell_s)
        if victims is not None:
            cleared[device_id] = victims
            prices.append((sum(_weight(state, model, v) for v in victims), device_id))
    if len(prices) < count:
        return None
    chosen = together(node, prices, count)
    if chosen is None:
        return None
    return Fit(node.node_id, chosen, _merged(cleared[d] for d in chosen))


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
    fit = Fit(node.node_id, replica.device_ids, _merged(sets), replica)
    return _priced(state, node, model, fit, now)


def _clear(
    state: ClusterState, node: Node, device_id: str, need: int, model: Model, now: float,
    min_dwell_s: float,
) -> list[Descent] | None:  # fmt: skip
    """What must go down for `need` bytes more on one device; [] if nothing, None if it can't be."""
    missing = need - node.plannable(device_id)
    if missing <= 0:
        return []
    rank_of = standing(state, model)
    there = [
        r
        for r in node.on_device(device_id)
        if r.model != model.name and evictable(state, r, now, min_dwell_s, rank_of)
    ]
    if sum(r.committed for r in there) < missing:
        return None
    return cheapest_descents(state, node, there, missing, now)


# ------------------------------------------------------------------------------- prices


def _priced(state: ClusterState, node: Node, model: Model, fit: Fit, now: float) -> Fit:
    climb = climb_s(model, fit.riser.sleep_level if fit.riser else 0, fit.rung)
    wait_s = climb + max(_turn_s(state, node, d, now) for d in fit.device_ids)
    more = fit.riser.bytes - fit.riser.residue if fit.riser else model.booked_bytes()
    leaving = any(node.physical(d) + more > node.capacity(d) for d in fit.device_ids)
    if fit.victims or leaving:
        wait_s += EVICT_S
    moved_s = sum(_weight(state, model, way) for way in fit.victims)
    return replace(fit, wait_s=wait_s, price=wait_s + moved_s + _preference(node, model, fit))


def _turn_s(state: ClusterState, node: Node, device_id: str, now: float) -> float:
    """Seconds until the starts and wakes that go first on a device are over."""
    total = 0.0
    for r in node.on_device(device_id):
        owner = state.models.get(r.model)
        if owner is not None and (r.stage in BUSY or r.plan):
            climb = climb_s(owner, r.sleep_level)
            total += climb if r.plan else max(0.0, climb - (now - r.since))
    return total


def _weight(state: ClusterState, model: Model, way: Descent) -> float:
    """The expected waiting a victim costs, doubled for each class of priority above ours."""
    classes = state.models[way.replica.model].spec.priority - model.spec.priority
    return way.cost * 2.0 ** max(-10, min(10, classes))


def _preference(node: Node, model: Model, fit: Fit) -> float:
    used = max((node.devices[d].utilization or 0.0 for d in fit.device_ids), default=0.0)
    total = PRESSURE_S * used
    if fit.riser is None and model.spec.placement.spread != "off":
        mine = (r for r in node.replicas.values() if r.model == model.name and r.stage in COMING)
        total += SPREAD_S * sum(1 for _ in mine)
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
            place_there = free_place(state, owner, fit.node_id)
        if place_there and taken.isdisjoint(f"{place_there[0]}/{d}" for d in place_there[1]):
            taken.update(f"{place_there[0]}/{d}" for d in place_there[1])
            way = replace(way, elsewhere=place_there)
        victims.append(way)
    return replace(fit, victims=tuple(victims))


def _holders(state: ClusterState, model: Model, now: float, min_dwell_s: float) -> str:
    """Who holds the devices and why they stay, in words."""
    why: dict[str, str] = {}
    for node in state.schedulable_nodes():
        if not runs_engine(node, model.spec) or not has_labels(node, model.spec):
            continue
        for r in node.replicas.values():
            if r.model != model.name and r.model not in why:
                why[r.model] = _why_stays(state, r, now, min_dwell_s)
    if not why:
        return "the node's memory is in use"
    shown = [f"{name} {why[name]}" for name in sorted(why)]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _why_stays(state: ClusterState, replica: Replica, now: float, min_dwell_s: float) -> str:
    model = state.models.get(replica.model)
    if model is None or replica.leaving:
        return "leaving"
    if model.pinned:
        return "pinned"
    if state.in_flight(replica) or state.demand(replica.model).waiting:
        return "in use"
    if replica.ready_at is not None and now - replica.ready_at < min_dwell_s:
        return "just started"
    return "kept by min_replicas or a floor" if model.spec.min_replicas or model.floor else "in use"
