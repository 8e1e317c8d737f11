"""What agents say: their devices, their page cache, their replicas. Pure.

Rules this file keeps:
- a heartbeat that says nothing new costs next to nothing;
- a replica that nobody here knows is adopted; one that its agent no longer has is gone.
"""

from __future__ import annotations

from runtime.wire.agent_messages import DeviceReport, Heartbeat, ReplicaReport
from scheduler.core.climbs import Climbs
from scheduler.core.node_care import NodeCare
from scheduler.core.page_cache_holds import Holds
from scheduler.core.refusals import Refusals
from scheduler.core.replica_moves import Moves
from scheduler.core.shells import Shells, changed_owner, take_word
from scheduler.core.turn import Turn
from scheduler.state.cluster import LEAVING, Node, Replica, Stage

_STEADY = {Stage.READY: "ready", Stage.ASLEEP: "asleep"}


class Heartbeats:
    """Takes agents' heartbeats in."""

    def __init__(
        self,
        turn: Turn,
        moves: Moves,
        shells: Shells,
        climbs: Climbs,
        holds: Holds,
        care: NodeCare,
        refusals: Refusals,
    ) -> None:
        self._turn = turn
        self._moves = moves
        self._shells = shells
        self._climbs = climbs
        self._holds = holds
        self._care = care
        self._refusals = refusals

    def take(self, heartbeat: Heartbeat, now: float) -> None:
        """Take one heartbeat in, unless a newer one was."""
        turn = self._turn
        node = turn.state.node(heartbeat.node_id)
        last = node.heartbeat
        if last is not None and (heartbeat.boot_id, heartbeat.seq) <= (last.boot_id, last.seq):
            return
        was_schedulable, old_devices = node.schedulable, node.devices
        if node.lost:  # what the route table says of it changes
            turn.dirty.update(r.model for r in node.replicas.values())
        node.heartbeat, node.seen_at, node.lost = heartbeat, now, False
        turn.state.awaited_nodes.discard(node.node_id)
        devices_differ = self._take_devices(node, heartbeat)
        if last is None or heartbeat.cached != last.cached:
            self._take_cached(node, heartbeat)
        if heartbeat.shells or (last is not None and last.shells):
            before = {} if last is None else last.shells
            turn.state.index.takes_shells(node.node_id, before, heartbeat.shells)
        reported = set()
        for report in heartbeat.replicas:
            reported.add(report.replica_id)
            self._replica_reported(node, report, now)
        if len(node.replicas) > len(reported):
            for replica in [r for r in node.replicas.values() if r.replica_id not in reported]:
                self._replica_missing(replica, now)
        self._holds.follow(node, heartbeat, now)
        if devices_differ:
            self._care.look_for_faults(node, now)
        self._care.preempted(node, last, now)
        if node.schedulable != was_schedulable:
            node.books.touch()
        if node.schedulable and (not was_schedulable or node.devices.keys() != old_devices.keys()):
            self._refusals.recheck()

    def _take_devices(self, node: Node, heartbeat: Heartbeat) -> bool:
        """Whether anything changed that placement or health depend on."""
        old, new = node.devices, {d.device_id: d for d in heartbeat.devices}
        node.devices = new
        if len(old) == len(new) and all(map(_gives_the_same, old.values(), new.values())):
            return False
        node.books.touch()
        if heartbeat.devices:
            self._turn.state.climb_times.kind = heartbeat.devices[0].kind
        return True

    def _take_cached(self, node: Node, heartbeat: Heartbeat) -> None:
        before = frozenset(node.cached)
        node.cached = {c.source: c for c in heartbeat.cached}
        self._turn.state.index.caches(node.node_id, before, frozenset(node.cached))

    def _replica_reported(self, node: Node, report: ReplicaReport, now: float) -> None:
        replica = self._turn.state.replicas.get(report.replica_id)
        if replica is None:
            replica = self._adopt(node, report, now)
        if changed_owner(replica, report):
            take_word(self._turn, replica, report)
        old = replica.report
        replica.report = report
        if report.engine_waiting or replica.queued:
            self._take_queue(replica, report)
        if report.in_flight or report.idle_for_s is not None:
            replica.engine_at = now if report.in_flight else now - (report.idle_for_s or 0.0)
            replica.judge_use()
        if replica.climb is not None:
            self._climbs.finish(replica, report, now)
        if old is not None and _STEADY.get(replica.stage) == report.phase and _alike(old, report):
            return
        before = (replica.stage, old and old.base_url)
        if old is not None and report.disabled != old.disabled:
            self._new_disabled(node, replica, old, report, now)
        if old is not None and report.died and (report.restarts, report.died) != (
            old.restarts, old.died,
        ):  # fmt: skip
            self._died(replica, old, report, now)
        if replica.former is not None:
            self._shells.follow(replica, report, now)
        else:
            self._moves.follow_phase(replica, report, now)
        self._climbs.learn_memory(replica, report)
        if before != (replica.stage, report.base_url):
            self._turn.dirty.add(replica.model)

    def _take_queue(self, replica: Replica, report: ReplicaReport) -> None:
        """Count the heartbeats in a row that tell of requests waiting in its engine."""
        was_full = replica.full
        replica.queued = replica.queued + 1 if report.engine_waiting else 0
        if replica.full != was_full:
            self._turn.dirty.add(replica.model)

    def _adopt(self, node: Node, report: ReplicaReport, now: float) -> Replica:
        replica = Replica(
            report.replica_id, report.model, node.node_id, report.device_ids,
            report.device_bytes, report.launch_key, Stage.STARTING, now,
            reason="adopted: its agent runs it", used_at=now - (report.idle_for_s or 0.0),
        )  # fmt: skip
        replica.doomed_at = self._care.deadline(node, replica, now)
        self._turn.state.add(replica)
        self._turn.decide("adopt", replica, replica.reason, now)
        return replica

    def _died(
        self, replica: Replica, old: ReplicaReport, report: ReplicaReport, now: float
    ) -> None:
        """Say why at once. A restart tells of the same death only once."""
        if report.died != old.died or report.phase in ("backoff", "failed"):
            self._turn.decide("die", replica, str(report.died), now, cause=report.exit_kind or "")

    def _new_disabled(
        self, node: Node, replica: Replica, old: ReplicaReport, report: ReplicaReport, now: float
    ) -> None:
        for rung, why in report.disabled.items():
            if rung not in old.disabled:
                self._turn.decide("disable", replica, f"{rung}: {why}", now)
                # A re-point that fails says something of the two models, not of the device.
                if "canary" in why and rung != "shell":
                    self._care.canary_failed(node, replica, now)

    def _replica_missing(self, replica: Replica, now: float) -> None:
        """Judge a replica that its node no longer reports."""
        if replica.stage is Stage.PLANNED:
            return
        if replica.report is not None or self._moves.shown(replica):
            if replica.stage not in LEAVING:
                self._turn.decide("lost", replica, "its agent no longer has it", now)
            self._moves.forget(replica)
        elif now >= replica.retry_at:
            if replica.stage in LEAVING:
                self._moves.send_stop(replica, now)
            else:
                self._moves.send_start(replica, now)


def _gives_the_same(old: DeviceReport, new: DeviceReport) -> bool:
    """Whether nothing changed that placement and health depend on."""
    return (
        old.device_id == new.device_id
        and old.foreign_bytes == new.foreign_bytes
        and old.memory_total_bytes == new.memory_total_bytes
        and old.healthy == new.healthy
        and old.xid == new.xid
        and old.unhealthy_reason == new.unhealthy_reason
    )


def _alike(old: ReplicaReport, new: ReplicaReport) -> bool:
    """Whether a report says nothing new that anything is decided or learnt by."""
    return (
        new.phase == old.phase
        and new.residue_bytes == old.residue_bytes
        and new.base_url == old.base_url
        and new.key == old.key
        and new.memory_used_bytes == old.memory_used_bytes
        and new.host_bytes == old.host_bytes
        and new.disabled == old.disabled
        and new.rungs == old.rungs
    )
