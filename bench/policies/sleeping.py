"""What the baselines share that let replicas sleep: who wakes, who sleeps, who stops. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from bench.policies.base import Baseline
from runtime.sizes import GIB
from scheduler.policy.ladder import EVICT_S, Descent, climb_s, expected_residue
from scheduler.policy.placement import Fit
from scheduler.state.cluster import ClusterState, Model, Node, Replica, Stage

_Priced = tuple[float, float, Fit]  # seconds until it serves, the order of the last that goes


class Sleeping(Baseline):
    """Where a model serves soonest, by a wake or a start; what goes down for it goes by `_order`,
    to the highest rung the host has room for. Nothing goes down before somebody needs its room."""

    idle_timers = False

    def choose(self, state: ClusterState, model: Model, now: float) -> Fit | None:
        """Where it serves soonest."""
        fits = [
            fit
            for riser in model.asleep()
            if (fit := self._rise(state, state.nodes[riser.node_id], model, riser, now))
        ]
        for node in self._able(state, model):
            fits += self._starts(state, node, model, now)
        best = min(fits, key=lambda f: (round(f[0], 1), f[1]), default=None)
        return best[2] if best else None

    def _starts(self, state: ClusterState, node: Node, model: Model, now: float) -> list[_Priced]:
        """A start in free room, and one in the room of others."""
        rung = node.start_rung(model.spec.source)
        load_s = climb_s(model, 0, rung)
        found = []
        devices = self._free(node, model)
        if devices:
            wait_s = load_s + self._turn_s(state, node, model, devices, now)
            found.append((wait_s, 0.0, Fit(node.node_id, devices, rung=rung, wait_s=wait_s)))
        cleared = self._cleared(state, node, model, now)
        if cleared is not None and cleared[1]:
            devices, ways, last = cleared
            wait_s = load_s + self._turn_s(state, node, model, devices, now) + EVICT_S
            fit = Fit(node.node_id, devices, ways, rung=rung, wait_s=wait_s)
            found.append((wait_s, last, fit))
        return found

    def _rise(
        self, state: ClusterState, node: Node, model: Model, riser: Replica, now: float
    ) -> _Priced | None:
        if not node.schedulable or not all(map(node.usable, riser.device_ids)):
            return None
        gone: dict[str, Replica] = {}
        for device_id in riser.device_ids:
            need = riser.bytes - riser.residue
            victims = self._victims(state, node, device_id, need, model, now)
            if victims is None:
                return None
            gone.update((r.replica_id, r) for r in victims)
        ways = tuple(self._way_down(state, node, r, now) for r in gone.values())
        wait_s = climb_s(model, riser.sleep_level) + self._turn_s(
            state, node, model, riser.device_ids, now, wake=True
        )
        wait_s += EVICT_S if ways else 0.0
        last = max((self._order(state, r) for r in gone.values()), default=0.0)
        return wait_s, last, Fit(node.node_id, riser.device_ids, ways, riser, wait_s=wait_s)

    def _may_go(self, replica: Replica, model: Model, now: float) -> bool:
        """A sleeper that keeps nothing on the device makes no room by going."""
        return replica.stage is Stage.READY or replica.residue > 0

    def _way_down(self, state: ClusterState, node: Node, replica: Replica, now: float) -> Descent:
        """Asleep, at the highest level that the host has room for; else stopped."""
        if replica.stage is Stage.READY:
            owner = state.models[replica.model]
            residue = expected_residue(owner, node, replica)
            for level in replica.rungs():
                host_bytes = owner.weights_bytes(replica) if level == 1 else 0
                if residue < replica.bytes and host_bytes <= node.host_free():
                    return Descent(replica, level, replica.bytes - residue, host_bytes, 0.0)
        return Descent(replica, 0, replica.committed, 0, 0.0)

    def _enough(self, node: Node, ordered: Iterable[Replica]) -> list[Replica]:
        """The first of these whose stopping gives the host room for the next one to sleep."""
        budget = node.heartbeat.host_budget_bytes if node.heartbeat else 0
        missing, gone = min(budget // 8, 64 * GIB) - node.host_free(), []
        for replica in ordered:
            if missing <= 0:
                break
            if replica.host_booked:
                gone.append(replica)
                missing -= replica.host_booked
        return gone


def sleepers(node: Node) -> list[Replica]:
    """Those of a node that sleep."""
    return [r for r in node.replicas.values() if r.stage is Stage.ASLEEP]
