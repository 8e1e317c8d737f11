"""Nodes and devices that come, go, are emptied or set aside. Pure.

Rules this file keeps:
- what must leave a place is *doomed*: it counts as gone when replicas are counted, so a successor
  is placed elsewhere; it goes once its successor serves or nobody needs it, or at the deadline;
- one sick device is set aside alone; an operator lets it in again;
- a lost node's replicas keep their bookings until it returns or is forgotten.
"""

from __future__ import annotations

from runtime.wire.agent_messages import DeviceReport, Heartbeat
from scheduler.core.refusals import Refusals
from scheduler.core.replica_moves import Moves
from scheduler.core.turn import Turn
from scheduler.policy.eviction import busy
from scheduler.state import messages as m
from scheduler.state.cluster import LEAVING, Drain, Model, Node, Replica, Stage

PREEMPT_MARGIN_S = 5.0  # engines must be gone before the machine is
QUARANTINE_GRACE_S = 30.0
CANARIES = 2  # models that failed their canary on one device: it is the device


class NodeCare:
    """Empties nodes and devices, and sets sick devices aside."""

    def __init__(self, turn: Turn, moves: Moves, refusals: Refusals) -> None:
        self._turn = turn
        self._moves = moves
        self._refusals = refusals

    def cordon(self, event: m.CordonSet, now: float) -> None:
        """Close a node to new replicas, or open it; a drain moves off what it runs."""
        node = self._turn.state.node(event.node_id)
        node.cordoned = event.cordoned
        node.drain = None
        if event.cordoned and event.drain:
            node.drain = Drain(f"node {node.node_id} is drained", now + event.deadline_s)
        self._places_changed(node, now)

    def _places_changed(self, node: Node, now: float) -> None:
        """Doom what may not stay, spare what may; all its models are looked at again."""
        node.books.touch()
        for replica in list(node.replicas.values()):
            deadline = self.deadline(node, replica, now)
            if replica.doomed_at is None or deadline is None:
                replica.doomed_at = deadline
            else:
                replica.doomed_at = min(replica.doomed_at, deadline)
            self._turn.dirty.add(replica.model)
        self._refusals.recheck()
        self.empty(node, now)

    def deadline(self, node: Node, replica: Replica, now: float) -> float | None:
        """When a replica must have left its place; None if it may stay."""
        if node.drain is not None:
            return node.drain.deadline
        if node.heartbeat is not None and node.heartbeat.preempted_in_s is not None:
            return now + max(0.0, node.heartbeat.preempted_in_s - PREEMPT_MARGIN_S)
        if any(d in node.quarantine for d in replica.device_ids):
            return now + QUARANTINE_GRACE_S
        return None

    def _why_doomed(self, node: Node, replica: Replica) -> str:
        if node.drain is not None:
            return node.drain.reason
        if node.heartbeat is not None and node.heartbeat.preempted_in_s is not None:
            return f"node {node.node_id} is being taken away"
        sick = next((d for d in replica.device_ids if d in node.quarantine), "")
        return f"device {sick} is quarantined: {node.quarantine.get(sick, '')}"

    def empty(self, node: Node, now: float) -> None:
        """Send away the doomed that can go; models serve elsewhere first."""
        for replica in [r for r in node.replicas.values() if r.doomed_at is not None]:
            if replica.stage in LEAVING and not replica.sleep_level:
                continue
            assert replica.doomed_at is not None
            over = now >= replica.doomed_at
            if over or not self._still_needed(replica, now):
                grace_s = None if node.drain else max(0.0, replica.doomed_at - now)
                reason = self._why_doomed(node, replica)
                cause = "operator" if node.drain else "node"
                self._moves.leave(replica, reason, cause, now, "move", grace_s=grace_s)

    def _still_needed(self, replica: Replica, now: float) -> bool:
        model = self._turn.state.models.get(replica.model)
        if model is None or replica.stage is not Stage.READY:
            return False
        if any(r.doomed_at is None for r in model.ready()):
            return False  # its successor serves
        return busy(self._turn.state, replica) or _wanted_at_all(model, now)

    def preempted(self, node: Node, before: Heartbeat | None, now: float) -> None:
        """Doom what runs on a machine that is about to be taken away, or spare it after all."""
        assert node.heartbeat is not None
        was = before.preempted_in_s if before else None
        if (was is None) != (node.heartbeat.preempted_in_s is None):
            self._places_changed(node, now)

    def look_for_faults(self, node: Node, now: float) -> None:
        """Set aside devices that report a fault."""
        for device in node.devices.values():
            fault = _fault(device)
            if fault and node.released.get(device.device_id) != fault:
                self._set_quarantine(node, device.device_id, fault, now)

    def canary_failed(self, node: Node, replica: Replica, now: float) -> None:
        """Count a failed canary: one model's is its own fault, several on one device are the
        device's."""
        for device_id in replica.device_ids:
            failed = node.canaries.setdefault(device_id, set())
            failed.add(replica.model)
            if len(failed) >= CANARIES:
                names = ", ".join(sorted(failed))
                self._set_quarantine(node, device_id, f"canaries failed there: {names}", now)

    def quarantine(self, event: m.QuarantineSet, now: float) -> None:
        """Set a device aside, or let it in again."""
        node = self._turn.state.node(event.node_id)
        if event.reason is not None:
            self._set_quarantine(node, event.device_id, event.reason, now)
            return
        if node.quarantine.pop(event.device_id, None) is None:
            return
        node.canaries.pop(event.device_id, None)
        device = node.devices.get(event.device_id)
        fault = _fault(device) if device else None
        if fault:
            node.released[event.device_id] = fault
        self._tell_quarantine(node, event.device_id, None, "released by an operator", now)

    def _set_quarantine(self, node: Node, device_id: str, reason: str, now: float) -> None:
        if device_id not in node.quarantine:
            node.quarantine[device_id] = reason
            self._tell_quarantine(node, device_id, reason, reason, now)

    def _tell_quarantine(
        self, node: Node, device_id: str, kept: str | None, words: str, now: float
    ) -> None:
        action = "quarantine" if kept else "release"
        self._turn.record(action, "", f"{device_id}: {words}", now, node_id=node.node_id)
        told = m.Quarantined(node_id=node.node_id, device_id=device_id, reason=kept)
        self._turn.out.append(told)
        self._places_changed(node, now)

    def node_lost(self, node: Node, now: float) -> None:
        """Take down that a node stopped reporting."""
        node.lost = True
        node.books.touch()
        for replica in list(node.replicas.values()):
            self._turn.dirty.add(replica.model)
            if replica.stage is Stage.PLANNED:
                self._moves.forget(replica)
            elif replica.stage not in LEAVING:
                replica.lost_from = replica.stage
                replica.move(Stage.UNKNOWN, now)
                self._turn.decide("lose", replica, f"node {node.node_id} stopped reporting", now)


def _fault(device: DeviceReport) -> str | None:
    """What sets a device aside until an operator has looked at it; a lost one heals by itself."""
    if device.xid is not None:
        return device.unhealthy_reason or f"XID {device.xid}"
    if not device.healthy and device.unhealthy_reason and "ECC" in device.unhealthy_reason:
        return "uncorrectable ECC errors"
    return None


def _wanted_at_all(model: Model, now: float) -> bool:
    return bool(
        model.spec.min_replicas or model.pinned or model.floor == "hot" or now < model.asked_until
    )
