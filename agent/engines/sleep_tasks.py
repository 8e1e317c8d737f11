"""Puts a node's engines to sleep and wakes them as the core says, and listens to their starts.

Rules this file keeps:
- a task per replica at most; its outcome is one event, its end (`end`) is waited for;
- the canary's answer is known before the first sleep: it is asked for in the background once the
  engine is ready, and at the latest by the sleep itself;
- an error becomes the event's words, never an exception of the agent's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.core.messages import Event, PhasesSeen, SleepEnded, SleepEngine, WakeEnded, WakeEngine
from agent.core.replica import Replica
from agent.devices.device_watch import DeviceWatch
from agent.engines import sleep
from agent.engines.start_phases import StartLog
from agent.engines.supervisor import read_more
from agent.engines.wake_canary import WakeCanary
from agent.metrics import Metrics
from agent.tasks import Tasks
from runtime.engine.contract import AsleepModel
from runtime.engine.select import get_engine
from runtime.wire.agent_messages import DeviceKind, ReplicaReport, StartReplica
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")

_LOG_POLL_S = 0.1


class KnownReplicas(Protocol):
    """The parts of the node's replicas that sleep tasks use."""

    def get(self, replica_id: str) -> Replica | None:
        """A replica of the node; None: it is over."""

    def controls(self, replica_id: str) -> sleep.Controls:
        """The sleep controls of a replica's engine."""

    def is_shell(self, replica_id: str) -> bool:
        """Whether other engines may be pointed at a replica's model, or its own at another."""

    def canary(self, replica_id: str) -> WakeCanary | None:
        """The canary that was recorded of a replica."""

    def keep_canary(self, replica_id: str, canary: WakeCanary) -> None:
        """Record the canary of a replica."""


def levels(spec: ModelSpec, kind: DeviceKind) -> tuple[int, ...]:
    """The sleep levels of such an engine on such devices; none for a spec that can't run."""
    try:
        return get_engine(spec.engine).rungs(spec, kind)
    except ValueError:
        return ()  # its start will say what is wrong with it
    except Exception:  # an engine's fault must not end the agent
        log.exception("%s: its sleep levels can't be told", spec.name)
        return ()


def asleep_model(spec: ModelSpec, level: int) -> AsleepModel | None:
    """What it holds asleep, where that is modelled."""
    return get_engine(spec.engine).asleep_model(spec, level)


