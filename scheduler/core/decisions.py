"""The scheduler's decisions: `Core.handle(event) -> [command, ...]`. Pure.

Rules this file keeps (docs/architecture.md, docs/states.md):
- level-triggered: every event may be lost, doubled or late; the next heartbeat repairs what it
  broke;
- unroute, wait for the routers (or a deadline), then stop or put to sleep; memory counts as free
  only when the agent no longer reports the replica, or reports it asleep;
- while recovering it adopts: it unloads nothing, starts nothing and publishes nothing;
- what chooses (`Choices`) is handed to it; what carries out is the same whoever chooses.

The parts, each made of those before it:

    Turn        one event's work: the state, what is to be done (turn.py)
    Holds       weights held in page caches (page_cache_holds.py)
    Climbs      what starts and wakes taught (climbs.py)
    Moves       one replica's way up and down (replica_moves.py)
    Refusals    models that no node could run (refusals.py)
    NodeCare    nodes and devices that come and go (node_care.py)
    Planner     from demand to plans (planner.py)
    Publisher   the route table (publisher.py)
    Dispatcher  from plans to commands (dispatcher.py)

Heartbeats, RouterReports and IdleTimers take in what agents, routers and the clock say.
"""

from __future__ import annotations

from typing import assert_never

from scheduler.core.climbs import Climbs
from scheduler.core.dispatcher import Dispatcher
from scheduler.core.heartbeats import Heartbeats
from scheduler.core.node_care import NodeCare
from scheduler.core.page_cache_holds import Holds
from scheduler.core.planner import IdleTimers, Planner
from scheduler.core.publisher import VERSIONS_PER_TERM, Publisher
from scheduler.core.refusals import Refusals
from scheduler.core.replica_moves import Moves
from scheduler.core.router_reports import RouterReports
from scheduler.core.shells import Shells
from scheduler.core.turn import EventFailed, Settings, Turn
from scheduler.policy.choices import Choices
from scheduler.policy.production import Production
from scheduler.state import messages as m
from scheduler.state.cluster import ClusterState, Model
from scheduler.state.learning import remember

ROUTER_TIMEOUT_S = 5.0  # a router silent for this long has no demand and acks nothing
FORGET_NODE_S = 600.0  # a lost node's replicas are forgotten after this
MIN_RECOVERY_S = 1.5  # agents heartbeat each second: none that lives is missed


