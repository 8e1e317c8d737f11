"""One node's replicas: events go to the core, and its effects to the parts that carry them out.

Rules this file keeps:
- the core is only touched in the event loop's thread, through `apply`;
- nothing slow runs there: devices, /proc and a start's source are read in threads;
- each part is handed what it needs; what it has to say comes back through `apply`, and the end of
  an engine's process through `_on_exit`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil

from agent.address import Address
from agent.cache.model_cache import ModelCache
from agent.core import messages
from agent.core.state_machine import AgentCore
from agent.devices.inventory import DeviceSource
from agent.engines.sleep_tasks import SleepTasks, levels
from agent.heartbeats import Heartbeats
from agent.host import Host
from agent.lifecycle.adoption import Adoption
from agent.lifecycle.exits import Exits
from agent.lifecycle.probes import Probes
from agent.lifecycle.reaper import Reaper
from agent.lifecycle.replicas import Replicas
from agent.lifecycle.shells import Shells
from agent.lifecycle.starts import Starts
from agent.records import Records
from agent.weights.adapters import Adapters
from agent.weights.staging import Stager
from runtime.contract.config import Config
from runtime.wire.names import REPLICA_ID


class Node:
    """One node's replicas, and the parts that start, watch and end them."""

    def __init__(
        self,
        config: Config,
        session: aiohttp.ClientSession,
        devices: DeviceSource,
        records: Records,
        cache: ModelCache,
        address: Address,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a heartbeat should be sent at once.

        Raises ValueError for settings that this host can't have.
        """
        self.finished = asyncio.Event()  # shut down, and no replica is left
        self._records = records
        self._changed = changed
        self.host = host = Host(config, session, devices, records, cache, self._on_exit, changed)
        self.core = AgentCore(
            start_timeout_s=config.agent.start_timeout_s,
            max_restarts=config.agent.max_restarts,
            epoch=records.epoch,
            rungs=functools.partial(levels, kind=devices.kind),
            disabled=records.disabled(),
            barred=host.limits.barred,
        )
        self._replicas = replicas = Replicas(self.core, records, session, config.agent.host)
        self.stager = Stager(cache, host.on_disk, host.metrics, host.devices.pids, replicas.loading)
        adapter_dir = host.state_dir / "adapters"
        self.adapters = Adapters(cache, adapter_dir, replicas.ready_engines, host.tasks)
        self._probes = probes = Probes(host, replicas, session, self.apply)
        self._sleeps = SleepTasks(replicas, host.devices, host.metrics, host.tasks, self.apply)
        self._exits = Exits(host, replicas, probes, self.apply)
        self._starts = Starts(
            host, replicas, self.adapters, probes, self._sleeps, self._exits, changed
        )
        self._shells = Shells(host, replicas, records, self.apply)
        self._reaper = Reaper(
            host, replicas, self._starts, self._sleeps, self._shells, probes, self.apply
        )
        self.adoption = Adoption(
            host, records, replicas, session, self.adapters, probes, self.apply
        )
        self.heartbeats = Heartbeats(
            config,
            host,
            self.core,
            replicas,
            self.stager,
            self._sleeps,
            self._shells,
            probes,
            boot_id=records.boot_id,
            address=address,
        )

    # ------------------------------------------------------------------ events and effects

    def apply(self, event: messages.Event) -> messages.CommandRefused | None:
        """Give the core an event and do what it says; a command may be refused."""
        refused = None
        if isinstance(event, messages.PhasesSeen):
            self._starts.ready(event)
            self._shells.learn(event.replica_id)
        for effect in self.core.handle(event):
            if isinstance(effect, messages.CommandRefused):
                refused = effect
            else:
                self._execute(effect)
        if self.core.finished:
            self.finished.set()
        return refused

    def _execute(self, effect: messages.Effect) -> None:
        match effect:
            case messages.Spawn(replica_id):
                self._starts.begin(replica_id)
            case messages.Signal(replica_id, "TERM"):
                self.host.supervisor.terminate(replica_id)
            case messages.Signal(replica_id):
                self._reaper.kill(replica_id)
            case messages.SleepEngine() | messages.WakeEngine():
                self._sleeps.carry_out(effect)
            case messages.RepointEngine():
                self._shells.carry_out(effect)
            case messages.StageWeights(models):
                self.stager.wish(models)
            case messages.SaveDisabled():
                self._records.save_disabled(self.core.disabled)
            case messages.SaveRecord(replica_id):
                self._replicas.save(replica_id)
                self._probes.poke(replica_id)
            case messages.ForgetRecord(replica_id):
                self._forget(replica_id)
            case messages.SaveEpoch(epoch):
                self._records.save_epoch(epoch)
            case messages.SendHeartbeatNow():
                self._changed()

    def _forget(self, replica_id: str) -> None:
        """Give back what a replica that is over had on this host."""
        self.host.cache.release(replica_id)
        self.host.sources.forget(replica_id)
        self.host.ports.give_back(replica_id)
        record = self._replicas.forget(replica_id)
        model = record.saved.command.spec.name if record else None
        if model and not self._replicas.any_of(model):
            self.adapters.end(model)

    def _on_exit(self, replica_id: str, returncode: int | None) -> None:
        self._exits.seen(replica_id, returncode)

    # ------------------------------------------------------------------ views

    def log_path(self, replica_id: str) -> Path | None:
        """The log of a replica, also of one that ended lately; None if there is none. It may not
        be written yet."""
        if not REPLICA_ID.fullmatch(replica_id):
            return None
        path = self.host.supervisor.log_path(replica_id)
        return path if self.runs(replica_id) or path.exists() else None

    def runs(self, replica_id: str) -> bool:
        """Whether more may be written to its log."""
        return replica_id in self._replicas

    # ------------------------------------------------------------------ the agent's own life

    async def keep_launcher(self) -> None:
        """Give the launcher's memory back while the host is short of it."""
        host = self.host
        host.launcher.keep(psutil.virtual_memory().available)
        await host.memory.read()
        host.metrics.launchers.set(host.launcher.ready)
        host.metrics.launcher_bytes.set(host.memory.launcher_bytes)
        host.metrics.host_budget_bytes.set(self.heartbeats.host_budget_bytes())

    async def rotate_logs(self) -> None:
        """Keep the logs within their limit."""
        await asyncio.to_thread(self.host.supervisor.rotate_logs)

    async def close(self) -> None:
        """Let go of every engine, dead or alive."""
        parts = (self._starts, self._reaper, self._probes, self._sleeps, self._shells)
        tasks = [task for part in parts for task in part.running()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.stager.close()
        await self.adapters.close()
        await self.host.launcher.close()
        self.host.supervisor.close()
