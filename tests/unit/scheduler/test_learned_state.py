"""What was learnt reaches the registry, by the leader alone, also where a write fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.contract.footprint_ledger import Footprint, Key
from runtime.outside import decode
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from scheduler import learned_state
from scheduler.core.decisions import Core
from scheduler.learned_state import LearnedState
from scheduler.signals.forecast import StoredArrivals
from scheduler.state import messages as m
from scheduler.store import Store, name_of
from scheduler.tasks import Tasks
from tests.kits.scheduler_world import spec

KEY = Key("a", "launch", "stub", "1", "nvml")
ARRIVALS = StoredArrivals(gaps=b"", slots=b"", days=0.0)


class Registry(EmbeddedRegistry):
    """Refuses so many writes."""

    refusals = 0

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        if self.refusals:
            self.refusals -= 1
            raise RegistryError("no write now")
        return await super().put(key, value, version)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    opened = Registry(tmp_path / "registry.db")
    yield opened
    await opened.close()


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    made = Tasks()
    yield made
    await made.close()


@pytest.fixture
def store(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(learned_state, "SAVE_S", 0.05)
    return Store(registry, "stoker")


def footprint(device_bytes: int) -> Footprint:
    return Footprint(key=KEY, device_bytes=device_bytes)


async def stored(store: Store, *folder: str) -> list[bytes]:
    """The values of a folder, once it has any."""
    async with asyncio.timeout(30):
        while not (entries := await store.below(*folder)):
            await asyncio.sleep(0.01)
    return [entry.value for entry in entries]


async def test_the_newest_figures_are_written_by_the_leader(store, registry, tasks) -> None:
    core = Core()
    core.handle(m.ModelPut(now=0.0, model=m.StoredModel(spec=spec("a"))))
    learned, leads = LearnedState(store, core), False
    tasks.spawn(learned.keep_saving(lambda: leads))
    learned.keep_footprint(footprint(1))
    learned.keep_sketch("a", ARRIVALS)
    await asyncio.sleep(0.2)
    assert await store.below("footprints") == await store.below("arrivals") == ()
    leads = True
    for device_bytes in (2, 3):
        learned.keep_footprint(footprint(device_bytes))
    learned.keep_sketch("a", ARRIVALS)
    learned.keep_sketch("removed", ARRIVALS)
    (value,) = await stored(store, "footprints", "a")
    assert decode(value, Footprint) == footprint(3)
    await stored(store, "arrivals")
    assert [name_of(entry) for entry in await store.below("arrivals")] == ["a"]


async def test_a_write_that_fails_ends_nothing(store, registry, tasks, caplog) -> None:
    learned = LearnedState(store, Core())
    registry.refusals = 1
    tasks.spawn(learned.keep_saving(lambda: True))
    learned.keep_footprint(footprint(1))
    async with asyncio.timeout(30):
        while "the footprint of a was not saved: no write now" not in caplog.text:
            await asyncio.sleep(0.01)
    learned.keep_footprint(footprint(2))
    (value,) = await stored(store, "footprints", "a")
    assert decode(value, Footprint) == footprint(2)


async def test_a_quarantine_is_told_until_the_registry_takes_it(store, registry) -> None:
    learned = LearnedState(store, Core())
    registry.refusals = 2
    told = m.Quarantined(node_id="n1", device_id="g0", reason="it smells")
    await learned.keep_quarantine(told)
    assert await stored(store, "quarantine") == [b"it smells"]
    await learned.keep_quarantine(m.Quarantined(node_id="n1", device_id="g0", reason=None))
    assert await store.below("quarantine") == ()
