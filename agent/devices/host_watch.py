"""The host memory that a node offers for booking, kept up to date.

Rules this file keeps: processes are measured in a thread, and not often: walking their pages costs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection

from agent.devices import host_memory_policy
from agent.devices.inventory import host_memory, process_bytes
from runtime.contract.config import AgentConfig
from runtime.wire.agent_messages import DeviceKind, DeviceReport

_MEASURE_S = 10.0


class HostWatch:
    """The host memory of one node."""

    def __init__(
        self, config: AgentConfig, kind: DeviceKind, launchers: Callable[[], Collection[int]]
    ) -> None:
        """`launchers`: their pids. Raises ValueError for settings that this host can't have."""
        self._config = config
        self._kind = kind
        self._launchers = launchers
        self._limit_bytes = host_memory()[0]
        self._reserve_bytes = host_memory_policy.reserve_bytes(
            self._limit_bytes, config.host_reserve_bytes
        )
        host_memory_policy.check_budget(self._limit_bytes, config.host_budget_bytes)
        self._measured_at = -_MEASURE_S
        self._measured: frozenset[int] = frozenset()
        self.launcher_bytes = 0

    async def read(self) -> None:
        """Measure what is due. A limit that was changed counts from now on."""
        now, pids = time.monotonic(), frozenset(self._launchers())
        if pids == self._measured and now - self._measured_at < _MEASURE_S:
            return
        self._measured_at, self._measured = now, pids
        self._limit_bytes, self.launcher_bytes = await asyncio.to_thread(_measure, pids)

    def budget_bytes(self, devices: tuple[DeviceReport, ...], awake_bytes: int) -> int:
        """What may be booked now; see `host_ram`."""
        return host_memory_policy.budget_bytes(
            limit_bytes=self._limit_bytes,
            reserve_bytes=self._reserve_bytes,
            launcher_bytes=self.launcher_bytes,
            engine_bytes=host_memory_policy.engines_bytes(self._kind, devices, awake_bytes),
            declared_bytes=self._config.host_budget_bytes,
        )

    def most_bytes(self, devices: tuple[DeviceReport, ...]) -> int:
        """What might be booked if nothing ran here."""
        return self.budget_bytes(devices, 0) + self.launcher_bytes


def _measure(pids: frozenset[int]) -> tuple[int, int]:
    return host_memory()[0], sum(map(process_bytes, pids))
