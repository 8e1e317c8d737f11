"""One scheduler process: its parts put together, its HTTP face, and its place in the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from runtime import places
from runtime.contract.config import Config, SchedulerConfig
from runtime.registry.protocol import Registry, Service
from runtime.registry.registration import keep_registered, withdraw
from scheduler.access import Access
from scheduler.admin.api import make_app
from scheduler.agent_calls import AgentCalls
from scheduler.core.decisions import Core
from scheduler.core.turn import Settings
from scheduler.driver import Driver
from scheduler.leadership import Leadership
from scheduler.learned_state import LearnedState
from scheduler.route_book import RuleBook
from scheduler.store import Store
from scheduler.stored_state import StoredState
from scheduler.tasks import Tasks


class Parts:
    """What one scheduler is made of, but for its HTTP face."""

    def __init__(self, config: Config, registry: Registry) -> None:
        clock = asyncio.get_running_loop().time
        store = Store(registry, config.registry.prefix)
        core = Core(_settings(config.scheduler))
        self.tasks = Tasks()
        self.agents = AgentCalls(core, config.cluster_token, self.tasks, clock)
        self.learned = LearnedState(store, core)
        self.driver = Driver(core, self.agents, self.learned, self.tasks, clock)
        self.stored = StoredState(store, self.driver)
        self.rules = RuleBook(store, self.driver)
        self.access = Access(store, clock)
        self.leadership = Leadership(store, self.driver, self.stored, self.rules, self.access)

    def begin(self, url: str) -> None:
        """Lead or stand by; others are sent to `url` while this one leads."""
        self.leadership.url = url
        self.tasks.spawn(self.leadership.run())
        self.tasks.spawn(self.learned.keep_saving(lambda: self.driver.leads))
        self.tasks.spawn(self.access.keep_usage(lambda: self.driver.leads))
        self.tasks.spawn(self.rules.follow())

    async def close(self) -> None:
        """Lead no more, and end what runs."""
        await self.tasks.close()
        await self.agents.close()


async def run_scheduler(
    config: Config,
    registry: Registry,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set. `on_ready(url)` is called when the API listens."""
    stop = stop or asyncio.Event()
    parts = Parts(config, registry)
    app = make_app(config, parts.driver, parts.stored, parts.rules, parts.access, parts.leadership)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.scheduler.host, config.scheduler.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        service = Service(
            service_id=f"stoker-scheduler-{config.node_id()}-{port}", name="stoker-scheduler",
            address=host, port=port,
        )  # fmt: skip
        url = config.scheduler.advertise_url or places.base_url(host, port)
        parts.begin(url)
        parts.tasks.spawn(keep_registered(registry, service))
        if on_ready is not None:
            on_ready(url)
        await stop.wait()
        await withdraw(registry, service)
    finally:
        await parts.close()
        await runner.cleanup()


def _settings(config: SchedulerConfig) -> Settings:
    return Settings(
        node_timeout_s=config.node_timeout_s,
        recovery_grace_s=config.recovery_grace_s,
        drain_grace_s=config.drain_grace_s,
        min_dwell_s=config.min_dwell_s,
        stand_by=config.stand_by,
        starts_at_once=config.starts_at_once,
        shells=config.shells,
    )
