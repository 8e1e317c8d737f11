"""Starts engines: finds what each loads, plans its process, has it run, and writes it down.

Rules this file keeps:
- whatever goes wrong with a start is told to the core as an exit, with words;
- from the process's birth until its record is written nothing waits: a stop finds either no
  process or a recorded one.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

from agent.core.messages import PhasesSeen
from agent.engines.launch_plan import BadStart, Plan, make_plan
from agent.engines.ports import NoFreePort
from agent.engines.sleep_tasks import SleepTasks
from agent.engines.spawner import Spawned
from agent.host import Host
from agent.lifecycle.exits import Exits
from agent.lifecycle.probes import Probes
from agent.lifecycle.replicas import Replicas
from agent.weights.adapters import Adapters
from agent.weights.start_source import StartSource
from runtime.wire.agent_messages import StartReplica

log = logging.getLogger("stoker.agent")


class Starts:
    """The starts of one node."""

    def __init__(
        self,
        host: Host,
        replicas: Replicas,
        adapters: Adapters,
        probes: Probes,
        sleeps: SleepTasks,
        exits: Exits,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a heartbeat should be sent at once."""
        self._host = host
        self._replicas = replicas
        self._adapters = adapters
        self._probes = probes
        self._sleeps = sleeps
        self._exits = exits
        self._changed = changed
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._sharing: set[asyncio.Task[None]] = set()

    def begin(self, replica_id: str) -> None:
        """Start the engine of a replica that the core knows."""
        self._adapters.begin(self._replicas[replica_id].command.spec)
        self._starting[replica_id] = self._host.tasks.start(self._start(replica_id))

    async def cancel(self, replica_id: str) -> None:
        """Return once its start has spawned or never will; one without a start is success."""
        if start := self._starting.pop(replica_id, None):
            start.cancel()
            await asyncio.wait([start])

    def ready(self, event: PhasesSeen) -> None:
        """Learn from a start that went well, and share what it compiled."""
        tail = functools.partial(self._host.supervisor.log_tail, event.replica_id)
        weights_s = event.phases.get("weights")
        ready = self._host.tasks.start(self._host.sources.ready(event.replica_id, weights_s, tail))
        self._sharing.add(ready)
        ready.add_done_callback(self._sharing.discard)

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks that run now."""
        return [*self._starting.values(), *self._sharing]

    # ------------------------------------------------------------------ one start

    async def _start(self, replica_id: str) -> None:
        command = self._replicas[replica_id].command
        log_file = self._host.supervisor.log_path(replica_id)
        position = log_file.stat().st_size if log_file.exists() else 0
        try:
            source = await self._find(replica_id, command)
            plan = await self._plan(replica_id, command, source)
            spawned = await self._host.spawner.start(replica_id, plan.launch)
        except BadStart as error:
            self._exits.tell(replica_id, error.kind, str(error))
        except NoFreePort as error:
            self._exits.tell(replica_id, "port_in_use", str(error))
        except OSError as error:
            words = f"its engine could not be started: {error}"
            self._exits.tell(replica_id, "crash", words)
        else:
            # No await from here on: a stop must find either no process or a recorded one.
            self._spawned(command, source, plan, spawned)
            self._follow(replica_id, log_file, position, source)

    async def _find(self, replica_id: str, command: StartReplica) -> StartSource:
        spec = command.spec
        devices = [d for d in self._host.devices.last() if d.device_id in command.device_ids]
        device = devices[0] if devices else None
        return await self._host.sources.find(
            replica_id, spec, device, self._host.versions.get(spec.engine)
        )

    async def _plan(self, replica_id: str, command: StartReplica, source: StartSource) -> Plan:
        return await asyncio.to_thread(
            make_plan,
            command,
            self._host.devices.last(),
            self._host.place,
            self._host.ports.take(replica_id, self._host.place.host),
            source.model_path,
            source.load_format,
            self._adapters.index(command.spec),
            self._host.versions.get(command.spec.engine),
        )

    def _spawned(
        self, command: StartReplica, source: StartSource, plan: Plan, spawned: Spawned
    ) -> None:
        """Write the process down."""
        replica_id, spec = command.replica_id, command.spec
        self._replicas.save(
            replica_id,
            port=plan.context.port,
            health_path=plan.launch.health_path,
            route_key=plan.context.route_key,
            control_key=plan.context.control_key,
            leader=spawned.leader,
            canary=None,
            started_from=source.rung,
            # What renews a process from within comes with the parent it was forked from.
            shell_key=None if plan.launch.preload and spawned.why_plain else plan.shell_key,
            load_format=plan.context.load_format,
            engine_version=self._host.versions.get(spec.engine),
        )
        self._host.metrics.starts.labels(spec.name, spawned.how, spawned.why_plain).inc()
        log.info(
            "%s started (%s, from %s): %s",
            replica_id,
            spawned.how,
            source.rung,
            command.reason,
            extra={"model": spec.name, "pid": spawned.leader.pid, "port": plan.context.port},
        )

    def _follow(self, replica_id: str, log_file: Path, position: int, source: StartSource) -> None:
        """Hear how the start goes on."""
        self._probes.begin(replica_id)
        self._sleeps.started(replica_id, log_file, position, time.monotonic(), source.phases)
        self._changed()
