"""The scheduler's decisions: `Core.handle(event) -> [command, ...]`. Pure.

Rules this file keeps (docs/architecture.md, docs/states.md):
- level-triggered: every event may be lost, doubled or late; the next heartbeat mends what it broke;
- a plan enters the state when it is made, so the next event already sees it;
- unroute, wait for the routers (or a deadline), then stop or put to sleep; memory counts as free
  only when the agent no longer reports the replica, or reports it asleep;
- one start at a time per device; a start under way is never idle; a config change never drops a
  replica that serves;
- while recovering it adopts: it unloads nothing, starts nothing and publishes nothing;
- every command and every refusal leaves a `Decided` with its reason and cause.
"""

from __future__ import annotations

from typing import assert_never

from runtime.wire import Heartbeat, ModelRoute, ReplicaReport, RouteTable
from scheduler import messages as m
from scheduler.autoscale import idle_replicas, wanted_replicas
from scheduler.ladder import resting_place
from scheduler.ledger import remember
from scheduler.moves import Moves, Settings
from scheduler.placement import Fit, Never, NotNow, place, why_never
from scheduler.state import LEAVING, Climb, ClusterState, Model, Node, Replica, Router, Stage
from scheduler.table import model_route

ROUTER_TIMEOUT_S = 5.0  # a router silent for this long has no demand and acks nothing
FORGET_NODE_S = 600.0  # a lost node's replicas are forgotten after this
MIN_RECOVERY_S = 1.5  # agents heartbeat each second: none that lives is missed
VERSIONS_PER_TERM = 10**9
BUSY = (Stage.SENT, Stage.STARTING, Stage.WAKING)  # one of these at a time per device
_AWAITED = {
    "start": Stage.SENT,
    "stop": Stage.STOPPING,
    "sleep": Stage.SLEEPING,
    "wake": Stage.WAKING,
}


