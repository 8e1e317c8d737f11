"""Which devices a replica gets, new or asleep, and what must go down first. Pure policy.

Rules this file keeps:
- "would it fit if everything were evicted?" is asked first; if not, the answer is `Never` with the
  reason, not a loop;
- best fit: the devices that would be left with the least room, so that large holes stay whole;
- among new places, room without eviction is preferred to room with it;
- an asleep replica is woken where that is expected to serve sooner than a new start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from runtime.wire import ModelSpec
from scheduler.eviction import cheapest_descents, evictable, rank
from scheduler.ladder import EVICT_S, Descent, climb_s
from scheduler.state import ClusterState, Model, Node, Replica


@dataclass(frozen=True, slots=True)
class Fit:
    """Place it here, or wake `riser` where it is. With `victims`, once they are down."""

    node_id: str
    device_ids: tuple[str, ...]
    victims: tuple[Descent, ...] = field(default=())
    riser: Replica | None = None


@dataclass(frozen=True, slots=True)
class NotNow:
    """It fits this cluster, but what is in its place is busy, pinned or too fresh to go."""

    reason: str


@dataclass(frozen=True, slots=True)
class Never:
    """No node could run it even if everything else were evicted."""

    reason: str


Placement = Fit | NotNow | Never


def place(state: ClusterState, model: Model, now: float, min_dwell_s: float) -> Placement:
    """Where one more replica of `model` serves from. Its spec must have its size."""
    spec = model.spec
    risers = [_rise(state, model, r, now, min_dwell_s) for r in model.asleep()]
    wakes = sorted((w for w in risers if w), key=lambda w: _wait_s(model, w))
    never = why_never(state, spec)
    fresh = None
    if never is None:
        fresh = _best_free(state, spec) or _cheapest_eviction(state, spec, now, min_dwell_s)
    if wakes and (fresh is None or _wait_s(model, wakes[0]) <= _wait_s(model, fresh)):
        return wakes[0]
    if fresh is not None:
        return fresh
    if never is not None:
        return Never(never)
    size = format_bytes(spec.booked_bytes())
    return NotNow(f"waiting for {size} on a device: {_holders(state, spec)}")


def _wait_s(model: Model, fit: Fit) -> float:
    """Seconds until a replica placed so is expected to serve."""
    climb = climb_s(model, fit.riser.sleep_level if fit.riser else 0)
    return climb + (EVICT_S if fit.victims else 0.0)


def _rise(
    state: ClusterState, model: Model, replica: Replica, now: float, min_dwell_s: float
) -> Fit | None:
    """Waking `replica` on its own devices; None if they can't be cleared now."""
    node = state.nodes[replica.node_id]
    if not node.schedulable or replica.launch_key != model.launch_key:
        return None
    need = replica.bytes - replica.residue
    victims: dict[str, Descent] = {}
    for device_id in replica.device_ids:
        found = _clear(state, node, device_id, need, model.spec.name, now, min_dwell_s)
        if found is None:
            return None
        victims.update({d.replica.replica_id: d for d in found})
    return Fit(node.node_id, replica.device_ids, tuple(victims.values()), replica)


def _clear(
    state: ClusterState, node: Node, device_id: str, need: int, name: str, now: float,
    min_dwell_s: float,
) -> list[Descent] | None:  # fmt: skip
    """What must go down for `need` bytes more on one device; [] if nothing, None if it can't be."""
    missing = need - node.plannable(device_id)
    if missing <= 0:
        return []
    there = [
        r
        for r in node.on_device(device_id)
        if r.model != name and evictable(state, r, now, min_dwell_s)
    ]
    return cheapest_descents(state, node, there, missing, now)


def why_never(state: ClusterState, spec: ModelSpec) -> str | None:
    """Why no schedulable node could run `spec` even when empty; None if one could."""
    nodes = list(state.schedulable_nodes())
    if not nodes:
        return "no node is up that takes new replicas"
    able = [node for node in nodes if _runs_engine(node, spec)]
    if not able:
        return f"no node can run the engine {spec.engine!r}{_engine_hint(nodes, spec)}"
    need, count = spec.booked_bytes(), spec.tensor_parallel_size
    if any(len(_large_enough(node, need)) >= count for node in able):
        return None
    if all(len(node.devices) < count for node in able):
        most = max(len(node.devices) for node in able)
        return f"needs {count} devices on one node; the largest node has {most}"
    largest = max((node.capacity(d) for node in able for d in node.devices), default=0)
    each = (
        f"{format_bytes(need)} on each of {count} devices of one node"
        if count > 1
        else (f"{format_bytes(need)} on one device")
    )
    return f"needs {each}; the most any device could give is {format_bytes(largest)}"


