"""The probes of this node's engines, one a replica, and what they tell the core.

Rules this file keeps: a replica has one prober at most; it ends with its engine.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable

import aiohttp

from agent.core.messages import Event, HealthChanged, StatusSeen
from agent.engines.probe import Prober
from agent.engines.reported_load import EngineLoad
from agent.host import Host
from agent.lifecycle.replicas import Replicas

log = logging.getLogger("stoker.agent")


class Probes:
    """The probes of one node."""

    def __init__(
        self,
        host: Host,
        replicas: Replicas,
        session: aiohttp.ClientSession,
        apply: Callable[[Event], object],
    ) -> None:
        """`apply` gives the core an event."""
        self._replicas = replicas
        self._session = session
        self._metrics = host.metrics
        self._tasks = host.tasks
        self._apply = apply
        self._probes: dict[str, tuple[Prober, asyncio.Task[None]]] = {}

    def begin(self, replica_id: str) -> None:
        """Ask its engine how it is, from now on."""
        prober = Prober(
            self._session,
            self._replicas.target(replica_id),
            functools.partial(self._replicas.phase, replica_id),
            self._heard,
        )
        self._probes[replica_id] = (prober, self._tasks.start(prober.run()))

    def end(self, replica_id: str) -> None:
        """Ask no more; a replica without a prober is success."""
        if probe := self._probes.pop(replica_id, None):
            probe[1].cancel()

    def poke(self, replica_id: str) -> None:
        """Look at once: its phase may have changed."""
        if probe := self._probes.get(replica_id):
            probe[0].poke()

    def load(self, replica_id: str) -> EngineLoad:
        """What its engine last said of its own load."""
        probe = self._probes.get(replica_id)
        return probe[0].load if probe else EngineLoad()

    def running(self) -> list[asyncio.Task[None]]:
        """The tasks that run now."""
        return [task for _, task in self._probes.values()]

    def _heard(self, event: HealthChanged | StatusSeen) -> None:
        was = self._replicas.phase(event.replica_id)
        self._apply(event)
        if was == "starting" and self._replicas.phase(event.replica_id) == "ready":
            replica = self._replicas[event.replica_id]
            start_s = replica.start_s or 0.0
            self._metrics.start_s.labels(replica.command.spec.name).observe(start_s)
            log.info("%s is ready after %.2f s", event.replica_id, start_s)
