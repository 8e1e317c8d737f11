"""The sleeps and wakes of a simulated node's engines. Pure.

Rules this file keeps:
- an outcome that was overtaken (the engine died) is dropped by looking at the engine it was for;
- one that an earlier agent process waited for changes the engine, and is told to nobody.
"""

from __future__ import annotations

from agent.core import messages as m
from agent.core.state_machine import AgentCore
from agent.sim.agent import Agent
from agent.sim.engine import SimEngine
from agent.sim.memory import Memory
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.timings import Timings


class Sleeps:
    """The sleeps and wakes of one node."""

    def __init__(self, loop: Loop, timings: Timings, agent: Agent, memory: Memory) -> None:
        self.bad_canary: set[str] = set()  # models whose next wake fails
        self._loop = loop
        self._timings = timings
        self._agent = agent
        self._memory = memory

    def sleep(self, replica_id: str, level: int) -> None:
        """Put an engine to sleep."""
        engine, core = self._memory.engines[replica_id], self._agent.core
        if engine.in_flight:
            words = f"{engine.in_flight} requests came in at the last moment"
            self._loop.after(0.0, self._slept, replica_id, engine, core, words)
            return
        engine.open, engine.asleep = False, True
        if level == 1:
            self._memory.offload(engine)
        seconds = self._timings.sleep_s(engine.command.spec, level)
        self._loop.after(seconds, self._slept, replica_id, engine, core, None)

    def _slept(
        self, replica_id: str, engine: SimEngine, core: AgentCore, error: str | None
    ) -> None:
        if not engine.alive:
            return
        residue = self._timings.residue_bytes(engine.command.spec, engine.command.device_bytes)
        if error is None:
            self._memory.hold(replica_id, engine, residue)
        if core is not self._agent.core:
            return  # the agent that waited for it is gone
        self._agent.apply(
            m.SleepEnded(
                now=self._loop.now, replica_id=replica_id, error=error,
                untouched=error is not None, residue_bytes=0 if error else residue,
            )
        )  # fmt: skip

    def wake(self, replica_id: str, level: int) -> None:
        """Wake an engine."""
        engine, core = self._memory.engines[replica_id], self._agent.core
        engine.rung = f"asleep-{level}"
        if not engine.asleep:  # woken half-way by an earlier agent: only its canary is to pass
            self._woken_after(replica_id, engine, core, {"canary": p.CANARY_S})
            return
        self._memory.hold(replica_id, engine, engine.command.device_bytes)
        known = self._timings.wake_s(engine.command.spec, level)
        if known is not None:
            shares = self._waking_beside(engine) if level == 1 else 1
            known = {n: s * shares if n == "wake" else s for n, s in known.items()}
            self._woken_after(replica_id, engine, core, known)
        else:
            self._reload(replica_id, engine, core)

    def _waking_beside(self, engine: SimEngine) -> int:
        """How many engines share the way into its devices with it, itself included."""
        devices, replicas = set(engine.command.device_ids), self._agent.core.replicas.values()
        return max(
            1,
            sum(
                r.phase == "waking" and r.at_work and not devices.isdisjoint(r.command.device_ids)
                for r in replicas
            ),
        )

    def _reload(self, replica_id: str, engine: SimEngine, core: AgentCore) -> None:
        """Read its weights again, then go on waking it."""
        began = self._loop.now

        def loaded() -> None:
            phases = {"reload": self._loop.now - began, "wake": p.MAP_S, "canary": p.CANARY_S}
            wait_s = p.MAP_S + p.CANARY_S
            self._loop.after(wait_s, self._woken, replica_id, engine, core, phases)

        def on_disk() -> None:
            if engine.alive:
                self._memory.read_weights(replica_id, engine, "cached", loaded)

        self._memory.fetch(engine.command.spec, on_disk)  # the disk may have forgotten it

    def _woken_after(
        self, replica_id: str, engine: SimEngine, core: AgentCore, phases: dict[str, float]
    ) -> None:
        self._loop.after(sum(phases.values()), self._woken, replica_id, engine, core, phases)

    def _woken(
        self, replica_id: str, engine: SimEngine, core: AgentCore, phases: dict[str, float]
    ) -> None:
        if not engine.alive:
            return
        engine.asleep, engine.offloaded = False, 0
        if core is not self._agent.core:
            return  # the agent that would open its door is gone
        model, error = engine.command.spec.name, None
        if model in self.bad_canary:
            self.bad_canary.discard(model)
            error = "its canary failed: another token than before it slept"
        else:
            engine.open = True
        rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
        self._agent.apply(
            m.WakeEnded(
                now=self._loop.now, replica_id=replica_id, error=error,
                phases={} if error else rounded,
            )
        )  # fmt: skip
