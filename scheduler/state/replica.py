"""One replica as the scheduler sees it (docs/states.md). Pure.

Rules this file keeps:
- a replica's bytes are *committed* on its devices from the moment it is planned until it begins to
  leave, and *physical* from the moment it is sent until its agent has seen the memory free; of one
  that goes to sleep only what it keeps (its residue) stays committed;
- whatever is booked changes through a method here, which tells the node's books;
- it enters only the stages that may follow the one it is in (scheduler/state/stages.py);
- nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from runtime.wire.agent_messages import ReplicaReport
from runtime.wire.model_spec import ModelSpec
from scheduler.state.stages import BUSY, EDGES, FOUND, LEAVING, PLANS, Stage


class Booked(Protocol):
    """The books that a replica stands in."""

    def touch(self) -> None:
        """Something that is booked there changed."""

    def moved(self, replica: Replica) -> None:
        """Note that a replica entered another stage."""


ENGINE_LATE_S = 3.0  # what an engine says of its last use may be so much too late


@dataclass(slots=True)
class Climb:
    """A replica's way up that is not over yet: the draft of a ColdStart."""

    rung: str
    planned_at: float
    waited_s: float  # the longest wait when it was planned
    cause: str
    reason: str
    moved_down: tuple[str, ...]
    considered: tuple[str, ...] = ()
    expected_s: float | None = None
    room_at: float | None = None  # its memory was found free
    sent_at: float | None = None
    ready_at: float | None = None  # it serves; its agent has not told yet where the time went
    woken_from: int = 0
    beside: bool = False  # another start went on on its devices meanwhile


@dataclass(frozen=True, slots=True)
class Former:
    """What a replica was before it was pointed at another model, until its agent has begun."""

    model: str
    launch_key: str
    spec: ModelSpec | None
    hot: bool  # it served; else it slept
    used_at: float
    sleep_level: int
    host_booked: int


@dataclass(slots=True, eq=False)
class Replica:
    """One replica. `bytes` is booked on each of its devices; see `Books` for who counts it."""

    replica_id: str
    model: str
    node_id: str
    device_ids: tuple[str, ...]
    bytes: int
    launch_key: str
    stage: Stage
    since: float
    reason: str
    cause: str = ""
    spec: ModelSpec | None = None  # None: adopted from a heartbeat
    report: ReplicaReport | None = None
    ready_at: float | None = None
    used_at: float = 0.0  # when it last had a request, as far as anyone told
    routed_at: dict[str, float] = field(default_factory=dict)  # router id -> likewise, by its word
    engine_at: float | None = None  # likewise, by its engine's word
    retry_at: float = 0.0  # when to repeat the last command, if nothing shows its effect
    confirmed: tuple[int, int] | None = None  # (boot_id, seq) whose heartbeats show the command
    unrouted_version: int = 0
    unrouted_deadline: float = 0.0
    doomed_at: float | None = None  # its node or device is being emptied: gone by then
    grace_s: float = 0.0  # leaving: how long its requests may take
    sleep_level: int = 0  # going to sleep, asleep or rising: at which level; 0: going for good
    residue: int = 0  # asleep: bytes it keeps on each device, expected and then measured
    host_booked: int = 0  # host memory booked for its sleep
    climb: Climb | None = None
    former: Former | None = None  # rising or waking as another model than it was
    kv_bytes: int | None = None  # what its start is told of its KV cache, on each device
    alone: bool = True  # while it starts nothing else may move memory on its devices
    stage_after: bool = False  # once it is gone, its model's weights may stay in the page cache
    queued: int = 0  # heartbeats in a row that told of requests waiting in its engine
    lost_from: Stage | None = None  # unknown: where it was when its node was last heard of
    books: Booked | None = field(default=None, repr=False)

    def move(self, stage: Stage, now: float) -> None:
        """Enter `stage`; entering the one it is in keeps `since`."""
        if stage is not self.stage:
            if stage not in EDGES[self.stage] and stage not in FOUND[self.stage]:
                raise AssertionError(f"{self.replica_id}: {self.stage} -> {stage}")
            self.stage = stage
            self.since = now
            if self.books is not None:
                self.books.moved(self)

    def judge_use(self) -> None:
        """Work `used_at` out again. A router's word is exact. The engine is asked by its agent
        once a second, and both may be slow: its word counts where it tells of a use that no
        router knows of any more."""
        at = max(self.routed_at.values(), default=float("-inf"))
        if self.engine_at is not None and self.engine_at > at + ENGINE_LATE_S:
            at = self.engine_at
        if at > float("-inf"):
            self.used_at = max(at, self.ready_at or 0.0)

    def book_sleep(self, level: int, host_bytes: int, residue: int) -> None:
        """What it will hold asleep at `level`; all 0: it is not going to sleep."""
        self.sleep_level, self.host_booked, self.residue = level, host_bytes, residue
        self._touch()

    def keep_residue(self, residue: int) -> None:
        """What it was seen to hold asleep on each device."""
        if min(residue, self.bytes) != self.residue:
            self.residue = min(residue, self.bytes)
            self._touch()

    def shrink(self) -> None:
        """Book only what it holds asleep: it will never take more again."""
        self.bytes = self.residue
        self._touch()

    @property
    def full(self) -> bool:
        """Requests wait in its engine, and not just for a moment."""
        return self.queued > 1

    def _touch(self) -> None:
        if self.books is not None:
            self.books.touch()

    @property
    def physical(self) -> int:
        """Bytes it may hold on each of its devices now."""
        if self.stage is Stage.PLANNED:
            return 0
        return self.residue if self._known_stage in (Stage.ASLEEP, Stage.RISING) else self.bytes

    @property
    def committed(self) -> int:
        """Bytes that are spoken for on each of its devices, now and later."""
        if self.stage in LEAVING:
            return self.residue if self.sleep_level else 0
        return self.residue if self._known_stage is Stage.ASLEEP else self.bytes

    @property
    def _known_stage(self) -> Stage:
        """A lost sleeper can't have taken more than it held asleep."""
        return self.lost_from if self.stage is Stage.UNKNOWN and self.lost_from else self.stage

    @property
    def sleeps(self) -> bool:
        """Whether it holds only its residue, as far as is known."""
        return self._known_stage in (Stage.ASLEEP, Stage.RISING)

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out of the routes, or out of them for good."""
        return self.stage in LEAVING

    @property
    def plan(self) -> bool:
        """Whether it is committed but its agent was not told yet."""
        return self.stage in PLANS

    @property
    def climbing(self) -> bool:
        """Whether it takes its turn on its devices, or waits for it."""
        return self.stage in BUSY or self.stage in PLANS

    @property
    def is_unrouting(self) -> bool:
        """Whether it is out of the table and not all routers have confirmed that."""
        return self.stage is Stage.UNROUTING

    def rungs(self) -> tuple[int, ...]:
        """The sleep levels it could take, by its agent's word."""
        if self.report is None:
            return ()
        return tuple(n for n in self.report.rungs if f"asleep-{n}" not in self.report.disabled)
