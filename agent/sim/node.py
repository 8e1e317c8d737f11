"""A simulated node: the production agent core over engines and devices that are modelled. Pure.

It does what agent/node.py does, and here the world happens to it: it is lost, crashed, restarted.

Rules this file keeps:
- what decides is AgentCore itself; the parts here do only what its driver and the world do;
- what costs time is an entry of the loop;
- the truth (phases, memory held, requests cut off) goes to the observer as it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from agent.core import messages as m
from agent.core.state_machine import AgentCore
from agent.sim.agent import Agent
from agent.sim.ends import Ends
from agent.sim.engine import Answer, SimEngine
from agent.sim.memory import Memory
from agent.sim.reports import VERSIONS, Reports, Statuses
from agent.sim.shells import SimShells
from agent.sim.sleeps import Sleeps
from agent.sim.starts import Starts
from runtime.sim.loop import Loop
from runtime.sim.observer import Job, Observer
from runtime.sim.timings import Timings
from runtime.wire.agent_messages import AgentCommand, CommandReply, DeviceReport, Heartbeat


@dataclass
class NodeSpec:
    """What a simulated node is made of."""

    node_id: str
    devices: int = 8
    rungs: tuple[int, ...] = (1, 2)
    labels: dict[str, str] = field(default_factory=dict)
    preemptible: bool = False
    check: bool = True  # validate the core's state after each event


class SimNode:
    """One node. `poke` is called when a heartbeat should be sent at once."""

    def __init__(
        self,
        loop: Loop,
        spec: NodeSpec,
        timings: Timings,
        observer: Observer,
        poke: Callable[[SimNode], object],
    ) -> None:
        self.node_id = spec.node_id
        self.spec = spec
        self.timings = timings
        self.boot_id = 1
        self.preempted_at: float | None = None
        self._silent = False  # it vanished, and whoever calls hears nothing
        self._loop = loop
        self._observer = observer
        self._poke = poke
        self._seq = 0
        self._records: dict[str, m.Saved] = {}
        self._phases: dict[str, str] = {}
        self._obeyed = 0  # the highest epoch ever obeyed or seen
        self._unhealthy: dict[str, str] = {}
        changed: set[str] = set()  # replicas that something happened to since they were reported
        self._agent = agent = Agent(
            loop, spec.rungs, check=spec.check, changed=changed, execute=self._execute
        )
        self._memory = memory = Memory(loop, spec.node_id, spec.devices, timings, observer, changed)
        self._files = memory.files
        self._statuses = Statuses(loop, agent, memory)
        self._ends = Ends(loop, spec.node_id, agent, memory, observer)
        self._sleeps = sleeps = Sleeps(loop, timings, agent, memory)
        self._shells = SimShells(loop, timings, agent, memory, sleeps.bad_canary)
        self._reports = Reports(spec.node_id, agent, memory, self._shells, changed)
        self._starts = Starts(
            loop, timings, agent, memory, self._statuses, self._ends, self._shells, changed
        )

    @property
    def up(self) -> bool:
        """Whether its agent runs."""
        return self._agent.up

    @property
    def core(self) -> AgentCore:
        """The core of the agent that runs, or ran last."""
        return self._agent.core

    @property
    def devices(self) -> tuple[str, ...]:
        """The ids of its devices."""
        return tuple(self._memory.devices)

    @property
    def failing(self) -> dict[str, str]:
        """Model -> exit kind of its next starts."""
        return self._starts.failing

    @property
    def bad_canary(self) -> set[str]:
        """Models whose next wake fails."""
        return self._sleeps.bad_canary

    def replicas(self) -> tuple[str, ...]:
        """Ids of those its agent knows."""
        return tuple(self.core.replicas)

    # -------------------------------------------------------------------- what it is asked

    def command(self, command: AgentCommand) -> CommandReply | None:
        """Obey; None: it came from an older leader (HTTP 409)."""
        effects = self._agent.apply(m.CommandReceived(now=self._loop.now, command=command))
        refused = next((e for e in effects if isinstance(e, m.CommandRefused)), None)
        if refused is not None and refused.stale:
            return None
        if command.epoch < self._obeyed:
            words = f"{self.node_id} obeyed epoch {command.epoch} after {self._obeyed}"
            self._observer.violated(words)
        self._obeyed = max(self._obeyed, command.epoch)
        return CommandReply(
            ok=refused is None,
            boot_id=self.boot_id,
            seq=self._seq + 1,
            error=refused.error if refused else None,
        )

    def see_term(self, term: int) -> bool:
        """A scheduler answered a heartbeat; False: it leads no more."""
        if term < self.core.epoch:
            return False
        self._obeyed = max(self._obeyed, term)
        if term > self.core.epoch:
            self._agent.apply(m.TermSeen(now=self._loop.now, term=term))
        return True

    def heartbeat(self) -> Heartbeat:
        """The node's whole truth now."""
        now = self._loop.now
        self._statuses.tell_all()
        self._seq += 1
        memory_bytes = self.timings.host.memory_bytes
        left = None if self.preempted_at is None else max(0.0, self.preempted_at - now)
        return Heartbeat(
            node_id=self.node_id,
            boot_id=self.boot_id,
            seq=self._seq,
            address=f"http://{self.node_id}",
            devices=self._device_reports(),
            replicas=self._reports.all(now),
            host_memory_total_bytes=memory_bytes,
            host_memory_available_bytes=max(0, memory_bytes - self._memory.host_held()),
            host_budget_bytes=self._memory.host_budget(),
            cached=self._files.cached(),
            staged=tuple(self._files.staged),
            preemptible=self.spec.preemptible,
            preempted_in_s=left,
            engines=dict(VERSIONS),
            labels=self.spec.labels,
            draining=self.core.shutting_down,
            shells=self._shells.told(),
        )

    def _device_reports(self) -> tuple[DeviceReport, ...]:
        return tuple(
            replace(
                device,
                memory_used_bytes=self._memory.used[device_id],
                healthy=device_id not in self._unhealthy,
                unhealthy_reason=self._unhealthy.get(device_id),
            )
            for device_id, device in self._memory.devices.items()
        )

    def submit(self, replica_id: str, job: Job) -> Answer:
        """A router sends a request to one of its engines."""
        if self._silent:
            return "silent"
        engine = self._memory.engines.get(replica_id)
        return engine.submit(job) if engine is not None and self.up else "refused"

    def drop(self, replica_id: str, job: Job) -> None:
        """Forget a request whose caller hung up."""
        if engine := self._memory.engines.get(replica_id):
            engine.drop(job)

    # -------------------------------------------------------------------- what happens to it

    def lose(self) -> None:
        """Turn the node off, or cut it off for good: its engines die with it."""
        self._agent.end()
        for replica_id, engine in list(self._memory.engines.items()):
            self._memory.end(replica_id, engine)
        for replica_id in list(self._phases):
            self._over(replica_id)
        self._files.reboot()

    def vanish(self) -> None:
        """Lose power or link without a word to those who are connected."""
        self._silent = True
        for engine in self._memory.engines.values():
            engine.fall_silent()
        self.lose()

    def restart_agent(self) -> None:
        """A new agent process on a node that is up (engines survive) or was lost (they are dead).

        It finds the records of the old one, as agent/lifecycle/adoption.py does.
        """
        self._silent = False
        self.boot_id += 1
        self._seq = 0
        self.preempted_at = None
        self._statuses.forget()
        self._agent.restart()
        # Those at work first: until the others are known, the core would begin with the first.
        for replica_id, saved in sorted(
            self._records.items(), key=lambda item: item[1].phase != "starting"
        ):
            self._adopt(replica_id, saved)
        self._poke(self)

    def _adopt(self, replica_id: str, saved: m.Saved) -> None:
        engine: SimEngine | None = self._memory.engines.get(replica_id)
        if engine is not None and not engine.process:
            self._memory.end(replica_id, engine)  # the old agent still fetched its files
            engine = None
        if engine is None and saved.phase == "starting":
            saved = replace(saved, phase="backoff")
        alive = engine is not None and engine.alive
        self._agent.apply(
            m.Adopted(
                now=self._loop.now, saved=saved, alive=alive,
                healthy=alive and engine is not None and engine.listens,
                sleeping=engine.asleep if engine is not None and alive else None,
                residue_bytes=engine.held if engine else 0,
            )
        )  # fmt: skip

    def crash(self, replica_id: str, kind: str = "crash") -> None:
        """One engine's process dies."""
        self._ends.crash(replica_id, kind)

    def fault(self, device_id: str, reason: str | None) -> None:
        """A device shows an error (None: no more): its engines die."""
        if reason is None:
            self._unhealthy.pop(device_id, None)
        else:
            self._unhealthy[device_id] = reason
            for replica_id, engine in list(self._memory.engines.items()):
                if device_id in engine.command.device_ids:
                    self.crash(replica_id, "device_fault")
        self._poke(self)

    def set_disk_rate(self, rate: float) -> None:
        """Bytes per second from now on."""
        self._files.disk_pipe.set_rate(rate)

    def has_on_disk(self, source: str, size: int) -> None:
        """Put a model on the disk that came by another way."""
        self._files.add(source, size)

    # -------------------------------------------------------------------- what its agent does

    def _execute(self, effect: m.Effect) -> None:
        match effect:
            case m.Spawn(replica_id):
                self._starts.begin(replica_id)
            case m.Signal(replica_id, "TERM"):
                self._ends.terminate(replica_id)
            case m.Signal(replica_id):
                self._ends.kill(replica_id)
            case m.SleepEngine(replica_id, level):
                self._sleeps.sleep(replica_id, level)
            case m.WakeEngine(replica_id, level):
                self._sleeps.wake(replica_id, level)
            case m.RepointEngine(replica_id, level):
                self._shells.repoint(replica_id, level)
            case m.StageWeights(models):
                wish = [(s.source, s.bytes) for s in models]
                self._files.stage(wish, lambda: self._poke(self))
                self._memory.check_host()
            case m.SaveRecord(replica_id):
                if replica_id in self.core.replicas:
                    self._records[replica_id] = self.core.saved(replica_id)
                    self._phase_seen(replica_id)
            case m.ForgetRecord(replica_id):
                self._over(replica_id)
                self._records.pop(replica_id, None)
            case m.SendHeartbeatNow():
                self._poke(self)

    def _phase_seen(self, replica_id: str) -> None:
        """Tell the observer of a replica's phase, where it changed."""
        r = self.core.replicas[replica_id]
        if self._phases.get(replica_id) == r.phase:
            return
        self._phases[replica_id] = r.phase
        engine = self._memory.engines.get(replica_id)
        level = r.sleep.level if r.sleep else 0
        rung = engine.rung if engine else ""
        self._observer.phase_changed(self.node_id, r.command, r.phase, level, rung)
        if r.phase == "draining":
            self._statuses.drain_began(replica_id)

    def _over(self, replica_id: str) -> None:
        """Tell the observer that a replica is no more."""
        if self._phases.pop(replica_id, None) is not None:
            command = self._records[replica_id].command
            self._observer.phase_changed(self.node_id, command, None, 0, "")
