"""A node of the mind: the production agent core over engines and devices that are modelled. Pure.

Rules this file keeps:
- the core is AgentCore itself; here is only what its driver (agent/node.py) and the world do;
- what costs time is an entry of the loop; an outcome that was overtaken (the engine died) is
  dropped by looking at the engine it was for;
- ticks that can change nothing are left out: `_due_at` says when one can (docs/simulator.md);
- the truth (memory held, requests cut off) goes to the witness as it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from agent.core import messages as m
from agent.core.replica import Replica, launch_name
from agent.core.replica import report as report_of
from agent.core.state_machine import HUNG_S, SLEEP_S, STATUS_S, WAKE_S, AgentCore
from agent.sim.engine import Answer, Engine
from agent.sim.files import Files
from runtime.sim import profile as p
from runtime.sim.loop import Loop
from runtime.sim.observer import Job, Witness
from runtime.sim.pipe import Pipe, Transfer
from runtime.sim.timings import Timings
from runtime.wire.agent_messages import (
    AgentCommand,
    CommandReply,
    DeviceReport,
    Heartbeat,
    ReplicaReport,
)
from runtime.wire.model_spec import ModelSpec

TICK_S = 0.1  # agent/driver.py
LOOK_S = 0.1  # how long a drained engine's last answer goes unseen (agent/engines/probe.py)
HEALTH_S = 0.05  # how long a start's end goes unseen, on average (agent/engines/probe.py)
START_TIMEOUT_S, MAX_RESTARTS = 600.0, 3  # runtime/contract/config.py


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
        witness: Witness,
        poke: Callable[[SimNode], object],
    ) -> None:
        self.node_id = spec.node_id
        self.spec = spec
        self.timings = timings
        self.up = True
        self._silent = False  # it vanished, and whoever calls hears nothing
        self.boot_id = 1
        self.preempted_at: float | None = None
        self.engines: dict[str, Engine] = {}
        self.files = Files(loop, timings.host, self._host_held, self._needed)
        self.failing: dict[str, str] = {}  # model -> exit kind of its next starts
        self.bad_canary: set[str] = set()  # models whose next wake fails
        self._loop = loop
        self._witness = witness
        self._poke = poke
        self._seq = 0
        self._records: dict[str, m.Saved] = {}
        self._phases: dict[str, str] = {}
        self._told: dict[str, tuple[ReplicaReport, float]] = {}  # and when
        self._moves: dict[str, list[tuple[Pipe, Transfer]]] = {}
        self._status: dict[str, tuple[int, float | None]] = {}
        self._tick_at = math.inf
        self._obeyed = 0  # the highest epoch ever obeyed or seen
        self._unhealthy: dict[str, str] = {}
        total = timings.gpu.memory_bytes
        self._devices = {
            f"{spec.node_id}-gpu{i}": DeviceReport(
                device_id=f"{spec.node_id}-gpu{i}", index=i, kind="nvml", name=timings.gpu.name,
                memory_total_bytes=total, memory_used_bytes=0,
                compute_capability=timings.gpu.compute_capability,
                nvlink_peers=tuple(
                    f"{spec.node_id}-gpu{j}" for j in range(spec.devices) if j != i
                ),
            )
            for i in range(spec.devices)
        }  # fmt: skip
        self._used = dict.fromkeys(self._devices, 0)
        self.core = self._new_core(0, {})

    # -------------------------------------------------------------------- what it is asked

    def command(self, command: AgentCommand) -> CommandReply | None:
        """Obey; None: it came from an older leader (HTTP 409)."""
        effects = self._apply(m.CommandReceived(now=self._loop.now, command=command))
        refused = next((e for e in effects if isinstance(e, m.Refused)), None)
        if refused is not None and refused.stale:
            return None
        if command.epoch < self._obeyed:
            words = f"{self.node_id} obeyed epoch {command.epoch} after {self._obeyed}"
            self._witness.violated(words)
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
            self._apply(m.TermSeen(now=self._loop.now, term=term))
        return True

    def heartbeat(self) -> Heartbeat:
        """The node's whole truth now."""
        now = self._loop.now
        for replica_id, engine in list(self.engines.items()):
            self._tell_status(replica_id, engine)
        self._seq += 1
        host = self.timings.host
        held = self._host_held()
        left = None if self.preempted_at is None else max(0.0, self.preempted_at - now)
        return Heartbeat(
            node_id=self.node_id,
            boot_id=self.boot_id,
            seq=self._seq,
            address=f"http://{self.node_id}",
            devices=tuple(
                replace(
                    device,
                    memory_used_bytes=self._used[device_id],
                    healthy=device_id not in self._unhealthy,
                    unhealthy_reason=self._unhealthy.get(device_id),
                )
                for device_id, device in self._devices.items()
            ),
            replicas=self._reports(now),
            host_memory_total_bytes=host.memory_bytes,
            host_memory_available_bytes=max(0, host.memory_bytes - held),
            host_budget_bytes=int(host.memory_bytes * host.budget_share),
            cached=self.files.cached(),
            staged=tuple(self.files.staged),
            preemptible=self.spec.preemptible,
            preempted_in_s=left,
            engines={"vllm": "0.32.0", "stub": "1"},
            labels=self.spec.labels,
            draining=self.core.shutting_down,
        )

    def submit(self, replica_id: str, job: Job) -> Answer:
        """A router sends a request to one of its engines."""
        if self._silent:
            return "silent"
        engine = self.engines.get(replica_id)
        return engine.submit(job) if engine is not None and self.up else "refused"

    def drop(self, replica_id: str, job: Job) -> None:
        """Its caller hung up."""
        if engine := self.engines.get(replica_id):
            engine.drop(job)

    # -------------------------------------------------------------------- what befalls it

    def lose(self) -> None:
        """It is off, or cut off for good: its engines die with it."""
        self.up = False
        for replica_id, engine in list(self.engines.items()):
            self._end_engine(replica_id, engine)
        for replica_id in list(self._phases):
            self._over(replica_id)
        self.files.reboot()
        self._tick_at = math.inf

    def vanish(self) -> None:
        """It loses its power or its link without a word to those who are connected."""
        self._silent = True
        for engine in self.engines.values():
            engine.fall_silent()
        self.lose()

    def restart_agent(self) -> None:
        """A new agent process on a node that is up (engines survive) or was lost (they are dead).

        It finds the records of the old one, as agent/node.py does.
        """
        self.up, self._silent = True, False
        self.boot_id += 1
        self._seq = 0
        self.preempted_at = None
        self._status = {}
        epoch, disabled = self.core.epoch, self.core.disabled
        self.core = self._new_core(epoch, disabled)
        # Those at work first: until the others are known, the core would begin with the first.
        order = sorted(self._records.items(), key=lambda item: item[1].phase != "starting")
        for replica_id, saved in order:
            engine = self.engines.get(replica_id)
            if engine is not None and not engine.process:
                self._end_engine(replica_id, engine)  # the old agent still fetched its files
                engine = None
            alive = engine is not None and engine.alive
            if engine is None and saved.phase == "starting":
                saved = replace(saved, phase="backoff")
            self._apply(
                m.Adopted(
                    now=self._loop.now, saved=saved, alive=alive,
                    healthy=alive and engine is not None and engine.listens,
                    sleeping=engine.asleep if engine is not None and alive else None,
                    residue_bytes=engine.held if engine else 0,
                )
            )  # fmt: skip
        self._poke(self)

    def crash(self, replica_id: str, kind: str = "crash") -> None:
        """One engine's process dies."""
        engine = self.engines.get(replica_id)
        if engine is None or not engine.alive:
            return
        engine.die()
        self._cancel_moves(replica_id)
        self._exited(replica_id, engine, kind, "it died in the simulation")

    def fault(self, device_id: str, reason: str | None) -> None:
        """A device shows an error (None: no more): its engines die."""
        if reason is None:
            self._unhealthy.pop(device_id, None)
        else:
            self._unhealthy[device_id] = reason
            for replica_id, engine in list(self.engines.items()):
                if device_id in engine.command.device_ids:
                    self.crash(replica_id, "device_fault")
        self._poke(self)

    def set_disk_rate(self, rate: float) -> None:
        """Bytes per second from now on."""
        self.files.disk_pipe.set_rate(rate)

    def has_on_disk(self, source: str, size: int) -> None:
        """Its files came by another way."""
        self.files.add(source, size)

    def replicas(self) -> tuple[str, ...]:
        """Ids of those its agent knows."""
        return tuple(self.core.replicas)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._devices)

    # -------------------------------------------------------------------- the core's hands

    def _new_core(self, epoch: int, disabled: dict[str, dict[str, str]]) -> AgentCore:
        return AgentCore(
            start_timeout_s=START_TIMEOUT_S, max_restarts=MAX_RESTARTS, epoch=epoch,
            rungs=lambda spec: () if spec.sleep == "off" else self.spec.rungs,
            disabled=disabled,
        )  # fmt: skip

    def _apply(self, event: m.Event) -> list[m.Effect]:
        effects = self.core.handle(event)
        self._forget_told(event, effects)
        for effect in effects:
            self._execute(effect)
        if self.spec.check:
            self.core.validate_state()
        if effects or not isinstance(event, m.StatusSeen):
            self._arm()
        return effects

    def _forget_told(self, event: m.Event, effects: list[m.Effect]) -> None:
        """What was told of replicas that the event may have changed is told anew."""
        replica_id = getattr(event, "replica_id", None)
        if replica_id is None:
            self._told.clear()
        else:
            self._told.pop(replica_id, None)
        for effect in effects:  # e.g. another one's turn has come
            if (other_id := getattr(effect, "replica_id", None)) is not None:
                self._told.pop(other_id, None)

    def _execute(self, effect: m.Effect) -> None:
        match effect:
            case m.Spawn(replica_id):
                self._spawn(replica_id)
            case m.Signal(replica_id, "TERM"):
                self._term(replica_id)
            case m.Signal(replica_id):
                self._kill(replica_id)
            case m.SleepEngine(replica_id, level):
                self._sleep(replica_id, level)
            case m.WakeEngine(replica_id, level):
                self._wake(replica_id, level)
            case m.Stage(models):
                wish = [(s.source, s.bytes) for s in models]
                self.files.stage(wish, lambda: self._poke(self))
                self._check_host()
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
        r = self.core.replicas[replica_id]
        if self._phases.get(replica_id) == r.phase:
            return
        self._phases[replica_id] = r.phase
        engine = self.engines.get(replica_id)
        level = r.sleep.level if r.sleep else 0
        rung = engine.rung if engine else ""
        self._witness.phase_changed(self.node_id, r.command, r.phase, level, rung)
        if r.phase == "draining":
            self._loop.after(LOOK_S / 10, self._look, replica_id, self.core)

    def _over(self, replica_id: str) -> None:
        if self._phases.pop(replica_id, None) is not None:
            command = self._records[replica_id].command
            self._witness.phase_changed(self.node_id, command, None, 0, "")

    def _arm(self) -> None:
        due = self._due_at()
        if due < self._tick_at:
            self._tick_at = due
            self._loop.at(due, self._tick, due)

    def _tick(self, due: float) -> None:
        if due == self._tick_at and self.up:
            self._tick_at = math.inf
            self._apply(m.Tick(now=self._loop.now))

    def _due_at(self) -> float:
        """The first tick that may change something: on the driver's grid, after a deadline."""
        now = self._loop.now
        due = min((_deadline(r, now) for r in self.core.replicas.values()), default=math.inf)
        if due == math.inf:
            return due
        return (math.floor(max(due, now) / TICK_S) + 1) * TICK_S

    # -------------------------------------------------------------------- starts

    def _spawn(self, replica_id: str) -> None:
        command = self.core.replicas[replica_id].command
        engine = Engine(self._loop, self.timings, command, self._requests_changed)
        self.engines[replica_id] = engine
        self._moves[replica_id] = []
        spec = command.spec
        source, size = spec.source, self.timings.of(spec).weights_bytes
        engine.rung = self.files.rung(source)
        began = self._loop.now
        phases: dict[str, float] = {}

        def on_disk() -> None:
            if engine.alive:
                if engine.rung == "remote":
                    phases["pull"] = self._loop.now - began
                self._fork(replica_id, engine, phases)

        self.files.fetch(source, size, on_disk)

    def _fork(self, replica_id: str, engine: Engine, phases: dict[str, float]) -> None:
        spec = engine.command.spec
        rest = self.timings.start_s(spec)
        first = {name: rest.pop(name) for name in _BEFORE_WEIGHTS if name in rest}
        phases.update(first)
        engine.process = True
        self._told.pop(replica_id, None)
        if kind := self.failing.get(spec.name):
            self._loop.after(sum(first.values()), self._start_fails, replica_id, engine, kind)
            return
        self._loop.after(sum(first.values()), self._load, replica_id, engine, phases, rest)

    def _start_fails(self, replica_id: str, engine: Engine, kind: str) -> None:
        if engine.alive and self.engines.get(replica_id) is engine:
            engine.die()
            self._exited(replica_id, engine, kind, "it was told to fail")

    def _load(
        self, replica_id: str, engine: Engine, phases: dict[str, float], rest: dict[str, float]
    ) -> None:
        if not engine.alive:
            return
        spec = engine.command.spec
        began = self._loop.now
        self._hold(replica_id, engine, engine.command.device_bytes)

        def loaded() -> None:
            if engine.alive:
                phases["weights"] = self._loop.now - began
                phases.update(rest)
                self._loop.after(
                    sum(rest.values()) + HEALTH_S, self._started, replica_id, engine, phases
                )

        self._weights(replica_id, engine, spec, engine.rung, loaded)

    def _weights(
        self, replica_id: str, engine: Engine, spec: ModelSpec, rung: str,
        done: Callable[[], object],
    ) -> None:  # fmt: skip
        """Read the weights onto the devices, through the page cache; both go on at once."""
        size = self.timings.of(spec).weights_bytes
        measured = self.timings.weights_s(spec, rung)
        if measured is not None:
            self.files.touch(spec.source, size)
            self._loop.after(measured, done)
            return
        copied_at = self._loop.now + self.timings.copy_s(spec)
        self._moving(
            replica_id,
            self.files.read(spec.source, size, lambda: self._loop.at(copied_at, done)),
        )

    def _started(self, replica_id: str, engine: Engine, phases: dict[str, float]) -> None:
        if not engine.alive:
            return
        engine.listens = True
        now = self._loop.now
        self._apply(m.HealthChanged(now=now, replica_id=replica_id, healthy=True))
        r = self.core.replicas.get(replica_id)
        if r is None or r.phase != "ready":
            return
        canary_s = self.timings.canary_s(engine.command.spec) if r.rungs else 0.0
        if r.rungs:
            phases["canary"] = canary_s
        self._loop.after(canary_s, self._tell_phases, replica_id, engine, phases)

    def _tell_phases(self, replica_id: str, engine: Engine, phases: dict[str, float]) -> None:
        if engine.alive and self.up:
            rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
            self._apply(m.PhasesSeen(now=self._loop.now, replica_id=replica_id, phases=rounded))

    # -------------------------------------------------------------------- sleep and wake

    def _sleep(self, replica_id: str, level: int) -> None:
        engine = self.engines[replica_id]
        if engine.in_flight:
            words = f"{engine.in_flight} requests came in at the last moment"
            self._loop.after(0.0, self._slept, replica_id, engine, self.core, words)
            return
        engine.open, engine.asleep = False, True
        if level == 1:
            engine.offloaded = self.timings.of(engine.command.spec).weights_bytes
            self._check_host()
        seconds = self.timings.sleep_s(engine.command.spec, level)
        self._loop.after(seconds, self._slept, replica_id, engine, self.core, None)

    def _slept(self, replica_id: str, engine: Engine, core: AgentCore, error: str | None) -> None:
        if not engine.alive:
            return
        residue = self.timings.residue_bytes(engine.command.spec, engine.command.device_bytes)
        if error is None:
            self._hold(replica_id, engine, residue)
        if core is not self.core:
            return  # the agent that waited for it is gone
        self._apply(
            m.SleepEnded(
                now=self._loop.now, replica_id=replica_id, error=error,
                untouched=error is not None, residue_bytes=0 if error else residue,
            )
        )  # fmt: skip

    def _wake(self, replica_id: str, level: int) -> None:
        engine = self.engines[replica_id]
        spec = engine.command.spec
        engine.rung = f"asleep-{level}"
        core = self.core
        if not engine.asleep:  # woken half-way by an earlier agent: only its canary is to pass
            phases = {"canary": p.CANARY_S}
            self._loop.after(p.CANARY_S, self._woken, replica_id, engine, core, phases)
            return
        self._hold(replica_id, engine, engine.command.device_bytes)
        known = self.timings.wake_s(spec, level)
        if known is not None:
            phases = known
            self._loop.after(sum(phases.values()), self._woken, replica_id, engine, core, phases)
            return
        began = self._loop.now

        def loaded() -> None:
            phases = {"reload": self._loop.now - began, "wake": p.WAKE_S, "canary": p.CANARY_S}
            wait_s = p.WAKE_S + p.CANARY_S
            self._loop.after(wait_s, self._woken, replica_id, engine, core, phases)

        size = self.timings.of(spec).weights_bytes

        def on_disk() -> None:
            if engine.alive:
                self._weights(replica_id, engine, spec, "cached", loaded)

        self.files.fetch(spec.source, size, on_disk)  # the disk may have forgotten it meanwhile

    def _woken(
        self, replica_id: str, engine: Engine, core: AgentCore, phases: dict[str, float]
    ) -> None:
        if not engine.alive:
            return
        engine.asleep, engine.offloaded = False, 0
        if core is not self.core:
            return  # the agent that would open its door is gone
        error = None
        if engine.command.spec.name in self.bad_canary:
            self.bad_canary.discard(engine.command.spec.name)
            error = "its canary failed: another token than before it slept"
        else:
            engine.open = True
        rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
        self._apply(
            m.WakeEnded(
                now=self._loop.now, replica_id=replica_id, error=error,
                phases={} if error else rounded,
            )
        )  # fmt: skip

    # -------------------------------------------------------------------- ends

    def _term(self, replica_id: str) -> None:
        engine = self.engines[replica_id]
        if engine.in_flight:
            r = self.core.replicas[replica_id]
            why = r.stop.cause if r.stop else ""
            self._witness.cut_off(self.node_id, replica_id, engine.in_flight, why)
        engine.listens = False
        self._loop.after(p.TERM_S, self._termed, replica_id, engine)

    def _termed(self, replica_id: str, engine: Engine) -> None:
        if engine.alive:
            engine.die()
            self._cancel_moves(replica_id)
            self._exited(replica_id, engine, "stopped", "it ended as it was told")

    def _kill(self, replica_id: str) -> None:
        engine = self.engines.get(replica_id)
        if engine is not None:
            if engine.in_flight and engine.alive:
                r = self.core.replicas[replica_id]
                if r.stop is not None:
                    self._witness.cut_off(self.node_id, replica_id, engine.in_flight, r.stop.cause)
            engine.die()
            self._cancel_moves(replica_id)
        self._loop.after(p.REAP_S, self._gone, replica_id, engine, self.core)

    def _gone(self, replica_id: str, engine: Engine | None, core: AgentCore) -> None:
        if not self.up or core is not self.core:
            return
        if engine is not None and self.engines.get(replica_id) is engine:
            self._end_engine(replica_id, engine)
        self._apply(m.Gone(now=self._loop.now, replica_id=replica_id))

    def _end_engine(self, replica_id: str, engine: Engine) -> None:
        engine.die()
        self._cancel_moves(replica_id)
        self._hold(replica_id, engine, 0)
        engine.offloaded = 0
        self.engines.pop(replica_id, None)
        self._status.pop(replica_id, None)

    def _exited(self, replica_id: str, engine: Engine, kind: str, words: str) -> None:
        if self.up and replica_id in self.core.replicas:
            exited = m.ProcessExited(
                now=self._loop.now, replica_id=replica_id, kind=kind, words=words
            )
            self._apply(exited)

    # -------------------------------------------------------------------- looking

    def _requests_changed(self, engine: Engine) -> None:
        if engine.in_flight:
            return
        replica_id = engine.command.replica_id
        r = self.core.replicas.get(replica_id)
        if r is not None and r.phase == "draining":
            self._loop.after(LOOK_S, self._look, replica_id, self.core)

    def _look(self, replica_id: str, core: AgentCore) -> None:
        engine = self.engines.get(replica_id)
        if self.up and core is self.core and engine is not None and engine.listens:
            self._tell_status(replica_id, engine, again=True)

    def _tell_status(self, replica_id: str, engine: Engine, again: bool = False) -> None:
        """What a probe would find, where that changed."""
        if not engine.listens:
            return
        now = self._loop.now
        status = (engine.in_flight, engine.last_end)
        if not again and self._status.get(replica_id) == status:
            return
        self._status[replica_id] = status
        idle = None if engine.last_end is None else now - engine.last_end
        self._apply(
            m.StatusSeen(
                now=now, replica_id=replica_id, in_flight=engine.in_flight,
                idle_for_s=0.0 if engine.in_flight else idle,
            )
        )  # fmt: skip

    def _reports(self, now: float) -> tuple[ReplicaReport, ...]:
        """Of a replica that nothing happened to since, only the ages differ."""
        known = self._told
        for replica_id, r in self.core.replicas.items():
            if replica_id not in known:
                disabled = self.core.disabled.get(launch_name(r.command.spec), {})
                known[replica_id] = (self._report(report_of(r, disabled, now)), now)
        return tuple(_older(*known[replica_id], now) for replica_id in self.core.replicas)

    def _report(self, report: ReplicaReport) -> ReplicaReport:
        engine = self.engines.get(report.replica_id)
        if engine is None or not engine.process or report.phase in ("backoff", "failed"):
            return report
        return replace(
            report,
            base_url=f"http://{self.node_id}/{report.replica_id}",
            key="k",
            memory_used_bytes=engine.held * len(report.device_ids),
            host_bytes=p.PROCESS_BYTES + engine.offloaded,
            engine_version="0.32.0",
            engine_waiting=engine.waiting,
            started_from=engine.rung if engine.rung in _START_RUNGS else report.started_from,
        )

    # -------------------------------------------------------------------- memory

    def _hold(self, replica_id: str, engine: Engine, held: int) -> None:
        more = held - engine.held
        if not more:
            return
        engine.held = held
        self._told.pop(replica_id, None)
        command = engine.command
        for device_id in command.device_ids:
            self._used[device_id] += more
            if self._used[device_id] > self._devices[device_id].memory_total_bytes:
                self._witness.violated(
                    f"{device_id} really holds {self._used[device_id]} of"
                    f" {self._devices[device_id].memory_total_bytes} bytes, {replica_id} the last"
                )
        self._witness.memory_changed(
            self.node_id, replica_id, command.spec.name, command.device_ids, held
        )

    def _host_held(self) -> int:
        """Host memory that processes and their offloaded weights hold."""
        return sum(p.PROCESS_BYTES + e.offloaded for e in self.engines.values())

    def _needed(self) -> set[str]:
        """Sources whose files an engine here may read."""
        return {e.command.spec.source for e in self.engines.values()}

    def _check_host(self) -> None:
        host = self.timings.host
        budget = int(host.memory_bytes * host.budget_share)
        sleepers = sum(e.offloaded for e in self.engines.values())
        if sleepers > budget:
            self._witness.violated(
                f"{self.node_id} holds {sleepers} bytes of sleepers, its budget is {budget}"
            )
        # A stage command that was lost or is still on its way: the kernel takes clean pages back.
        self.files.yield_staged(sleepers + self.files.staged_bytes() - budget)
        self.files.shrink()

    def _moving(self, replica_id: str, move: tuple[Pipe, Transfer] | None) -> None:
        if move is not None:
            self._moves.setdefault(replica_id, []).append(move)

    def _cancel_moves(self, replica_id: str) -> None:
        for pipe, transfer in self._moves.pop(replica_id, ()):
            pipe.cancel(transfer)


_BEFORE_WEIGHTS: tuple[str, ...] = ("fork", "init", "import")
_START_RUNGS = ("staged", "cached", "remote")


def _older(report: ReplicaReport, made_at: float, now: float) -> ReplicaReport:
    """As agent.replica.report would make it now."""
    age_s = now - made_at
    idle = report.idle_for_s
    if idle is not None and report.in_flight == 0:
        idle += age_s
    return replace(report, phase_age_s=report.phase_age_s + age_s, idle_for_s=idle)


def _deadline(r: Replica, now: float) -> float:
    """When a tick first changes this replica, if nothing else does."""
    match r.phase:
        case "ready" | "asleep":
            return math.inf if r.unhealthy_since is None else r.unhealthy_since + HUNG_S
        case "starting":
            return r.spawned_at + START_TIMEOUT_S if r.tree else math.inf
        case "draining":
            return r.deadline if now < r.deadline else r.deadline + STATUS_S
        case "stopping":
            return math.inf if r.killed else r.deadline
        case "backoff":
            return math.inf if r.tree else r.retry_at
        case "sleeping" | "waking" if r.began_at is not None:
            return r.began_at + (SLEEP_S if r.phase == "sleeping" else WAKE_S)
    return math.inf
