"""The router's tie to the scheduler: tables of routes and of keys in, demand and use out.

Rules this file keeps:
- the last tables are kept without limit; no failure of scheduler or registry ever takes them away;
- within one unbroken tie to one leader only a higher version is taken. A tie is (re)made, after a
  failure or for a new leader, by asking with `since=0`, and that answer is taken whatever its
  version: the leader of the highest term knows best, even if its cluster was set up again;
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
from typing import TypeVar

import aiohttp
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from runtime import outside, places
from runtime.contract.access import KeyTable, PeerUsage, RouterUsage
from runtime.registry.protocol import Registry, RegistryError
from runtime.router.admission.gate import Gate
from runtime.router.admission.key_limits import DAY_S
from runtime.router.callers.keys import Keys
from runtime.router.control import saved_tables
from runtime.sockets import tcp_connector
from runtime.wire.routes import REPORT_S, DemandReport, RouteTable

log = logging.getLogger("stoker.router")

POLL_S = 25.0
USED_WITHIN_S = 60.0  # replicas that were used since are told of in every report
TIMEOUT_S = 5.0  # for an answer that is due at once


class LinkError(Exception):
    """The scheduler could not be asked; says why."""


_Table = TypeVar("_Table", RouteTable, KeyTable)


class _Leader(msgspec.Struct, frozen=True):
    url: str
    term: int


class Link:
    """Keeps `gate`'s route table and `keys` fresh, tells the scheduler what is asked for and used.

    `folder`: where the last tables are kept.
    """

    def __init__(
        self,
        gate: Gate,
        keys: Keys,
        registry: Registry,
        *,
        prefix: str,
        token: str,
        router_id: str,
        folder: Path,
    ) -> None:
        self._gate = gate
        self._keys = keys
        self._registry = registry
        self._leader_key = places.key(prefix, "leader")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._router_id = router_id
        self._folder = folder
        self._boot_id = time.time_ns() // 1_000_000
        self._seq = 0
        self._leader: _Leader | None = None
        self._last_known: _Leader | None = None  # asked again when the registry is down as well
        self._since = {"routes": 0, "keys": 0}  # 0: the next one is taken whatever its version
        self._tell_all = True  # of what was used, not only what changed
        self._told: _Leader | None = None  # who has heard when every replica was used
        self._lost = False
        self._report_now = asyncio.Event()
        gate.on_first_wait = self._report_now.set

    def restore(self) -> None:
        """Put the tables of the last run in force, if there are any."""
        routes = self._kept("routes", RouteTable)
        if routes is not None:
            self._gate.routes(routes)
        keys = self._kept("keys", KeyTable)
        if keys is not None:
            self._keys.load(keys, self._gate.loop.time())
        self._turn_day()

    def _kept(self, name: str, kind: type[saved_tables.Table]) -> saved_tables.Table | None:
        file = places.below(self._folder, f"{name}.json")
        try:
            return saved_tables.load(file, kind)
        except (OSError, ValueError) as error:
            log.warning("cannot read the last table %s: %s", file, error)
            return None

    async def run(self) -> None:
        """Until cancelled."""
        async with (
            aiohttp.ClientSession(headers=self._headers, connector=tcp_connector()) as session,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(_forever(lambda: self._poll_routes(session), self._failed))
            tasks.create_task(_forever(lambda: self._poll_keys(session), self._failed))
            tasks.create_task(_forever(lambda: self._report(session), self._failed))

    # -------------------------------------------------------------------------------- tables

    async def _poll_routes(self, session: aiohttp.ClientSession) -> None:
        table = await self._poll(session, "routes", RouteTable)
        if table is not None:
            self._gate.routes(table)
            self._report_now.set()
            await self._keep("routes", table)

    async def _poll_keys(self, session: aiohttp.ClientSession) -> None:
        table = await self._poll(session, "keys", KeyTable)
        if table is not None:
            self._keys.load(table, self._gate.loop.time())
            await self._keep("keys", table)

    async def _poll(
        self, session: aiohttp.ClientSession, name: str, kind: type[_Table]
    ) -> _Table | None:
        """One long poll: a table that is to be put in force, if there is one."""
        leader = await self._find_leader()
        since = self._since[name]
        timeout = aiohttp.ClientTimeout(total=POLL_S + TIMEOUT_S, sock_connect=TIMEOUT_S)
        query = {"since": str(since), "wait_s": f"{POLL_S:g}"}
        where = places.url(leader.url, "internal", name)
        async with session.get(where, params=query, timeout=timeout) as response:
            body = await response.read()
        if self._leader != leader:
            return None  # the tie broke while we waited; what came may be an old leader's
        if response.status == 404:  # an older scheduler has no such table
            await asyncio.sleep(POLL_S)
            return None
        if response.status not in (200, 204):
            raise LinkError(f"the scheduler answered /internal/{name} with {response.status}")
        if self._lost:
            self._lost = False
            log.info("tied to the scheduler at %s again", leader.url)
        if response.status == 204:
            return None
        table = outside.decode(body, kind)
        if since and table.version <= since:
            log.warning("ignored table %d of %s: %d is in force", table.version, name, since)
            await asyncio.sleep(0.1)  # a scheduler that repeats itself must not make us spin
            return None
        self._since[name] = table.version
        return table

    async def _keep(self, name: str, table: msgspec.Struct) -> None:
        file = places.below(self._folder, f"{name}.json")
        try:
            await asyncio.to_thread(saved_tables.save, file, table)
        except OSError as error:
            log.warning("cannot keep the table %s: %s", file, error)

    # -------------------------------------------------------------------------------- demand

    async def _report(self, session: aiohttp.ClientSession) -> None:
        """Wait until a report is due, send it, and hear what others used."""
        try:
            async with asyncio.timeout(REPORT_S):
                await self._report_now.wait()
        except TimeoutError:
            pass
        self._report_now.clear()
        self._turn_day()
        leader = await self._find_leader()
        demand = self._demand()
        try:
            await self._post(session, leader, "demand", demand)
            self._told = leader
            await self._tell_use(session, leader, demand)
        except BaseException:
            self._report_now.set()  # it is still due
            raise

    async def _tell_use(
        self, session: aiohttp.ClientSession, leader: _Leader, demand: DemandReport
    ) -> None:
        """What was used of keys' limits here and, in the answer, elsewhere."""
        if not self._keys.any:
            return
        use = RouterUsage(
            router_id=demand.router_id,
            boot_id=demand.boot_id,
            usage=self._keys.report(self._tell_all),
        )
        self._tell_all = True  # unless this arrives
        body = await self._post(session, leader, "usage", use)
        self._tell_all = False
        self._keys.hear(outside.decode(body, PeerUsage), self._gate.loop.time())

    def _turn_day(self) -> None:
        wall_s = time.time()
        day = time.strftime("%Y-%m-%d", time.gmtime(wall_s))
        self._keys.day(day, DAY_S - wall_s % DAY_S, self._gate.loop.time())

    async def _post(
        self, session: aiohttp.ClientSession, leader: _Leader, name: str, message: msgspec.Struct
    ) -> bytes:
        where = places.url(leader.url, "internal", name)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with session.post(
            where, data=msgspec.json.encode(message), timeout=timeout
        ) as response:
            body = await response.read()
        if response.status >= 300:
            raise LinkError(f"the scheduler answered /internal/{name} with {response.status}")
        return body

    def _demand(self) -> DemandReport:
        self._seq += 1
        table = self._gate.table
        within_s = USED_WITHIN_S if self._told == self._leader else float("inf")
        models, in_flight = self._gate.demand()
        return DemandReport(
            router_id=self._router_id,
            boot_id=self._boot_id,
            seq=self._seq,
            routes_version=table.version if table else 0,
            models=models,
            in_flight=in_flight,
            idle_s=self._gate.idle_s(within_s),
            sent_s=self._gate.loop.time(),
            targets=self._gate.versions.counts(),
        )

    # -------------------------------------------------------------------------------- the leader

    async def _find_leader(self) -> _Leader:
        if self._leader is None:
            self._leader = await self._read_leader()
            self._since = dict.fromkeys(self._since, 0)
            self._tell_all = True
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
        leader = outside.decode(entry.value, _Leader)
        if self._last_known is not None and leader.term < self._last_known.term:
            raise LinkError(f"the registry names a leader of the old term {leader.term}")
        self._last_known = leader
        return leader

    def _failed(self, state: RetryCallState) -> None:
        """After every failure: read the leader again; say so once."""
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
