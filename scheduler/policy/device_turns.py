"""How many starts and wakes go on at once on a device, and what waiting for memory and a turn there
costs. Pure policy.

An engine that sizes its KV cache by what it finds free must be alone on its devices while it
starts: whatever else moves memory there falsifies its measurement. One that is told its size may
start beside others, up to `starts_at_once`, as long as that is a gain: two that start together are
both ready after s x T, where s is how much slower company makes them; one after the other they are
ready after T and 2 T, in the mean 1.5 T. So there is company only where s < WORTH_IT = 1.5.

A wake takes no start's turn, and no start takes a wake's: it waits only for a start that must be
alone, and for other wakes beyond WAKES_AT_ONCE, which would share the way into the device with it.

Worked example: a device where a start of 20 s has 5 s left and another one of 20 s just began; two
at once. A third begins in 5 s. If it must be alone, in 20 s; a wake begins now.

Rules this file keeps: nothing starts beside one that must be alone, nor that one beside others.
"""

from __future__ import annotations

from scheduler.policy.ladder import EVICT_S, climb_s
from scheduler.state.cluster import BUSY, ClusterState, Model, Node, Replica, Stage

WORTH_IT = 1.5
WAKES_AT_ONCE = 2


def must_be_alone(node: Node, model: Model, device_ids: tuple[str, ...]) -> bool:
    """Whether a start of `model` would measure what is free on those devices."""
    if model.spec.engine == "stub" or model.kv_bytes() is not None:
        return False
    return any(node.devices[d].kind == "nvml" for d in device_ids if d in node.devices)


def starts_at_once(state: ClusterState, node: Node, device_id: str) -> int:
    """How many starts may go on at once on a device."""
    device = node.devices.get(device_id)
    slower = state.climb_times.slowdown(device.kind) if device else 1.0
    return state.starts_at_once if slower < WORTH_IT else 1


def may_begin(state: ClusterState, node: Node, replica: Replica) -> bool:
    """Whether a planned start or wake may begin beside what goes on on its devices now."""
    return all(_may_begin_on(state, node, d, replica) for d in replica.device_ids)


def _may_begin_on(state: ClusterState, node: Node, device_id: str, replica: Replica) -> bool:
    there = [r for r in node.books.climbing(device_id) if r.stage in BUSY]
    if not there:
        return True
    starts = [r for r in there if r.stage is not Stage.WAKING]
    if any(r.alone for r in starts):
        return False
    if replica.stage is Stage.RISING:
        return len(there) - len(starts) < WAKES_AT_ONCE
    return not replica.alone and len(starts) < starts_at_once(state, node, device_id)


def company(node: Node, replica: Replica) -> list[Replica]:
    """The starts that go on now on its devices, but for itself."""
    found = {
        r.replica_id: r
        for d in replica.device_ids
        for r in node.books.climbing(d)
        if r is not replica and r.stage in (Stage.SENT, Stage.STARTING)
    }
    return list(found.values())


def queue_s(
    state: ClusterState, node: Node, device_id: str, now: float, *, alone: bool = False,
    wake: bool = False,
) -> float:  # fmt: skip
    """Seconds until a start or a wake that is planned now has its turn on a device."""
    there = node.books.climbing(device_id)
    if not there:
        return 0.0
    slots = [0.0] * starts_at_once(state, node, device_id)
    others_s = 0.0  # wakes under way, which only one that must be alone waits for
    for r in sorted(there, key=lambda r: r.plan):
        left = _left_s(state, node, r, now)
        if r.stage in (Stage.WAKING, Stage.RISING):
            others_s = max(others_s, left)
        elif r.alone:
            slots = [max(max(slots), others_s) + left] * len(slots)
        elif not wake:
            slots[slots.index(min(slots))] += left
    return max(max(slots), others_s) if alone else min(slots)


def slower_by_s(state: ClusterState, node: Node, device_id: str, start_s: float) -> float:
    """What company on a device adds to a start of `start_s` there."""
    if not any(r.stage not in (Stage.WAKING, Stage.RISING) for r in node.books.climbing(device_id)):
        return 0.0
    if starts_at_once(state, node, device_id) < 2:
        return 0.0
    kind = node.devices[device_id].kind
    return (state.climb_times.slowdown(kind) - 1.0) * start_s


def drain_s(state: ClusterState, replica: Replica) -> float:
    """Seconds until a replica that leaves, or is to, has given its memory back: its requests end
    first. Of n whose lengths are exponential the last one ends after (1 + 1/2 + ... + 1/n) means.

    Worked example: 3 in flight, 12 s in the mean: 12 x 1.83 = 22 s, and EVICT_S.
    """
    count, model = state.in_flight(replica), state.models.get(replica.model)
    if not count or model is None:
        return EVICT_S
    return EVICT_S + model.request_s * sum(1 / n for n in range(1, min(count, 100) + 1))


def memory_s(state: ClusterState, node: Node, device_id: str, more: int) -> float:
    """Seconds until `more` bytes are really free on a device whose bookings have room for them."""
    if node.physical(device_id) + more <= node.capacity(device_id):
        return 0.0
    leaving = (drain_s(state, r) for r in node.on_device(device_id) if r.leaving)
    return max(leaving, default=EVICT_S)


def start_waits_s(
    state: ClusterState, node: Node, device_id: str, model: Model, start_s: float, now: float
) -> float:
    """Seconds that a start on a device waits for memory and its turn, and that company there costs
    the two."""
    drains_s = memory_s(state, node, device_id, model.booked_bytes())
    if not node.books.climbing(device_id):
        return drains_s
    alone = must_be_alone(node, model, (device_id,))
    slower_s = 0.0 if alone else 2 * slower_by_s(state, node, device_id, start_s)
    return max(drains_s, queue_s(state, node, device_id, now, alone=alone)) + slower_s


def _left_s(state: ClusterState, node: Node, replica: Replica, now: float) -> float:
    owner = state.models.get(replica.model)
    if owner is None:
        return 0.0
    rung = node.start_rung(owner.spec.source) if replica.plan else "cached"
    whole_s = climb_s(owner, replica.sleep_level, rung)
    return whole_s if replica.plan else max(0.0, whole_s - (now - replica.since))
