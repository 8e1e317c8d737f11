"""What operators declared, as the registry keeps it: models, pins, prewarms, cordons.

Rules this file keeps: a change is stored first, then told to the core; an entry that can't be read
is left alone, for the version of Stoker that wrote it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from runtime.contract.footprint_ledger import Footprint
from runtime.contract.prewarm import Ask
from runtime.outside import decode
from runtime.registry.protocol import Entry
from runtime.wire.routes import RouteRule
from scheduler.driver import Driver
from scheduler.policy.warm_value import changed_floors
from scheduler.signals.forecast import StoredArrivals
from scheduler.state import messages as m
from scheduler.store import Store, name_of

log = logging.getLogger("stoker.scheduler")
T = TypeVar("T")


class NodeFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the registry keeps of a node."""

    cordoned: bool = False


class StoredState:
    """The leader's changes. Each raises RegistryError where it was not stored."""

    def __init__(self, store: Store, driver: Driver) -> None:
        self._store = store
        self._driver = driver
        self._asks: dict[str, tuple[Ask, ...]] = {}  # model -> what operators wish for

    async def load(self, term: int, rules: tuple[RouteRule, ...]) -> m.Elected:
        """Everything that is stored, for a new leader with these routes."""
        store = self._store
        models = _readable(await store.below("models"), m.StoredModel)
        footprints = await store.below("footprints")
        nodes = _readable(await store.below("nodes"), NodeFlags)
        pins = await store.below("pins")
        self._asks = dict(_readable(await store.below("prewarm"), tuple[Ask, ...]))
        sick = await store.below("quarantine")
        histories = await store.below("arrivals")
        agents, _ = await store.registry.services("stoker-agent")
        return m.Elected(
            now=self._driver.now(),
            term=term,
            models=tuple(model for _, model in models),
            known_nodes=tuple(agent.meta.get("node_id", agent.service_id) for agent in agents),
            cordoned=tuple(node_id for node_id, flags in nodes if flags.cordoned),
            footprints=tuple(_footprints(footprints)),
            quarantined=tuple(map(_quarantined, sick)),
            sketches=dict(_sketches(histories)),
            rules=rules,
            wall_s=time.time(),
            pinned=tuple(map(name_of, pins)),
        )

    async def put_model(self, stored: m.StoredModel) -> None:
        """Add or change a model."""
        await self._store.put(stored, "models", stored.spec.name)
        self._driver.apply(m.ModelPut(now=self._driver.now(), model=stored))

    async def remove_model(self, name: str) -> None:
        """Remove a model and all that is stored of it."""
        for folder in ("models", "pins", "prewarm", "arrivals"):
            await self._store.delete(folder, name)
        self._asks.pop(name, None)
        for entry in await self._store.below("footprints", name):
            await self._store.registry.delete(entry.key)
        self._driver.apply(m.ModelRemoved(now=self._driver.now(), name=name))

    async def pin_model(self, name: str, pinned: bool) -> None:
        """Keep a model running, or no longer."""
        if pinned:
            await self._store.put(True, "pins", name)
        else:
            await self._store.delete("pins", name)
        self._driver.apply(m.PinSet(now=self._driver.now(), model=name, pinned=pinned))

    async def ask_prewarm(self, name: str, ask: Ask) -> None:
        """Keep an operator's wish beside those that are not over yet, and act on it."""
        asks = [a for a in self._asks.get(name, ()) if a.by + a.for_s > time.time()]
        asks.append(ask)
        await self._store.put(asks, "prewarm", name)
        self._asks[name] = tuple(asks)
        self.set_floors()

    def set_floors(self) -> None:
        """Tell the core which models may not be colder than what, as the clock stands now."""
        driver = self._driver
        for name, floor in changed_floors(driver.core.state.models, self._asks, time.time()):
            driver.apply(m.FloorSet(now=driver.now(), model=name, floor=floor))

    async def cordon_node(self, node_id: str, cordoned: bool, drain_s: float | None = None) -> None:
        """Place nothing new there; `drain_s`: what it runs moves off, or stops after so long."""
        await self._store.put(NodeFlags(cordoned=cordoned), "nodes", node_id)
        event = m.CordonSet(
            now=self._driver.now(), node_id=node_id, cordoned=cordoned, drain=drain_s is not None,
            deadline_s=drain_s or 0.0,
        )  # fmt: skip
        self._driver.apply(event)


def _readable(entries: Iterable[Entry], kind: type[T]) -> Iterator[tuple[str, T]]:
    """The entries that can be read, by name."""
    for entry in entries:
        try:
            yield name_of(entry), decode(entry.value, kind)
        except ValueError as error:
            log.error("stored %s cannot be read and is left alone: %s", entry.key, error)


def _footprints(entries: Iterable[Entry]) -> Iterator[Footprint]:
    """The entries of this version of Stoker; what another one wrote is measured again."""
    for entry in entries:
        with contextlib.suppress(ValueError):
            yield decode(entry.value, Footprint)


def _sketches(entries: Iterable[Entry]) -> Iterator[tuple[str, StoredArrivals]]:
    """The arrivals by model that this version wrote; what another one wrote is learnt again."""
    for entry in entries:
        with contextlib.suppress(ValueError):
            yield name_of(entry), decode(entry.value, StoredArrivals)


def _quarantined(entry: Entry) -> tuple[str, str, str]:
    _, node_id, device_id = entry.key.rsplit("/", 2)
    return node_id, device_id, entry.value.decode(errors="replace")
