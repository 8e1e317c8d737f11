"""LRU eviction that puts to sleep instead of stopping. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bench.policies.sleeping import Sleeping, sleepers
from scheduler.state.cluster import ClusterState, Node, Replica


class LruSleep(Sleeping):
    """LRU with our sleep rungs, to tell what is gained by the rungs and what by choosing: level 1
    while the host has room, else level 2; the oldest sleepers give their host memory back."""

    def also_down(self, state: ClusterState, node: Node, now: float) -> Sequence[Replica]:
        """The oldest sleepers, until the host has room for the next one."""
        return self._enough(node, sorted(sleepers(node), key=lambda r: self._order(state, r)))
