"""What the baselines share: a policy for the production core with none of production's opinions.
Pure.

The core is the same: how it drains, unroutes, sends, retries and books, so that a difference in a
figure is one of policy. A baseline knows only the seam (scheduler/policy/choices.py), the state,
and judgements of scheduler/policy/ that it shares with production. What it goes without:

- `scheduler.policy.placement.place` and with it eviction by cost, preferences and defragmentation;
- idle timers that step down the ladder, staged weights (the page cache still works by itself, as an
  operating system's does), forecasts;
- where a baseline has no sleep rung its specs say `sleep: off` (bench/policy.py), so that no agent
  offers one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from scheduler.policy.choices import Plan, Scale
from scheduler.policy.eviction import evictable
from scheduler.policy.feasibility import allowed_devices, could_run, together, why_never
from scheduler.policy.ladder import Descent, climb_s
from scheduler.policy.placement import Answer, Fit, Never, NotNow
from scheduler.policy.production import MIN_DWELL_S, scale
from scheduler.state.cluster import ClusterState, Demand, Model, Node, Replica, Stage

Order = Callable[[Replica], float]  # the smallest goes first


class Baseline(ABC):
    """A policy for the core (`Choices`) that says where a replica goes (`choose`)."""

    staging = False  # nobody is told to hold weights
    idle_timers = True

    def __init__(self, min_dwell_s: float = MIN_DWELL_S) -> None:
        self._min_dwell_s = min_dwell_s

    @abstractmethod
    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """Where one more replica goes; None: nowhere now."""

    def place(
        self, state: ClusterState, model: Model, now: float, evict: bool, extra: bool
    ) -> Answer:
        """Where `choose` says."""
        fit = self.choose(state, model, now)
        if fit is not None:
            return fit
        never = why_never(state, model)
        return NotNow("its policy found no room") if never is None else Never(never)

    def scale(self, state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
        """As production does."""
        return scale(state, model, demand, now)

    def worth_keeping(
        self, state: ClusterState, model: Model, replica: Replica, now: float, hungry: bool
    ) -> bool:
        """Never: an idle timer is an idle timer."""
        return False

    def look_ahead(self, state: ClusterState, now: float, hungry: bool, plan: Plan) -> None:  # noqa: B027
        """Nothing is started before it is called: a policy that does otherwise says so."""

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """Nothing."""
        return ()

    # ------------------------------------------------------------------------- finding room

    def _able(self, state: ClusterState, model: Model) -> Iterator[Node]:
        """Nodes that could run it, in the order of their names."""
        state.refresh_index()
        need = model.booked_bytes()
        for node_id in sorted(state.nodes):
            node = state.nodes[node_id]
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
        self, state: ClusterState, node: Node, model: Model, now: float, order: Order
    ) -> tuple[tuple[str, ...], tuple[Descent, ...], float] | None:
        """(devices, what stops there, the order of the last of it): idle ones by `order`."""
        need, count = model.booked_bytes(), model.spec.tensor_parallel_size
        found: dict[str, list[Replica]] = {}
        prices = []
        for device_id in allowed_devices(node, model.spec):
            if node.capacity(device_id) < need:
                continue
            victims = self._victims(state, node, device_id, need, model, now, order)
            if victims is not None:
                found[device_id] = victims
                prices.append((max(map(order, victims), default=float("-inf")), device_id))
        chosen = together(node, prices, count) if len(prices) >= count else None
        if chosen is None:
            return None
        gone = {r.replica_id: r for d in chosen for r in found[d]}
        last = max(price for price, device_id in prices if device_id in chosen)
        return chosen, tuple(self._way_down(state, node, r, now) for r in gone.values()), last

    def _victims(
        self, state: ClusterState, node: Node, device_id: str, need: int, model: Model, now: float,
        order: Order,
    ) -> list[Replica] | None:  # fmt: skip
        """The first by `order` whose going makes room for `need` bytes; None: not enough."""
        missing = need - node.plannable(device_id)
        idle = [
            r
            for r in node.on_device(device_id)
            if r.model != model.name
            and evictable(state, r, now, self._min_dwell_s, None)
            and self._may_go(r, model, now)
        ]
        chosen = []
        for replica in sorted(idle, key=lambda r: (order(r), r.replica_id)):
            if missing <= 0:
                break
            chosen.append(replica)
            missing -= self._way_down(state, node, replica, now).frees
        return None if missing > 0 else chosen

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        """Whether an idle replica may go down for `model`."""
        return True

    def _way_down(self, state: ClusterState, node: Node, replica: Replica, now: float) -> Descent:
        """It stops."""
        return Descent(replica, 0, replica.committed, 0, 0.0)

    def _turn_s(
        self, state: ClusterState, node: Node, device_ids: tuple[str, ...], now: float
    ) -> float:
        """Seconds until the starts and wakes that go first on these devices are over."""
        longest = 0.0
        for device_id in device_ids:
            total = 0.0
            for r in node.books.climbing(device_id):
                climb = climb_s(state.models[r.model], r.sleep_level)
                total += climb if r.plan else max(0.0, climb - (now - r.since))
            longest = max(longest, total)
        return longest


def hot(model: Model) -> list[Replica]:
    """Those that serve."""
    return [r for r in model.replicas.values() if r.stage is Stage.READY]
