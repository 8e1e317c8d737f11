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


async def run_scheduler(
    config: Config,
    registry: Registry,
    *,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until `stop` is set. `on_ready(url)` is called when the API listens."""
    stop = stop or asyncio.Event()
    tasks, clock = Tasks(), asyncio.get_running_loop().time
    store = Store(registry, config.registry.prefix)
    core = Core(_settings(config.scheduler))
    agents = AgentCalls(core, config.cluster_token, tasks, clock)
    learned = LearnedState(store, core)
    driver = Driver(core, agents, learned, tasks, clock)
    stored = StoredState(store, driver)
    rules = RuleBook(store, driver)
    access = Access(store, clock)
    leadership = Leadership(store, driver, stored, rules, access)
    app = make_app(config, driver, stored, rules, access, leadership)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.scheduler.host, config.scheduler.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        leadership.url = config.scheduler.advertise_url or places.base_url(host, port)
        service = Service(
            service_id=f"stoker-scheduler-{config.node_id()}-{port}", name="stoker-scheduler",
            address=host, port=port,
        )  # fmt: skip
        tasks.spawn(leadership.run())
        tasks.spawn(keep_registered(registry, service))
        tasks.spawn(learned.keep_saving(lambda: driver.leads))
        tasks.spawn(access.keep_usage(lambda: driver.leads))
        tasks.spawn(rules.follow())
        if on_ready is not None:
            on_ready(leadership.url)
        await stop.wait()
        await withdraw(registry, service)
    finally:
        await tasks.close()
        await agents.close()
        await runner.cleanup()


def _settings(config: SchedulerConfig) -> Settings:
    return Settings(
        node_timeout_s=config.node_timeout_s,
        recovery_grace_s=config.recovery_grace_s,
        drain_grace_s=config.drain_grace_s,
        min_dwell_s=config.min_dwell_s,
        stand_by=config.stand_by,
    )
