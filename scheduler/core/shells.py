"""Engines that are pointed at another model: a replica that changes its owner. Pure.

Rules this file keeps:
- a replica is the new model's from the moment that is planned, so that nothing else is planned for
  it; what it was is kept until its agent says that it is the new model's, and it goes back to that
  where the plan is taken back or its agent does not do it;
- one that serves is out of the route table, and every router has confirmed that, before its agent
  is told;
- a model that an agent refused to point an engine at is started plainly for a while.
"""

from __future__ import annotations

from runtime.wire.agent_messages import ReplicaReport, RepointReplica
from scheduler.core.replica_moves import EVICT_GRACE_S, UNROUTE_TIMEOUT_S, Moves
from scheduler.core.turn import Turn
from scheduler.policy.ladder import Descent
from scheduler.state.cluster import Climb, Former, Model, Replica, Stage

_AS_IT_WAS = {"ready", "asleep", "draining", "waking"}  # its engine lives, as its former model's


class Shells:
    """Points replicas at other models."""

    def __init__(self, turn: Turn, moves: Moves) -> None:
        self._turn = turn
        self._moves = moves

    def take(self, model: Model, way: Descent, climb: Climb, now: float) -> Replica:
        """Make the replica of `way`, idle or asleep, one of `model` that is about to rise."""
        replica, state = way.replica, self._turn.state
        hot = replica.stage is Stage.READY
        if replica.report is not None:
            self._moves.finish_climb(replica, replica.report, now)
        state.prewarms.gone(replica.replica_id, now)
        self._turn.dirty.update((replica.model, model.name))
        replica.former = Former(
            replica.model, replica.launch_key, replica.spec, hot, replica.used_at,
            replica.sleep_level, replica.host_booked,
        )  # fmt: skip
        state.reassign(replica, model.name)
        replica.launch_key, replica.spec, replica.used_at = model.launch_key, model.spec, now
        replica.reason, replica.cause, replica.climb = climb.reason, climb.cause, climb
        if hot:
            replica.book_sleep(0, 0, replica.bytes)
            replica.unrouted_version = state.routes_version + 1
            replica.unrouted_deadline = now + UNROUTE_TIMEOUT_S
        replica.move(Stage.RISING, now)
        return replica

    def may_begin(self, replica: Replica, now: float) -> bool:
        """Whether no router sends it requests for what it was."""
        return (
            replica.former is None or not replica.former.hot or self._moves.unrouted(replica, now)
        )

    def send(self, replica: Replica, now: float) -> None:
        """Tell its agent, for the first time or again."""
        assert replica.spec is not None
        if replica.climb is not None and replica.climb.sent_at is None:
            replica.climb.sent_at = now
        replica.move(Stage.WAKING, now)
        command = RepointReplica(
            replica_id=replica.replica_id, epoch=self._turn.state.term, spec=replica.spec,
            grace_s=EVICT_GRACE_S, reason=replica.reason, cause=replica.cause,
        )  # fmt: skip
        self._moves.tell(replica, command, now)

    def follow(self, replica: Replica, report: ReplicaReport, now: float) -> None:
        """Take over what the agent says of a replica that is changing its owner."""
        former = replica.former
        assert former is not None
        if report.model not in (replica.model, former.model):
            replica.former = None
            take_word(self._turn, replica, report)
            self._moves.follow_phase(replica, report, now)
        elif report.model == replica.model:  # its agent has begun, or is done
            if report.phase != "waking":
                replica.former = None
                self._moves.follow_phase(replica, report, now)
        elif report.phase not in _AS_IT_WAS:
            self._moves.give_back(replica, f"it is {report.phase}", now)  # it died as what it was
            self._moves.follow_phase(replica, report, now)
        elif replica.stage is Stage.RISING:
            if report.phase == "asleep":
                replica.keep_residue(report.residue_bytes)
        elif report.phase in ("ready", "asleep") and self._moves.shown(replica):
            self._moves.give_back(replica, report.reason or "its agent did not do it", now)
        elif now >= replica.retry_at:
            self.send(replica, now)


def changed_owner(replica: Replica, report: ReplicaReport) -> bool:
    """Whether its agent says that it is another model's than this scheduler thinks."""
    return replica.former is None and report.model != replica.model


def take_word(turn: Turn, replica: Replica, report: ReplicaReport) -> None:
    """Believe the agent whose replica is: a leader before this one had it pointed elsewhere."""
    turn.dirty.update((replica.model, report.model))
    turn.state.reassign(replica, report.model)
    replica.launch_key, replica.spec, replica.climb = report.launch_key, None, None
    turn.decide("adopt", replica, "its agent points it at this model", turn.now)
