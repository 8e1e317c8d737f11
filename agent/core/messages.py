"""What the agent's core is told, and what it answers.

Rules this file keeps: every event carries `now`, in seconds of one steady clock; effects carry
no more than what the driver can't look up.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from runtime.wire.agent_messages import (
    AgentCommand,
    ReplicaPhase,
    RepointReplica,
    SleepReplica,
    Staging,
    StartReplica,
    StopReplica,
)

# ------------------------------------------------------------------------------ events


class CommandReceived(Struct, frozen=True, kw_only=True):
    """The scheduler asks for something."""

    now: float
    command: AgentCommand


class TermSeen(Struct, frozen=True, kw_only=True):
    """A leader answered a heartbeat with this term."""

    now: float
    term: int


class ProcessExited(Struct, frozen=True, kw_only=True):
    """The engine's main process ended, or never started; `kind` as in ReplicaReport.exit_kind."""

    now: float
    replica_id: str
    kind: str
    words: str


class HealthChanged(Struct, frozen=True, kw_only=True):
    """The engine's health check passes now, or fails now. Repeating it is harmless."""

    now: float
    replica_id: str
    healthy: bool


class StatusSeen(Struct, frozen=True, kw_only=True):
    """What the engine says of its own requests. `asked_at`: when it was asked, if not now."""

    now: float
    replica_id: str
    in_flight: int
    idle_for_s: float | None
    asked_at: float | None = None


class SleepEnded(Struct, frozen=True, kw_only=True):
    """A SleepEngine is over. `error` says why it failed, None: its device memory is free.

    `untouched`: it failed before the engine was told to sleep, which serves on as before.
    """

    now: float
    replica_id: str
    error: str | None = None
    untouched: bool = False
    residue_bytes: int = 0  # still held on each device


class WakeEnded(Struct, frozen=True, kw_only=True):
    """A WakeEngine is over. `error` says why it failed, None: the canary passed."""

    now: float
    replica_id: str
    error: str | None = None
    phases: dict[str, float] = {}


class RepointEnded(Struct, frozen=True, kw_only=True):
    """A RepointEngine is over. `error` says why it failed, None: the new model's canary passed."""

    now: float
    replica_id: str
    error: str | None = None
    phases: dict[str, float] = {}


class PhasesSeen(Struct, frozen=True, kw_only=True):
    """How long each phase of the replica's start took, told after it became ready."""

    now: float
    replica_id: str
    phases: dict[str, float]


class Gone(Struct, frozen=True, kw_only=True):
    """No process of the replica is left and its device memory has been seen free."""

    now: float
    replica_id: str


class Tick(Struct, frozen=True, kw_only=True):
    """Time passed."""

    now: float


class Saved(Struct, frozen=True, kw_only=True):
    """What an agent must remember of a replica across its own restart."""

    command: StartReplica
    phase: ReplicaPhase
    restarts: int = 0
    failures: int = 0
    reason: str | None = None
    exit_kind: str | None = None
    start_s: float | None = None
    stop: StopReplica | None = None
    sleep: SleepReplica | None = None
    repoint: RepointReplica | None = None
    rungs: tuple[int, ...] = ()
    residue_bytes: int = 0
    sleep_s: float | None = None
    wake_s: float | None = None
    phases: dict[str, float] = {}


class Adopted(Struct, frozen=True, kw_only=True):
    """A replica found in the records of an earlier agent. `age_s`: since its process started.

    `sleeping`: what the engine itself says, None where it was not asked or did not answer;
    `residue_bytes`: what is seen on each device of one that sleeps.
    """

    now: float
    saved: Saved
    alive: bool
    healthy: bool = False
    age_s: float = 0.0
    sleeping: bool | None = None
    residue_bytes: int = 0


class ShutdownRequested(Struct, frozen=True, kw_only=True):
    """The agent must end: drain and stop every replica, or (hard) kill them all."""

    now: float
    grace_s: float
    hard: bool = False


Event = (
    CommandReceived
    | TermSeen
    | ProcessExited
    | HealthChanged
    | StatusSeen
    | SleepEnded
    | WakeEnded
    | RepointEnded
    | PhasesSeen
    | Gone
    | Tick
    | Adopted
    | ShutdownRequested
)

# ------------------------------------------------------------------------------ effects


class Spawn(Struct, frozen=True):
    """Start the replica's engine."""

    replica_id: str


class Signal(Struct, frozen=True):
    """TERM: ask the engine to end. KILL: end every process of its tree, then report Gone."""

    replica_id: str
    signal: Literal["TERM", "KILL"]


class SleepEngine(Struct, frozen=True):
    """Give its device memory back, see it free, then report SleepEnded."""

    replica_id: str
    level: int


class WakeEngine(Struct, frozen=True):
    """Take the device memory again, pass the canary, then report WakeEnded.

    An engine that does not sleep (an agent died half-way) has its canary to pass only.
    """

    replica_id: str
    level: int


class RepointEngine(Struct, frozen=True):
    """Point the engine at the model of its command, asleep at `level` (0: awake, with its door
    open), pass that model's canary, then report RepointEnded."""

    replica_id: str
    level: int


class StageWeights(Struct, frozen=True):
    """Hold these models' weights in the page cache, and no others'."""

    models: tuple[Staging, ...]


class SaveDisabled(Struct, frozen=True):
    """Write down which rungs are not used any more, as `AgentCore.disabled` has them."""


class SaveRecord(Struct, frozen=True):
    """Write down what `saved()` says now."""

    replica_id: str


class ForgetRecord(Struct, frozen=True):
    """The replica is over."""

    replica_id: str


class SaveEpoch(Struct, frozen=True):
    """Write down the highest epoch seen."""

    epoch: int


class SendHeartbeatNow(Struct, frozen=True):
    """Something changed that the scheduler waits for."""


class CommandRefused(Struct, frozen=True):
    """The command was not carried out. `stale`: it came from an earlier leader."""

    error: str
    stale: bool = False


Effect = (
    Spawn
    | Signal
    | SleepEngine
    | WakeEngine
    | RepointEngine
    | StageWeights
    | SaveRecord
    | ForgetRecord
    | SaveEpoch
    | SaveDisabled
    | SendHeartbeatNow
    | CommandRefused
)
