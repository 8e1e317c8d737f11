"""From demand to plans, and from idleness one rung down. Pure.

Rules this file keeps:
- a plan enters the state when it is made, so the next event already sees it;
- a start under way is never idle; a config change never drops a replica that serves;
- a model that found no room is looked at again when something moved, not with every event;
- what pays to be kept stays, whatever its idle timer says; the last that a floor asks for never
  goes;
- every decision and every refusal leaves a `Decided` with its reason, cause and runners-up.
"""

from __future__ import annotations

import heapq

from scheduler.core.page_cache_holds import Holds
from scheduler.core.refusals import Refusals
from scheduler.core.replica_moves import Moves
from scheduler.core.shells import Shells
from scheduler.core.turn import Turn
from scheduler.policy import autoscale
from scheduler.policy.autoscale import idle_replicas
from scheduler.policy.choices import Choices
from scheduler.policy.device_turns import must_be_alone
from scheduler.policy.eviction import UNWANTED, given_up, standing
from scheduler.policy.ladder import Descent, resting_place
from scheduler.policy.placement import Fit, Never
from scheduler.policy.prewarming import hot_s
from scheduler.state.cluster import Climb, Demand, Model, Replica, Stage

HUNGRY_AT_ONCE = 16  # models without room that are looked at in one go, the most urgent first


