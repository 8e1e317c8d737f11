"""Kills what is left of a replica, and tells the core once nothing of it is.

Rules this file keeps: Gone is said when its processes are dead and its device memory is free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from agent.core.messages import Event, Gone
from agent.engines.sleep_tasks import SleepTasks
from agent.host import Host
from agent.lifecycle.probes import Probes
from agent.lifecycle.replicas import Replicas
from agent.lifecycle.shells import Shells
from agent.lifecycle.starts import Starts


class Reaper:
    """The killing of one node's replicas."""

    def __init__(
        self,
        host: Host,
        replicas: Replicas,
        starts: Starts,
        sleeps: SleepTasks,
        shells: Shells,
        probes: Probes,
        apply: Callable[[Event], object],
    ) -> None:
        """`apply` gives the core an event."""
        self._host = host
        self._replicas = replicas
        self._starts = starts
        self._sleeps = sleeps
        self._shells = shells
        self._probes = probes
        self._apply = apply
        self._reaps: dict[str, asyncio.Task[None]] = {}

    def kill(self, replica_id: str) -> None:
        """Kill the replica's processes; one that is being killed already is success."""
        if replica_id not in self._reaps:
            self._reaps[replica_id] = self._host.tasks.start(self._reap(replica_id))

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks that run now."""
        return list(self._reaps.values())

    async def _reap(self, replica_id: str) -> None:
        await self._starts.cancel(replica_id)
        await self._sleeps.end(replica_id)
        await self._shells.end(replica_id)
        self._host.devices.dying(replica_id)
        await self._host.supervisor.kill_tree(replica_id)
        self._probes.end(replica_id)
        await self._host.devices.wait_free(replica_id)
        self._host.supervisor.forget(replica_id)
        self._host.ports.give_back(replica_id)
        del self._reaps[replica_id]
        self._replicas.save(replica_id, leader=None)
        self._apply(Gone(now=time.monotonic(), replica_id=replica_id))
