"""What the agent's core knows of one replica, and what it says of it.

Rules this file keeps:
- pure, as the core is; only the core changes a Replica;
- `stop`, `sleep` and `repoint` are the commands under way: a replica drains for one of them only;
- what is saved is enough for the next agent to go on from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.core.messages import Saved
from runtime.wire.agent_messages import (
    ReplicaPhase,
    ReplicaReport,
    RepointReplica,
    SleepReplica,
    StartReplica,
    StopReplica,
)
from runtime.wire.model_spec import ModelSpec

# phase -> the phases that may follow it (None: forgotten)
EDGES: dict[ReplicaPhase, frozenset[ReplicaPhase | None]] = {
    "starting": frozenset({"ready", "backoff", "failed", "stopping", None}),
    "ready": frozenset({"draining", "backoff", "failed", "stopping"}),
    "draining": frozenset({"ready", "sleeping", "waking", "backoff", "failed", "stopping"}),
    "sleeping": frozenset({"asleep", "ready", "backoff", "failed", "stopping"}),
    "asleep": frozenset({"waking", "failed", "stopping"}),
    "waking": frozenset({"ready", "backoff", "failed", "stopping"}),
    "backoff": frozenset({"starting", "stopping", None}),
    "failed": frozenset({"stopping", None}),
    "stopping": frozenset({None}),
}
SLEEP_PHASES = frozenset({"sleeping", "asleep", "waking"})
SERVED_PHASES = SLEEP_PHASES | {"ready", "draining"}  # it was ready once since it was spawned
MEMORY_PHASES = frozenset({"starting", "sleeping", "waking"})  # their memory moves


@dataclass
class Replica:
    """One replica. Times are of the clock that events carry."""

    command: StartReplica
    phase: ReplicaPhase
    since: float
    tree: bool = False  # processes of it, or their memory, may be there
    killed: bool = False  # its tree is being killed; Gone will follow
    spawned_at: float = 0.0
    ready_at: float = 0.0  # its first time since it was spawned
    retry_at: float = 0.0  # backoff: not before
    deadline: float = 0.0  # draining: its end; stopping: KILL
    unhealthy_since: float | None = None
    status_at: float = 0.0
    in_flight: int = 0
    idle_for_s: float | None = None
    restarts: int = 0
    failures: int = 0  # in a row
    reason: str | None = None
    died: str | None = None  # why it last died after having served
    exit_kind: str | None = None
    start_s: float | None = None
    stop: StopReplica | None = None
    sleep: SleepReplica | None = None  # draining for it, sleeping, asleep or waking
    repoint: RepointReplica | None = None  # draining for it, or waking as that model
    began_at: float | None = None  # sleeping, waking: when its turn on its devices came
    looked: bool = False  # draining: its requests were counted since
    wake_wanted: bool = False  # sleeping: wake it as soon as it is asleep
    rungs: tuple[int, ...] = ()  # the sleep levels it was started with
    residue_bytes: int = 0
    sleep_s: float | None = None
    wake_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def at_work(self) -> bool:
        """Whether it moves memory on its devices now."""
        if self.phase == "starting":
            return self.tree
        return self.phase in SLEEP_PHASES and self.began_at is not None

    @property
    def alone(self) -> bool:
        """Whether nothing else may move memory on its devices while it is at work."""
        return self.phase == "starting" and self.command.alone


def adopted(saved: Saved, now: float, spawned_at: float) -> Replica:
    """What an earlier agent wrote down, as it was."""
    return Replica(
        saved.command,
        saved.phase,
        now,
        tree=True,  # even of a dead one something may be left
        spawned_at=spawned_at,
        ready_at=now,
        restarts=saved.restarts,
        failures=saved.failures,
        reason=saved.reason,
        exit_kind=saved.exit_kind,
        start_s=saved.start_s,
        sleep=saved.sleep,
        repoint=saved.repoint,
        rungs=saved.rungs,
        residue_bytes=saved.residue_bytes,
        sleep_s=saved.sleep_s,
        wake_s=saved.wake_s,
        phases=saved.phases,
    )


def saved(r: Replica) -> Saved:
    """What to write down of it."""
    return Saved(
        command=r.command,
        phase=r.phase,
        restarts=r.restarts,
        failures=r.failures,
        reason=r.reason,
        exit_kind=r.exit_kind,
        start_s=r.start_s,
        stop=r.stop,
        sleep=r.sleep,
        repoint=r.repoint,
        rungs=r.rungs,
        residue_bytes=r.residue_bytes,
        sleep_s=r.sleep_s,
        wake_s=r.wake_s,
        phases=r.phases,
    )


def report(r: Replica, disabled: Mapping[str, str], now: float) -> ReplicaReport:
    """What the scheduler is told; the driver adds what only it knows (address, key, memory)."""
    idle_for_s = r.idle_for_s
    if idle_for_s is not None and r.in_flight == 0:
        idle_for_s += now - r.status_at
    sleeps = r.phase in SLEEP_PHASES
    return ReplicaReport(
        replica_id=r.command.replica_id,
        epoch=r.command.epoch,
        model=r.command.spec.name,
        launch_key=r.command.spec.launch_key(),
        device_ids=r.command.device_ids,
        device_bytes=r.command.device_bytes,
        phase=r.phase,
        phase_age_s=max(0.0, now - r.since),
        in_flight=r.in_flight,
        idle_for_s=idle_for_s,
        restarts=r.restarts,
        reason=r.reason,
        died=r.died,
        exit_kind=r.exit_kind,
        start_s=r.start_s,
        wake_s=r.wake_s,
        sleep_s=r.sleep_s,
        sleep_level=r.sleep.level if sleeps and r.sleep else 0,
        residue_bytes=r.residue_bytes if r.phase in ("asleep", "waking") else 0,
        phases=r.phases,
        rungs=tuple(level for level in r.rungs if rung_name(level) not in disabled),
        disabled=dict(disabled),
        engine=r.command.spec.engine,
    )


def rung_name(level: int) -> str:
    """As in ReplicaReport.disabled."""
    return f"asleep-{level}"


SHELL = "shell"  # as in ReplicaReport.disabled: its engines are not pointed at it any more


def launch_name(spec: ModelSpec) -> str:
    """What a disabled rung is remembered by: the model, and what it is started with."""
    return f"{spec.name}/{spec.launch_key()}"


def check(replicas: Iterable[Replica]) -> None:
    """Raises AssertionError where one is in no possible state, or another works on the devices of
    one that must be alone there."""
    busy: set[str] = set()
    alone: set[str] = set()
    for r in replicas:
        about = f"{r.command.replica_id} ({r.phase})"
        assert r.tree or r.phase in ("starting", "backoff", "failed"), f"{about}: no tree"
        assert r.tree or not r.killed, f"{about}: killed without a tree"
        assert not r.killed or r.phase in ("backoff", "failed", "stopping"), f"{about}: killed"
        assert not (r.stop and r.sleep), f"{about}: stop and sleep"
        assert not (r.repoint and r.stop), f"{about}: stop and repoint"
        assert not r.repoint or r.phase in ("draining", "waking"), f"{about}: repoint"
        if r.phase == "draining":
            assert r.stop or r.sleep or r.repoint, f"{about}: drains for nothing"
            assert not (r.sleep and r.repoint), f"{about}: sleep and repoint"
        else:
            assert (r.stop is not None) == (r.phase == "stopping"), f"{about}: stop"
            assert not r.sleep or r.phase in SLEEP_PHASES, f"{about}: sleep"
            assert r.sleep or r.repoint or r.phase not in SLEEP_PHASES, f"{about}: no sleep"
        assert not r.wake_wanted or r.phase == "sleeping", f"{about}: wake wanted"
        assert r.began_at is None or r.phase in ("sleeping", "waking"), f"{about}: began"
        if r.at_work:
            there = busy if r.alone else alone
            assert there.isdisjoint(r.command.device_ids), f"{about}: not alone at work there"
            busy.update(r.command.device_ids)
            if r.alone:
                alone.update(r.command.device_ids)