class Planner:
    """Gives each model the replicas it should have."""

    def __init__(
        self,
        turn: Turn,
        moves: Moves,
        shells: Shells,
        holds: Holds,
        refusals: Refusals,
        choices: Choices,
    ) -> None:
        self._turn = turn
        self._moves = moves
        self._shells = shells
        self._holds = holds
        self._refusals = refusals
        self._choices = choices

    def look(self, now: float) -> None:
        """Look at every model that something happened to, and at those that wait for room."""
        for name in self._to_look_at():
            model = self._turn.state.models[name]
            model.rest_at, model.looked_at = 0.0, now
            self._replace_outdated(model, now)
            self._scale(model, now)
            self._holds.hold_floor(model, now)

    def _to_look_at(self) -> list[str]:
        turn = self._turn
        models = turn.state.models
        names = [name for name in turn.dirty if name in models]
        if turn.hungry and (turn.freed or turn.state.index.touched):
            turn.freed = False
            waiting = [n for n in turn.hungry if n in models and n not in turn.dirty]
            names += heapq.nsmallest(HUNGRY_AT_ONCE, waiting, key=self._urgency)
        return sorted(names, key=self._urgency) if len(names) > 1 else names

    def _urgency(self, name: str) -> tuple[int, float, str]:
        state = self._turn.state
        return -standing(state, state.models[name]), -state.demand(name).oldest_wait_s, name

    def _scale(self, model: Model, now: float) -> None:
        turn = self._turn
        demand = turn.state.demand(model.name)
        scale = self._choices.scale(turn.state, model, demand, now)
        model.wanted, model.wanted_why = scale.wanted, scale.reason
        model.scale_at = now + scale.look_again_s
        coming = model.coming()
        # Replicas of an older spec do not count once their successors come.
        coming = [r for r in coming if r.launch_key == model.launch_key] or coming
        turn.hungry.discard(model.name)
        self._cancel(coming, len(coming) - scale.wanted, now)
        if scale.wanted <= len(coming):
            model.waiting_for = None
            if scale.keep is not None and scale.keep < len(coming):
                self._fewer(model, scale.keep, scale.reason, now)
        elif model.blocked_until > now:
            turn.hungry.add(model.name)
        elif any(
            r.leaving and r.sleep_level and r.doomed_at is None for r in model.replicas.values()
        ):
            turn.hungry.add(model.name)  # waking it, once it sleeps, is quicker than a start
            model.waiting_for = "its replica is going to sleep, and will be woken"
        else:
            self._more(model, demand, len(coming), scale.wanted, now)

    def _cancel(self, coming: list[Replica], count: int, now: float) -> None:
        """Take back so many plans that have not begun, those of new replicas first."""
        if count <= 0:
            return
        planned = [r for r in coming if r.stage is Stage.PLANNED]
        planned += [r for r in coming if r.stage is Stage.RISING]
        for replica in planned[:count]:
            self._turn.decide("cancel", replica, "nobody waits for it any more", now)
            self._moves.unplan(replica, now)

    def _more(self, model: Model, demand: Demand, there: int, wanted: int, now: float) -> None:
        needed = max(1, autoscale.floor(model, now)[0])
        for index in range(there, wanted):
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
        state = self._turn.state
        ready = [r for r in model.ready() if r.doomed_at is None]
        spare = sorted(ready, key=lambda r: (state.in_flight(r), r.used_at, r.replica_id))
        limit = model.spec.max_replicas
        over = max(0, len(ready) - max(wanted, limit))
        for replica in spare[:over]:
            self._moves.leave(replica, f"more than max_replicas ({limit})", "autoscale", now)
        for replica in spare[over : max(over, len(ready) - wanted)]:
            node = state.nodes[replica.node_id]
            way = resting_place(state, model, node, replica, now)
            if way is not None:
                action = "sleep" if way.level else "stop"
                self._moves.descend(way, f"fewer are enough: {reason}", "autoscale", now, action)

    def _add_replica(
        self, model: Model, cause: str, now: float, evict: bool = True, extra: bool = False
    ) -> bool:
        """Plan one more replica; False where there is no room now, or never."""
        answer = self._choices.place(self._turn.state, model, now, evict, extra)
        if isinstance(answer, Fit):
            model.unfit = model.waiting_for = None
            self.plan(model, answer, cause)
            return True
        if isinstance(answer, Never) and self._refusals.nodes_known():
            self._refusals.refuse(model, answer.reason, cause, now)
        elif evict:
            model.waiting_for = answer.reason
            self._turn.hungry.add(model.name)
            self._turn.dirty.add(model.name)
        return False

    def plan(self, model: Model, fit: Fit, cause: str) -> None:
        """Enter a replica, or a wake, into the state; what is in its way goes down."""
        now, state = self._turn.now, self._turn.state
        if fit.riser is not None:
            fit.riser.move(Stage.RISING, now)  # first, so that no sleeper's end takes it along
        for way in fit.victims:
            # What was loaded for later and made way is not loaded again at this one's cost.
            state.models[way.replica.model].asked_until = 0.0
            action = "move" if way.elsewhere else "evict"
            why = UNWANTED if given_up(state, way.replica, now) else ""
            self._moves.descend(way, f"makes room for {model.name}{why}", cause, now, action)
        evicted = ", ".join(sorted({way.replica.model for way in fit.victims}))
        self._turn.dirty.add(model.name)
        if fit.riser is not None:
            reason = f"woken after evicting {evicted}" if evicted else "woken"
            self._rise(model, fit, fit.riser, reason, cause, now)
            return
        if fit.shell is not None:
            self._point(model, fit, fit.shell, cause, now)
            return
        reason = f"after evicting {evicted}" if evicted else "best fit"
        climb = self._climb(model, fit, reason, cause, now)
        replica = self._planned(model, fit.node_id, fit.device_ids, reason, cause, climb, now)
        self._turn.decide("start", replica, reason, now, considered=fit.considered)
        for way in fit.victims:
            if way.elsewhere:
                self._resettle(way.replica, *way.elsewhere, for_model=model.name, now=now)

    def _rise(
        self, model: Model, fit: Fit, riser: Replica, reason: str, cause: str, now: float
    ) -> None:
        riser.reason, riser.cause = reason, cause
        riser.climb = self._climb(model, fit, reason, cause, now)
        self._turn.decide("wake", riser, reason, now, considered=fit.considered)

    def _point(self, model: Model, fit: Fit, shell: Descent, cause: str, now: float) -> None:
        owner = shell.replica.model
        self._turn.state.models[owner].asked_until = 0.0
        reason = f"in the engine of {owner}"
        climb = self._climb(model, fit, reason, cause, now)
        replica = self._shells.take(model, shell, climb, now)
        self._turn.decide("repoint", replica, reason, now, considered=fit.considered)

    def _planned(
        self, model: Model, node_id: str, device_ids: tuple[str, ...], reason: str, cause: str,
        climb: Climb | None, now: float,
    ) -> Replica:  # fmt: skip
        state = self._turn.state
        state.replica_count += 1
        replica = Replica(
            f"{model.name}-{state.term}-{state.replica_count}", model.name, node_id, device_ids,
            model.booked_bytes(), model.launch_key, Stage.PLANNED, now,
            reason=reason, cause=cause, spec=model.spec, used_at=now, climb=climb,
            kv_bytes=model.kv_bytes(),
            alone=must_be_alone(state.nodes[node_id], model, device_ids),
        )  # fmt: skip
        state.add(replica)
        return replica

    def _resettle(
        self, victim: Replica, node_id: str, device_ids: tuple[str, ...], for_model: str, now: float
    ) -> None:
        """Start again elsewhere what made room."""
        model = self._turn.state.models[victim.model]
        node = self._turn.state.nodes[node_id]
        if any(node.plannable(d) < model.booked_bytes() for d in device_ids):
            return
        reason = f"moved from {victim.node_id} to make room for {for_model}"
        replica = self._planned(model, node_id, device_ids, reason, "defragmentation", None, now)
        replica.used_at = victim.used_at
        self._turn.decide("start", replica, reason, now)
        self._turn.dirty.add(model.name)

    def _climb(self, model: Model, fit: Fit, reason: str, cause: str, now: float) -> Climb:
        rung = f"asleep-{fit.riser.sleep_level}" if fit.riser else "stopped"
        if fit.shell is not None:
            rung = "shell"
        moved = tuple(
            f"{way.replica.replica_id} ({way.replica.model}) to"
            f" {f'asleep-{way.replica.sleep_level}' if way.replica.sleep_level else 'stopped'}"
            for way in fit.victims
        )
        waited_s = self._turn.state.demand(model.spec.name).oldest_wait_s
        return Climb(
            rung, now, waited_s, cause, reason, moved, fit.considered, round(fit.wait_s, 3)
        )

    def _replace_outdated(self, model: Model, now: float) -> None:
        """Bring replicas of an older spec down without dropping a request."""
        if all(r.launch_key == model.launch_key for r in model.replicas.values()):
            return
        for replica in model.asleep():
            if replica.launch_key != model.launch_key:
                self._moves.leave(replica, "its model's spec changed", "spec change", now)
        old = [r for r in model.coming() if r.launch_key != model.launch_key]
        if not old:
            return
        demand = self._turn.state.demand(model.spec.name)
        new_serves = any(r.launch_key == model.launch_key for r in model.ready())
        for replica in old:
            idle = not demand.waiting and not self._turn.state.in_flight(replica)
            if replica.stage is not Stage.READY or new_serves or idle:
                self._moves.leave(replica, "its model's spec changed", "spec change", now)
        if not new_serves and all(r.launch_key != model.launch_key for r in model.coming()):
            serving = [r for r in old if r.stage is Stage.READY]
            if serving and model.blocked_until <= now:
                self._add_replica(model, "spec change", now, evict=False)


