"""The re-points of a simulated node's engines: what agent/lifecycle/shells.py does. Pure.

Rules this file keeps: an engine is pointed only at a model that this node has started itself, of
the same architecture, size and booking; an outcome that was overtaken is dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.core import messages as m
from agent.core.periods import DRAIN_PROBE_S
from agent.core.replica import SHELL, launch_name
from agent.core.state_machine import AgentCore
from agent.sim.agent import Agent
from agent.sim.engine import SimEngine
from agent.sim.memory import Memory
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.timings import Timings
from runtime.wire.agent_messages import StartReplica


class SimShells:
    """The re-points of one node."""

    def __init__(
        self, loop: Loop, timings: Timings, agent: Agent, memory: Memory, bad_canary: set[str]
    ) -> None:
        """`bad_canary`: models whose next canary fails."""
        self._loop = loop
        self._timings = timings
        self._agent = agent
        self._memory = memory
        self._bad_canary = bad_canary
        self._known: dict[str, tuple[str, str, str]] = {}  # launch name -> its keys, its source

    def key(self, command: StartReplica) -> str | None:
        """As in ReplicaReport.shell_key."""
        spec, facts = command.spec, self._timings.of(command.spec)
        if not facts.architecture:
            return None
        same = (spec.tensor_parallel_size, command.device_bytes, command.kv_bytes, spec.sleep)
        return f"{facts.architecture} {facts.weights_bytes} {same}"

    def learn(self, command: StartReplica) -> None:
        """A model's own engine serves, and has told its canary."""
        if key := self.key(command):
            spec = command.spec
            self._known[launch_name(spec)] = (spec.launch_key(), key, spec.source)

    def told(self) -> dict[str, str]:
        """As in Heartbeat.shells."""
        disabled, files = self._agent.core.disabled, self._memory.files
        return {
            launch_key: key
            for name, (launch_key, key, source) in self._known.items()
            if SHELL not in disabled.get(name, ()) and files.rung(source) != "remote"
        }

    def repoint(self, replica_id: str, level: int) -> None:
        """Point an engine at the model that its core's command names now."""
        engine, core = self._memory.engines[replica_id], self._agent.core
        engine.open = False
        self._begin(replica_id, level, engine, core)

    def _begin(self, replica_id: str, level: int, engine: SimEngine, core: AgentCore) -> None:
        if not engine.alive:
            return
        if engine.in_flight:
            self._loop.after(DRAIN_PROBE_S, self._begin, replica_id, level, engine, core)
            return
        replica = core.replicas.get(replica_id)
        if replica is None or core is not self._agent.core:
            return
        engine.command = replica.command
        if level:
            self._memory.hold(replica_id, engine, engine.command.device_bytes)
        began = self._loop.now

        def loaded() -> None:
            phases = {"reload": self._loop.now - began, "canary": p.CANARY_S}
            if level:
                phases["wake"] = p.MAP_S
            wait_s = sum(phases.values()) - phases["reload"]
            self._loop.after(wait_s, self._ended, replica_id, engine, core, phases)

        self._fetched(replica_id, engine, loaded)

    def _fetched(self, replica_id: str, engine: SimEngine, loaded: Callable[[], object]) -> None:
        def on_disk() -> None:
            if engine.alive:
                self._memory.read_weights(replica_id, engine, "cached", loaded)

        self._memory.fetch(engine.command.spec, on_disk)  # the disk may have forgotten it

    def _ended(
        self, replica_id: str, engine: SimEngine, core: AgentCore, phases: dict[str, float]
    ) -> None:
        if not engine.alive:
            return
        engine.asleep, engine.offloaded, engine.rung = False, 0, "shell"
        if core is not self._agent.core:
            return  # the agent that would open its door is gone
        model, error = engine.command.spec.name, None
        if model in self._bad_canary:
            self._bad_canary.discard(model)
            error = "its canary failed: another token than of its own engine"
        else:
            engine.open = True
        rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
        self._agent.apply(
            m.RepointEnded(
                now=self._loop.now, replica_id=replica_id, error=error,
                phases={} if error else rounded,
            )
        )  # fmt: skip
