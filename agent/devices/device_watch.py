"""The latest figures of a node's devices, read in a thread however slow their driver is.

Rules this file keeps:
- one read at a time; whoever asks for the last figures never waits;
- host memory is measured as often as it costs little: walking the pages of a process that holds
  hundreds of GiB takes a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from agent.devices.inventory import DeviceSource, process_bytes
from runtime.wire.agent_messages import DeviceReport

log = logging.getLogger("stoker.agent")

_FREE_S = 30.0  # how long dead processes' device memory may take to be seen free
_FREE_POLL_S = 0.1
_HOST_SHARE = 0.05  # of the time may go into measuring host memory
_STALE_S = 10.0  # a device not read for so long is unhealthy

Pids = dict[str, set[int]]


class DeviceWatch:
    """Reads a device source, and remembers what it said."""

    def __init__(self, source: DeviceSource, live_pids: Callable[[], Awaitable[Pids]]) -> None:
        self.kind = source.kind
        self._source = source
        self._live_pids = live_pids
        self._one_at_a_time = asyncio.Lock()
        self._dying: Pids = {}
        self._pids: Pids = {}
        self._reports: tuple[DeviceReport, ...] = ()
        self._replica_bytes: dict[str, int] = {}
        self._host_bytes: dict[str, int] = {}
        self._host_due_at = 0.0
        self._read_at = time.monotonic()

    async def read(self) -> None:
        """Read every device again. A failure keeps the last figures."""
        # Shielded: a caller that gives up must not let a second read run beside this one.
        await asyncio.shield(asyncio.create_task(self._read()))

    async def _read(self) -> None:
        async with self._one_at_a_time:
            self._pids = await self._live_pids()
            try:
                reports = await asyncio.to_thread(self._measure, self._dying | self._pids)
            except Exception as error:  # a driver's fault must not end the agent
                log.warning("the devices can't be read: %r", error)
                return
            self._reports = tuple(reports)
            self._replica_bytes = self._source.replica_bytes()
            self._read_at = time.monotonic()

    def _measure(self, pids: Pids) -> list[DeviceReport]:
        reports = self._source.read(pids)
        began = time.monotonic()
        if self.kind == "cpu":
            self._host_bytes = self._source.replica_bytes()
        elif began >= self._host_due_at:
            self._host_bytes = {r: sum(map(process_bytes, group)) for r, group in pids.items()}
            self._host_due_at = began + (time.monotonic() - began) / _HOST_SHARE
        return reports

    def last(self) -> tuple[DeviceReport, ...]:
        """As last read; unhealthy where that is too long ago."""
        stale_s = time.monotonic() - self._read_at
        if stale_s < _STALE_S:
            return self._reports
        reason = f"its driver has not answered for {stale_s:.0f} s"
        return tuple(
            msgspec.structs.replace(d, healthy=False, unhealthy_reason=reason)
            for d in self._reports
        )

    def used_bytes(self, replica_id: str) -> int | None:
        """What a replica was last seen to use; None if that can't be measured."""
        return self._replica_bytes.get(replica_id)

    def host_bytes(self, replica_id: str) -> int:
        """Host memory of a replica's processes, shared pages by share; 0 if not measured yet."""
        return self._host_bytes.get(replica_id, 0)

    def pids(self) -> set[int]:
        """Every process of the replicas, as last seen."""
        return {pid for group in self._pids.values() for pid in group}

    def dying(self, replica_id: str) -> None:
        """From now on the pids it was last seen with count, dead or not, until `wait_free`."""
        self._dying[replica_id] = self._pids.get(replica_id, set())

    async def wait_free(self, replica_id: str) -> None:
        """Returns once the devices show no memory of those pids, or with a warning if they
        still do after a while."""
        try:
            async with asyncio.timeout(_FREE_S):
                await self._until_free(replica_id)
        except TimeoutError:
            used_bytes = self._replica_bytes.get(replica_id, 0)
            log.warning(
                "%s is dead, but after %.0f s its devices still show %d bytes of it",
                replica_id,
                _FREE_S,
                used_bytes,
            )
        finally:
            self._dying.pop(replica_id, None)

    async def _until_free(self, replica_id: str) -> None:
        while True:
            await self.read()
            if not self._replica_bytes.get(replica_id):
                return
            await asyncio.sleep(_FREE_POLL_S)
