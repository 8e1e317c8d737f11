"""What really happened in a simulated cluster: measured, and held against the rules. Pure.

Rules it checks as they can be broken (a broken one raises Violation at once):
- no device and no host memory holds more than there is (the nodes tell);
- no agent obeys a leader after a later one (the nodes tell);
- nothing that was evicted or idle is ended with a request in flight;
- nothing that is hot is evicted within the dwell time, but for a start that nobody waited for and
  of which its leader has not heard yet that it is done;
- the phases of a cold start's post-mortem add up to its total;
- a request that was let in ends once (its router's books raise KeyError, this counts).

Definitions, for reports:
- device-seconds *occupied*: a device counts while at least one replica on it starts, wakes, serves,
  drains or goes to sleep; one that holds sleepers only does not;
- device-seconds *held*: the bytes that replicas really hold on it, over its size, by time.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

from runtime.sim.loop import Loop
from runtime.wire.agent_messages import ReplicaPhase, StartReplica
from scheduler.policy.eviction import UNWANTED
from scheduler.sim.routers import Request
from scheduler.state import messages as m
from scheduler.state.learning import mismatch

OCCUPIES = frozenset({"starting", "ready", "draining", "sleeping", "waking"})
PROTECTED = frozenset({"evict", "sleep"})  # actions that must not end a request
PROTECTED_CAUSES = frozenset({"idle timer"})


class Violation(AssertionError):
    """A rule was broken; the message says which, and when."""


@dataclass(slots=True)
class Segment:
    """A replica on its devices in one state. Times are seconds from the start."""

    device_ids: tuple[str, ...]
    model: str
    replica_id: str
    state: str  # a ReplicaPhase; "waking-1" for its rung
    from_s: float
    to_s: float


@dataclass(slots=True)
class _Seen:
    command: StartReplica
    phase: str
    state: str
    since: float
    hot_at: float | None = None


class Truth:
    """The observer of one run (runtime.sim.observer.Observer)."""

    def __init__(
        self, loop: Loop, *, min_dwell_s: float, keep_segments: bool = True, strict: bool = True
    ) -> None:
        """`strict`: raise at the first violation; else they are only kept."""
        self.requests = 0
        self.outcomes: Counter[str] = Counter()
        self.ttft = array("d")  # of answered requests, in order of their end
        self.held_ttft = array("d")  # of those among them that had waited at a router
        self.arrived = array("d")  # their arrivals
        self.by_model: dict[str, list[float]] = {}  # model -> [answered, sum of TTFT, worst]
        self.climbs: Counter[str] = Counter()  # rung -> how often a replica became hot from it
        self.actions: Counter[str] = Counter()
        self.decisions: list[m.Decided] = []
        self.cold_starts: list[m.ColdStart] = []
        self.segments: list[Segment] = []
        self.climb_times: list[tuple[float, str]] = []
        self.violations: list[str] = []
        self.cut = 0
        self.occupied_s = 0.0
        self.held_s = 0.0  # in device sizes
        self.queue: list[tuple[float, int]] = []
        self.memory: list[tuple[float, dict[str, int]]] = []
        self.used: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self._loop = loop
        self._min_dwell_s = min_dwell_s
        self._keep = keep_segments
        self._strict = strict
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._held: dict[str, int] = {}  # replica -> bytes on each device
        self._occupants: Counter[str] = Counter()
        self._occupied_since: dict[str, float] = {}
        self._used_since: dict[str, float] = {}
        self._last_action: dict[str, m.Decided] = {}
        self._hot_at: dict[str, float] = {}

    # -------------------------------------------------------------------- the nodes' truth

    def phase_changed(
        self,
        node_id: str,
        command: StartReplica,
        phase: ReplicaPhase | None,
        level: int,
        rung: str,
    ) -> None:
        """As runtime.sim.observer.Observer."""
        now, key = self._loop.now, (node_id, command.replica_id)
        seen = self._seen.pop(key, None)
        if seen is not None:
            self._close(seen, now)
        replica_id = command.replica_id
        if phase == "ready":
            if seen is None or seen.phase in ("starting", "waking"):
                self.climbs[rung] += 1
                self.climb_times.append((now, rung))
            if seen is None or seen.phase != "draining":
                self._hot_at[replica_id] = now
        elif phase != "draining":
            self._hot_at.pop(replica_id, None)
        if phase is None:
            return
        state = f"{phase}-{level}" if phase in ("asleep", "waking", "sleeping") else phase
        self._seen[key] = _Seen(command, phase, state, now)
        if phase in OCCUPIES:
            for device_id in command.device_ids:
                self._occupants[device_id] += 1
                if self._occupants[device_id] == 1:
                    self._occupied_since[device_id] = now

    def _close(self, seen: _Seen, now: float) -> None:
        if self._keep:
            self.segments.append(
                Segment(
                    seen.command.device_ids, seen.command.spec.name, seen.command.replica_id,
                    seen.state, seen.since, now,
                )
            )  # fmt: skip
        if seen.phase in OCCUPIES:
            for device_id in seen.command.device_ids:
                self._occupants[device_id] -= 1
                if not self._occupants[device_id]:
                    self.occupied_s += now - self._occupied_since.pop(device_id)

    def memory_changed(
        self, node_id: str, replica_id: str, model: str, device_ids: tuple[str, ...], held: int
    ) -> None:
        """As runtime.sim.observer.Observer."""
        now = self._loop.now
        more = held - self._held.get(replica_id, 0)
        self._held[replica_id] = held
        if not held:
            del self._held[replica_id]
        for device_id in device_ids:
            self._integrate(device_id, now)
            self.used[device_id] = self.used.get(device_id, 0) + more

    def _integrate(self, device_id: str, now: float) -> None:
        used = self.used.get(device_id, 0)
        since = self._used_since.get(device_id, 0.0)
        self.held_s += (now - since) * used / self.sizes[device_id]
        self._used_since[device_id] = now

    def cut_off(self, node_id: str, replica_id: str, in_flight: int, why: str) -> None:
        """As runtime.sim.observer.Observer."""
        self.cut += in_flight
        last = self._last_action.get(replica_id)
        if last is not None and (last.action in PROTECTED or last.cause in PROTECTED_CAUSES):
            self.violated(
                f"{replica_id} was ended with {in_flight} requests in flight:"
                f" {last.action}, {last.reason} ({last.cause})"
            )

    def violated(self, words: str) -> None:
        """As runtime.sim.observer.Observer."""
        words = f"at {self._loop.now:.3f} s: {words}"
        self.violations.append(words)
        if self._strict:
            raise Violation(words)

    # -------------------------------------------------------------------- decisions

    def decided(self, record: m.Decided | m.ColdStart) -> None:
        """A leader's record."""
        if isinstance(record, m.ColdStart):
            self.cold_starts.append(record)
            if wrong := mismatch(record):
                self.violated(wrong)
            return
        self.decisions.append(record)
        self.actions[record.action] += 1
        if record.replica_id is None:
            return
        self._last_action[record.replica_id] = record
        hot_at = self._hot_at.get(record.replica_id)
        unheard = record.reason.endswith(UNWANTED)
        if record.action == "evict" and hot_at is not None and not unheard:
            hot_s = self._loop.now - hot_at
            if hot_s < self._min_dwell_s - 1e-6:
                self.violated(
                    f"{record.replica_id} is evicted {hot_s:.3f} s after it became hot, the"
                    f" dwell time is {self._min_dwell_s:g} s"
                )

    # -------------------------------------------------------------------- requests

    def ended(self, request: Request) -> None:
        """A request is over."""
        outcome = request.ended
        assert outcome is not None
        self.requests += 1
        self.outcomes[outcome] += 1
        if request.first_at is None:
            return
        ttft = request.first_at - request.arrived_at
        if outcome != "answered":
            return
        self.ttft.append(ttft)
        self.arrived.append(request.arrived_at)
        if request.held:
            self.held_ttft.append(ttft)
        sums = self.by_model.setdefault(request.model, [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += ttft
        sums[2] = max(sums[2], ttft)

    def sample(self, waiting: int) -> None:
        """Look at queue and memory now, for the plots."""
        self.queue.append((self._loop.now, waiting))
        self.memory.append((self._loop.now, dict(self.used)))

    def close(self) -> None:
        """The run is over: count what still goes on."""
        now = self._loop.now
        for seen in self._seen.values():
            self._close(seen, now)
        self._seen = {}
        for device_id in self.sizes:
            self._integrate(device_id, now)
