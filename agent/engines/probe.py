"""Asks one engine how it is: quickly while it starts, each second while it serves.

Rules this file keeps: it only looks and tells; an engine that does not answer in time is unhealthy.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
from msgspec import Struct

from agent.core.messages import HealthChanged, StatusSeen
from agent.core.periods import DRAIN_PROBE_S, READY_PROBE_S, START_PROBE_S
from agent.engines.reported_load import EngineLoad, read_load
from runtime import outside
from runtime.wire.agent_messages import ReplicaPhase

_STATUS_PATH = "/stoker/status"
_METRICS_PATH = "/metrics"
_LOAD_PAUSE_S = 2.0  # between looks at its metrics, while it has requests
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)

_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class _Status(Struct, frozen=True):
    in_flight: int
    idle_for_s: float | None = None


class Target(Struct, frozen=True, kw_only=True):
    """Where one engine is reached."""

    replica_id: str
    base_url: str
    health_path: str
    control_key: str


async def is_healthy(session: aiohttp.ClientSession, target: Target) -> bool:
    """Whether its health check answers 200 now."""
    try:
        async with session.get(target.base_url + target.health_path, timeout=_TIMEOUT) as reply:
            return reply.status == 200
    except _FAILURES:
        return False


class Prober:
    """Probes one replica until its phase says that there is nothing to ask any more."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        phase: Callable[[], ReplicaPhase | None],
        tell: Callable[[HealthChanged | StatusSeen], object],
    ) -> None:
        self._session = session
        self._target = target
        self._phase = phase
        self._tell = tell
        self._poked = asyncio.Event()
        self._in_flight = 0
        self._load_due_at = 0.0
        self.load = EngineLoad()  # as last seen

    def poke(self) -> None:
        """The phase changed: look at once."""
        self._poked.set()

    async def run(self) -> None:
        """Returns once the replica's engine is not to be asked any more."""
        while True:
            self._poked.clear()
            phase = self._phase()
            if phase == "starting":
                await self._probe_start()
                pause_s = START_PROBE_S
            elif phase == "ready":
                await asyncio.gather(self._probe_health(), self._probe_status(), self._probe_load())
                pause_s = READY_PROBE_S
            elif phase == "draining":
                await self._probe_status()
                pause_s = DRAIN_PROBE_S
            elif phase == "asleep":
                await self._probe_health()
                pause_s = READY_PROBE_S
            elif phase in ("sleeping", "waking"):
                pause_s = READY_PROBE_S  # it is busy; the core has a limit for that
            else:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._poked.wait()

    async def _probe_start(self) -> None:
        if await is_healthy(self._session, self._target):
            self._tell_health(True)

    async def _probe_health(self) -> None:
        self._tell_health(await is_healthy(self._session, self._target))

    async def _ask(self, path: str) -> bytes:
        target = self._target
        headers = {"Authorization": f"Bearer {target.control_key}"}
        async with self._session.get(
            target.base_url + path, headers=headers, timeout=_TIMEOUT
        ) as reply:
            reply.raise_for_status()
            return await reply.read()

    async def _probe_load(self) -> None:
        """What its metrics say; once more after its last request, and then no more."""
        now = time.monotonic()
        known_idle = self.load.kv_cache_usage is not None and self.load.is_idle
        if now < self._load_due_at or (known_idle and not self._in_flight):
            return
        self._load_due_at = now + _LOAD_PAUSE_S
        with contextlib.suppress(*_FAILURES):
            self.load = read_load((await self._ask(_METRICS_PATH)).decode(errors="replace"))

    async def _probe_status(self) -> None:
        target = self._target
        asked_at = time.monotonic()
        try:
            status = outside.decode(await self._ask(_STATUS_PATH), _Status)
        except _FAILURES:
            return  # the health check and the drain's grace time judge it
        self._in_flight = status.in_flight
        self._tell(
            StatusSeen(
                now=time.monotonic(),
                replica_id=target.replica_id,
                in_flight=status.in_flight,
                idle_for_s=status.idle_for_s,
                asked_at=asked_at,
            )
        )

    def _tell_health(self, healthy: bool) -> None:
        self._tell(
            HealthChanged(now=time.monotonic(), replica_id=self._target.replica_id, healthy=healthy)
        )
