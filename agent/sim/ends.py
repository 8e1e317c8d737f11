"""The ends of a simulated node's engines: told to end, killed, crashed, gone. Pure.

Rules this file keeps: requests that an end cuts off are told to the observer.
"""

from __future__ import annotations

from agent.core import messages as m
from agent.core.state_machine import AgentCore
from agent.sim.agent import Agent
from agent.sim.engine import SimEngine
from agent.sim.memory import Memory
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.observer import Observer


class Ends:
    """The ends of one node's engines."""

    def __init__(
        self, loop: Loop, node_id: str, agent: Agent, memory: Memory, observer: Observer
    ) -> None:
        self._loop = loop
        self._node_id = node_id
        self._agent = agent
        self._memory = memory
        self._observer = observer

    def terminate(self, replica_id: str) -> None:
        """SIGTERM: it ends after a while."""
        engine = self._memory.engines[replica_id]
        if engine.in_flight:
            r = self._agent.core.replicas[replica_id]
            why = r.stop.cause if r.stop else ""
            self._observer.cut_off(self._node_id, replica_id, engine.in_flight, why)
        engine.listens = False
        self._loop.after(p.TERM_S, self._terminated, replica_id, engine)

    def _terminated(self, replica_id: str, engine: SimEngine) -> None:
        if engine.alive:
            self._memory.die(replica_id, engine)
            self.exited(replica_id, "stopped", "it ended as it was told")

    def kill(self, replica_id: str) -> None:
        """SIGKILL: it is dead at once, and its memory is free after a while."""
        engine, core = self._memory.engines.get(replica_id), self._agent.core
        if engine is not None:
            if engine.in_flight and engine.alive:
                r = core.replicas[replica_id]
                if r.stop is not None:
                    why = r.stop.cause
                    self._observer.cut_off(self._node_id, replica_id, engine.in_flight, why)
            self._memory.die(replica_id, engine)
        self._loop.after(p.REAP_S, self._gone, replica_id, engine, core)

    def _gone(self, replica_id: str, engine: SimEngine | None, core: AgentCore) -> None:
        if not self._agent.asks(core):
            return
        if engine is not None and self._memory.engines.get(replica_id) is engine:
            self._memory.end(replica_id, engine)
        self._agent.apply(m.Gone(now=self._loop.now, replica_id=replica_id))

    def crash(self, replica_id: str, kind: str) -> None:
        """Have the replica's process die, if there is one."""
        engine = self._memory.engines.get(replica_id)
        if engine is not None and engine.alive:
            self._memory.die(replica_id, engine)
            self.exited(replica_id, kind, "it died in the simulation")

    def exited(self, replica_id: str, kind: str, words: str) -> None:
        """Tell the agent, where there is one, that its process ended."""
        if self._agent.up and replica_id in self._agent.core.replicas:
            self._agent.apply(
                m.ProcessExited(now=self._loop.now, replica_id=replica_id, kind=kind, words=words)
            )
