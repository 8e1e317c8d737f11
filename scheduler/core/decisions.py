"""The scheduler's decisions: `Core.handle(event) -> [command, ...]`. Pure.

Rules this file keeps (docs/architecture.md, docs/states.md):
- level-triggered: every event may be lost, doubled or late; the next heartbeat mends what it broke;
- unroute, wait for the routers (or a deadline), then stop or put to sleep; memory counts as free
  only when the agent no longer reports the replica, or reports it asleep;
- while recovering it adopts: it unloads nothing, starts nothing and publishes nothing;
- a heartbeat that says nothing new costs next to nothing.

What follows from an event is decided in planner.py and carried out by replica_moves.py,
page_cache_holds.py and node_care.py; this file takes the events in.
"""

from __future__ import annotations

from typing import assert_never

from runtime.wire.agent_messages import DeviceReport, Heartbeat, ReplicaReport
from runtime.wire.routes import ModelDemand
from scheduler.core.planner import VERSIONS_PER_TERM
from scheduler.core.prewarmer import Warm
from scheduler.policy.autoscale import idle_replicas
from scheduler.policy.ladder import resting_place
from scheduler.policy.learning import remember
from scheduler.state import messages as m
from scheduler.state.clocks import RemoteClock
from scheduler.state.cluster import LEAVING, ClusterState, Model, Node, Replica, Router, Stage

ROUTER_TIMEOUT_S = 5.0  # a router silent for this long has no demand and acks nothing
FORGET_NODE_S = 600.0  # a lost node's replicas are forgotten after this
MIN_RECOVERY_S = 1.5  # agents heartbeat each second: none that lives is missed
_AWAITED = {
    "start": Stage.SENT,
    "stop": Stage.STOPPING,
    "sleep": Stage.SLEEPING,
    "wake": Stage.WAKING,
}


_STEADY = {Stage.READY: "ready", Stage.ASLEEP: "asleep"}