class Core:
    """One leader's view of the cluster and what it does about it."""

    def __init__(self, settings: Settings | None = None, choices: Choices | None = None) -> None:
        settings = settings or Settings()
        turn = self._turn = Turn(settings)
        self._choices: Choices = choices or Production(
            min_dwell_s=settings.min_dwell_s, stand_by=settings.stand_by
        )
        holds = self._holds = Holds(turn)
        climbs = Climbs(turn)
        moves = self._moves = Moves(turn, holds, climbs, self._choices)
        refusals = self._refusals = Refusals(turn)
        care = self._care = NodeCare(turn, moves, refusals)
        shells = Shells(turn, moves)
        self._planner = Planner(turn, moves, shells, holds, refusals, self._choices)
        self._publisher = Publisher(turn)
        self._dispatcher = Dispatcher(turn, moves, shells, self._publisher)
        self._heartbeats = Heartbeats(turn, moves, shells, climbs, holds, care, refusals)
        self._reports = RouterReports(turn)
        self._timers = IdleTimers(turn, moves, self._choices)

    @property
    def state(self) -> ClusterState:
        """What it knows. Only events change it; an election replaces it."""
        return self._turn.state

    def handle(self, event: m.Event) -> list[m.Command]:
        """Take one event in and return what is to be done, in order.

        Raises EventFailed, with what was decided until then, where any part fails.
        """
        turn, now = self._turn, event.now
        turn.out, turn.now = [], now
        turn.state.new_event()
        try:
            self._take(event, now)
            self._settle(now)
        except Exception as error:
            raise EventFailed(event, error, turn.out) from error
        return turn.out

    def _take(self, event: m.Event, now: float) -> None:
        """Enter into the state what an event says."""
        match event:
            case m.HeartbeatSeen():
                self._heartbeats.take(event.heartbeat, now)
            case m.DemandSeen():
                self._reports.take(event, now)
            case m.CommandDone():
                self._moves.command_done(event, now)
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
            case m.PinSet() | m.FloorSet():
                self._stay_warm(event)
            case m.CordonSet():
                self._care.cordon(event, now)
            case m.QuarantineSet():
                self._care.quarantine(event, now)
            case m.RulesSet():
                state = self._turn.state
                state.rules, state.rules_changed = event.rules, True
            case _:
                assert_never(event)

    def _settle(self, now: float) -> None:
        """Bring what should be and what is together, then publish what changed."""
        turn = self._turn
        if turn.state.recovering:
            return
        self._planner.look(now)
        self._dispatcher.dispatch(now)
        if turn.restage:
            self._holds.send(now)
        self._publisher.publish(now)
        if turn.unrouted or turn.state.index.unrouting:
            self._moves.stop_unrouted(now)

    def _elected(self, event: m.Elected) -> None:
        state = self._turn.state = ClusterState(
            term=event.term,
            started_at=event.now,
            awaited_nodes=set(event.known_nodes),
            routes_version=event.term * VERSIONS_PER_TERM,
            rules=event.rules,
            starts_at_once=self._turn.settings.starts_at_once,
            shells=self._turn.settings.shells,
            wall_offset_s=0.0 if event.wall_s is None else event.wall_s - event.now,
        )
        self._publisher.begin_term()
        self._turn.hungry.clear()
        self._turn.restage.clear()  # the nodes it names are known again once they report
        for stored in event.models:
            self._model_put(stored, event.now)
        for name in event.pinned:
            if name in state.models:
                state.models[name].pinned = True
        for footprint in event.footprints:
            if footprint.key.model in state.models:
                remember(state.models[footprint.key.model], footprint)
        self._reports.recall(event.sketches, event.now)
        for model in state.models.values():  # the scale is held until history is back
            model.scaling.hold(event.now + model.spec.autoscale.down.stabilization_s)
        for node_id in event.cordoned:
            state.node(node_id).cordoned = True
        for node_id, device_id, reason in event.quarantined:
            state.node(node_id).quarantine[device_id] = reason

    # ------------------------------------------------------------------------------- operators

    def _stay_warm(self, event: m.PinSet | m.FloorSet) -> None:
        model = self._turn.state.models.get(event.model)
        if model is None:
            return
        if isinstance(event, m.PinSet):
            model.pinned = event.pinned
        else:
            model.floor = event.floor
        self._turn.dirty.add(event.model)

    def _model_put(self, stored: m.StoredModel, now: float) -> None:
        spec = stored.effective()
        model = self._turn.state.models.get(spec.name)
        if model is None:
            times = self._turn.state.climb_times
            model = Model(stored, spec, spec.launch_key(), climb_times=times)
            # Replicas may outlive a removal: if it is added again, they are its own again.
            model.replicas = {
                r.replica_id: r for r in self._turn.state.replicas.values() if r.model == spec.name
            }
            self._turn.state.models[spec.name] = model
        else:
            model.sizes_itself &= spec == model.spec  # what ran out of memory was the one before
            model.stored, model.spec, model.launch_key = stored, spec, spec.launch_key()
            same = (f for f in model.footprints.values() if f.key.launch_key == model.launch_key)
            model.footprint = next(same, None)
        # A changed spec deserves a fresh try.
        model.forgive()
        self._refusals.judge(model)
        self._turn.dirty.add(spec.name)

    def _model_removed(self, name: str, now: float) -> None:
        model = self._turn.state.models.get(name)
        if model is None:
            return
        for replica in list(model.replicas.values()):
            self._moves.leave(replica, "the model was removed", "operator", now)
        del self._turn.state.models[name]
        self._turn.hungry.discard(name)
        self._turn.dirty.add(name)
        self._holds.review(now)

    def _load(self, event: m.LoadAsked, now: float) -> None:
        model = self._turn.state.models.get(event.model)
        if model is None:
            return
        model.asked_replicas = min(event.replicas, model.spec.max_replicas)
        model.asked_until = now + max(model.spec.idle_s, model.spec.hold_s)
        model.forgive()
        self._refusals.judge(model)
        self._turn.dirty.add(event.model)

    def _unload(self, event: m.UnloadAsked, now: float) -> None:
        model = self._turn.state.models.get(event.model)
        if model is not None:
            model.asked_replicas, model.asked_until = 0, 0.0
            self._reports.dismiss(model)
        for replica in list(self._turn.state.replicas.values()):
            if replica.model == event.model and event.replica_id in (None, replica.replica_id):
                self._moves.leave(replica, "unloaded on request", "operator", now)

    # ------------------------------------------------------------------------------- time

    def _tick(self, now: float) -> None:
        turn, state = self._turn, self._turn.state
        turn.freed = turn.unrouted = True
        self._miss_the_silent(now)
        if self._recovered(now):
            self._recover(now)
        if state.recovering:
            return
        for replica in list(state.index.plans.values()):
            state.index.changed.add(replica.node_id)
        self._look_at_clocks(now)
        for node in state.nodes.values():
            if node.live and node.emptying:
                self._care.empty(node, now)
        self._holds.review(now)
        self._choices.look_ahead(state, now, bool(turn.hungry), self._planner.plan)
        self._reports.write_down(now)
        self._refusals.recheck()

    def _miss_the_silent(self, now: float) -> None:
        """Count routers and nodes out that have not been heard of for too long."""
        turn, state = self._turn, self._turn.state
        for router in [r for r in state.routers.values() if now - r.seen_at > ROUTER_TIMEOUT_S]:
            self._reports.router_gone(router)
            turn.dirty.update(name for name in router.models if name in state.models)
        for node in state.nodes.values():
            if node.live and now - node.seen_at > turn.settings.node_timeout_s:
                self._care.node_lost(node, now)
            elif node.lost and now - node.seen_at > FORGET_NODE_S:
                for replica in list(node.replicas.values()):
                    self._moves.forget(replica)

    def _look_at_clocks(self, now: float) -> None:
        """Step down what is idle, and look again at models whose time has come."""
        dirty, idle_timers = self._turn.dirty, self._choices.idle_timers
        for model in self._turn.state.models.values():
            if idle_timers and model.rest_at <= now:
                model.rest_at = self._timers.rest(model, now)
            if model.problem and model.blocked_until <= now and self._publisher.refuses(model.name):
                dirty.add(model.name)
            if model.floor == "staged" or model.scale_at <= now:
                dirty.add(model.name)

    def _recovered(self, now: float) -> bool:
        state = self._turn.state
        if not state.recovering or state.term == 0:
            return False
        age_s = now - state.started_at
        return age_s >= self._turn.settings.recovery_grace_s or (
            not state.awaited_nodes and age_s >= MIN_RECOVERY_S
        )

    def _recover(self, now: float) -> None:
        state = self._turn.state
        state.recovering = False
        self._turn.dirty.update(state.models)
        for replica in list(state.replicas.values()):
            if replica.model not in state.models:
                self._moves.leave(replica, "its model is not declared any more", "recovery", now)
