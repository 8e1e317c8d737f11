"""The loop around the core: what it hands in and carries out, and what it tells routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.routes import DemandReport, RouteTable
from scheduler import driver as driver_file
from scheduler.core.refusals import Refusals
from scheduler.core.turn import EventFailed
from scheduler.driver import Driver
from scheduler.state import messages as m
from scheduler.store import Store
from tests.kits.scheduler_parts import Scheduler


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[Scheduler]:
    """One that leads, with nothing stored."""
    registry = EmbeddedRegistry(tmp_path / "registry.db")
    one = Scheduler(registry, "http://a")
    one.driver.lead(m.Elected(now=one.driver.now(), term=1))
    yield one
    await one.close()
    await registry.close()


@pytest.fixture
def driver(scheduler: Scheduler) -> Driver:
    return scheduler.driver


@pytest.fixture
def store(scheduler: Scheduler) -> Store:
    return scheduler.store


def publishes(driver: Driver, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the core publish a table of that version with the next event."""
    table = RouteTable(version=version, models=())
    monkeypatch.setattr(driver.core, "handle", lambda _: [m.Publish(table=table)])
    driver.apply(m.Tick(now=driver.now()))
    monkeypatch.undo()


def fails(driver: Driver, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
    """Have the core fail on one event."""

    def fail(event: m.Event) -> list[m.Command]:
        raise EventFailed(event, AssertionError("a-1-1: stopping -> ready"), [])

    monkeypatch.setattr(driver.core, "handle", fail)
    driver.apply(m.Tick(now=at))
    monkeypatch.undo()


async def test_routers_are_told_what_is_newer_at_once_or_when_it_comes(driver, monkeypatch) -> None:
    publishes(driver, 5, monkeypatch)
    newer = await driver.routes_after(4, 0)
    assert newer is not None
    assert newer.version == 5
    assert await driver.routes_after(5, 0.05) is None
    waiting = asyncio.create_task(driver.routes_after(5, 60))
    await asyncio.sleep(0.01)
    publishes(driver, 6, monkeypatch)
    told = await asyncio.wait_for(waiting, 10)
    assert told is not None
    assert told.version == 6


async def test_who_stands_by_tells_routers_nothing(driver, monkeypatch) -> None:
    publishes(driver, 5, monkeypatch)
    waiting = asyncio.create_task(driver.routes_after(5, 60))
    await asyncio.sleep(0.01)
    driver.stand_by()
    assert await asyncio.wait_for(waiting, 10) is None
    assert await driver.routes_after(0, 60) is None


async def test_a_change_is_answered_once_every_router_routes_by_it(driver, monkeypatch) -> None:
    def reports(seq: int, version: int) -> None:
        report = DemandReport(router_id="r", boot_id=1, seq=seq, routes_version=version)
        driver.apply(m.DemandSeen(now=driver.now(), report=report))

    await driver.routers_follow()  # there is no router
    reports(1, 0)
    publishes(driver, 5, monkeypatch)
    following = asyncio.create_task(driver.routers_follow(60))
    reports(2, 4)
    await asyncio.sleep(0.01)
    assert not following.done()
    reports(3, 5)
    await asyncio.wait_for(following, 10)
    publishes(driver, 6, monkeypatch)
    await driver.routers_follow(0.05)  # a router that does not report keeps nobody for long


async def test_an_event_the_core_fails_on_at_once_changes_nothing_outside(
    driver: Driver, monkeypatch, caplog
) -> None:
    publishes(driver, 5, monkeypatch)
    fails(driver, monkeypatch, driver.now())
    assert driver.leads
    assert driver.table is not None
    assert driver.table.version == 5
    assert driver.decided["core_error"] == 1
    assert "the core failed on Tick" in caplog.text
    assert not driver.keeps_failing
    driver.apply(m.Tick(now=driver.now()))  # the next one is taken in
    assert driver.decided["core_error"] == 1


async def test_what_was_decided_before_the_core_failed_is_carried_out(
    driver: Driver, store: Store, monkeypatch
) -> None:
    def fail(_: Refusals) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(Refusals, "recheck", fail)
    driver.apply(m.QuarantineSet(now=driver.now(), node_id="n", device_id="g", reason="noisy"))
    assert driver.decided == {"quarantine": 1, "core_error": 1}
    async with asyncio.timeout(30):
        while not (entries := await store.below("quarantine", "n")):
            await asyncio.sleep(0.01)
    assert [entry.value for entry in entries] == [b"noisy"]
    assert driver.leads


async def test_a_command_that_can_not_be_carried_out_keeps_back_no_other(
    driver: Driver, monkeypatch, caplog
) -> None:
    def fail(_: m.ColdStart) -> None:
        raise KeyError("a fault of ours")

    driver.on_cold_start = fail
    table = RouteTable(version=5, models=())
    climb = m.ColdStart(
        number=1, at=0.0, model="a", replica_id="a-1-1", node_id="n", rung="cached",
        outcome="ready", cause="", reason="", moved_down=(), total_s=0.0, phases={},
    )  # fmt: skip
    commands = [climb, m.Publish(table=table)]
    monkeypatch.setattr(driver.core, "handle", lambda _: commands)
    driver.apply(m.Tick(now=driver.now()))
    assert driver.table == table
    assert driver.decided == {"core_error": 1}
    assert "ColdStart could not be carried out" in caplog.text


@pytest.mark.parametrize(
    ("after_s", "failing"),
    [
        ((0.0, 1.0), False),
        ((0.0, 1.0, 2.0), True),
        ((0.0, 1.0, 10.0), True),
        ((0.0, 1.0, 10.1), False),
        ((0.0, 1.0, 10.1, 10.2), True),
        ((0.0, 6.0, 12.0, 18.0, 24.0), False),
    ],
)
async def test_a_core_keeps_failing_if_it_fails_three_times_within_ten_seconds(
    driver: Driver, monkeypatch, after_s: tuple[float, ...], failing: bool
) -> None:
    assert (driver_file.FAILURES, driver_file.FAILURES_S) == (3, 10.0)
    for after in after_s:
        fails(driver, monkeypatch, 1000.0 + after)
    assert driver.keeps_failing is failing
    driver.stand_by()
    driver.lead(m.Elected(now=driver.now(), term=2))
    assert not driver.keeps_failing


async def test_decisions_and_cold_starts_are_counted(driver, monkeypatch) -> None:
    seen: list[m.ColdStart] = []
    driver.on_cold_start = seen.append
    decided = [
        m.Decided(number=n, at=0.0, action=action, model="a", reason="why", cause="")
        for n, action in enumerate(("start", "start", "stop"))
    ]
    monkeypatch.setattr(driver.core, "handle", lambda _: decided)
    driver.apply(m.Tick(now=driver.now()))
    assert driver.decided == {"start": 2, "stop": 1}
    assert seen == []
