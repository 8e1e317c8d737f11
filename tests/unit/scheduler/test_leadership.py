"""Who leads: the lock, the term, and what a scheduler does when it loses them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from runtime.registry.embedded import EmbeddedLock, EmbeddedRegistry
from runtime.registry.protocol import RegistryError
from scheduler import leadership
from scheduler.core.router_reports import RouterReports
from scheduler.core.turn import EventFailed
from scheduler.state import messages as m
from scheduler.stored_state import StoredState
from tests.kits.scheduler_parts import Scheduler
from tests.kits.scheduler_world import spec


class Registry(EmbeddedRegistry):
    """A file that can be made to fail: `down`, or overtaken by another scheduler."""

    down = False
    overtaken = False  # another one takes the next term between the lock and ours
    lock: EmbeddedLock | None = None

    async def get(self, key: str):
        self._check()
        return await super().get(key)

    async def put(self, key: str, value: bytes, version: int | None = None) -> bool:
        self._check()
        if self.overtaken and key.endswith("/term"):
            self.overtaken = False
            assert await super().put(key, b"6")
        return await super().put(key, value, version)

    async def acquire(self, key: str, holder: bytes, ttl_s: float) -> EmbeddedLock | None:
        self._check()
        lock = await super().acquire(key, holder, ttl_s)
        if lock is not None:
            self.lock = lock
            renew = lock.renew

            async def checked() -> bool:
                self._check()
                return await renew()

            lock.renew = checked  # type: ignore[method-assign]
        return lock

    def _check(self) -> None:
        if self.down:
            raise RegistryError("it is down")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "TICK_S", 0.02)
    monkeypatch.setattr(leadership, "TRY_AGAIN_S", 0.02)
    monkeypatch.setattr(leadership, "PAUSE_S", 0.02)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[[str], tuple[Scheduler, Registry]]]:
    made: list[tuple[Scheduler, Registry]] = []

    def scheduler(url: str = "http://a") -> tuple[Scheduler, Registry]:
        registry = Registry(tmp_path / "registry.db")
        made.append((Scheduler(registry, url), registry))
        return made[-1]

    yield scheduler
    for one, registry in made:
        await one.close()
        await registry.close()


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


async def test_a_leader_knows_what_is_stored_before_it_acts(make) -> None:
    one, _ = make()
    await one.store.put(m.StoredModel(spec=spec("a")), "models", "a")
    await one.store.put(True, "pins", "a")
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    assert one.term == 1
    assert one.driver.core.state.models["a"].pinned
    assert await one.leadership.leader_url() is None  # nobody else


async def test_one_leads_and_the_other_takes_over_with_a_higher_term(make) -> None:
    one, _ = make("http://a")
    two, _ = make("http://b")
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "the first leads")
    two.lead_or_stand_by()
    await asyncio.sleep(0.1)  # some tries
    assert not two.driver.leads
    assert await two.leadership.leader_url() == "http://a"
    await one.tasks.close()
    assert not one.driver.leads
    await until(lambda: two.driver.leads, "the second leads")
    assert two.term == 2


async def test_who_is_overtaken_gives_the_lock_back(make) -> None:
    one, registry = make()
    registry.overtaken = True
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads at the second try")
    assert one.term == 7
    assert registry.lock is not None
    assert registry.lock.held


async def test_who_loses_the_lock_stands_by_and_lets_go_of_all_that_waits(make) -> None:
    one, registry = make()
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    await until(lambda: one.driver.table is not None, "it has told routers what it knows")
    assert one.driver.table is not None
    waiting = asyncio.create_task(one.driver.routes_after(one.driver.table.version, 60))
    keys = asyncio.create_task(one.access.table_after(10, 60))
    await asyncio.sleep(0.05)
    registry.down = True  # or it leads again at once
    assert registry.lock is not None
    await registry.lock.release()
    assert await asyncio.wait_for(waiting, 10) is None
    assert await asyncio.wait_for(keys, 10) is None
    assert not one.driver.leads
    await until(lambda: one.leadership.why_not_leading, "it says why")
    assert one.leadership.why_not_leading == "the registry does not answer: it is down"
    registry.down = False
    await until(lambda: one.driver.leads, "it leads again")
    assert (one.term, one.leadership.why_not_leading) == (2, "")


async def test_a_registry_that_is_down_for_less_than_the_locks_time_costs_nothing(
    make, monkeypatch
) -> None:
    monkeypatch.setattr(leadership, "LEADER_TTL_S", 1.5)
    one, registry = make()
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    registry.down = True
    await asyncio.sleep(0.8)  # one renewal, at least, has failed
    registry.down = False
    await asyncio.sleep(1.0)
    assert (one.driver.leads, one.term) == (True, 1)
    registry.down = True
    await until(lambda: not one.driver.leads, "its time is over")


async def test_who_is_outranked_leads_again_with_a_higher_term(make) -> None:
    one, _ = make()
    await one.leadership.hear_epoch(9)  # who does not lead need not be told
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    await one.leadership.hear_epoch(1)
    await asyncio.sleep(0.1)
    assert one.term == 1
    await one.leadership.hear_epoch(7)
    await until(lambda: one.term == 8 and one.driver.leads, "it leads with term 8")


async def test_entries_that_cannot_be_read_keep_nobody_from_leading(make, caplog) -> None:
    one, registry = make()
    await one.store.put(m.StoredModel(spec=spec("a")), "models", "a")
    for folder in ("models", "nodes", "prewarm", "footprints", "arrivals", "routes", "keys"):
        await registry.put(one.store.key(folder, "broken"), b'{"cordoned": 3, "keep": [')
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    assert set(one.driver.core.state.models) == {"a"}
    for folder in ("models", "nodes", "prewarm"):
        assert f"stored stoker/{folder}/broken cannot be read and is left alone" in caplog.text


async def test_a_try_that_fails_gives_the_lock_back_and_another_one_comes(
    make, monkeypatch, caplog
) -> None:
    one, _ = make("http://a")
    two, _ = make("http://b")
    load, fails = StoredState.load, True

    async def load_or_fail(self, term, rules):
        if fails and self is one.stored:
            raise KeyError("a fault of ours")
        return await load(self, term, rules)

    monkeypatch.setattr(StoredState, "load", load_or_fail)
    monkeypatch.setattr(leadership, "LEADER_TTL_S", 600)  # not by its time
    one.lead_or_stand_by()
    await until(lambda: one.leadership.why_not_leading, "it says why")
    assert one.leadership.why_not_leading == "it could not lead: 'a fault of ours'"
    assert "it could not lead" in caplog.text
    two.lead_or_stand_by()
    await until(lambda: two.driver.leads, "the other one leads")
    await two.tasks.close()
    fails = False
    await until(lambda: one.driver.leads, "it leads after all")
    assert one.leadership.why_not_leading == ""


async def test_who_can_not_take_in_what_is_stored_does_not_lead(make, monkeypatch) -> None:
    one, _ = make()
    await one.store.put(m.StoredModel(spec=spec("a")), "models", "a")

    def fail(*_: object) -> None:
        raise KeyError("a fault of ours")

    with monkeypatch.context() as broken:
        broken.setattr(RouterReports, "recall", fail)
        one.lead_or_stand_by()
        await until(lambda: one.leadership.why_not_leading, "it says why")
        assert not one.driver.leads
        assert one.leadership.why_not_leading == (
            "it could not lead: the core failed on Elected: KeyError('a fault of ours')"
        )
    await until(lambda: one.driver.leads, "it leads after all")
    assert set(one.driver.core.state.models) == {"a"}


def poison(one: Scheduler, monkeypatch: pytest.MonkeyPatch, failures: int) -> list[m.Event]:
    """Have the core fail so often, as on a state that is wrong; a new one is right. Returns what
    it failed on."""
    failed: list[m.Event] = []
    healed = False
    handle = one.driver.core.handle

    def fail_or_handle(event: m.Event) -> list[m.Command]:
        nonlocal healed
        healed = healed or isinstance(event, m.Elected)
        if healed or len(failed) >= failures:
            return handle(event)
        failed.append(event)
        raise EventFailed(event, AssertionError("a-1-1: stopping -> ready"), [])

    monkeypatch.setattr(one.driver.core, "handle", fail_or_handle)
    return failed


async def test_a_core_that_keeps_failing_begins_again_with_what_is_stored(
    make, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(leadership, "START_OVER_S", 0.0)
    one, _ = make()
    await one.store.put(m.StoredModel(spec=spec("a")), "models", "a")
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    failed = poison(one, monkeypatch, 100)
    await until(lambda: one.term == 2 and one.driver.leads, "it leads with a fresh state")
    assert len(failed) == 3
    assert set(one.driver.core.state.models) == {"a"}
    assert one.driver.decided["core_error"] == 3
    assert "the core keeps failing" in caplog.text
    await asyncio.sleep(0.2)  # ticks that are well
    assert (one.term, one.driver.leads) == (2, True)


async def test_a_core_that_failed_twice_goes_on(make, monkeypatch) -> None:
    monkeypatch.setattr(leadership, "START_OVER_S", 0.0)
    one, _ = make()
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    poison(one, monkeypatch, 2)
    await until(lambda: one.driver.decided.get("core_error") == 2, "it failed twice")
    await asyncio.sleep(0.2)
    assert (one.term, one.driver.leads) == (1, True)


async def test_a_core_that_fails_for_good_does_not_begin_again_all_the_time(
    make, monkeypatch
) -> None:
    one, _ = make()
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    poison(one, monkeypatch, 100)
    await until(lambda: one.driver.decided.get("core_error", 0) > 5, "it fails at each tick")
    assert (one.term, one.driver.leads) == (1, True)  # START_OVER_S is not over


async def test_each_next_time_it_begins_again_twice_as_late(make, monkeypatch) -> None:
    monkeypatch.setattr(leadership, "START_OVER_S", 0.1)
    one, _ = make()
    one.lead_or_stand_by()
    await until(lambda: one.driver.leads, "it leads")
    began_at = one.driver.now()

    def fail(event: m.Event) -> list[m.Command]:
        if isinstance(event, m.Elected):
            one.driver.core.state.term = event.term
            return []
        raise EventFailed(event, AssertionError("whatever it is told"), [])

    monkeypatch.setattr(one.driver.core, "handle", fail)
    await until(lambda: one.term == 4, "it began again three times")
    assert one.driver.now() - began_at >= 0.1 + 0.2 + 0.4
