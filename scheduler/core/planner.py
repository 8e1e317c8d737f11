"""Brings what should be and what is together: the decisions of the core. Pure.

Rules this file keeps:
- a plan enters the state when it is made, so the next event already sees it;
- one start, sleep or wake at a time per device; a start under way is never idle; a config change
  never drops a replica that serves;
- a model that found no room is looked at again when something moved, not with every event;
- every decision and every refusal leaves a `Decided` with its reason, cause and runners-up.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort

from runtime.wire.routes import ModelRoute, RouteTable
from scheduler.core.node_care import Nodes
from scheduler.core.replica_moves import Settings
from scheduler.policy import autoscale
from scheduler.policy.eviction import UNWANTED, given_up, standing
from scheduler.policy.feasibility import suits, why_never
from scheduler.policy.ladder import resting_place
from scheduler.policy.model_routes import lost_urls, model_route, waiting_for
from scheduler.policy.placement import Fit, Never, NotNow, place
from scheduler.signals.replica_target import Desired
from scheduler.state import messages as m
from scheduler.state.cluster import BUSY, Climb, Model, Node, Replica, Stage

EXTRA_S = 1.0  # expected waiting of others that one more replica beside others is worth
HUNGRY_AT_ONCE = 16  # models without room that are looked at in one go, the most urgent first
VERSIONS_PER_TERM = 10**9


class Planning(Nodes):
    """From demand to plans, from plans to commands."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self._hungry: set[str] = set()  # models that want more replicas than they could get
        self._routes: dict[str, ModelRoute] = {}
        self._route_names: list[str] = []  # sorted
        self._lost: tuple[str, ...] = ()  # as published last
        self._freed = False  # something moved that may have made room
        self._unrouted = False  # a router or the clock may have let an unrouted replica go

    def _settle(self, now: float) -> None:
        """Bring what should be and what is together, then publish what changed."""
        if self.state.recovering:
            return
        for name in self._to_look_at():
            model = self.state.models[name]
            model.rest_at = 0.0
            self._replace_outdated(model, now)
            self._scale(model, now)
            self._hold_floor(model, now)
        self._dispatch(now)
        if self._restage:
            self._send_holds(now)
        if self._dirty or self.state.rules_changed or self._unpublished():
            self._publish(now)
        if self._unrouted or self.state.index.unrouting:
            self._stop_unrouted(now)

    def _to_look_at(self) -> list[str]:
        models = self.state.models
        names = [name for name in self._dirty if name in models]
        if self._hungry and (self._freed or self.state.index.touched):
            self._freed = False
            waiting = [n for n in self._hungry if n in models and n not in self._dirty]
            names += heapq.nsmallest(HUNGRY_AT_ONCE, waiting, key=self._urgency)
        return sorted(names, key=self._urgency) if len(names) > 1 else names

    def _urgency(self, name: str) -> tuple[int, float, str]:
        model = self.state.models[name]
        return -standing(self.state, model), -self.state.demand(name).oldest_wait_s, name

    def _scale(self, model: Model, now: float) -> None:
        name = model.spec.name
        demand = self.state.demand(name)
        desired = autoscale.decide(self.state, model, demand, now)
        wanted, model.wanted, model.wanted_why = desired.replicas, desired.replicas, desired.reason
        coming = model.coming()
        model.scale_at = now + _look_again_s(model, desired, len(coming))
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
            # The last one goes by its own idleness, but more than the most is too many at any time.
            enough = wanted or model.spec.max_replicas
            if enough < len(coming) and not demand.waiting:
                self._fewer(model, enough, desired.reason, now)
        elif model.blocked_until > now:
            self._hungry.add(name)
            return
        elif any(
            r.leaving and r.sleep_level and r.doomed_at is None for r in model.replicas.values()
        ):
            self._hungry.add(name)  # waking it, once it sleeps, is quicker than a start
            model.waiting_for = "its replica is going to sleep, and will be woken"
            return
        needed = max(1, autoscale.floor(model, now)[0])
        for index in range(len(coming), wanted):
            cause = _cause(model, demand.waiting, now)
            extra = index >= needed or bool(demand.background and not demand.urgent)
            if not self._add_replica(model, cause, now, extra=extra):
                break

    def _fewer(self, model: Model, wanted: int, reason: str, now: float) -> None:
        """Let the least used of too many replicas step down; its requests end first.

        Beyond max_replicas (a lost node came back, the limit was lowered) none is of use asleep.
        """
        if any(r.stage is not Stage.READY for r in model.coming()):
            return
        ready = [r for r in model.ready() if r.doomed_at is None]
        spare = sorted(ready, key=lambda r: (self.state.in_flight(r), r.used_at, r.replica_id))
        limit = model.spec.max_replicas
        over = max(0, len(ready) - max(wanted, limit))
        for replica in spare[:over]:
            self._leave(replica, f"more than max_replicas ({limit})", "autoscale", now)
        for replica in spare[over : max(over, len(ready) - wanted)]:
            node = self.state.nodes[replica.node_id]
            way = resting_place(self.state, model, node, replica, now)
            if way is not None:
                action = "sleep" if way.level else "stop"
                self._descend(way, f"fewer are enough: {reason}", "autoscale", now, action)

    def _add_replica(
        self, model: Model, cause: str, now: float, evict: bool = True, extra: bool = False
    ) -> bool:
        """Plan one more replica; False where there is no room now, or never.

        `extra`: others serve or will, or nobody is in a hurry, so it is not worth much waiting of
        the models it moves down.
        """
        name = model.spec.name
        answer = place(self.state, model, now, self.settings.min_dwell_s, evict)
        if extra and isinstance(answer, Fit):
            cost_s = sum(way.cost for way in answer.victims)
            if cost_s > EXTRA_S or any(way.busy for way in answer.victims):
                answer = NotNow(f"another replica would cost others {cost_s:.0f} s of waiting")
        if isinstance(answer, Never):
            if self._nodes_known():
                self._refuse(model, answer.reason, cause, now)
                return False
            answer = NotNow(answer.reason)
        if isinstance(answer, NotNow):
            if evict:
                model.waiting_for = answer.reason
                self._hungry.add(name)
                self._dirty.add(name)
            return False
        model.unfit = model.waiting_for = None
        self._plan(model, answer, cause, now)
        return True

    def _refuse(self, model: Model, reason: str, cause: str, now: float) -> None:
        if self._set_unfit(model, reason):
            self._record("refuse", model.name, reason, now, cause=cause)

    def _plan(self, model: Model, fit: Fit, cause: str, now: float) -> None:
        name = model.spec.name
        for way in fit.victims:
            # What was loaded for later and made way is not loaded again at this one's cost.
            self.state.models[way.replica.model].asked_until = 0.0
            action = "move" if way.elsewhere else "evict"
            why = UNWANTED if given_up(self.state, way.replica, now) else ""
            self._descend(way, f"makes room for {name}{why}", cause, now, action)
        evicted = ", ".join(sorted({way.replica.model for way in fit.victims}))
        reason = f"after evicting {evicted}" if evicted else "best fit"
        self._dirty.add(name)
        if fit.riser is not None:
            fit.riser.move(Stage.RISING, now)
            fit.riser.reason, fit.riser.cause = f"woken {reason}" if evicted else "woken", cause
            fit.riser.climb = self._climb(model, fit, fit.riser.reason, cause, now)
            self._decide("wake", fit.riser, fit.riser.reason, now, considered=fit.considered)
            return
        climb = self._climb(model, fit, reason, cause, now)
        replica = self._planned(model, fit.node_id, fit.device_ids, reason, cause, climb, now)
        self._decide("start", replica, reason, now, considered=fit.considered)
        for way in fit.victims:
            if way.elsewhere:
                self._resettle(way.replica, *way.elsewhere, for_model=name, now=now)

    def _planned(
        self, model: Model, node_id: str, device_ids: tuple[str, ...], reason: str, cause: str,
        climb: Climb | None, now: float,
    ) -> Replica:  # fmt: skip
        self.state.replica_count += 1
        replica = Replica(
            f"{model.name}-{self.state.term}-{self.state.replica_count}", model.name, node_id,
            device_ids, model.booked_bytes(), model.launch_key, Stage.PLANNED, now,
            reason=reason, cause=cause, spec=model.spec, used_at=now, climb=climb,
        )  # fmt: skip
        self.state.add(replica)
        return replica

    def _resettle(
        self, victim: Replica, node_id: str, device_ids: tuple[str, ...], for_model: str, now: float
    ) -> None:
        """Start anew elsewhere what made room."""
        model = self.state.models[victim.model]
        node = self.state.nodes[node_id]
        if any(node.plannable(d) < model.booked_bytes() for d in device_ids):
            return
        reason = f"moved from {victim.node_id} to make room for {for_model}"
        replica = self._planned(model, node_id, device_ids, reason, "defragmentation", None, now)
        replica.used_at = victim.used_at
        self._decide("start", replica, reason, now)
        self._dirty.add(model.name)

    def _climb(self, model: Model, fit: Fit, reason: str, cause: str, now: float) -> Climb:
        rung = f"asleep-{fit.riser.sleep_level}" if fit.riser else "stopped"
        moved = tuple(
            f"{way.replica.replica_id} ({way.replica.model}) to"
            f" {f'asleep-{way.replica.sleep_level}' if way.replica.sleep_level else 'stopped'}"
            for way in fit.victims
        )
        waited_s = self.state.demand(model.spec.name).oldest_wait_s
        return Climb(
            rung, now, waited_s, cause, reason, moved, fit.considered, round(fit.wait_s, 3)
        )

    def _replace_outdated(self, model: Model, now: float) -> None:
        """Bring replicas of an older spec down without dropping a request."""
        if all(r.launch_key == model.launch_key for r in model.replicas.values()):
            return
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
            serving = [r for r in old if r.stage is Stage.READY]
            if serving and model.blocked_until <= now:
                self._add_replica(model, "spec change", now, evict=False)

    # ------------------------------------------------------------------------------- commands

    def _dispatch(self, now: float) -> None:
        """Start and wake what is planned, where the memory is really free and no other does."""
        self.state.refresh_index()
        changed, self.state.index.changed = self.state.index.changed, set()
        for replica in list(self.state.index.plans.values()):
            if replica.node_id not in changed:
                continue
            node = self.state.nodes[replica.node_id]
            # Others may have taken what the plan counted on, or a sleeper kept more than expected.
            if not node.schedulable or any(node.plannable(d) < 0 for d in replica.device_ids):
                self._unplan(replica, now)
                self._hungry.add(replica.model)
                self._freed = True
            elif self._has_room(node, replica, now) and not _in_use(node, replica):
                if replica.stage is Stage.RISING:
                    self._send_wake(replica, now)
                else:
                    self._send_start(replica, now)
            else:
                self._take_turn(node, replica, now)
                self._tell_turn(replica)

    def _take_turn(self, node: Node, replica: Replica, now: float) -> None:
        """A start or a long wake that nobody waits for any more gives way to one that somebody
        waits for."""
        if not self.state.demand(replica.model).waiting:
            return
        there = {r.replica_id: r for d in replica.device_ids for r in node.on_device(d)}
        for other in there.values():
            if given_up(self.state, other, now):
                way = "wake" if other.stage is Stage.WAKING else "start"
                reason = f"nobody waits for its {way} any more, and {replica.model} needs its turn"
                self._leave(other, reason, replica.cause, now)

    def _tell_turn(self, replica: Replica) -> None:
        """Those who wait hear if it comes behind another one than they were told."""
        model, route = self.state.models.get(replica.model), self._routes.get(replica.model)
        if model is None or route is None or route.endpoints:
            return
        if route.waiting_for != waiting_for(self.state, model):
            self._dirty.add(replica.model)

    def _has_room(self, node: Node, replica: Replica, now: float) -> bool:
        """Whether its memory is really free; its climb is told when that was so first."""
        more = replica.bytes - replica.physical
        if any(node.physical(d) + more > node.capacity(d) for d in replica.device_ids):
            return False
        if replica.climb is not None and replica.climb.room_at is None:
            replica.climb.room_at = now
        return True

    # ------------------------------------------------------------------------------- routes

    def _unpublished(self) -> bool:
        """A new leader says what it knows even if that is nothing."""
        return self.state.routes_version == self.state.term * VERSIONS_PER_TERM

    def _publish(self, now: float) -> None:
        changed = self._unpublished() or self.state.rules_changed
        self.state.rules_changed = False
        if self._dirty and (lost := lost_urls(self.state)) != self._lost:
            self._lost, changed = lost, True
        for name in self._dirty:
            model = self.state.models.get(name)
            route = model_route(self.state, model, now) if model else None
            if route != self._routes.get(name):
                changed = True
                self._set_route(name, route)
        self._dirty.clear()
        if changed:
            self.state.routes_version += 1
            ordered = tuple(map(self._routes.__getitem__, self._route_names))
            table = RouteTable(
                version=self.state.routes_version,
                models=ordered,
                rules=self.state.rules,
                lost=self._lost,
            )
            self._out.append(m.Publish(table=table))

    def _set_route(self, name: str, route: ModelRoute | None) -> None:
        if route is None:
            if self._routes.pop(name, None) is not None:
                del self._route_names[bisect_left(self._route_names, name)]
            return
        if name not in self._routes:
            insort(self._route_names, name)
        self._routes[name] = route

    # ------------------------------------------------------------------------------- small helpers

    def _nodes_known(self) -> bool:
        """Whether "no node can" is worth saying: some node reports, or none has for a while."""
        return any(node.live for node in self.state.nodes.values())

    def _refused(self, name: str) -> bool:
        route = self._routes.get(name)
        return route is not None and route.refusal is not None

    def _recheck_unfit(self) -> None:
        for model in self.state.models.values():
            if model.unfit is None:
                continue
            self._set_unfit(model, why_never(self.state, model))

    def _judge(self, model: Model) -> None:
        """Whether it could ever run, as far as the nodes are known."""
        self._set_unfit(model, why_never(self.state, model) if self._nodes_known() else None)

    def _set_unfit(self, model: Model, reason: str | None) -> bool:
        """Whether that is news."""
        final = reason is not None and not any(
            suits(node, model.spec, model.booked_bytes()) for node in self.state.nodes.values()
        )
        if (reason, final) == (model.unfit, model.unfit_final):
            return False
        model.unfit, model.unfit_final = reason, final
        self._dirty.add(model.name)
        return True


def _look_again_s(model: Model, desired: Desired, coming: int) -> float:
    """Until windows and policies, or metrics that no event tells of, may say something else."""
    if not coming or (model.spec.max_replicas == 1 and not model.spec.autoscale.metrics):
        return math.inf
    if model.spec.autoscale.metrics or (desired.limited_by or "").startswith(("up", "panic")):
        return 1.0
    return 5.0 if coming > 1 else math.inf  # on the way down nobody waits


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
    if len(model.coming()) < model.spec.min_replicas:
        return "min_replicas"
    return model.wanted_why or "concurrency"


def _in_use(node: Node, replica: Replica) -> bool:
    """Whether another one has its turn on a device of `replica`."""
    return any(r.stage in BUSY for d in replica.device_ids for r in node.on_device(d))
