"""Which models' weights each node holds in its page cache. Pure.

Rules this file keeps:
- holds book host memory, and give way to sleepers that save more (scheduler/policy/ladder.py);
- a node is told its whole wish each time; it is told again until its heartbeat shows it;
- a hold ends `staged_s` after its model was last called, and never while a floor asks for it.
"""

from __future__ import annotations

from runtime.wire.agent_messages import Heartbeat, Staging
from runtime.wire.agent_messages import StageModels as StageCommand
from scheduler.core.turn import RESEND_S, Turn
from scheduler.policy.ladder import chance, climb_s, hold_value, yielding
from scheduler.state import messages as m
from scheduler.state.cluster import Hold, Model, Node, Replica

WORTH_S = 0.05  # of expected waiting: less is not worth a message


class Holds:
    """Holds staged weights, and lets go of them."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def after_stop(self, replica: Replica) -> None:
        """A replica is gone: hold its model's weights where its stop asked for that."""
        model = self._turn.state.models.get(replica.model)
        node = self._turn.state.nodes[replica.node_id]
        if not replica.stage_after or model is None or not node.schedulable:
            return
        if node.start_rung(model.spec.source) != "staged" and _climbs(node):
            return  # reading it again would hold up the starts and wakes that read the disk now
        if model.spec.source in node.cached and not model.coming() and not model.asleep():
            self._hold(model, node, "its replica stopped", self._turn.now)

    def let_go(self, node: Node, hold: Hold, reason: str, now: float) -> None:
        """Hold a model's weights in a node's page cache no longer."""
        if node.holds.pop(hold.source, None) is not None:
            self._turn.restage.add(node.node_id)
            model = self._turn.state.models.get(hold.model)
            if model is not None:
                model.staged_on.discard(node.node_id)
                self._turn.dirty.add(model.name)
            self._turn.record("unstage", hold.model, reason, now, node_id=node.node_id)

    def follow(self, node: Node, heartbeat: Heartbeat, now: float) -> None:
        """Compare what a node holds with the wish; a new leader takes over what it finds."""
        if not heartbeat.staged and not node.holds:
            return
        told = set(heartbeat.staged)
        if node.holds_sent_at is None and not node.holds:
            self._adopt_holds(node, told, now)
        sent_at = node.holds_sent_at
        if told == node.holds.keys():
            return
        if sent_at is None or now - sent_at >= RESEND_S:
            self._turn.restage.add(node.node_id)

    def review(self, now: float) -> None:
        """Let go of what is over, and of the cheapest where a node has less to give than before."""
        state = self._turn.state
        for node in state.nodes.values():
            if not node.holds:
                continue
            for hold in list(node.holds.values()):
                model = state.models.get(hold.model)
                if model is None or model.spec.source != hold.source:
                    self.let_go(node, hold, "its model is not declared any more", now)
                elif model.floor != "staged":
                    used_at = max(hold.since, model.active_at or 0.0)
                    if now - used_at >= model.spec.staged_s:
                        reason = f"staged and unused for {model.spec.staged_s:g} s"
                        self.let_go(node, hold, reason, now)
            while node.holds and node.live and node.host_free() < 0:
                cheapest = min(node.holds.values(), key=lambda h: hold_value(state, h, now))
                self.let_go(node, cheapest, "the host is short of memory", now)

    def hold_floor(self, model: Model, now: float) -> None:
        """A model that must not be colder than staged is held somewhere, if it is not warmer."""
        if model.floor != "staged" or model.coming() or model.asleep():
            return
        source = model.spec.source
        nodes = [n for n in self._turn.state.schedulable_nodes() if n.heartbeat]
        if any(source in node.holds for node in nodes):
            return
        for node in sorted(
            nodes, key=lambda n: (source not in n.cached, -n.host_free(), n.node_id)
        ):
            if self._hold(model, node, "prewarm: staged", now):
                return

    def send(self, now: float) -> None:
        """Tell each node whose wish changed, or whose heartbeat does not show it."""
        for node_id in sorted(self._turn.restage):
            node = self._turn.state.nodes[node_id]
            if not node.live:
                continue
            node.holds_sent_at = now
            wish = tuple(
                Staging(source=h.source, bytes=h.bytes)
                for h in sorted(node.holds.values(), key=lambda h: h.source)
            )
            command = StageCommand(epoch=self._turn.state.term, models=wish)
            self._turn.out.append(m.Send(node_id=node_id, command=command))
        self._turn.restage.clear()

    def _hold(self, model: Model, node: Node, reason: str, now: float) -> bool:
        """Hold a model's weights on a node, where that pays; whether they are held now."""
        source = model.spec.source
        if source in node.holds:
            return True
        size = _size(model, node)
        worth = chance(self._turn.state, model, now, now) * (
            climb_s(model, 0, "cached") - climb_s(model, 0, "staged")
        )
        if model.floor == "staged":
            worth = float("inf")
        if size <= 0 or worth < WORTH_S:
            return False
        gone = yielding(self._turn.state, node, size, worth, now)
        if gone is None:
            return False
        for other in gone:
            self.let_go(node, other, f"host memory for {model.name} staged", now)
        node.holds[source] = Hold(source, model.name, size, now, reason)
        model.staged_on.add(node.node_id)
        self._turn.dirty.add(model.name)
        self._turn.restage.add(node.node_id)
        self._turn.record("stage", model.name, reason, now, node_id=node.node_id)
        return True

    def _adopt_holds(self, node: Node, told: set[str], now: float) -> None:
        by_source = {model.spec.source: model for model in self._turn.state.models.values()}
        for source in sorted(told & by_source.keys()):
            model = by_source[source]
            size = _size(model, node)
            if 0 < size <= node.host_free():
                node.holds[source] = Hold(source, model.name, size, now, "adopted")
                model.staged_on.add(node.node_id)
                self._turn.dirty.add(model.name)


def _climbs(node: Node) -> bool:
    return any(map(node.books.climbing, node.devices))


def _size(model: Model, node: Node) -> int:
    """Host bytes of the weights: by the files on the node's disk, else by the estimate."""
    cached = node.cached.get(model.spec.source)
    if cached is not None and cached.disk_bytes:
        return cached.disk_bytes
    return model.stored.estimate.weights_bytes if model.stored.estimate else 0
