"""One scheduler process: the driver, its HTTP face, and its place in the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from runtime import places
from runtime.contract.config import Config
from runtime.registry.protocol import Registry, Service
from runtime.registry.registration import keep_registered, withdraw
from scheduler.admin.api import make_app
from scheduler.driver import Driver


async def run_scheduler(
    config: Config,
    registry: Registry,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set. `on_ready(url)` is called when the API listens."""
    stop = stop or asyncio.Event()
    driver = Driver(config, registry)
    runner = web.AppRunner(make_app(driver), access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.scheduler.host, config.scheduler.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        driver.url = config.scheduler.advertise_url or places.base_url(host, port)
        service = Service(
            service_id=f"stoker-scheduler-{config.node_id()}-{port}", name="stoker-scheduler",
            address=host, port=port,
        )  # fmt: skip
        driver.spawn(driver.lead_or_stand_by())
        driver.spawn(keep_registered(registry, service))
        driver.spawn(driver.keep_footprints())
        driver.spawn(driver.access.keep_usage(lambda: driver.leads))
        driver.spawn(driver.rules.follow())
        if on_ready is not None:
            on_ready(driver.url)
        await stop.wait()
        await withdraw(registry, service)
    finally:
        await driver.close()
        await runner.cleanup()
