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
from collections.abc import Iterator, Sequence

from scheduler.policy.choices import Plan, Scale
from scheduler.policy.device_turns import must_be_alone, queue_s
from scheduler.policy.eviction import evictable
from scheduler.policy.feasibility import allowed_devices, could_run, together, why_never
from scheduler.policy.ladder import Descent
from scheduler.policy.placement import Answer, Fit, Never, NotNow
from scheduler.policy.production import MIN_DWELL_S, scale
from scheduler.state.cluster import ClusterState, Demand, Model, Node, Replica, Stage


class Baseline(ABC):
    """A policy for the core (`Choices`) that says where a replica goes (`choose`)."""

    staging = False  # nobody is told to hold weights
    idle_timers = True

    def __init__(self, min_dwell_s: float = MIN_DWELL_S) -> None:
        self._min_dwell_s = min_dwell_s
        self._moment = (0.0, 0)  # that `_idle` is of
        self._idle: dict[tuple[str, str], list[Replica]] = {}  # by node and device

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
        self, state: ClusterState, node: Node, model: Model, now: float
    ) -> tuple[tuple[str, ...], tuple[Descent, ...], float] | None:
        """(devices, what goes down there, the order of the last of it): idle ones by `_order`."""
        need, count = model.booked_bytes(), model.spec.tensor_parallel_size
        found: dict[str, list[Replica]] = {}
        prices = []
        for device_id in allowed_devices(node, model.spec):
            if node.capacity(device_id) < need:
                continue
            victims = self._victims(state, node, device_id, need, model, now)
            if victims is not None:
                found[device_id] = victims
                last = max((self._order(state, r) for r in victims), default=float("-inf"))
                prices.append((last, device_id))
        chosen = together(node, prices, count) if len(prices) >= count else None
        if chosen is None:
            return None
        gone = {r.replica_id: r for d in chosen for r in found[d]}
        last = max(price for price, device_id in prices if device_id in chosen)
        return chosen, tuple(self._way_down(state, node, r, now) for r in gone.values()), last

    def _victims(
        self, state: ClusterState, node: Node, device_id: str, need: int, model: Model, now: float
    ) -> list[Replica] | None:
        """The first by `_order` whose going makes room for `need` bytes; None: not enough."""
        missing = need - node.plannable(device_id)
        chosen = []
        for replica in self._idle_on(state, node, device_id, now) if missing > 0 else ():
            if replica.model != model.name and self._may_go(replica, model, now):
                chosen.append(replica)
                missing -= self._way_down(state, node, replica, now).frees
                if missing <= 0:
                    break
        return None if missing > 0 else chosen

    def _idle_on(
        self, state: ClusterState, node: Node, device_id: str, now: float
    ) -> list[Replica]:
        """Idle replicas on a device, the first to go first.

        Worked out once an event, and again after each decision, since a baseline with many models
        that wait for room would spend most of its time here.
        """
        moment = now, state.decision_count
        if moment != self._moment:
            self._moment = moment
            self._idle.clear()
        key = node.node_id, device_id
        if key not in self._idle:
            there = [
                r
                for r in node.on_device(device_id)
                if evictable(state, r, now, self._min_dwell_s, None)
            ]
            self._idle[key] = sorted(there, key=lambda r: (self._order(state, r), r.replica_id))
        return self._idle[key]

    def _order(self, state: ClusterState, replica: Replica) -> float:
        """What idle replicas go by, the smallest first: the one that is idle longest."""
        return replica.used_at

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        """Whether an idle replica may go down for `model`."""
        return True

    def _way_down(self, state: ClusterState, node: Node, replica: Replica, now: float) -> Descent:
        """It stops."""
        return Descent(replica, 0, replica.committed, 0, 0.0)

    def _turn_s(
        self, state: ClusterState, node: Node, model: Model, device_ids: tuple[str, ...],
        now: float, wake: bool = False,
    ) -> float:  # fmt: skip
        """Seconds until a start or wake of `model` has its turn on these devices, by the rule that
        the core begins them by."""
        alone = not wake and must_be_alone(node, model, device_ids)
        turns = (queue_s(state, node, d, now, alone=alone, wake=wake) for d in device_ids)
        return max(turns, default=0.0)


def hot(model: Model) -> list[Replica]:
    """Those that serve."""
    return [r for r in model.replicas.values() if r.stage is Stage.READY]
