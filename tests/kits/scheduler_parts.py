"""A scheduler process without its HTTP face, put together as scheduler/main.py does it."""

from __future__ import annotations

from runtime.contract.config import Config
from runtime.registry.protocol import Registry
from scheduler.main import Parts
from scheduler.store import Store


class Scheduler(Parts):
    """The parts of a scheduler with the settings that it has without a configuration."""

    def __init__(self, registry: Registry, url: str) -> None:
        super().__init__(Config(), registry)
        self.store = Store(registry, "stoker")
        self.url = url

    @property
    def term(self) -> int:
        return self.driver.core.state.term

    def lead_or_stand_by(self) -> None:
        self.begin(self.url)
