"""What a simulated node tells: its heartbeats' reports, and its core how its engines do. Pure.

Rules this file keeps:
- a report is made again only where something happened to its replica: else only its ages grow;
- a status is told where it changed, or where a drain asks for it again.
"""

from __future__ import annotations

from msgspec.structs import replace

from agent.core import messages as m
from agent.core.periods import DRAIN_PROBE_S
from agent.core.replica import launch_name
from agent.core.replica import report as report_of
from agent.core.state_machine import AgentCore
from agent.sim.agent import Agent
from agent.sim.engine import SimEngine
from agent.sim.memory import Memory
from agent.sim.shells import SimShells
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.wire.agent_messages import ReplicaReport

VERSIONS = {"vllm": "0.32.0", "stub": "1"}  # of the engines it says it has
_START_RUNGS = ("staged", "cached", "remote")


class Statuses:
    """The requests of a node's engines, as the core is told of them."""

    def __init__(self, loop: Loop, agent: Agent, memory: Memory) -> None:
        self._loop = loop
        self._agent = agent
        self._memory = memory
        self._told: dict[str, tuple[SimEngine, int, float | None]] = {}

    def forget(self) -> None:
        """Tell all of them again: another agent process asks."""
        self._told = {}

    def tell_all(self) -> None:
        """Tell the core what changed."""
        for replica_id, engine in list(self._memory.engines.items()):
            self._tell(replica_id, engine)

    def drain_began(self, replica_id: str) -> None:
        """Look at a replica's requests soon."""
        self._loop.after(DRAIN_PROBE_S / 10, self._look, replica_id, self._agent.core)

    def requests_changed(self, engine: SimEngine) -> None:
        """A request of it began or ended."""
        if engine.in_flight:
            return
        replica_id = engine.command.replica_id
        r = self._agent.core.replicas.get(replica_id)
        if r is not None and r.phase == "draining":
            self._loop.after(DRAIN_PROBE_S, self._look, replica_id, self._agent.core)

    def _look(self, replica_id: str, core: AgentCore) -> None:
        engine = self._memory.engines.get(replica_id)
        if self._agent.asks(core) and engine is not None and engine.listens:
            self._tell(replica_id, engine, again=True)

    def _tell(self, replica_id: str, engine: SimEngine, again: bool = False) -> None:
        """What a probe would find, where that changed."""
        if not engine.listens:
            return
        now = self._loop.now
        status = (engine, engine.in_flight, engine.last_end)
        if not again and self._told.get(replica_id) == status:
            return
        self._told[replica_id] = status
        idle = None if engine.last_end is None else now - engine.last_end
        self._agent.apply(
            m.StatusSeen(
                now=now, replica_id=replica_id, in_flight=engine.in_flight,
                idle_for_s=0.0 if engine.in_flight else idle,
            )
        )  # fmt: skip


class Reports:
    """The reports of a node's replicas, as heartbeats tell them."""

    def __init__(
        self, node_id: str, agent: Agent, memory: Memory, shells: SimShells, changed: set[str]
    ) -> None:
        """`changed`: the replicas that something happened to since they were reported."""
        self._node_id = node_id
        self._agent = agent
        self._memory = memory
        self._shells = shells
        self._changed = changed
        self._made: dict[str, tuple[ReplicaReport, float]] = {}  # and when

    def all(self, now: float) -> tuple[ReplicaReport, ...]:
        """Every replica's report. Where nothing happened to one since, only the ages differ."""
        made, core = self._made, self._agent.core
        for replica_id in self._changed:
            made.pop(replica_id, None)
        self._changed.clear()
        for replica_id, r in core.replicas.items():
            if replica_id not in made:
                disabled = core.disabled.get(launch_name(r.command.spec), {})
                made[replica_id] = (self._report(report_of(r, disabled, now)), now)
        return tuple(_older(*made[replica_id], now) for replica_id in core.replicas)

    def _report(self, report: ReplicaReport) -> ReplicaReport:
        engine = self._memory.engines.get(report.replica_id)
        if engine is None or not engine.process or report.phase in ("backoff", "failed"):
            return report
        return replace(
            report,
            base_url=f"http://{self._node_id}/{report.replica_id}",
            key="k",
            memory_used_bytes=engine.held * len(report.device_ids),
            host_bytes=p.PROCESS_BYTES + engine.offloaded,
            engine_version=VERSIONS["vllm"],
            engine_waiting=engine.waiting,
            shell_key=self._shells.key(engine.command),
            started_from=engine.rung if engine.rung in _START_RUNGS else report.started_from,
        )


def _older(report: ReplicaReport, made_at: float, now: float) -> ReplicaReport:
    """As agent.core.replica.report would make it now."""
    age_s = now - made_at
    idle = report.idle_for_s
    if idle is not None and report.in_flight == 0:
        idle += age_s
    return replace(report, phase_age_s=report.phase_age_s + age_s, idle_for_s=idle)
