"""One host as the scheduler sees it. Pure.

Rules this file keeps:
- what it can give is its devices' total less what others hold; a sick or quarantined device gives
  nothing;
- host memory is booked by sleeping replicas and by staged weights, together;
- nothing here decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from runtime.wire.agent_messages import CachedModel, DeviceReport, Heartbeat
from scheduler.state.bookings import Books
from scheduler.state.replica import Replica

RESIDENT = 0.9  # of a model's weights in the page cache: it counts as staged


@dataclass(slots=True)
class Hold:
    """One model's weights that the node holds in its page cache by our wish."""

    source: str
    model: str
    bytes: int
    since: float
    reason: str


@dataclass(slots=True)
class Drain:
    """A node is being emptied; what is still there at `deadline` goes without a successor."""

    reason: str
    deadline: float


@dataclass(slots=True, frozen=True)
class Rooms:
    """What a node's devices have to give, by `books.version`."""

    version: int
    capacity: dict[str, int]
    plannable: dict[str, int]
    sizes: list[int]  # the capacities, the largest first


@dataclass(slots=True)
class Node:
    """One host and its last heartbeat."""

    node_id: str
    books: Books
    heartbeat: Heartbeat | None = None
    seen_at: float = 0.0
    lost: bool = False
    cordoned: bool = False
    drain: Drain | None = None
    devices: dict[str, DeviceReport] = field(default_factory=dict)
    quarantine: dict[str, str] = field(default_factory=dict)  # device id -> why
    released: dict[str, str] = field(default_factory=dict)  # device id -> the fault that was let go
    canaries: dict[str, set[str]] = field(default_factory=dict)  # device id -> models that failed
    cached: dict[str, CachedModel] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)  # by source
    holds_sent_at: float | None = None  # the last `stage` command, until a heartbeat shows it
    _rooms: Rooms | None = None

    @property
    def replicas(self) -> dict[str, Replica]:
        """The replicas on it, by id."""
        return self.books.replicas

    @property
    def live(self) -> bool:
        """Whether it reports."""
        return self.heartbeat is not None and not self.lost

    @property
    def schedulable(self) -> bool:
        """Whether new replicas may be placed here."""
        return (
            self.heartbeat is not None
            and not self.lost
            and not self.cordoned
            and self.drain is None
            and not self.heartbeat.draining
            and self.heartbeat.preempted_in_s is None
        )

    @property
    def emptying(self) -> bool:
        """Whether replicas here may be doomed."""
        return (
            self.drain is not None
            or bool(self.quarantine)
            or (self.heartbeat is not None and self.heartbeat.preempted_in_s is not None)
        )

    @property
    def preemptible(self) -> bool:
        """Whether its provider may take it away."""
        return self.heartbeat is not None and self.heartbeat.preemptible

    def on_device(self, device_id: str) -> Iterator[Replica]:
        """The replicas on one device."""
        return (r for r in self.replicas.values() if device_id in r.device_ids)

    def usable(self, device_id: str) -> bool:
        """Whether the device may carry replicas at all."""
        device = self.devices.get(device_id)
        return device is not None and device.healthy and device_id not in self.quarantine

    def rooms(self) -> Rooms:
        """Counted once for each change of the books; whoever changes a device touches them too."""
        if self._rooms is None or self._rooms.version != self.books.version:
            capacity = {
                d: max(0, r.memory_total_bytes - r.foreign_bytes) if self.usable(d) else 0
                for d, r in self.devices.items()
            }
            plannable = {d: size - self.books.committed(d) for d, size in capacity.items()}
            sizes = sorted(capacity.values(), reverse=True)
            self._rooms = Rooms(self.books.version, capacity, plannable, sizes)
        return self._rooms

    def capacity(self, device_id: str) -> int:
        """Bytes that Stoker's replicas may take there: the total less what others hold."""
        return self.rooms().capacity.get(device_id, 0)

    def committed(self, device_id: str) -> int:
        """Bytes spoken for on one device, now and later."""
        return self.books.committed(device_id)

    def physical(self, device_id: str) -> int:
        """Bytes that may be in use on one device now."""
        return self.books.physical(device_id)

    def most_room(self) -> int | None:
        """What its roomiest device could take now; None: it takes no new replica."""
        if not self.schedulable or not self.devices:
            return None
        return max(self.plannable(device_id) for device_id in self.devices)

    def plannable(self, device_id: str) -> int:
        """Bytes a new plan may take, counting those that leave as gone already."""
        return self.rooms().plannable.get(device_id, 0)

    def host_held(self) -> int:
        """Host bytes booked for staged weights."""
        return sum(hold.bytes for hold in self.holds.values())

    def host_free(self) -> int:
        """Host bytes that may still be booked, for sleep or for staging."""
        budget = self.heartbeat.host_budget_bytes if self.heartbeat else 0
        return budget - self.books.host - self.host_held()

    def start_rung(self, source: str) -> str:
        """What a start of a model from `source` would begin from here: staged, cached, remote."""
        cached = self.cached.get(source)
        if cached is None:
            return "remote"
        if cached.resident_bytes >= RESIDENT * max(1, cached.disk_bytes):
            return "staged"
        return "cached"
