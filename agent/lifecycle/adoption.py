"""Takes over what an earlier agent left on this node: its records, and the engines that still run.

Rules this file keeps: processes of which there is no record are killed; what is alive is asked how
it is before the core is told of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import aiohttp
import msgspec

from agent.core.messages import Adopted, Event
from agent.core.replica import SLEEP_PHASES
from agent.engines import process
from agent.engines.probe import is_healthy
from agent.engines.sleep import is_sleeping
from agent.engines.sleep_tasks import residue_bytes
from agent.host import Host
from agent.lifecycle.probes import Probes
from agent.lifecycle.replicas import Replicas
from agent.records import Record, Records
from agent.weights.adapters import Adapters

log = logging.getLogger("stoker.agent")


class Adoption:
    """The adoption of one node's replicas, when its agent starts."""

    def __init__(
        self,
        host: Host,
        records: Records,
        replicas: Replicas,
        session: aiohttp.ClientSession,
        adapters: Adapters,
        probes: Probes,
        apply: Callable[[Event], object],
    ) -> None:
        """`apply` gives the core an event."""
        self._host = host
        self._records = records
        self._replicas = replicas
        self._session = session
        self._adapters = adapters
        self._probes = probes
        self._apply = apply

    async def run(self) -> None:
        """Adopt every recorded replica; kill the processes of all others."""
        records = {r.saved.command.replica_id: r for r in self._records.load()}
        await self._kill_unknown(records)
        self._replicas.take_over(records.values())
        alive = self._watch(records)
        healthy = await self._ask_health(alive)
        sleeping = await self._ask_sleepers(records, [r for r in alive if healthy[r]])
        # Those that start first: the core gives a device to whoever is adopted before them.
        for replica_id in sorted(
            records, key=lambda r: (r not in alive, records[r].saved.phase != "starting")
        ):
            self._adopt(
                records[replica_id],
                replica_id in alive,
                healthy.get(replica_id, False),
                sleeping.get(replica_id),
            )

    async def _kill_unknown(self, records: Collection[str]) -> None:
        trees = await self._host.supervisor.trees()
        for replica_id in trees.keys() - set(records):
            log.warning("%s: no record of it, so its processes are killed", replica_id)
            await self._host.supervisor.kill_tree(replica_id)

    def _watch(self, records: dict[str, Record]) -> set[str]:
        """The replicas whose main process is alive; it is watched from now on."""
        alive = set()
        for replica_id, record in records.items():
            if record.leader:
                # Dead or alive: what is left of it may listen there.
                self._host.ports.keep(replica_id, record.port)
                if self._host.supervisor.adopt(replica_id, record.leader):
                    alive.add(replica_id)
        return alive

    async def _ask_health(self, alive: Collection[str]) -> dict[str, bool]:
        targets = map(self._replicas.target, alive)
        answers = await asyncio.gather(*(is_healthy(self._session, t) for t in targets))
        return dict(zip(alive, answers, strict=True))

    async def _ask_sleepers(
        self, records: dict[str, Record], alive: list[str]
    ) -> dict[str, bool | None]:
        """What each engine that was asleep, or nearly so, says of itself."""
        asked = [r for r in alive if records[r].saved.phase in SLEEP_PHASES]
        if asked:
            await self._host.devices.read()
        controls = map(self._replicas.controls, asked)
        answers = await asyncio.gather(*map(is_sleeping, controls))
        return dict(zip(asked, answers, strict=True))

    def _adopt(self, record: Record, alive: bool, healthy: bool, sleeping: bool | None) -> None:
        saved = record.saved
        replica_id, spec = saved.command.replica_id, saved.command.spec
        if record.leader is None and saved.phase == "starting":
            saved = msgspec.structs.replace(saved, phase="backoff")  # it never ran: no crash
        log.info("%s adopted", replica_id, extra={"alive": alive, "healthy": healthy})
        self._host.cache.hold(spec.source, replica_id)
        self._host.on_disk.name(spec.source)
        self._adapters.begin(spec, adopted=True)
        residue = 0
        if saved.sleep:
            held = self._host.devices.used_bytes(replica_id) or 0
            residue = residue_bytes(saved.command, saved.sleep.level, held)
        self._apply(
            Adopted(
                now=time.monotonic(),
                saved=saved,
                alive=alive,
                healthy=healthy,
                age_s=process.age_s(record.leader) if alive and record.leader else 0.0,
                sleeping=sleeping,
                residue_bytes=residue,
            )
        )
        if alive:
            self._probes.begin(replica_id)
