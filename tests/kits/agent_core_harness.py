"""An agent core, a clock, and the shortest ways to say things to it."""

from __future__ import annotations

import msgspec

from agent.core.messages import (
    Adopted,
    CommandReceived,
    Gone,
    HealthChanged,
    ProcessExited,
    RepointEnded,
    Saved,
    SleepEnded,
    StatusSeen,
    Tick,
    WakeEnded,
)
from agent.core.state_machine import AgentCore
from runtime.wire.agent_messages import (
    RepointReplica,
    SleepReplica,
    StartReplica,
    StopReplica,
    WakeReplica,
)
from runtime.wire.model_spec import ModelSpec

SPEC = ModelSpec(name="m", source="x", engine="stub", device_memory_bytes=1)
OTHER = ModelSpec(name="other", source="y", engine="stub", device_memory_bytes=1)
SPECS = (SPEC, OTHER)


def start(
    replica_id: str = "a",
    epoch: int = 1,
    devices: tuple[str, ...] = ("d0",),
    spec=SPEC,
    alone: bool = True,
):
    return StartReplica(
        replica_id=replica_id,
        epoch=epoch,
        spec=spec,
        device_ids=devices,
        device_bytes=1,
        reason="demand",
        alone=alone,
    )


def stop(replica_id: str = "a", epoch: int = 1, grace_s: float = 60.0):
    return StopReplica(replica_id=replica_id, epoch=epoch, grace_s=grace_s, reason="idle")


def sleep(replica_id: str = "a", epoch: int = 1, level=1, grace_s: float = 60.0):
    return SleepReplica(
        replica_id=replica_id, epoch=epoch, level=level, grace_s=grace_s, reason="idle"
    )


def wake(replica_id: str = "a", epoch: int = 1):
    return WakeReplica(replica_id=replica_id, epoch=epoch, reason="demand")


def repoint(replica_id: str = "a", epoch: int = 1, spec=OTHER, grace_s: float = 60.0):
    return RepointReplica(
        replica_id=replica_id, epoch=epoch, spec=spec, grace_s=grace_s, reason="called"
    )


class Harness:
    """A core, a clock, and the shortest ways to say things to it."""

    def __init__(self, max_restarts: int = 3, rungs=(1, 2), disabled=None) -> None:
        self.core = AgentCore(
            start_timeout_s=100.0,
            max_restarts=max_restarts,
            rungs=lambda spec: rungs if spec.sleep == "auto" else (),
            disabled=disabled,
        )
        self.now = 1000.0

    def __call__(self, event, **fields):
        effects = self.core.handle(event(now=self.now, **fields))
        self.core.validate_state()
        return effects

    def command(self, command):
        return self(CommandReceived, command=command)

    def exited(self, replica_id="a", kind="crash", words="it crashed"):
        return self(ProcessExited, replica_id=replica_id, kind=kind, words=words)

    def healthy(self, replica_id="a", healthy=True):
        return self(HealthChanged, replica_id=replica_id, healthy=healthy)

    def status(self, in_flight, replica_id="a", idle_for_s=None):
        return self(StatusSeen, replica_id=replica_id, in_flight=in_flight, idle_for_s=idle_for_s)

    def gone(self, replica_id="a"):
        return self(Gone, replica_id=replica_id)

    def slept(self, replica_id="a", **fields):
        return self(SleepEnded, replica_id=replica_id, **fields)

    def woken(self, replica_id="a", **fields):
        return self(WakeEnded, replica_id=replica_id, **fields)

    def repointed(self, replica_id="a", **fields):
        return self(RepointEnded, replica_id=replica_id, **fields)

    def asleep(self, replica_id="a", level=1, **fields):
        self.ready(replica_id, **fields)
        self.command(sleep(replica_id, level=level))
        self.status(0, replica_id)
        self.slept(replica_id, residue_bytes=7)
        assert self.phase(replica_id) == "asleep"

    def tick(self, after_s=0.0):
        self.now += after_s
        return self(Tick)

    def ready(self, replica_id="a", **fields):
        self.command(start(replica_id, **fields))
        return self.healthy(replica_id)

    def report(self, replica_id="a"):
        return {r.replica_id: r for r in self.core.reports(self.now)}[replica_id]

    def phase(self, replica_id="a"):
        replica = self.core.replicas.get(replica_id)
        return replica.phase if replica else None


def of(effects, kind):
    return [e for e in effects if isinstance(e, kind)]


def saved_of(h, replica_id="a"):
    return msgspec.json.decode(msgspec.json.encode(h.core.saved(replica_id)), type=Saved)


def adopt(saved, **fields):
    successor = Harness()
    return successor, successor(Adopted, saved=saved, **fields)
