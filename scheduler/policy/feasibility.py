"""Which nodes and devices could run a model at all, and what would have to change. Pure policy.

Rules this file keeps: constraints of the spec (labels, device names, compute capability, spread)
are asked here and nowhere else; a refusal names the figure that is missing and a way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from runtime.sizes import sizes_apart
from runtime.wire.model_spec import ModelSpec
from scheduler.state.cluster import ClusterState, Model, Node


def runs_engine(node: Node, spec: ModelSpec) -> bool:
    """Whether the node has the engine; simulated devices run only the stub."""
    assert node.heartbeat is not None
    if spec.engine not in node.heartbeat.engines:
        return False
    return spec.engine == "stub" or any(d.kind != "simulated" for d in node.devices.values())


def has_labels(node: Node, spec: ModelSpec) -> bool:
    """Whether the node has every label the spec asks for."""
    wanted = spec.placement.labels
    if not wanted:
        return True
    assert node.heartbeat is not None
    labels = node.heartbeat.labels
    return all(labels.get(key) == value for key, value in wanted.items())


def allowed_devices(node: Node, spec: ModelSpec) -> list[str]:
    """The node's usable devices that the spec's constraints allow."""
    rules = spec.placement
    found = [d for d in node.devices if node.usable(d)]
    if rules.devices:
        found = [
            d for d in found if any(fnmatchcase(node.devices[d].name, p) for p in rules.devices)
        ]
    if rules.min_compute_capability is not None:
        least = rules.min_compute_capability
        found = [d for d in found if (node.devices[d].compute_capability or 0.0) >= least]
    return found


def could_run(node: Node, spec: ModelSpec, need: int) -> bool:
    """Whether the node could run one replica of `need` bytes a device if it were empty."""
    if not runs_engine(node, spec) or not has_labels(node, spec):
        return False
    rules = spec.placement
    if not rules.devices and rules.min_compute_capability is None:
        sizes, count = node.rooms().sizes, spec.tensor_parallel_size
        return len(sizes) >= count and sizes[count - 1] >= need
    room = sum(1 for d in allowed_devices(node, spec) if node.capacity(d) >= need)
    return room >= spec.tensor_parallel_size


def suits(node: Node, spec: ModelSpec, need: int) -> bool:
    """Whether the node could run it were it up and open to new replicas, all its devices healthy
    and nothing of others on them: waiting may help."""
    if node.heartbeat is None or not runs_engine(node, spec) or not has_labels(node, spec):
        return False
    rules, least = spec.placement, spec.placement.min_compute_capability or 0.0
    room = sum(
        1
        for device in node.devices.values()
        if device.memory_total_bytes >= need
        and (not rules.devices or any(fnmatchcase(device.name, p) for p in rules.devices))
        and (device.compute_capability or 0.0) >= least
    )
    return room >= spec.tensor_parallel_size


def together(
    node: Node, choices: Sequence[tuple[float, str]], count: int
) -> tuple[str, ...] | None:
    """The best `count` of `choices` ((price, device id), any order) for one replica.

    One kind of device only; with more than one, those joined by NVLink first, then the cheapest.
    """
    ordered = sorted(choices)
    if count == 1:
        return (ordered[0][1],) if ordered else None
    best: tuple[tuple[int, float], tuple[str, ...]] | None = None
    for _, seed in ordered:
        chosen = _grow(node, seed, ordered, count)
        if chosen is None:
            continue
        price = sum(p for p, d in ordered if d in chosen)
        key = (-_links(node, chosen), price)
        if best is None or key < best[0]:
            best = (key, chosen)
    return best[1] if best else None


def _grow(
    node: Node, seed: str, ordered: Sequence[tuple[float, str]], count: int
) -> tuple[str, ...] | None:
    kind = node.devices[seed].name
    chosen = [seed]
    rest = [(p, d) for p, d in ordered if d != seed and node.devices[d].name == kind]
    while len(chosen) < count and rest:
        linked = set(chosen)
        nearest = min(
            rest, key=lambda c: (-len(linked & set(node.devices[c[1]].nvlink_peers)), c[0], c[1])
        )
        rest.remove(nearest)
        chosen.append(nearest[1])
    return (
        tuple(sorted(chosen, key=lambda d: node.devices[d].index))
        if not count - len(chosen)
        else None
    )


def _links(node: Node, chosen: Sequence[str]) -> int:
    there = set(chosen)
    return sum(len(there & set(node.devices[d].nvlink_peers)) for d in chosen)


def why_never(state: ClusterState, model: Model) -> str | None:
    """Why no schedulable node could run `model` even when empty; None if one could."""
    spec, need = model.spec, model.booked_bytes()
    nodes = list(state.schedulable_nodes())
    if any(could_run(node, spec, need) for node in nodes):
        return None
    if not nodes:
        return "no node is up that takes new replicas"
    able = [node for node in nodes if runs_engine(node, spec)]
    if not able:
        return f"no node can run the engine {spec.engine!r}{_engine_hint(nodes, spec)}"
    labelled = [node for node in able if has_labels(node, spec)]
    if not labelled:
        wanted = ", ".join(f"{k}={v}" for k, v in sorted(spec.placement.labels.items()))
        return (
            f"no node has the labels {wanted}; label one (agent.labels) or change placement.labels"
        )
    allowed = {node.node_id: allowed_devices(node, spec) for node in labelled}
    if not any(allowed.values()):
        return f"no healthy device matches its placement{_device_hint(labelled, spec)}"
    return _too_large(labelled, allowed, spec, need)


def _too_large(
    nodes: Sequence[Node], allowed: dict[str, list[str]], spec: ModelSpec, need: int
) -> str:
    count = spec.tensor_parallel_size
    most = max(len(devices) for devices in allowed.values())
    if most < count:
        return f"needs {count} devices on one node; the largest node has {most}"
    largest = max((node.capacity(d) for node in nodes for d in allowed[node.node_id]), default=0)
    needed, given = sizes_apart(need, largest)
    where = f"each of {count} devices of one node" if count > 1 else "one device"
    text = f"needs {needed} on {where}; the most any device could give is {given}"
    total = need * count
    for wider in (2, 4, 8):
        if count < wider <= most and any(
            sum(1 for d in allowed[n.node_id] if n.capacity(d) >= -(-total // wider)) >= wider
            for n in nodes
        ):
            return f"{text}; tensor_parallel_size: {wider} would fit"
    if spec.device_memory_bytes is not None:
        return f"{text}; it is its device_memory_bytes that says so"
    return f"{text}; a lower max_model_len or target_concurrency takes less"


def _engine_hint(nodes: Iterable[Node], spec: ModelSpec) -> str:
    kinds = {d.kind for node in nodes for d in node.devices.values()}
    if spec.engine != "stub" and kinds == {"simulated"}:
        return " (simulated devices run only the stub engine)"
    return " (is it installed in the agents' environment?)"


def _device_hint(nodes: Iterable[Node], spec: ModelSpec) -> str:
    rules = spec.placement
    asked = [f"devices {', '.join(rules.devices)}"] if rules.devices else []
    if rules.min_compute_capability is not None:
        asked.append(f"min_compute_capability {rules.min_compute_capability}")
    seen = sorted({d.name for node in nodes for d in node.devices.values()})
    wanted = f" ({'; '.join(asked)})" if asked else ""
    return f"{wanted}; there are: {', '.join(seen) or 'none'}"
