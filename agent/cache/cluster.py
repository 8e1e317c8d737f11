"""What the nodes' caches know of each other: who offers what, and who may ask the origin.

Rules this file keeps:
- peers are asked when something is wanted, so nothing stored can go stale;
- one lease per model: its holder asks the hub or the object store, the others follow it;
- a registry that is down costs what it costs: peers that were known are asked, no lease is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection

import aiohttp

from agent.cache.policy import PeerOffer
from runtime import outside, places
from runtime.checkpoints.model_files import ModelRef, Offer, model_id
from runtime.registry.protocol import Lock, Registry, RegistryError

log = logging.getLogger("stoker.agent")

_LEASE_TTL_S = 15.0
_ASK_TIMEOUT_S = 5.0


class Lease:
    """The right to ask the origin for one model, kept until `release`."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while self._lock.held:
            await asyncio.sleep(_LEASE_TTL_S / 3)
            with contextlib.suppress(RegistryError):  # it is tried again before it is lost
                await self._lock.renew()

    async def release(self) -> None:
        """Stop renewing, and give the lock up."""
        self._renewing.cancel()
        with contextlib.suppress(RegistryError):
            await self._lock.release()


class PeerCaches:
    """The other nodes' caches, and the registry."""

    def __init__(
        self,
        registry: Registry,
        session: aiohttp.ClientSession,
        *,
        token: str,
        prefix: str,
        own_url: Callable[[], str],
    ) -> None:
        """`own_url` is where this agent answers, "" until it does."""
        self.token = token
        self._registry = registry
        self._session = session
        self._prefix = prefix
        self._own_url = own_url
        self._known: tuple[str, ...] = ()

    async def peers(self) -> tuple[str, ...]:
        """The base URLs of every other agent, the last known ones while the registry is down."""
        try:
            services, _ = await self._registry.services("stoker-agent")
        except RegistryError as error:
            log.warning("the registry does not answer (%s); asking the peers known before", error)
            return self._known
        urls = (places.base_url(service.address, service.port) for service in services)
        self._known = tuple(u for u in urls if u != self._own_url())
        return self._known

    async def offers(
        self, ref: ModelRef, peers: Collection[str], *, seen: int = 0, wait_s: float = 0.0
    ) -> list[PeerOffer]:
        """What `peers` have of the model; one that does not answer has nothing.

        With `wait_s`, a peer that is pulling it answers once it has more than `seen` files.
        """
        asked = (self._offer(peer, ref, seen, wait_s) for peer in peers)
        found = await asyncio.gather(*asked)
        return [PeerOffer(url=p, offer=o) for p, o in zip(peers, found, strict=True) if o]

    async def _offer(self, peer: str, ref: ModelRef, seen: int, wait_s: float) -> Offer | None:
        try:
            async with self._session.get(
                places.url(peer, "agent", "cache", "offer"),
                params={
                    "source": ref.source,
                    "asked": ref.asked,
                    "seen": str(seen),
                    "wait_s": str(wait_s),
                },
                headers={"Authorization": f"Bearer {self.token}"},
                timeout=aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S + wait_s),
            ) as answer:
                if answer.status == 200:
                    return outside.decode(await answer.read(), Offer)
                if answer.status in (401, 403):
                    log.warning("%s refuses this node's cluster_token; is it the same there?", peer)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            log.info("%s does not say whether it has %s: %r", peer, ref.text, error)
        return None

    async def lease(self, ref: ModelRef) -> Lease | None:
        """The model's lease; None if another node has it. Raises RegistryError."""
        holder = self._own_url().encode()
        lock = await self._registry.acquire(self._key("leases", ref), holder, _LEASE_TTL_S)
        return Lease(lock) if lock else None

    async def holder(self, ref: ModelRef) -> str | None:
        """Who asked the origin last: a hint."""
        try:
            entry = await self._registry.get(self._key("leases", ref))
        except RegistryError:
            return None
        return entry.value.decode() if entry and entry.value else None

    async def pinned(self, ref: ModelRef) -> str | None:
        """The commit that every node takes `ref` for; None if it was never asked."""
        try:
            entry = await self._registry.get(self._key("pins", ref))
        except RegistryError:
            return None
        return entry.value.decode() if entry else None

    async def pin(self, ref: ModelRef, revision: str) -> None:
        """From now on every node takes `ref` for this revision."""
        try:
            await self._registry.put(self._key("pins", ref), revision.encode())
        except RegistryError as error:
            log.warning("%s is not pinned for other nodes: %s", ref.text, error)

    def _key(self, kind: str, ref: ModelRef) -> str:
        return places.key(self._prefix, "cache", kind, model_id(ref.source, ref.asked))
