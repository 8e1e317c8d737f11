"""A scheduler process without its HTTP face, put together as scheduler/main.py does it."""

from __future__ import annotations

import asyncio

from runtime.registry.protocol import Registry
from scheduler.access import Access
from scheduler.agent_calls import AgentCalls
from scheduler.core.decisions import Core
from scheduler.driver import Driver
from scheduler.leadership import Leadership
from scheduler.learned_state import LearnedState
from scheduler.route_book import RuleBook
from scheduler.store import Store
from scheduler.stored_state import StoredState
from scheduler.tasks import Tasks


class Scheduler:
    """The parts; `begin` lets it lead or stand by."""

    def __init__(self, registry: Registry, url: str) -> None:
        clock = asyncio.get_running_loop().time
        self.tasks = Tasks()
        self.store = Store(registry, "stoker")
        core = Core()
        self.agents = AgentCalls(core, "", self.tasks, clock)
        self.driver = Driver(core, self.agents, LearnedState(self.store, core), self.tasks, clock)
        self.stored = StoredState(self.store, self.driver)
        self.rules = RuleBook(self.store, self.driver)
        self.access = Access(self.store, clock)
        self.leadership = Leadership(self.store, self.driver, self.stored, self.rules, self.access)
        self.leadership.url = url

    @property
    def term(self) -> int:
        return self.driver.core.state.term

    def begin(self) -> None:
        self.tasks.spawn(self.leadership.run())

    async def close(self) -> None:
        await self.tasks.close()
        await self.agents.close()