class Core(Warm):
    """One leader's view of the cluster and what it does about it."""

    def handle(self, event: m.Event) -> list[m.Command]:
        """Take one event in and return what is to be done, in order."""
        self._out = []
        now = self._now = event.now
        match event:
            case m.HeartbeatSeen():
                self._heartbeat(event.heartbeat, now)
            case m.DemandSeen():
                self._demand(event, now)
            case m.CommandDone():
                self._command_done(event, now)
            case m.Tick():
                self._tick(now)
            case m.Elected():
                self._elected(event)
            case m.ModelPut():
                self._model_put(event.model, now)
            case m.ModelRemoved():
                self._model_removed(event.name, now)
            case m.LoadAsked():
                self._load(event, now)
            case m.UnloadAsked():
                self._unload(event, now)
            case m.PinSet():
                if event.model in self.state.models:
                    self.state.models[event.model].pinned = event.pinned
                    self._dirty.add(event.model)
            case m.FloorSet():
                if event.model in self.state.models:
                    self.state.models[event.model].floor = event.floor
                    self._dirty.add(event.model)
            case m.CordonSet():
                self._cordon(event, now)
            case m.QuarantineSet():
                self._quarantine(event, now)
            case m.RulesSet():
                self.state.rules, self.state.rules_changed = event.rules, True
            case _:
                assert_never(event)
        self._settle(now)
        return self._out

    def _elected(self, event: m.Elected) -> None:
        self.state = ClusterState(
            term=event.term,
            started_at=event.now,
            awaited_nodes=set(event.known_nodes),
            routes_version=event.term * VERSIONS_PER_TERM,
            rules=event.rules,
            wall_offset_s=0.0 if event.wall_s is None else event.wall_s - event.now,
        )
        self._routes, self._route_names = {}, []
        self._hungry = set()
        for stored in event.models:
            self._model_put(stored, event.now)
        for name in event.pinned:
            if name in self.state.models:
                self.state.models[name].pinned = True
        for footprint in event.footprints:
            if footprint.key.model in self.state.models:
                remember(self.state.models[footprint.key.model], footprint)
        self._recall(event.sketches, event.now)
        for model in self.state.models.values():  # the scale is held until history is back
            model.scaling.hold(event.now + model.spec.autoscale.down.stabilization_s)
        for node_id in event.cordoned:
            self.state.node(node_id).cordoned = True
        for node_id, device_id, reason in event.quarantined:
            self.state.node(node_id).quarantine[device_id] = reason

    # ------------------------------------------------------------------------------- heartbeats

    def _heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        node = self.state.node(heartbeat.node_id)
        last = node.heartbeat
        if last is not None and (heartbeat.boot_id, heartbeat.seq) <= (last.boot_id, last.seq):
            return
        was_schedulable, old_devices = node.schedulable, node.devices
        if node.lost:  # what the route table says of it changes
            self._dirty.update(r.model for r in node.replicas.values())
        node.heartbeat, node.seen_at, node.lost = heartbeat, now, False
        self.state.awaited_nodes.discard(node.node_id)
        devices_differ = self._take_devices(node, heartbeat)
        if last is None or heartbeat.cached != last.cached:
            self._take_cached(node, heartbeat)
        reported = set()
        for report in heartbeat.replicas:
            reported.add(report.replica_id)
            self._replica_reported(node, report, now)
        if len(node.replicas) > len(reported):
            for replica in [r for r in node.replicas.values() if r.replica_id not in reported]:
                self._replica_missing(replica, now)
        self._follow_holds(node, heartbeat, now)
        if devices_differ:
            self._look_for_faults(node, now)
        self._preempted(node, last, now)
        if node.schedulable != was_schedulable:
            node.books.touch()
        if node.schedulable and (not was_schedulable or node.devices.keys() != old_devices.keys()):
            self._recheck_unfit()

    def _take_devices(self, node: Node, heartbeat: Heartbeat) -> bool:
        """Whether anything changed that placement or health depend on."""
        old, new = node.devices, {d.device_id: d for d in heartbeat.devices}
        node.devices = new
        if len(old) == len(new) and all(map(_gives_the_same, old.values(), new.values())):
            return False
        node.books.touch()
        return True

    def _take_cached(self, node: Node, heartbeat: Heartbeat) -> None:
        before = frozenset(node.cached)
        node.cached = {c.source: c for c in heartbeat.cached}
        self.state.index.caches(node.node_id, before, frozenset(node.cached))

    def _replica_reported(self, node: Node, report: ReplicaReport, now: float) -> None:
        replica = self.state.replicas.get(report.replica_id)
        if replica is None:
            replica = self._adopt(node, report, now)
        old = replica.report
        replica.report = report
        was_full = replica.full
        replica.queued = replica.queued + 1 if report.engine_waiting else 0
        if replica.full != was_full:
            self._dirty.add(replica.model)
        if report.in_flight or report.idle_for_s is not None:
            replica.engine_at = now if report.in_flight else now - (report.idle_for_s or 0.0)
            replica.judge_use()
        if replica.climb is not None:
            self._finish_climb(replica, report, now)
        if old is not None and _STEADY.get(replica.stage) == report.phase and _alike(old, report):
            return
        before = (replica.stage, old and old.base_url)
        if old is not None and report.disabled != old.disabled:
            self._new_disabled(node, replica, old, report, now)
        if old is not None and report.died and (report.restarts, report.died) != (
            old.restarts, old.died,
        ):  # fmt: skip
            self._died(replica, old, report, now)
        self._follow_phase(replica, report, now)
        self._learn_memory(replica, report)
        if before != (replica.stage, report.base_url):
            self._dirty.add(replica.model)

    def _adopt(self, node: Node, report: ReplicaReport, now: float) -> Replica:
        replica = Replica(
            report.replica_id, report.model, node.node_id, report.device_ids,
            report.device_bytes, report.launch_key, Stage.STARTING, now,
            reason="adopted: its agent runs it", used_at=now - (report.idle_for_s or 0.0),
        )  # fmt: skip
        replica.doomed_at = self._deadline(node, replica, now)
        self.state.add(replica)
        self._decide("adopt", replica, replica.reason, now)
        return replica

    def _died(
        self, replica: Replica, old: ReplicaReport, report: ReplicaReport, now: float
    ) -> None:
        """Say why at once. A restart tells of the same death only once."""
        if report.died != old.died or report.phase in ("backoff", "failed"):
            self._decide("die", replica, str(report.died), now, cause=report.exit_kind or "")

    def _new_disabled(
        self, node: Node, replica: Replica, old: ReplicaReport, report: ReplicaReport, now: float
    ) -> None:
        for rung, why in report.disabled.items():
            if rung not in old.disabled:
                self._decide("disable", replica, f"{rung}: {why}", now)
                if "canary" in why:
                    self._canary_failed(node, replica, now)

    def _replica_missing(self, replica: Replica, now: float) -> None:
        """Its node reports, but not this replica."""
        if replica.stage is Stage.PLANNED:
            return
        if replica.report is not None or self._shown(replica):
            if replica.stage not in LEAVING:
                self._decide("lost", replica, "its agent no longer has it", now)
            self._forget(replica)
        elif now >= replica.retry_at:
            if replica.stage in LEAVING:
                self._send_stop(replica, now)
            else:
                self._send_start(replica, now)

    # ------------------------------------------------------------------------------- demand

    def _demand(self, event: m.DemandSeen, now: float) -> None:
        report = event.report
        last = self.state.routers.get(report.router_id)
        if last is not None and (report.boot_id, report.seq) <= (last.boot_id, last.seq):
            return
        self._arrived(last, report, now)
        same_run = last is not None and last.boot_id == report.boot_id
        clock = last.clock if last is not None and same_run else RemoteClock()
        made_at = clock.made_at(report.sent_s, now)
        old = last.models if last else {}
        models = {part.model: part for part in report.models}
        for name, part in models.items():
            model = self.state.models.get(name)
            if model is None:
                continue
            if part.idle_for_s is not None:
                model.active_at = max(model.active_at or 0.0, made_at - part.idle_for_s)
            before = old.get(name)
            known_s = before.first_token_s if before else None
            if last is not None and part.first_token_s not in (None, known_s):
                model.first_token_s, model.first_token_at = part.first_token_s, now
            if part.waiting or before is None or _differs(before, part):
                self._dirty.add(name)
        for name in old.keys() - models.keys():
            if name in self.state.models:
                self._dirty.add(name)
        self._freed = self._freed or any(_busy(part) for part in old.values())
        self._unrouted = True
        self.state.routers[report.router_id] = Router(
            report.router_id, report.boot_id, report.seq, now, report.routes_version,
            models, report.in_flight, clock,
        )  # fmt: skip
        # A router that does not say how long a replica is idle says at least what is in flight.
        idle_s = dict.fromkeys((r for r, n in report.in_flight.items() if n), 0.0) | report.idle_s
        for replica_id, seconds in idle_s.items():
            replica = self.state.replicas.get(replica_id)
            if replica is not None:
                replica.routed_at[report.router_id] = made_at - seconds
                replica.judge_use()

    def _router_gone(self, router: Router) -> None:
        """What it told of when replicas were used stays true."""
        del self.state.routers[router.router_id]
        for replica in self.state.replicas.values():
            at = replica.routed_at.pop(router.router_id, None)
            if at is not None:
                replica.routed_at[""] = max(at, replica.routed_at.get("", at))

    # ------------------------------------------------------------------------------- operators

    def _model_put(self, stored: m.StoredModel, now: float) -> None:
        spec = stored.effective()
        model = self.state.models.get(spec.name)
        if model is None:
            model = Model(stored, spec, spec.launch_key())
            # Replicas may outlive a removal: if it is added again, they are its own again.
            model.replicas = {
                r.replica_id: r for r in self.state.replicas.values() if r.model == spec.name
            }
            self.state.models[spec.name] = model
        else:
            model.stored, model.spec, model.launch_key = stored, spec, spec.launch_key()
            same = (f for f in model.footprints.values() if f.key.launch_key == model.launch_key)
            model.footprint = next(same, None)
        # A changed spec deserves a fresh try.
        model.forgive()
        self._judge(model)
        self._dirty.add(spec.name)

    def _model_removed(self, name: str, now: float) -> None:
        model = self.state.models.get(name)
        if model is None:
            return
        for replica in list(model.replicas.values()):
            self._leave(replica, "the model was removed", "operator", now)
        del self.state.models[name]
        self._hungry.discard(name)
        self._dirty.add(name)
        self._review_holds(now)

    def _load(self, event: m.LoadAsked, now: float) -> None:
        model = self.state.models.get(event.model)
        if model is None:
            return
        model.asked_replicas = min(event.replicas, model.spec.max_replicas)
        model.asked_until = now + max(model.spec.idle_s, model.spec.hold_s)
        model.forgive()
        self._judge(model)
        self._dirty.add(event.model)

    def _unload(self, event: m.UnloadAsked, now: float) -> None:
        model = self.state.models.get(event.model)
        if model is not None:
            model.asked_replicas, model.asked_until = 0, 0.0
            self._dismiss(model)
        for replica in list(self.state.replicas.values()):
            if replica.model == event.model and event.replica_id in (None, replica.replica_id):
                self._leave(replica, "unloaded on request", "operator", now)

    def _command_done(self, event: m.CommandDone, now: float) -> None:
        replica = self.state.replicas.get(event.replica_id)
        if replica is None or not event.delivered:
            return  # repeated after RESEND_S, or settled by the next heartbeat
        if replica.stage is not _AWAITED[event.kind]:
            return
        why = event.error or f"its agent refused to {event.kind} it"
        if event.ok:
            replica.confirmed = (event.boot_id, event.seq)
        elif event.kind == "start":
            self._failed(replica, why, now)
        elif event.kind == "sleep":
            # What wanted its memory may still have it: then it stops instead.
            self._decide("stay", replica, why, now)
            replica.book_sleep(0, 0, 0)
            self._send_stop(replica, now)
        elif event.kind == "wake":
            self._decide("lost", replica, why, now)
            self._send_stop(replica, now)

    # ------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> None:
        state = self.state
        self._freed = self._unrouted = True
        for router in [r for r in state.routers.values() if now - r.seen_at > ROUTER_TIMEOUT_S]:
            self._router_gone(router)
            self._dirty.update(name for name in router.models if name in state.models)
        for node in state.nodes.values():
            if node.live and now - node.seen_at > self.settings.node_timeout_s:
                self._node_lost(node, now)
            elif node.lost and now - node.seen_at > FORGET_NODE_S:
                for replica in list(node.replicas.values()):
                    self._forget(replica)
        if self._recovered(now):
            self._recover(now)
        if state.recovering:
            return
        for replica in list(state.index.plans.values()):
            state.index.changed.add(replica.node_id)
        for model in state.models.values():
            if model.rest_at <= now:
                model.rest_at = self._rest(model, now)
            if model.problem and model.blocked_until <= now and self._refused(model.name):
                self._dirty.add(model.name)
            if model.floor == "staged" or model.scale_at <= now:
                self._dirty.add(model.name)
        for node in state.nodes.values():
            if node.live and node.emptying:
                self._empty(node, now)
        self._review_holds(now)
        self._forecast(now)
        self._stand_by(now)
        self._write_down(now)
        self._recheck_unfit()

    def _rest(self, model: Model, now: float) -> float:
        """Idle timers: one rung down at a time. When the next could be due."""
        asleep_s = model.spec.asleep_s
        idle, next_at = False, float("inf")
        for replica in list(model.replicas.values()):
            if replica.stage is Stage.READY:
                idle_s = self._idle_s(model, replica)
                due_at = max(replica.used_at, replica.ready_at or now) + idle_s
                idle = idle or due_at <= now
                next_at = min(next_at, due_at)
            elif replica.stage is Stage.ASLEEP:
                due_at = max(replica.used_at, replica.since) + asleep_s
                next_at = min(next_at, due_at)
                if due_at <= now and model.may_stop(replica):
                    reason = f"asleep and unused for {asleep_s:g} s"
                    self._leave(replica, reason, "idle timer", now)
                    self._keep_staged(replica, now)
        if idle:
            for replica in idle_replicas(self.state, model, now, self._idle_s):
                idle_s = self._idle_s(model, replica)
                if not self._worth_keeping(model, replica, now):
                    self._step_down(model, replica, f"idle for {idle_s:g} s", now)
        return next_at

    def _step_down(self, model: Model, replica: Replica, reason: str, now: float) -> None:
        """One rung down: asleep where that is open to it, else stopped."""
        node = self.state.nodes[replica.node_id]
        way = resting_place(self.state, model, node, replica, now)
        if way is None:
            return
        self._descend(way, reason, "idle timer", now, "sleep" if way.level else "stop")

    def _recovered(self, now: float) -> bool:
        state = self.state
        if not state.recovering or state.term == 0:
            return False
        age_s = now - state.started_at
        return age_s >= self.settings.recovery_grace_s or (
            not state.awaited_nodes and age_s >= MIN_RECOVERY_S
        )

    def _recover(self, now: float) -> None:
        state = self.state
        state.recovering = False
        self._dirty.update(state.models)
        for replica in list(state.replicas.values()):
            if replica.model not in state.models:
                self._leave(replica, "its model is not declared any more", "recovery", now)


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


def _differs(old: ModelDemand, new: ModelDemand) -> bool:
    return old.in_flight != new.in_flight or old.waiting != new.waiting


def _busy(part: ModelDemand) -> bool:
    return bool(part.waiting or part.in_flight)
