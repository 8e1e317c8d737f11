"""Greedy-dual size frequency over whole models. Pure."""

from __future__ import annotations

from bench.policies.simple import Locality
from runtime.sizes import GIB
from scheduler.policy.choices import Scale
from scheduler.policy.ladder import climb_s
from scheduler.state.cluster import ClusterState, Demand, Model, Replica


class Gdsf(Locality):
    """As web caches do (Cherkasova, HP Labs 1998), over models: what goes first has the least

        age + calls x seconds of its next start / GiB

    where `age` is the value of the last one that went when this one was called last, so that who
    was called often long ago goes in the end. Placed as ServerlessLLM does, no sleep rung.

    Worked example: 10 calls, a start of 40 s, 20 GiB: 20 above the age. 2 calls, 15 s, 4 GiB: 7.5.
    """

    alike_s = 2.0

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0
        self._calls: dict[str, int] = {}
        self._called_at: dict[str, float] = {}  # the age then

    def scale(self, state: ClusterState, model: Model, demand: Demand, now: float) -> Scale:
        """As production does; calls are counted on the way."""
        parts = (router.models.get(model.name) for router in state.routers.values())
        calls = sum(part.arrived for part in parts if part is not None)
        if calls > self._calls.get(model.name, 0):
            self._calls[model.name] = calls
            self._called_at[model.name] = self._age
        return super().scale(state, model, demand, now)

    def _order(self, state: ClusterState, replica: Replica) -> float:
        model, node = state.models[replica.model], state.nodes[replica.node_id]
        cost_s = climb_s(model, 0, node.start_rung(model.spec.source))
        size_gib = replica.bytes * len(replica.device_ids) / GIB
        calls = self._calls.get(model.name, 1)
        return self._called_at.get(model.name, 0.0) + calls * cost_s / size_gib

    def _chosen(self, last: float) -> None:
        self._age = max(self._age, last)
