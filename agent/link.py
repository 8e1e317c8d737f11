"""How a node tells the scheduler what it is: heartbeats to whoever leads.

Rules this file keeps:
- neither a registry nor a scheduler that is down stops anything: the last known leader is tried
  again and again, and what a failure means is said once, not each second;
- heartbeats asked for while one is under way become one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import aiohttp
import msgspec
from msgspec import Struct

from runtime import outside, places
from runtime.registry.protocol import Registry, RegistryError
from runtime.wire.agent_messages import Heartbeat, HeartbeatReply

log = logging.getLogger("stoker.agent")

_POST_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_LOOKUP_TIMEOUT_S = 5.0


class Leader(Struct, frozen=True):
    """The value of the leader key."""

    url: str
    term: int = 0


class _NotAccepted(Exception):
    """A scheduler did not take the heartbeat; the message says why."""


class SchedulerLink:
    """Sends heartbeats to whoever leads."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        registry: Registry,
        *,
        leader_key: str,
        token: str,
        interval_s: float,
        due: asyncio.Event,
        build: Callable[[], Heartbeat],
        on_reply: Callable[[HeartbeatReply], bool],
    ) -> None:
        """`due` is set where a heartbeat should be sent at once; `build` makes the one of this
        moment; `on_reply` returns False where the scheduler that answered is an outdated leader."""
        self._session = session
        self._registry = registry
        self._leader_key = leader_key
        self._headers = {"Authorization": f"Bearer {token}"}
        self._interval_s = interval_s
        self._build = build
        self._on_reply = on_reply
        self._url: str | None = None
        self._due = due
        self._trouble: str | None = None

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            self._due.clear()
            await self.send()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._due.wait()

    async def send(self) -> bool:
        """One heartbeat, to the leader we know or else to the one the registry names."""
        try:
            if self._url is None:
                await self._post(await self._find())
            else:
                await self._post_again(self._url)
        except _NotAccepted as error:
            if self._trouble is None:
                log.warning("no heartbeat reaches a scheduler: %s", error)
            self._trouble = str(error)
            return False
        if self._trouble:
            log.info("heartbeats go to %s", self._url)
        self._trouble = None
        return True

    async def _post_again(self, url: str) -> None:
        try:
            await self._post(url)
        except _NotAccepted:
            found = await self._find()
            if found == url:
                raise
            await self._post(found)

    async def _post(self, url: str) -> None:
        try:
            async with self._session.post(
                places.url(url, "internal", "heartbeat"),
                data=msgspec.json.encode(self._build()),
                headers=self._headers | {"Content-Type": "application/json"},
                timeout=_POST_TIMEOUT,
            ) as reply:
                body = await reply.read()
                if reply.status != 200:
                    raise _NotAccepted(f"{url} answers {reply.status}: {body[:200]!r}")
                if not self._on_reply(outside.decode(body, HeartbeatReply)):
                    raise _NotAccepted(f"{url} leads no more")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _NotAccepted(f"{url}: {error or type(error).__name__}") from None
        self._url = url

    async def _find(self) -> str:
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
                entry = await self._registry.get(self._leader_key)
        except (RegistryError, TimeoutError) as error:
            raise _NotAccepted(f"the registry does not answer: {error}") from None
        if entry is None:
            raise _NotAccepted("no scheduler leads yet")
        try:
            return outside.decode(entry.value, Leader).url.rstrip("/")
        except ValueError as error:
            raise _NotAccepted(f"{self._leader_key} holds no leader: {error}") from None