class Core(Moves):
    """One leader's view of the cluster and what it does about it."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._hungry: set[str] = set()  # models that want more replicas than they could get
        self._routes: dict[str, ModelRoute] = {}

    # ------------------------------------------------------------------------------- events

    def handle(self, event: m.Event) -> list[m.Command]:
        """Take one event in and return what is to be done, in order."""
        self._out = []
        now = event.now
        match event:
            case m.Elected():
                self._elected(event)
            case m.HeartbeatSeen():
                self._heartbeat(event.heartbeat, now)
            case m.DemandSeen():
                self._demand(event, now)
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
            case m.CommandDone():
                self._command_done(event, now)
            case m.Tick():
                self._tick(now)
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
        )
        self._routes = {}
        self._hungry = set()
        for stored in event.models:
            self._model_put(stored, event.now)
        for name in event.pinned:
            if name in self.state.models:
                self.state.models[name].pinned = True
        for footprint in event.footprints:
            if footprint.key.model in self.state.models:
                remember(self.state.models[footprint.key.model], footprint)
        for node_id in event.cordoned:
            self.state.nodes[node_id] = Node(node_id, cordoned=True)

    def _heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        node = self.state.nodes.setdefault(heartbeat.node_id, Node(heartbeat.node_id))
        last = node.heartbeat
        if last is not None and (heartbeat.boot_id, heartbeat.seq) <= (last.boot_id, last.seq):
            return
        was_schedulable, old_devices = node.schedulable, node.devices
        node.heartbeat, node.seen_at, node.lost = heartbeat, now, False
        node.devices = {d.device_id: d for d in heartbeat.devices}
        self.state.awaited_nodes.discard(node.node_id)
        reported = set()
        for report in heartbeat.replicas:
            reported.add(report.replica_id)
            self._replica_reported(node, report, now)
        for replica in [r for r in node.replicas.values() if r.replica_id not in reported]:
            self._replica_missing(replica, now)
        if node.schedulable and (not was_schedulable or node.devices.keys() != old_devices.keys()):
            self._recheck_unfit()

    def _replica_reported(self, node: Node, report: ReplicaReport, now: float) -> None:
        replica = self.state.replicas.get(report.replica_id)
        if replica is None:
            replica = Replica(
                report.replica_id, report.model, node.node_id, report.device_ids,
                report.device_bytes, report.launch_key, Stage.STARTING, now,
                reason="adopted: its agent runs it", used_at=now - (report.idle_for_s or 0.0),
            )  # fmt: skip
            self.state.add(replica)
            self._decide("adopt", replica, replica.reason, now)
        before = (replica.stage, replica.report and replica.report.base_url)
        replica.report = report
        if report.in_flight:
            replica.used_at = now
        elif report.idle_for_s is not None:
            # The engine's own word is exact, also where an in-flight count was seen late.
            replica.used_at = max(now - report.idle_for_s, replica.ready_at or 0.0)
        self._follow_phase(replica, report, now)
        self._learn_memory(replica, report)
        if before != (replica.stage, report.base_url):
            self._dirty.add(replica.model)

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

    def _demand(self, event: m.DemandSeen, now: float) -> None:
        report = event.report
        last = self.state.routers.get(report.router_id)
        if last is not None and (report.boot_id, report.seq) <= (last.boot_id, last.seq):
            return
        models = {part.model: part for part in report.models}
        for name in models.keys() | (last.models.keys() if last else set()):
            part = models.get(name)
            if name in self.state.models:
                self._dirty.add(name)
                if part is not None and part.idle_for_s is not None:
                    model = self.state.models[name]
                    model.active_at = max(model.active_at or 0.0, now - part.idle_for_s)
        self.state.routers[report.router_id] = Router(
            report.router_id, report.boot_id, report.seq, now, report.routes_version,
            models, report.in_flight,
        )  # fmt: skip
        for replica_id, count in report.in_flight.items():
            replica = self.state.replicas.get(replica_id)
            if replica is not None and count:
                replica.used_at = now

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
        model.failures, model.blocked_until, model.problem = 0, 0.0, None
        model.unfit = why_never(self.state, spec) if self._nodes_known() else None
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

    def _load(self, event: m.LoadAsked, now: float) -> None:
        model = self.state.models.get(event.model)
        if model is None:
            return
        model.asked_replicas = min(event.replicas, model.spec.max_replicas)
        model.asked_until = now + max(model.spec.idle_s, model.spec.hold_s)
        model.failures, model.blocked_until, model.problem = 0, 0.0, None
        model.unfit = why_never(self.state, model.spec) if self._nodes_known() else None
        self._dirty.add(event.model)

    def _unload(self, event: m.UnloadAsked, now: float) -> None:
        model = self.state.models.get(event.model)
        if model is not None:
            model.asked_replicas, model.asked_until = 0, 0.0
        for replica in list(self.state.replicas.values()):
            if replica.model == event.model and event.replica_id in (None, replica.replica_id):
                self._leave(replica, "unloaded on request", "operator", now)

    def _cordon(self, event: m.CordonSet, now: float) -> None:
        node = self.state.nodes.setdefault(event.node_id, Node(event.node_id))
        node.cordoned = event.cordoned
        node.draining = event.cordoned and event.drain
        if node.draining:
            for replica in list(node.replicas.values()):
                self._leave(replica, f"node {node.node_id} is drained", "operator", now)
        self._dirty.update(r.model for r in node.replicas.values())
        self._recheck_unfit()

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
            replica.sleep_level = replica.host_booked = replica.residue = 0
            self._send_stop(replica, now)
        elif event.kind == "wake":
            self._decide("lost", replica, why, now)
            self._send_stop(replica, now)

    def _tick(self, now: float) -> None:
        state = self.state
        for router in [r for r in state.routers.values() if now - r.seen_at > ROUTER_TIMEOUT_S]:
            del state.routers[router.router_id]
            self._dirty.update(name for name in router.models if name in state.models)
        for node in state.nodes.values():
            if node.live and now - node.seen_at > self.settings.node_timeout_s:
                self._node_lost(node, now)
            elif node.lost and now - node.seen_at > FORGET_NODE_S:
                for replica in list(node.replicas.values()):
                    self._forget(replica)
        if self._recovered(now):
            state.recovering = False
            self._dirty.update(state.models)
            for replica in list(state.replicas.values()):
                if replica.model not in state.models:
                    self._leave(replica, "its model is not declared any more", "recovery", now)
        if state.recovering:
            return
        for name, model in state.models.items():
            for replica in idle_replicas(state, model, now):
                self._step_down(model, replica, f"idle for {model.spec.idle_s:g} s", now)
            for replica in model.asleep():
                unused_s = now - max(replica.used_at, replica.since)
                if unused_s >= model.spec.asleep_s and model.may_stop(replica):
                    reason = f"asleep and unused for {model.spec.asleep_s:g} s"
                    self._leave(replica, reason, "idle timer", now)
            if model.problem and model.blocked_until <= now and self._refused(name):
                self._dirty.add(name)
        self._recheck_unfit()

    def _step_down(self, model: Model, replica: Replica, reason: str, now: float) -> None:
        """One rung down: asleep where that is open to it, else stopped."""
        way = resting_place(model, self.state.nodes[replica.node_id], replica, now)
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

    def _node_lost(self, node: Node, now: float) -> None:
        node.lost = True
        for replica in list(node.replicas.values()):
            self._dirty.add(replica.model)
            if replica.stage is Stage.PLANNED:
                self._forget(replica)
            elif replica.stage not in LEAVING:
                replica.move(Stage.UNKNOWN, now)
                self._decide("lose", replica, f"node {node.node_id} stopped reporting", now)

    # ------------------------------------------------------------------------------- decisions

    def _settle(self, now: float) -> None:
        """Bring what should be and what is together, then publish what changed."""
        if self.state.recovering:
            return
        names = [n for n in self._dirty | self._hungry if n in self.state.models]
        for name in sorted(names, key=self._urgency):
            self._replace_outdated(self.state.models[name], now)
            self._scale(self.state.models[name], now)
        self._dispatch(now)
        self._publish(now)
        self._stop_unrouted(now)

    def _urgency(self, name: str) -> tuple[int, float, str]:
        spec = self.state.models[name].spec
        return -spec.priority, -self.state.demand(name).oldest_wait_s, name

    def _scale(self, model: Model, now: float) -> None:
        name = model.spec.name
        demand = self.state.demand(name)
        wanted = wanted_replicas(model, demand, now)
        coming = model.coming()
        # Replicas of an older spec do not count once their successors come.
        coming = [r for r in coming if r.launch_key == model.launch_key] or coming
        self._hungry.discard(name)
        planned = [r for r in coming if r.stage is Stage.PLANNED]
        planned += [r for r in coming if r.stage is Stage.RISING]
        for replica in planned[: max(0, len(coming) - wanted)]:
            self._decide("cancel", replica, "nobody waits for it any more", now)
            self._unplan(replica, now)
        if wanted <= len(coming):
            model.waiting_for = None
        elif model.blocked_until > now:
            self._hungry.add(name)  # looked at again with every event, so also when it has rested
            return
        elif any(r.leaving and r.sleep_level for r in model.replicas.values()):
            self._hungry.add(name)  # waking it, once it sleeps, is quicker than a start
            model.waiting_for = "its replica is going to sleep, and will be woken"
            return
        for _ in range(wanted - len(coming)):
            cause = _cause(model, demand.waiting, now)
            if not self._add_replica(model, cause, now):
                break

    def _add_replica(self, model: Model, cause: str, now: float, evict: bool = True) -> bool:
        """Plan one more replica; False where there is no room now, or never."""
        name = model.spec.name
        placement = place(self.state, model, now, self.settings.min_dwell_s)
        if isinstance(placement, Never):
            if not self._nodes_known():
                placement = NotNow(placement.reason)
            elif model.unfit != placement.reason:
                model.unfit = placement.reason
                self._dirty.add(name)
                self._record("refuse", name, placement.reason, now, cause=cause)
                return False
            else:
                return False
        if isinstance(placement, NotNow) or (placement.victims and not evict):
            if evict and isinstance(placement, NotNow):
                model.waiting_for = placement.reason
                self._hungry.add(name)
                self._dirty.add(name)
            return False
        model.unfit = model.waiting_for = None
        self._plan(model, placement, cause, now)
        return True

    def _plan(self, model: Model, fit: Fit, cause: str, now: float) -> None:
        name = model.spec.name
        for way in fit.victims:
            self._descend(way, f"makes room for {name}", cause, now, "evict")
        evicted = ", ".join(sorted({way.replica.model for way in fit.victims}))
        reason = f"after evicting {evicted}" if evicted else "best fit"
        self._dirty.add(name)
        if fit.riser is not None:
            fit.riser.move(Stage.RISING, now)
            fit.riser.reason, fit.riser.cause = f"woken {reason}" if evicted else "woken", cause
            fit.riser.climb = self._climb(model, fit, fit.riser.reason, cause, now)
            self._decide("wake", fit.riser, fit.riser.reason, now)
            return
        self.state.replica_count += 1
        replica = Replica(
            f"{name}-{self.state.term}-{self.state.replica_count}", name, fit.node_id,
            fit.device_ids, model.spec.booked_bytes(), model.launch_key, Stage.PLANNED, now,
            reason=reason, cause=cause, spec=model.spec, used_at=now,
            climb=self._climb(model, fit, reason, cause, now),
        )  # fmt: skip
        self.state.add(replica)
        self._decide("start", replica, reason, now)

    def _climb(self, model: Model, fit: Fit, reason: str, cause: str, now: float) -> Climb:
        rung = f"asleep-{fit.riser.sleep_level}" if fit.riser else "stopped"
        moved = tuple(
            f"{way.replica.replica_id} ({way.replica.model}) to"
            f" {f'asleep-{way.replica.sleep_level}' if way.replica.sleep_level else 'stopped'}"
            for way in fit.victims
        )
        waited_s = self.state.demand(model.spec.name).oldest_wait_s
        return Climb(rung, now, waited_s, cause, reason, moved)

    def _replace_outdated(self, model: Model, now: float) -> None:
        """Bring replicas of an older spec down without dropping a request."""
        for replica in model.asleep():
            if replica.launch_key != model.launch_key:
                self._leave(replica, "its model's spec changed", "spec change", now)
        old = [r for r in model.coming() if r.launch_key != model.launch_key]
        if not old:
            return
        demand = self.state.demand(model.spec.name)
        new_serves = any(r.launch_key == model.launch_key for r in model.ready())
        for replica in old:
            idle = not demand.waiting and not self.state.in_flight(replica)
            if replica.stage is not Stage.READY or new_serves or idle:
                self._leave(replica, "its model's spec changed", "spec change", now)
        if not new_serves and all(r.launch_key != model.launch_key for r in model.coming()):
            busy = [r for r in old if r.stage is Stage.READY]
            if busy and model.blocked_until <= now:
                self._add_replica(model, "spec change", now, evict=False)

    def _dispatch(self, now: float) -> None:
        """Start and wake what is planned, where the memory is really free and no other does."""
        plans = (Stage.PLANNED, Stage.RISING)
        for replica in [r for r in self.state.replicas.values() if r.stage in plans]:
            node = self.state.nodes[replica.node_id]
            # Others may have taken what the plan counted on, or a sleeper kept more than expected.
            if not node.schedulable or any(node.plannable(d) < 0 for d in replica.device_ids):
                self._unplan(replica, now)
                self._hungry.add(replica.model)
            elif all(self._device_open(node, d, replica) for d in replica.device_ids):
                if replica.stage is Stage.RISING:
                    self._send_wake(replica, now)
                else:
                    self._send_start(replica, now)

    def _device_open(self, node: Node, device_id: str, replica: Replica) -> bool:
        more = replica.bytes - replica.physical
        if node.physical(device_id) + more > node.capacity(device_id):
            return False
        return not any(r.stage in BUSY for r in node.on_device(device_id))

    # ------------------------------------------------------------------------------- routes

    def _publish(self, now: float) -> None:
        changed = self.state.routes_version == self.state.term * VERSIONS_PER_TERM
        for name in self._dirty:
            model = self.state.models.get(name)
            route = model_route(model, now) if model else None
            if route != self._routes.get(name):
                changed = True
                if route is None:
                    self._routes.pop(name, None)
                else:
                    self._routes[name] = route
        self._dirty.clear()
        if changed:
            self.state.routes_version += 1
            ordered = tuple(self._routes[name] for name in sorted(self._routes))
            table = RouteTable(version=self.state.routes_version, models=ordered)
            self._out.append(m.Publish(table=table))

    # ------------------------------------------------------------------------------- small helpers

    def _nodes_known(self) -> bool:
        """Whether "no node can" is worth saying: some node reports, or none has for a while."""
        return any(node.live for node in self.state.nodes.values())

    def _refused(self, name: str) -> bool:
        route = self._routes.get(name)
        return route is not None and route.refusal is not None

    def _recheck_unfit(self) -> None:
        for name, model in self.state.models.items():
            if model.unfit is None:
                continue
            unfit = why_never(self.state, model.spec)
            if unfit != model.unfit:
                model.unfit = unfit
                self._dirty.add(name)


def _cause(model: Model, waiting: int, now: float) -> str:
    """Why a model wants another replica, in words."""
    if waiting:
        return f"{waiting} request{'s' if waiting > 1 else ''} waiting"
    if now < model.asked_until and model.asked_replicas > len(model.coming()):
        return "operator asked"
    if model.pinned and not model.coming():
        return "pinned"
    if model.floor is not None and not model.coming():
        return f"prewarm: {model.floor}"
    return "min_replicas" if len(model.coming()) < model.spec.min_replicas else "concurrency"
