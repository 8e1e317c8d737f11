"""Delivers webhooks: signed, again and again for an hour, and only to where they may go.

Rules this file keeps:
- the address that is connected to is the one that was looked at: the check is the resolver's;
- a redirect is not followed, and nothing of an answer but its status is read;
- neither a secret nor a whole URL is logged: callers put keys into URLs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from tenacity import (
    AsyncRetrying,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from runtime.router.jobs import signing
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.store import hook_rows
from runtime.router.jobs.store.database import JobStore, StoreError
from runtime.router.jobs.store.hook_rows import HookRow
from runtime.sockets import tcp_connector

log = logging.getLogger("stoker.router.jobs")

ATTEMPTS = 12  # with pauses of 1, 2, 4 ... 600 seconds: about an hour
PAUSE_MAX_S = 600.0
TIMEOUT_S = 15.0
KNOWN = 200  # deliveries of each tenant that are under way, its oldest
AT_A_TIME = 64
OF_ONE_TENANT = 4  # at a time


class NotDelivered(Exception):
    """One attempt has failed; says why."""


class PublicResolver(AbstractResolver):
    """Names as the system has them, without those that are not public."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """A host's public addresses. Raises OSError where it has none."""
        found = await self._inner.resolve(host, port, family)
        public = [result for result in found if signing.is_public(result["host"])]
        if not public:
            raise OSError("it has no public address (router.webhook_private allows others)")
        return public

    async def close(self) -> None:
        """Close the system's resolver."""
        await self._inner.close()


class Webhooks:
    """The deliveries of one host, in the one process that holds its lock.

    `master`: see `signing.key_of`; None: what is in the store waits for one. `private`: any
    address will do.
    """

    def __init__(
        self, store: JobStore, metrics: JobMetrics, *, master: bytes | None, private: bool
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._master = master
        self._private = private
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def step(self) -> None:
        """Begin what the store says is to be delivered. Raises StoreError."""
        if self._master is None:
            return
        for hook in await self._store.read(hook_rows.due, KNOWN):
            if hook.id not in self._tasks:
                key = signing.tenant_key(self._master, hook.tenant)
                task = asyncio.get_running_loop().create_task(self._deliver(hook, key))
                self._tasks[hook.id] = task

    async def close(self) -> None:
        """End what is under way; it is delivered by whoever runs next."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _deliver(self, hook: HookRow, key: bytes) -> None:
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NotDelivered),
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_exponential_jitter(initial=1.0, max=PAUSE_MAX_S),
            ):
                with attempt:
                    await self._post(hook, key)
            self._metrics.hook("delivered")
        except RetryError as error:
            self._metrics.hook("given_up")
            why = error.last_attempt.exception()
            log.warning("webhook %s to %s is given up: %s", hook.id, _host(hook.url), why)
        try:
            await self._store.write(hook_rows.delete, hook.id)
        except StoreError:
            await asyncio.sleep(TIMEOUT_S)  # and then it goes out once more
        del self._tasks[hook.id]

    async def _post(self, hook: HookRow, key: bytes) -> None:
        problem = signing.url_problem(hook.url, self._private)
        if problem is not None:  # the setting has changed
            self._metrics.hook("failed")
            raise NotDelivered(f"its URL {problem}")
        async with self._of(hook.tenant), self._turns:
            try:
                headers = signing.headers(key, hook.id, time.time(), hook.body)
                async with self._sessions().post(
                    hook.url,
                    data=hook.body,
                    headers={"Content-Type": "application/json", **headers},
                    allow_redirects=False,
                ) as response:
                    status = response.status
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                self._metrics.hook("failed")
                raise NotDelivered(f"{type(error).__name__}") from error
        if not 200 <= status < 300:
            self._metrics.hook("failed")
            raise NotDelivered(f"it was answered with status {status}")

    def _of(self, tenant: str) -> asyncio.Semaphore:
        """The turns of one tenant's deliveries: receivers that never answer delay only its own."""
        turns = self._tenants.get(tenant)
        if turns is None:
            turns = self._tenants[tenant] = asyncio.Semaphore(OF_ONE_TENANT)
        return turns

    def _sessions(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = None if self._private else PublicResolver()
            self._session = aiohttp.ClientSession(
                connector=tcp_connector(resolver=resolver, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            )
        return self._session


def _host(url: str) -> str:
    return urlsplit(url).hostname or "?"
