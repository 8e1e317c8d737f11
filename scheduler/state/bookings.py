"""What is booked on each node, summed once and kept, and where to look for room. Pure.

Rules this file keeps:
- sums and indexes are caches of the replicas: whatever changes a replica's booking says so
  (`Books.touch`), and `check_invariants` compares them with a fresh count;
- an index only proposes nodes to look at; whether one fits is asked of the node itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from scheduler.state.replica import Replica


class Index:
    """Of one cluster: nodes by free room, nodes by cached model, replicas that wait for a step."""

    def __init__(self) -> None:
        self.touched: set[str] = set()  # nodes whose bookings or capacity changed
        self.changed: set[str] = set()  # the same, since plans were last looked at
        self.moves = 0  # of replicas, from stage to stage: counted
        self.turn = 0  # of the samples of nodes that placement looks at
        self.plans: dict[str, Replica] = {}  # planned or rising
        self.unrouting: dict[str, Replica] = {}
        self.cached_on: dict[str, set[str]] = {}  # source -> node ids
        self.shells: dict[str, dict[str, str]] = {}  # launch key -> node id -> shell key
        self._by_room: list[tuple[int, str]] = []  # (most room on one device, node id), sorted
        self._room: dict[str, int] = {}

    def place_node(self, node_id: str, room: int | None) -> None:
        """Sort a node in again, by what its roomiest device could take now; None: it takes none."""
        self.remove_node(node_id)
        if room is not None:
            self._room[node_id] = room
            insort(self._by_room, (room, node_id))

    def remove_node(self, node_id: str) -> None:
        """No placement looks at it."""
        room = self._room.pop(node_id, None)
        if room is not None:
            del self._by_room[bisect_left(self._by_room, (room, node_id))]

    def roomy(self, need: int) -> Iterator[str]:
        """Nodes with `need` bytes on some device, the tightest first."""
        for position in range(bisect_left(self._by_room, (need, "")), len(self._by_room)):
            yield self._by_room[position][1]

    @property
    def open_count(self) -> int:
        """Nodes that take new replicas."""
        return len(self._by_room)

    def sample(self, count: int) -> list[str]:
        """About `count` nodes spread over all, the fullest and the emptiest; others each turn."""
        stride = max(1, len(self._by_room) // max(1, count))
        return [name for _, name in self._by_room[self.turn % stride :: stride]]

    def open_nodes(self) -> list[str]:
        """Every node that takes new replicas, the fullest first."""
        return [node_id for _, node_id in self._by_room]

    def takes_shells(self, node_id: str, before: dict[str, str], after: dict[str, str]) -> None:
        """Engines of a node may be pointed at other launches than before."""
        for launch_key in before.keys() - after.keys():
            self.shells[launch_key].pop(node_id, None)
        for launch_key, shell_key in after.items():
            self.shells.setdefault(launch_key, {})[node_id] = shell_key

    def caches(self, node_id: str, before: frozenset[str], after: frozenset[str]) -> None:
        """A node's disk holds other models than before."""
        for source in before - after:
            self.cached_on[source].discard(node_id)
        for source in after - before:
            self.cached_on.setdefault(source, set()).add(node_id)


class Books:
    """One node's replicas and the sums of what they book."""

    def __init__(self, node_id: str, index: Index) -> None:
        self.node_id = node_id
        self.index = index
        self.replicas: dict[str, Replica] = {}
        self.version = 0  # grows with every change
        self._stale = True
        self._committed: dict[str, int] = {}
        self._physical: dict[str, int] = {}
        self._host = 0
        self._climbing: dict[str, list[Replica]] = {}

    def touch(self) -> None:
        """Something that is booked here changed."""
        self._stale = True
        self.version += 1
        self.index.touched.add(self.node_id)

    def add(self, replica: Replica) -> None:
        """Book a replica here from now on."""
        replica.books = self
        self.replicas[replica.replica_id] = replica
        self.moved(replica)

    def drop(self, replica: Replica) -> None:
        """Take a replica off the books."""
        self.index.moves += 1
        self.replicas.pop(replica.replica_id, None)
        self.index.plans.pop(replica.replica_id, None)
        self.index.unrouting.pop(replica.replica_id, None)
        self.touch()

    def moved(self, replica: Replica) -> None:
        """Note that a replica entered another stage."""
        self.index.moves += 1
        plans, unrouting = self.index.plans, self.index.unrouting
        plans.pop(replica.replica_id, None)
        unrouting.pop(replica.replica_id, None)
        if replica.plan:
            plans[replica.replica_id] = replica
        elif replica.is_unrouting:
            unrouting[replica.replica_id] = replica
        self.touch()

    def committed(self, device_id: str) -> int:
        """Bytes spoken for on one device, now and later."""
        if self._stale:
            self._count()
        return self._committed.get(device_id, 0)

    def physical(self, device_id: str) -> int:
        """Bytes that may be in use on one device now."""
        if self._stale:
            self._count()
        return self._physical.get(device_id, 0)

    @property
    def host(self) -> int:
        """Host bytes booked by sleeping replicas."""
        if self._stale:
            self._count()
        return self._host

    def climbing(self, device_id: str) -> list[Replica]:
        """Replicas that start or wake on one device, or wait for their turn to."""
        if self._stale:
            self._count()
        return self._climbing.get(device_id, [])

    def _count(self) -> None:
        committed: dict[str, int] = {}
        physical: dict[str, int] = {}
        host = 0
        climbing: dict[str, list[Replica]] = {}
        for replica in self.replicas.values():
            more, held = replica.committed, replica.physical
            host += replica.host_booked
            if replica.climbing:
                for device_id in replica.device_ids:
                    climbing.setdefault(device_id, []).append(replica)
            for device_id in replica.device_ids:
                committed[device_id] = committed.get(device_id, 0) + more
                physical[device_id] = physical.get(device_id, 0) + held
        self._committed, self._physical, self._host = committed, physical, host
        self._climbing, self._stale = climbing, False