def residue_bytes(command: StartReplica, level: int, held_bytes: int) -> int:
    """What it holds asleep on each device, where it was seen to hold so much on all of them."""
    model = asleep_model(command.spec, level)
    return model.residue_bytes if model else -(-held_bytes // len(command.device_ids))


class SleepTasks:
    """The sleeps, wakes and canaries of one node."""

    def __init__(
        self,
        replicas: KnownReplicas,
        devices: DeviceWatch,
        metrics: Metrics,
        tasks: Tasks,
        apply: Callable[[Event], object],
    ) -> None:
        """`apply` gives the core an event."""
        self._replicas = replicas
        self._devices = devices
        self._metrics = metrics
        self._start = tasks.start
        self._apply = apply
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def carry_out(self, effect: SleepEngine | WakeEngine) -> None:
        """Begin what the core says."""
        replica_id, level = effect.replica_id, effect.level
        work = self._sleep if isinstance(effect, SleepEngine) else self._wake
        self._next(replica_id, work(replica_id, level, self._tasks.get(replica_id)))

    def started(
        self,
        replica_id: str,
        log_file: Path,
        position: int,
        forked_at: float,
        before: Mapping[str, float],
    ) -> None:
        """Follow the start of a process that is there, and then its canary.

        `before`: seconds of the phases that came before its process was asked for.
        """
        self._next(replica_id, self._follow(replica_id, log_file, position, forked_at, before))

    async def end(self, replica_id: str) -> None:
        """Ask nothing more of an engine that is about to be killed."""
        if task := self._tasks.pop(replica_id, None):
            task.cancel()
            await asyncio.wait([task])

    def host_bytes(self, report: ReplicaReport, spec: ModelSpec) -> int:
        """Host memory of a replica now: measured, and what is modelled of a sleeper."""
        held = self._devices.host_bytes(report.replica_id)
        if report.phase not in ("asleep", "waking"):
            return held
        model = asleep_model(spec, report.sleep_level)
        return held + (model.host_bytes if model else 0)

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks that run now."""
        return list(self._tasks.values())

    def _next(self, replica_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[replica_id] = self._start(work)
        task.add_done_callback(lambda done: self._forget(replica_id, done))

    def _forget(self, replica_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(replica_id) is task:
            del self._tasks[replica_id]

    # ------------------------------------------------------------------ start

    async def _follow(
        self,
        replica_id: str,
        log_file: Path,
        position: int,
        forked_at: float,
        before: Mapping[str, float],
    ) -> None:
        start_log = StartLog()
        starts = True
        while starts:
            r = self._replicas.get(replica_id)
            starts = r is not None and r.phase == "starting"
            text, position = await asyncio.to_thread(read_more, log_file, position)
            start_log.feed(text.decode(errors="replace"), time.monotonic())
            if starts:
                await asyncio.sleep(_LOG_POLL_S)
        if r is None or r.phase != "ready":
            return
        phases = start_log.phases(r.spawned_at, forked_at, r.ready_at, before)
        began = time.monotonic()
        checked = r.rungs or self._replicas.is_shell(replica_id)
        if checked and await self._take_canary(replica_id, r) is None:
            phases["canary"] = round(time.monotonic() - began, 3)
        self._apply(PhasesSeen(now=time.monotonic(), replica_id=replica_id, phases=phases))

    async def _take_canary(self, replica_id: str, r: Replica) -> str | None:
        """Ask for the answer that will be compared with, if it is not known; why it can't be."""
        if self._replicas.canary(replica_id) is not None:
            return None
        model = r.command.spec.name
        try:
            canary = await sleep.take_canary(self._replicas.controls(replica_id), model)
        except sleep.EngineError as error:
            return f"its canary can't be asked for: {error}"
        if not canary.path:
            log.warning("%s: it has no call to compare after a wake: woken unchecked", replica_id)
        self._replicas.keep_canary(replica_id, canary)
        return None

    # ------------------------------------------------------------------ sleep and wake

    async def _sleep(self, replica_id: str, level: int, before: asyncio.Task[None] | None) -> None:
        r = self._replicas.get(replica_id)
        if before:
            await asyncio.wait([before])  # the canary, on its way
        if r is None:
            return
        command, began = r.command, time.monotonic()
        model = asleep_model(command.spec, level)
        measure = None if model else sleep.measure_of(self._devices, command)
        error: str | None = None
        untouched, held = False, 0
        try:
            if words := await self._take_canary(replica_id, r):
                raise sleep.Untouched(words)
            booked = command.device_bytes * len(command.device_ids)
            controls = self._replicas.controls(replica_id)
            held = await sleep.put_to_sleep(controls, level, booked, measure)
        except sleep.Untouched as refusal:
            error, untouched = str(refusal), True
        except sleep.RungFailed as failure:
            error = str(failure)
        self._count("sleep", r, level, error, time.monotonic() - began)
        self._apply(
            SleepEnded(
                now=time.monotonic(),
                replica_id=replica_id,
                error=error,
                untouched=untouched,
                residue_bytes=residue_bytes(command, level, held),
            )
        )

    async def _wake(self, replica_id: str, level: int, before: asyncio.Task[None] | None) -> None:
        r = self._replicas.get(replica_id)
        if before:
            await asyncio.wait([before])
        if r is None:
            return
        error: str | None = None
        phases: dict[str, float] = {}
        began = time.monotonic()
        try:
            known = self._replicas.canary(replica_id)
            phases = await sleep.wake(self._replicas.controls(replica_id), level, known)
        except sleep.RungFailed as failure:
            error = str(failure)
        self._count("wake", r, level, error, time.monotonic() - began)
        now = time.monotonic()
        rounded = {phase: round(took_s, 3) for phase, took_s in phases.items()}
        self._apply(WakeEnded(now=now, replica_id=replica_id, error=error, phases=rounded))

    def _count(self, what: str, r: Replica, level: int, error: str | None, took_s: float) -> None:
        model, replica_id = r.command.spec.name, r.command.replica_id
        self._metrics.rung_changed(model, what, level, error is None, took_s)
        if error is None:
            log.info("%s: %s at level %d took %.2f s", replica_id, what, level, took_s)
        else:
            log.warning("%s: %s at level %d failed: %s", replica_id, what, level, error)
