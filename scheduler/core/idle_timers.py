"""One rung down at a time, as idle timers run out. Pure.

Rules this file keeps: what pays to be kept stays; the last that a floor asks for never goes.
"""

from __future__ import annotations

from scheduler.core.replica_moves import Moves
from scheduler.core.turn import Turn
from scheduler.policy.autoscale import idle_replicas
from scheduler.policy.choices import Choices
from scheduler.policy.ladder import resting_place
from scheduler.policy.prewarming import hot_s
from scheduler.state.cluster import Model, Replica, Stage


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
