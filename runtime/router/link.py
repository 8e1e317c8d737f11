"""The router's tie to the scheduler: route tables in, demand out.

Rules this file keeps:
- the last table is kept for ever; no failure of scheduler or registry ever takes it away;
- within one unbroken tie to one leader only a higher version is taken. A tie is (re)made, after a
  failure or for a new leader, by asking with `since=0`, and that answer is taken whatever its
  version: the leader of the highest term knows best, even if its cluster was set up anew;
- a leader of a lower term than one seen before is not asked;
- demand is reported each second, and at once when a model goes from no waiting request to one or
  a new table is in force (its ack).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from runtime import wire
from runtime.registry import Registry, RegistryError
from runtime.router import table_file
from runtime.router.gate import Gate

log = logging.getLogger("stoker.router")

POLL_S = 25.0
REPORT_S = 1.0
TIMEOUT_S = 5.0  # for an answer that is due at once


class LinkError(Exception):
    """The scheduler could not be asked; says why."""


class _Leader(msgspec.Struct, frozen=True):
    url: str
    term: int


class Link:
    """Keeps `gate`'s route table fresh and tells the scheduler what is asked for."""

    def __init__(
        self, gate: Gate, registry: Registry, *, prefix: str, token: str, router_id: str, file: Path
    ) -> None:
        self._gate = gate
        self._registry = registry
        self._leader_key = f"{prefix}/leader"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._router_id = router_id
        self._file = file
        self._boot_id = time.time_ns() // 1_000_000
        self._seq = 0
        self._leader: _Leader | None = None
        self._last_known: _Leader | None = None  # asked again when the registry is down as well
        self._since = 0  # 0: the next table is taken whatever its version
        self._lost = False
        self._report_now = asyncio.Event()
        gate.on_first_wait = self._report_now.set

    def restore(self) -> None:
        """Put the table of the last run in force, if there is one."""
        try:
            table = table_file.load(self._file)
        except (OSError, ValueError) as error:
            log.warning("cannot read the last route table %s: %s", self._file, error)
            return
        if table is not None:
            self._gate.routes(table)

    async def run(self) -> None:
        """Until cancelled."""
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(_forever(lambda: self._poll(session), self._failed))
            tasks.create_task(_forever(lambda: self._report(session), self._failed))

    # -------------------------------------------------------------------------------- routes

    async def _poll(self, session: aiohttp.ClientSession) -> None:
        """One long poll; whatever it brings is in force when this returns."""
        leader = await self._find_leader()
        since = self._since
        timeout = aiohttp.ClientTimeout(total=POLL_S + TIMEOUT_S, sock_connect=TIMEOUT_S)
        query = {"since": str(since), "wait_s": f"{POLL_S:g}"}
        url = f"{leader.url}/internal/routes"
        async with session.get(url, params=query, timeout=timeout) as response:
            body = await response.read()
        if self._leader != leader:
            return  # the tie broke while we waited; what came may be an old leader's
        if response.status == 200:
            await self._take(wire.decode(body, wire.RouteTable), since)
        elif response.status != 204:
            raise LinkError(f"the scheduler answered /internal/routes with {response.status}")
        if self._lost:
            self._lost = False
            log.info("tied to the scheduler at %s again", leader.url)

    async def _take(self, table: wire.RouteTable, since: int) -> None:
        if since and table.version <= since:
            log.warning("ignored route table %d: %d is in force", table.version, since)
            await asyncio.sleep(0.1)  # a scheduler that repeats itself must not make us spin
            return
        self._since = table.version
        self._gate.routes(table)
        self._report_now.set()
        try:
            await asyncio.to_thread(table_file.save, self._file, table)
        except OSError as error:
            log.warning("cannot keep the route table in %s: %s", self._file, error)

    # -------------------------------------------------------------------------------- demand

    async def _report(self, session: aiohttp.ClientSession) -> None:
        """Wait until a report is due, and send it."""
        try:
            async with asyncio.timeout(REPORT_S):
                await self._report_now.wait()
        except TimeoutError:
            pass
        self._report_now.clear()
        leader = await self._find_leader()
        url = f"{leader.url}/internal/demand"
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with session.post(
                url, data=wire.encode(self._demand()), timeout=timeout
            ) as response:
                await response.read()
            if response.status >= 300:
                raise LinkError(f"the scheduler answered /internal/demand with {response.status}")
        except BaseException:
            self._report_now.set()  # it is still due
            raise

    def _demand(self) -> wire.DemandReport:
        self._seq += 1
        table = self._gate.table
        models, in_flight = self._gate.demand()
        return wire.DemandReport(
            router_id=self._router_id,
            boot_id=self._boot_id,
            seq=self._seq,
            routes_version=table.version if table else 0,
            models=models,
            in_flight=in_flight,
            targets=self._gate.versions.counts(),
        )

    # -------------------------------------------------------------------------------- the leader

    async def _find_leader(self) -> _Leader:
        if self._leader is None:
            self._leader = await self._read_leader()
            self._since = 0
        return self._leader

    async def _read_leader(self) -> _Leader:
        try:
            entry = await self._registry.get(self._leader_key)
        except RegistryError as error:
            if self._last_known is not None:
                return self._last_known
            raise LinkError(f"the registry cannot be asked for the leader: {error}") from None
        if entry is None:
            raise LinkError(f"the registry has no leader ({self._leader_key})")
        leader = msgspec.json.decode(entry.value, type=_Leader)
        if self._last_known is not None and leader.term < self._last_known.term:
            raise LinkError(f"the registry names a leader of the old term {leader.term}")
        self._last_known = leader
        return leader

    def _failed(self, state: RetryCallState) -> None:
        """After every failure: read the leader anew; say so once."""
        self._leader = None
        error = state.outcome.exception() if state.outcome else None
        if not self._lost:
            self._lost = True
            log.warning("no tie to the scheduler, serving by the last table: %r", error)


async def _forever(
    step: Callable[[], Awaitable[None]], failed: Callable[[RetryCallState], None]
) -> None:
    """`step` again and again; after failures with growing pauses of at most a second."""
    while True:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(Exception),
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            before_sleep=failed,
        ):
            with attempt:
                await step()
