"""From plans to commands: starts and wakes, each in its turn on its devices. Pure.

Rules this file keeps: a climb begins only where the memory is really free, and beside others only
as scheduler/policy/device_turns.py allows; a plan whose room went is taken back, and its model
looked at again.
"""

from __future__ import annotations

from scheduler.core.publisher import Publisher
from scheduler.core.replica_moves import Moves
from scheduler.core.shells import Shells
from scheduler.core.turn import Turn
from scheduler.policy.device_turns import company, may_begin
from scheduler.policy.eviction import given_up
from scheduler.state.cluster import Node, Replica, Stage


class Dispatcher:
    """Starts and wakes what is planned."""

    def __init__(self, turn: Turn, moves: Moves, shells: Shells, publisher: Publisher) -> None:
        self._turn = turn
        self._moves = moves
        self._shells = shells
        self._publisher = publisher

    def dispatch(self, now: float) -> None:
        """Start and wake what is planned, where the memory is really free and its turn has come."""
        state = self._turn.state
        state.refresh_index()
        changed, state.index.changed = state.index.changed, set()
        for replica in list(state.index.plans.values()):
            if replica.node_id not in changed and not (replica.former and self._turn.unrouted):
                continue
            node = state.nodes[replica.node_id]
            # Others may have taken what the plan counted on, or a sleeper kept more than expected.
            if not node.schedulable or any(node.plannable(d) < 0 for d in replica.device_ids):
                self._moves.unplan(replica, now)
                self._turn.hungry.add(replica.model)
                self._turn.freed = True
            elif not self._shells.may_begin(replica, now):
                continue
            elif self._has_room(node, replica, now) and may_begin(state, node, replica):
                self._begin(node, replica, now)
            else:
                self._take_turn(node, replica, now)
                self._publisher.tell_turn(replica)

    def _begin(self, node: Node, replica: Replica, now: float) -> None:
        if replica.former is not None:
            self._shells.send(replica, now)
            return
        if replica.stage is Stage.RISING:
            self._moves.send_wake(replica, now)
            return
        others = company(node, replica)
        for one in (replica, *others) if others else ():
            if one.climb is not None:
                one.climb.beside = True
        self._moves.send_start(replica, now)

    def _take_turn(self, node: Node, replica: Replica, now: float) -> None:
        """Make a start or a long wake that nobody waits for any more give way to one that somebody
        waits for."""
        if not self._turn.state.demand(replica.model).waiting:
            return
        there = {r.replica_id: r for d in replica.device_ids for r in node.on_device(d)}
        for other in there.values():
            if given_up(self._turn.state, other, now):
                way = "wake" if other.stage is Stage.WAKING else "start"
                reason = f"nobody waits for its {way} any more, and {replica.model} needs its turn"
                self._moves.leave(other, reason, replica.cause, now)

    def _has_room(self, node: Node, replica: Replica, now: float) -> bool:
        """Whether its memory is really free; its climb is told when that was so first."""
        more = replica.bytes - replica.physical
        if any(node.physical(d) + more > node.capacity(d) for d in replica.device_ids):
            return False
        if replica.climb is not None and replica.climb.room_at is None:
            replica.climb.room_at = now
        return True
