"""Points engines of this node at other models: a process, its compiled code and its memory stay.

Rules this file keeps:
- an engine is only pointed at a model that was started on this node before and whose canary is
  known from then: it has to give the answer of that engine, behind a shut door, before it serves;
- nor at one whose weights would have to be fetched first;
- what the process keeps is the same for both models, or there is no re-point (`Engine.shell_key`,
  worked out again from the new model's folder before its engine is told);
- the route key is a new one, so that no router reaches the new model by an old table;
- whatever goes wrong is told to the core in words: it starts the model plainly.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from agent.core.messages import Event, RepointEnded, RepointEngine
from agent.core.replica import SHELL, Replica, launch_name
from agent.engines import sleep
from agent.engines.launch_plan import BadStart, make_repoint
from agent.host import Host
from agent.lifecycle.replicas import Replicas
from agent.records import KnownShell, Record, Records
from agent.weights.start_source import StartSource
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")


class Shells:
    """The re-points of one node."""

    def __init__(
        self, host: Host, replicas: Replicas, records: Records, apply: Callable[[Event], object]
    ) -> None:
        """`apply` gives the core an event."""
        self._host = host
        self._replicas = replicas
        self._records = records
        self._apply = apply
        self._known = records.shells()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def learn(self, replica_id: str) -> None:
        """Remember the canary of a model whose own engine has started."""
        record = self._replicas.record(replica_id)
        if record is None or record.shell_key is None or not (record.canary and record.canary.path):
            return
        spec = record.saved.command.spec
        name, source = launch_name(spec), None if spec.engine == "stub" else spec.source
        known = KnownShell(shell_key=record.shell_key, canary=record.canary, source=source)
        if self._known.get(name) != known:
            self._known.pop(name, None)
            self._known[name] = known
            self._records.save_shells(self._known)

    def told(self, disabled: dict[str, dict[str, str]]) -> dict[str, str]:
        """As in Heartbeat.shells; `disabled`: as AgentCore has it."""
        on_disk = {None, *(model.source for model in self._host.on_disk.cached())}
        return {
            name.rpartition("/")[2]: known.shell_key
            for name, known in self._known.items()
            if known.source in on_disk and SHELL not in disabled.get(name, ())
        }

    def carry_out(self, effect: RepointEngine) -> None:
        """Begin what the core says."""
        work = self._repoint(effect.replica_id, effect.level)
        self._tasks[effect.replica_id] = self._host.tasks.start(work)

    async def end(self, replica_id: str) -> None:
        """Ask nothing more of an engine that is about to be killed."""
        if task := self._tasks.pop(replica_id, None):
            task.cancel()
            await asyncio.wait([task])

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks that run now."""
        return list(self._tasks.values())

    async def _repoint(self, replica_id: str, level: int) -> None:
        replica, record = self._replicas.get(replica_id), self._replicas.record(replica_id)
        if replica is None or record is None:
            return
        spec, began = replica.command.spec, time.monotonic()
        error: str | None = None
        phases: dict[str, float] = {}
        try:
            phases = await self._point(replica, record, level)
        except (sleep.RungFailed, BadStart, ValueError) as failure:
            error = str(failure)
        except Exception as failure:  # an engine's fault must not end the agent
            log.exception("%s: pointing it at %s failed", replica_id, spec.name)
            error = f"pointing it at {spec.name} failed: {failure!r}"
        now = time.monotonic()
        self._host.metrics.rung_changed(spec.name, "repoint", level, error is None, now - began)
        if error is None:
            log.info("%s serves %s after %.2f s in its process", replica_id, spec.name, now - began)
        else:
            log.warning("%s could not be pointed at %s: %s", replica_id, spec.name, error)
        rounded = {phase: round(took_s, 3) for phase, took_s in phases.items()}
        self._apply(RepointEnded(now=now, replica_id=replica_id, error=error, phases=rounded))

    async def _point(self, replica: Replica, record: Record, level: int) -> dict[str, float]:
        """Raises RungFailed, BadStart or ValueError; the engine may be half-way then."""
        spec, replica_id = replica.command.spec, replica.command.replica_id
        known = self._known.get(launch_name(spec))
        if known is None:
            raise ValueError("its canary is not known on this node: it was never started here")
        source = await self._host.sources.folder(replica_id, spec)
        context = await asyncio.to_thread(self._context, replica, record, source)
        body = get_engine(spec.engine).repoint(spec, context)
        # Before its engine is told: an agent that comes after this one must not use the old key.
        self._replicas.save(
            replica_id,
            route_key=context.route_key,
            canary=known.canary,
            started_from=source.rung,
        )
        phases = await sleep.repoint(self._replicas.controls(replica_id), level, body, known.canary)
        return source.phases | phases

    def _context(self, replica: Replica, record: Record, source: StartSource) -> LaunchContext:
        """Where it runs, if its process may serve that. Blocks. Raises BadStart, ValueError."""
        spec: ModelSpec = replica.command.spec
        context = make_repoint(
            replica.command, self._host.devices.last(), self._host.place, record.port,
            record.control_key, source.model_path,
        )  # fmt: skip
        context = msgspec.structs.replace(context, load_format=record.load_format)
        version = self._host.versions.get(spec.engine)
        if version != record.engine_version:
            raise ValueError(f"its process runs {record.engine_version}, this node has {version}")
        if get_engine(spec.engine).shell_key(spec, context, version) != record.shell_key:
            raise ValueError(
                "its process was started for a model that differs in more than weights"
            )
        return context
