"""Builds the heartbeats of one node: everything that the scheduler is told of it.

Rules this file keeps: nothing here blocks or waits; figures are those that were last measured.
"""

from __future__ import annotations

import importlib.metadata
import time

import msgspec
import psutil

from agent.address import Address, advertised_host
from agent.core.replica import SERVED_PHASES
from agent.core.state_machine import AgentCore
from agent.engines.sleep_tasks import SleepTasks
from agent.host import Host
from agent.lifecycle.probes import Probes
from agent.lifecycle.replicas import Replicas
from agent.lifecycle.shells import Shells
from agent.weights.staging import Stager
from runtime import places
from runtime.contract.config import Config
from runtime.wire.agent_messages import Heartbeat, ReplicaReport


class Heartbeats:
    """The heartbeats of one node."""

    def __init__(
        self,
        config: Config,
        host: Host,
        core: AgentCore,
        replicas: Replicas,
        stager: Stager,
        sleeps: SleepTasks,
        shells: Shells,
        probes: Probes,
        *,
        boot_id: int,
        address: Address,
    ) -> None:
        self._config = config
        self._host = host
        self._core = core
        self._replicas = replicas
        self._stager = stager
        self._sleeps = sleeps
        self._shells = shells
        self._probes = probes
        self.boot_id = boot_id
        self._address = address
        self._advertised = advertised_host(config)
        self._stoker_version = importlib.metadata.version("stoker-serve")
        self._seq = 0

    @property
    def next_seq(self) -> int:
        """The number of the heartbeat that will be built next."""
        return self._seq + 1

    def build(self) -> Heartbeat:
        """The whole truth about the node now."""
        self._seq += 1
        memory = psutil.virtual_memory()
        return Heartbeat(
            node_id=self._config.node_id(),
            boot_id=self.boot_id,
            seq=self._seq,
            address=self._address.url,
            devices=self._host.devices.last(),
            replicas=tuple(map(self._report, self._core.reports(time.monotonic()))),
            host_memory_total_bytes=memory.total,
            host_memory_available_bytes=memory.available,
            host_budget_bytes=self.host_budget_bytes(),
            cached=self._host.on_disk.cached(),
            staged=self._stager.staged(),
            preemptible=self._host.preemption.preemptible,
            preempted_in_s=self._host.preemption.left_s(),
            engines=dict(self._host.versions),
            labels=self._config.agent.labels,
            draining=self._core.shutting_down,
            version=self._stoker_version,
            epoch=self._core.epoch,
            shells=self._shells.told(self._core.disabled),
        )

    def host_budget_bytes(self) -> int:
        """Host memory that may be booked now: that of engines awake is not, a sleeper's is."""
        awake_bytes = sum(map(self._host.devices.host_bytes, self._replicas.awake()))
        return self._host.memory.budget_bytes(self._host.devices.last(), awake_bytes)

    def _report(self, report: ReplicaReport) -> ReplicaReport:
        """The core's report, and what only its engine and its record tell."""
        record = self._replicas.record(report.replica_id)
        runs = report.phase in ("starting", "stopping") or report.phase in SERVED_PHASES
        if record is None or record.leader is None or not runs:
            return report
        load = self._probes.load(report.replica_id)
        return msgspec.structs.replace(
            report,
            base_url=places.base_url(self._advertised, record.port),
            key=record.route_key,
            pid=record.leader.pid,
            memory_used_bytes=self._host.devices.used_bytes(report.replica_id),
            host_bytes=self._sleeps.host_bytes(report, record.saved.command.spec),
            engine_version=record.engine_version,
            started_from=record.started_from,
            shell_key=record.shell_key,
            kv_cache_usage=load.kv_cache_usage if report.phase == "ready" else None,
            engine_waiting=load.waiting if report.phase == "ready" else None,
        )
