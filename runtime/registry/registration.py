"""Keeps one part of Stoker findable in the registry while it runs.

Rules this file keeps:
- nothing waits for a registry that is down: registering is tried again without end, and said once;
- a service whose session was lost (`keep_alive` says so, or fails) is registered again;
- leaving takes FAREWELL_S at most: a registry that is down holds up no shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from runtime.registry.protocol import Registry, RegistryError, Service

log = logging.getLogger("stoker.registration")

SERVICE_TTL_S = 10.0
FAREWELL_S = 2.0
FIRST_PAUSE_S = 1.0  # before who may write is asked again; doubles


async def keep_registered(
    registry: Registry, service: Service, ttl_s: float = SERVICE_TTL_S
) -> None:
    """Register and prolong, three times in `ttl_s`, until it is cancelled."""
    while True:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(RegistryError),
            wait=wait_exponential(multiplier=0.5, max=ttl_s / 3),
            before_sleep=lambda state: _say_unregistered(state.attempt_number, service),
        )
        await retrying(registry.register, service, ttl_s)
        with contextlib.suppress(RegistryError):  # then it is registered again
            known = True
            while known:
                await asyncio.sleep(ttl_s / 3)
                known = await registry.keep_alive(service.service_id)


def _say_unregistered(attempt: int, service: Service) -> None:
    if attempt == 1:
        log.warning("the registry does not answer; registering %s goes on", service.service_id)


async def warn_if_open(registry: Registry, key: str) -> None:
    """Say once, as soon as the registry answers, that others may write `key` there."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(RegistryError),
        wait=wait_exponential(multiplier=FIRST_PAUSE_S, max=60.0),
    )
    who: str | None = await retrying(registry.open_to, key)
    if who:
        log.warning(
            "%s may be written by %s. Whoever does is sent the cluster token, and leads. With"
            " Consul, turn ACLs on (default_policy deny) and set registry.consul_token",
            key,
            who,
        )


async def withdraw(registry: Registry, service: Service) -> None:
    """Leave the registry, if it answers."""
    with contextlib.suppress(RegistryError, TimeoutError):
        async with asyncio.timeout(FAREWELL_S):
            await registry.deregister(service.service_id)
