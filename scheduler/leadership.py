"""Takes the leader lock, leads until it is lost, and stands by.

Rules this file keeps:
- the term is written by compare-and-set once the lock is held: who is overtaken in between gives
  the lock back and leads nothing;
- a leader knows all that is stored before it acts;
- whatever ends a try to lead, the lock is given back and the next try comes;
- a core that keeps failing is given up with all that it knows: the next term learns it again from
  the registry and the agents. Whatever that does not cure costs a pause in an hour, not one a
  minute: each next time comes twice as late.
- a registry that is down for less than the lock's time costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from runtime.outside import decode
from runtime.registry.protocol import Lock, RegistryError
from scheduler.access import Access
from scheduler.driver import Driver
from scheduler.route_book import RuleBook
from scheduler.state import messages as m
from scheduler.store import Store
from scheduler.stored_state import StoredState

log = logging.getLogger("stoker.scheduler")

LEADER_TTL_S = 6.0  # Consul's shortest is 10 s: the registry rounds up
TRY_AGAIN_S = 0.5  # where another one leads
PAUSE_S = 1.0  # after a try that failed
START_OVER_S = 60.0  # a leader whose core keeps failing goes on for so long, the first time
MAX_START_OVER_S = 3600.0


class Holder(msgspec.Struct, frozen=True):
    """Who leads, as the registry's lock says it."""

    url: str | None = None
    term: int = 0


class Leadership:
    """One scheduler's part in who leads; `driver.leads` says whether it does."""

    def __init__(
        self,
        store: Store,
        driver: Driver,
        stored: StoredState,
        rules: RuleBook,
        access: Access,
    ) -> None:
        self._store = store
        self._driver = driver
        self._stored = stored
        self._rules = rules
        self._access = access
        self._outranked = False
        self._start_over_s = START_OVER_S
        self.url = ""  # where this scheduler is called; others are sent there while it leads
        self.why_not_leading = ""  # what the last try to lead failed of

    async def run(self) -> None:
        """Take the lock, lead until it is lost, and try again, until cancelled."""
        while True:
            try:
                await self._campaign()
            except RegistryError as error:
                self.why_not_leading = f"the registry does not answer: {error}"
                log.warning(self.why_not_leading)
                await asyncio.sleep(PAUSE_S)
            except Exception as error:  # a scheduler that tries no more would stand by until killed
                self.why_not_leading = f"it could not lead: {error}"
                log.exception(self.why_not_leading)
                await asyncio.sleep(PAUSE_S)

    async def hear_epoch(self, epoch: int) -> None:
        """An agent has obeyed a later leader, so it would refuse this one forever.

        That leader's registry may be lost: then the next term has to be higher than it.
        """
        driver = self._driver
        if not driver.leads or epoch <= driver.core.state.term or self._outranked:
            return
        self._outranked = True
        log.warning(
            "an agent knows term %d, this leader's is %d: leading again with a higher one",
            epoch, driver.core.state.term,
        )  # fmt: skip
        last, version = await self._last_term()
        if last < epoch:
            await self._put_term(epoch, version)

    async def leader_url(self) -> str | None:
        """Where another scheduler leads, as far as the registry tells."""
        try:
            entry = await self._store.registry.get(self._store.key("leader"))
        except RegistryError:
            return None
        url = decode(entry.value, Holder).url if entry else None
        return None if url == self.url else url

    async def _campaign(self) -> None:
        """Take the lock and lead until it is lost, or pause where another one holds it."""
        last, version = await self._last_term()
        term = last + 1
        holder = msgspec.json.encode(Holder(self.url, term))
        key = self._store.key("leader")
        lock = await self._store.registry.acquire(key, holder, LEADER_TTL_S)
        if lock is None:
            await asyncio.sleep(TRY_AGAIN_S)
            return
        try:
            if await self._put_term(term, version):  # or another led in between
                await self._lead(term, lock)
        finally:
            with contextlib.suppress(RegistryError):
                await lock.release()

    async def _lead(self, term: int, lock: Lock) -> None:
        driver = self._driver
        renewed_at = driver.now()
        event = await self._stored.load(term, await self._rules.load())
        await self._access.load()
        log.info("leading", extra={"term": term, "models": len(event.models)})
        self.why_not_leading = ""
        driver.lead(event)
        began_at = driver.now()
        try:
            while lock.held and not self._outranked and not self._starts_over(began_at):
                await asyncio.sleep(m.TICK_S)
                driver.apply(m.Tick(now=driver.now()))
                self._stored.set_floors()
                if driver.now() - renewed_at >= LEADER_TTL_S / 3:
                    renewed_at = await self._renew(lock, renewed_at)
            log.warning("the leader lock is lost or given up: standing by")
        finally:
            self._outranked = False
            driver.stand_by()
            self._access.wake()

    def _starts_over(self, began_at: float) -> bool:
        """Whether the core is failing, and has not just begun."""
        driver = self._driver
        if not driver.keeps_failing or driver.now() - began_at < self._start_over_s:
            return False
        self._start_over_s = min(MAX_START_OVER_S, 2 * self._start_over_s)
        log.error("the core keeps failing: leading again, with what the agents say")
        return True

    async def _renew(self, lock: Lock, renewed_at: float) -> float:
        """When it was last renewed; raises RegistryError once that is too long ago."""
        try:
            async with asyncio.timeout(LEADER_TTL_S / 3):
                await lock.renew()
        except (RegistryError, TimeoutError) as error:
            if self._driver.now() - renewed_at > LEADER_TTL_S:
                raise RegistryError(f"the leader lock could not be renewed: {error}") from error
            return renewed_at
        return self._driver.now()

    async def _last_term(self) -> tuple[int, int]:
        """(the last leader's term, the version of its entry); both 0 before the first one."""
        entry = await self._store.registry.get(self._store.key("term"))
        return (int(entry.value), entry.version) if entry else (0, 0)

    async def _put_term(self, term: int, version: int) -> bool:
        """Whether it was written: not where another wrote in between."""
        return await self._store.registry.put(self._store.key("term"), str(term).encode(), version)
