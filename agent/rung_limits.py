"""Which rungs of the ladder this host can't give to a model, and why.

Rules this file keeps: a rung that is not offered has its reason in words.
"""

from __future__ import annotations

import asyncio
import logging
import os

from agent.core.replica import rung_name
from agent.devices.device_watch import DeviceWatch
from agent.devices.host_memory_policy import level_1_refusal
from agent.devices.host_watch import HostWatch
from agent.engines import process_snapshot
from agent.engines.launch_plan import Place
from agent.engines.sleep_tasks import asleep_model
from agent.metrics import Metrics
from agent.weights.disk_models import DiskModels
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")


class RungLimits:
    """The limits of one node."""

    def __init__(
        self,
        host: HostWatch,
        devices: DeviceWatch,
        on_disk: DiskModels,
        place: Place,
        metrics: Metrics,
    ) -> None:
        self._host = host
        self._devices = devices
        self._on_disk = on_disk
        self._place = place
        self._metrics = metrics
        self._snapshot_lacks: tuple[str, ...] = ("an agent that has looked (it just started)",)

    def barred(self, spec: ModelSpec) -> dict[str, str]:
        """Rung -> why this host can't give it, as in ReplicaReport.disabled."""
        barred = {}
        if why := process_snapshot.refusal(spec, self._snapshot_lacks):
            barred[process_snapshot.RUNG] = why
        try:
            model = asleep_model(spec, 1)
        except ValueError:
            return barred  # its start will say what is wrong with it
        held = model.host_bytes if model else self._on_disk.seen(spec.source).weights_bytes
        if why := level_1_refusal(held, self._host.most_bytes(self._devices.last())):
            barred[rung_name(1)] = why
        return barred

    async def find(self) -> None:
        """Learn what this host and its engines' environment allow."""
        self._snapshot_lacks = await asyncio.to_thread(
            process_snapshot.host_lacks, self._place.python, self._place.device_kind, os.environ
        )
        self._metrics.snapshots.set(not self._snapshot_lacks)
        log.info("snapshots: missing %s", "; ".join(self._snapshot_lacks) or "nothing")
