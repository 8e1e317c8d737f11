"""What the baselines share: the production core's hands, with none of its opinions. Pure.

A baseline is the production core with the functions that choose taken out: how it drains, unroutes,
sends, retries and books is the same, so that a difference in a figure is one of policy. What goes:

- `scheduler.policy.placement.place` and with it eviction by cost, preferences and defragmentation;
- idle timers that step down the ladder, staged weights (the page cache still works by itself, as an
  operating system's does), forecasts;
- where a baseline has no sleep rung its specs say `sleep: off` (bench/policy.py), so that no agent
  offers one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from scheduler.core.decisions import Core
from scheduler.policy.eviction import evictable
from scheduler.policy.feasibility import allowed_devices, could_run, together, why_never
from scheduler.policy.ladder import Descent, climb_s
from scheduler.policy.placement import Answer, Fit, Never, NotNow
from scheduler.state.cluster import Model, Node, Replica, Stage

Order = Callable[[Replica], float]  # the smallest goes first


class Baseline(Core):
    """Subclasses say where a replica goes (`_choose`)."""

    def _choose(self, model: Model, now: float) -> Fit | None:
        """Where one more replica goes; None: nowhere now."""
        raise NotImplementedError

    def _add_replica(
        self, model: Model, cause: str, now: float, evict: bool = True, extra: bool = False
    ) -> bool:
        answer: Answer = self._choose(model, now) or NotNow("its policy found no room")
        if isinstance(answer, NotNow) and (never := why_never(self.state, model)) is not None:
            answer = Never(never)
        if isinstance(answer, Fit):
            model.unfit = model.waiting_for = None
            self._plan(model, answer, cause, now)
            return True
        if isinstance(answer, Never) and self._nodes_known():
            self._refuse(model, answer.reason, cause, now)
            return False
        model.waiting_for = answer.reason
        self._hungry.add(model.name)
        self._dirty.add(model.name)
        return False

    def _forecast(self, now: float) -> None:
        """None."""

    def _worth_keeping(self, model: Model, replica: Replica, now: float) -> bool:
        return False

    def _keep_staged(self, replica: Replica, now: float) -> None:
        """Nobody is told to hold weights."""

    # ------------------------------------------------------------------------- finding room

    def _able(self, model: Model) -> Iterator[Node]:
        """Nodes that could run it, in the order of their names."""
        self.state.refresh_index()
        need = model.booked_bytes()
        for node_id in sorted(self.state.nodes):
            node = self.state.nodes[node_id]
            if node.schedulable and could_run(node, model.spec, need):
                yield node

    def _free(self, node: Node, model: Model) -> tuple[str, ...] | None:
        """The first devices of a node with room for `model`."""
        need = model.booked_bytes()
        rooms = [
            (float(i), d)
            for i, d in enumerate(allowed_devices(node, model.spec))
            if node.plannable(d) >= need
        ]
        count = model.spec.tensor_parallel_size
        return together(node, rooms, count) if len(rooms) >= count else None

    def _cleared(
        self, node: Node, model: Model, now: float, order: Order
    ) -> tuple[tuple[str, ...], tuple[Descent, ...], float] | None:
        """(devices, what stops there, the order of the last of it): idle ones by `order`."""
        need, count = model.booked_bytes(), model.spec.tensor_parallel_size
        found: dict[str, list[Replica]] = {}
        prices = []
        for device_id in allowed_devices(node, model.spec):
            if node.capacity(device_id) < need:
                continue
            victims = self._victims(node, device_id, need, model, now, order)
            if victims is not None:
                found[device_id] = victims
                prices.append((max(map(order, victims), default=float("-inf")), device_id))
        chosen = together(node, prices, count) if len(prices) >= count else None
        if chosen is None:
            return None
        gone = {r.replica_id: r for d in chosen for r in found[d]}
        last = max(price for price, device_id in prices if device_id in chosen)
        return chosen, tuple(self._way_down(node, r, now) for r in gone.values()), last

    def _victims(
        self, node: Node, device_id: str, need: int, model: Model, now: float, order: Order
    ) -> list[Replica] | None:
        """The first by `order` whose going makes room for `need` bytes; None: not enough."""
        missing = need - node.plannable(device_id)
        idle = [
            r
            for r in node.on_device(device_id)
            if r.model != model.name
            and evictable(self.state, r, now, self.settings.min_dwell_s, None)
            and self._may_go(r, model, now)
        ]
        chosen = []
        for replica in sorted(idle, key=lambda r: (order(r), r.replica_id)):
            if missing <= 0:
                break
            chosen.append(replica)
            missing -= self._way_down(node, replica, now).frees
        return None if missing > 0 else chosen

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        """Whether an idle replica may go down for `model`."""
        return True

    def _way_down(self, node: Node, replica: Replica, now: float) -> Descent:
        """It stops."""
        return Descent(replica, 0, replica.committed, 0, 0.0)

    def _turn_s(self, node: Node, device_ids: tuple[str, ...], now: float) -> float:
        """Seconds until the starts and wakes that go first on these devices are over."""
        longest = 0.0
        for device_id in device_ids:
            total = 0.0
            for r in node.books.climbing(device_id):
                climb = climb_s(self.state.models[r.model], r.sleep_level)
                total += climb if r.plan else max(0.0, climb - (now - r.since))
            longest = max(longest, total)
        return longest


def hot(model: Model) -> list[Replica]:
    """Those that serve."""
    return [r for r in model.replicas.values() if r.stage is Stage.READY]