def format_bytes(count: int) -> str:
    """12884901888 -> "12.0 GiB"; below 1 GiB in MiB."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"


def _runs_engine(node: Node, spec: ModelSpec) -> bool:
    assert node.heartbeat is not None
    kinds = {d.kind for d in node.devices.values()}
    return spec.engine in node.heartbeat.engines and (
        spec.engine == "stub" or kinds != {"simulated"}
    )


def _engine_hint(nodes: Iterable[Node], spec: ModelSpec) -> str:
    kinds = {d.kind for node in nodes for d in node.devices.values()}
    if spec.engine != "stub" and kinds == {"simulated"}:
        return " (simulated devices run only the stub engine)"
    return " (is it installed in the agents' environment?)"


def _large_enough(node: Node, need: int) -> list[str]:
    return [d for d in node.devices if node.capacity(d) >= need]


def _best_free(state: ClusterState, spec: ModelSpec) -> Fit | None:
    """The tightest devices with room, one with nothing still leaving it preferred."""
    need, count = spec.booked_bytes(), spec.tensor_parallel_size
    best: tuple[tuple[bool, int, int, str], Fit] | None = None
    for node in state.schedulable_nodes():
        if not _runs_engine(node, spec):
            continue
        rooms = sorted((node.plannable(d) - need, d) for d in node.devices)
        fitting = [(left, d) for left, d in rooms if left >= 0][:count]
        if len(fitting) < count:
            continue
        devices = tuple(d for _, d in fitting)
        must_wait = any(node.physical(d) + need > node.capacity(d) for d in devices)
        mine = sum(1 for r in node.replicas.values() if r.model == spec.name)
        key = (must_wait, mine, sum(left for left, _ in fitting), node.node_id)
        if best is None or key < best[0]:
            best = (key, Fit(node.node_id, devices))
    return best[1] if best else None


def _cheapest_eviction(
    state: ClusterState, spec: ModelSpec, now: float, min_dwell_s: float
) -> Fit | None:
    best: tuple[tuple[list[tuple[int, int, float]], str], Fit] | None = None
    for node in state.schedulable_nodes():
        if not _runs_engine(node, spec):
            continue
        fit = _evict_on(state, node, spec, now, min_dwell_s)
        if fit is None:
            continue
        key = (_dearest(state, fit.victims, now), node.node_id)
        if best is None or key < best[0]:
            best = (key, fit)
    return best[1] if best else None


def _dearest(
    state: ClusterState, victims: Iterable[Descent], now: float
) -> list[tuple[int, int, float]]:
    """Orders sets of victims: a set is as dear as the dearest in it."""
    return sorted((rank(state, v, now) for v in victims), reverse=True)


def _evict_on(
    state: ClusterState, node: Node, spec: ModelSpec, now: float, min_dwell_s: float
) -> Fit | None:
    """The cheapest devices of one node to clear. A victim that spans devices counts once."""
    need, count = spec.booked_bytes(), spec.tensor_parallel_size
    options: list[tuple[list[tuple[int, int, float]], str, list[Descent]]] = []
    for device_id in _large_enough(node, need):
        victims = _clear(state, node, device_id, need, spec.name, now, min_dwell_s)
        if victims is not None:
            options.append((_dearest(state, victims, now), device_id, victims))
    if len(options) < count:
        return None
    chosen = sorted(options, key=lambda option: option[:2])[:count]
    by_id: dict[str, Descent] = {}
    for _, _, victims in chosen:
        for way in victims:
            known = by_id.get(way.replica.replica_id)
            # One device may need it to stop where another would let it sleep.
            if known is None or way.frees > known.frees:
                by_id[way.replica.replica_id] = way
    return Fit(node.node_id, tuple(d for _, d, _ in chosen), tuple(by_id.values()))


def _holders(state: ClusterState, spec: ModelSpec) -> str:
    """Who holds the devices, in words."""
    names = sorted(
        {
            r.model
            for node in state.schedulable_nodes()
            if _runs_engine(node, spec)
            for r in node.replicas.values()
            if r.model != spec.name
        }
    )
    if not names:
        return "the node's memory is in use"
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} in use"