class IdleTimers:
    """Moves down what nobody used for long enough."""

    def __init__(self, turn: Turn, moves: Moves, choices: Choices) -> None:
        self._turn = turn
        self._moves = moves
        self._choices = choices

    def rest(self, model: Model, now: float) -> float:
        """Step down what is due, one rung at a time; returns when the next could be due."""
        asleep_s = model.spec.asleep_s
        idle, next_at = False, float("inf")
        for replica in list(model.replicas.values()):
            if replica.stage is Stage.READY:
                idle_s = hot_s(model, replica)
                due_at = max(replica.used_at, replica.ready_at or now) + idle_s
                idle = idle or due_at <= now
                next_at = min(next_at, due_at)
            elif replica.stage is Stage.ASLEEP:
                due_at = max(replica.used_at, replica.since) + asleep_s
                next_at = min(next_at, due_at)
                if due_at <= now and model.may_stop(replica):
                    reason = f"asleep and unused for {asleep_s:g} s"
                    self._moves.leave(replica, reason, "idle timer", now)
                    self._moves.keep_staged(replica)
        if idle:
            self._review(model, now)
        return next_at

    def _review(self, model: Model, now: float) -> None:
        state = self._turn.state
        for replica in idle_replicas(state, model, now, hot_s):
            hungry = bool(self._turn.hungry)
            if not self._choices.worth_keeping(state, model, replica, now, hungry):
                self._step_down(model, replica, f"idle for {hot_s(model, replica):g} s", now)

    def _step_down(self, model: Model, replica: Replica, reason: str, now: float) -> None:
        """Take it one rung down: asleep where that is open to it, else stopped."""
        node = self._turn.state.nodes[replica.node_id]
        way = resting_place(self._turn.state, model, node, replica, now)
        if way is None:
            return
        self._moves.descend(way, reason, "idle timer", now, "sleep" if way.level else "stop")


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
