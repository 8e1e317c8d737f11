"""The starts of a simulated node's engines: files, process, weights, canary. Pure.

Rules this file keeps: what costs time is an entry of the loop; an outcome that was overtaken (the
engine died) is dropped by looking at the engine it was for.
"""

from __future__ import annotations

from agent.core import messages as m
from agent.sim.agent import Agent
from agent.sim.ends import Ends
from agent.sim.engine import SimEngine
from agent.sim.memory import Memory
from agent.sim.reports import Statuses
from agent.sim.shells import SimShells
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.timings import Timings

HEALTH_S = 0.05  # [as] from a start's end until the answer of a probe that saw it
_BEFORE_WEIGHTS = ("fork", "init", "import")


class Starts:
    """The starts of one node."""

    def __init__(
        self,
        loop: Loop,
        timings: Timings,
        agent: Agent,
        memory: Memory,
        statuses: Statuses,
        ends: Ends,
        shells: SimShells,
        changed: set[str],
    ) -> None:
        """`changed` gets the replicas that have a process now."""
        self.failing: dict[str, str] = {}  # model -> exit kind of its next starts
        self._loop = loop
        self._timings = timings
        self._agent = agent
        self._memory = memory
        self._statuses = statuses
        self._ends = ends
        self._shells = shells
        self._changed = changed

    def begin(self, replica_id: str) -> None:
        """Start the engine of a replica that the core knows."""
        command = self._agent.core.replicas[replica_id].command
        engine = self._memory.begin(command, self._statuses.requests_changed)
        engine.rung = self._memory.files.rung(command.spec.source)
        began = self._loop.now
        phases: dict[str, float] = {}

        def on_disk() -> None:
            if engine.alive:
                if engine.rung == "remote":
                    phases["pull"] = self._loop.now - began
                self._fork(replica_id, engine, phases)

        self._memory.fetch(command.spec, on_disk)

    def _fork(self, replica_id: str, engine: SimEngine, phases: dict[str, float]) -> None:
        spec = engine.command.spec
        rest = self._timings.start_s(spec)
        engine.process = True
        slower = self._slower(engine)
        first = {name: slower * rest.pop(name) for name in _BEFORE_WEIGHTS if name in rest}
        phases.update(first)
        self._changed.add(replica_id)
        if kind := self.failing.get(spec.name):
            self._loop.after(sum(first.values()), self._fails, replica_id, engine, kind)
            return
        self._loop.after(sum(first.values()), self._load, replica_id, engine, phases, rest)

    def _slower(self, engine: SimEngine) -> float:
        """How many times as long its next phases take: beside another start they take longer."""
        company = any(
            other is not engine and other.alive and other.process and not other.listens
            and not set(other.command.device_ids).isdisjoint(engine.command.device_ids)
            for other in self._memory.engines.values()
        )  # fmt: skip
        return p.BESIDE if company else 1.0

    def _fails(self, replica_id: str, engine: SimEngine, kind: str) -> None:
        if self._memory.is_there(replica_id, engine):
            engine.die()
            self._ends.exited(replica_id, kind, "it was told to fail")

    def _load(
        self, replica_id: str, engine: SimEngine, phases: dict[str, float], rest: dict[str, float]
    ) -> None:
        if not engine.alive:
            return
        began = self._loop.now
        self._memory.hold(replica_id, engine, engine.command.device_bytes)

        def loaded() -> None:
            if engine.alive:
                phases["weights"] = self._loop.now - began
                slower = self._slower(engine)
                phases.update({name: slower * seconds for name, seconds in rest.items()})
                left_s = slower * sum(rest.values()) + HEALTH_S
                self._loop.after(left_s, self._started, replica_id, engine, phases)

        self._memory.read_weights(replica_id, engine, engine.rung, loaded)

    def _started(self, replica_id: str, engine: SimEngine, phases: dict[str, float]) -> None:
        if not engine.alive:
            return
        engine.listens = True
        now = self._loop.now
        self._agent.apply(m.HealthChanged(now=now, replica_id=replica_id, healthy=True))
        r = self._agent.core.replicas.get(replica_id)
        if r is None or r.phase != "ready":
            return
        checked = r.rungs or self._shells.key(engine.command)
        canary_s = self._timings.canary_s(engine.command.spec) if checked else 0.0
        if checked:
            phases["canary"] = canary_s
        self._loop.after(canary_s, self._tell_phases, replica_id, engine, phases)

    def _tell_phases(self, replica_id: str, engine: SimEngine, phases: dict[str, float]) -> None:
        if engine.alive and self._agent.up:
            self._shells.learn(engine.command)
            rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
            self._agent.apply(
                m.PhasesSeen(now=self._loop.now, replica_id=replica_id, phases=rounded)
            )
