"""Staying findable: over a registry that is down, forgets, or hangs at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from runtime.registry import registration
from runtime.registry.protocol import RegistryError, Service
from runtime.registry.registration import keep_registered, withdraw

SERVICE = Service(service_id="s", name="stoker-router", address="127.0.0.1", port=1)
TTL_S = 0.03


class Flaky:
    """A registry that is down or forgets when told to."""

    def __init__(self) -> None:
        self.down = self.hangs = False
        self.known = False
        self.asked = 0

    async def register(self, service: Service, ttl_s: float) -> None:
        self._answer()
        assert (service, ttl_s) == (SERVICE, TTL_S)
        self.known = True

    async def keep_alive(self, service_id: str) -> bool:
        self._answer()
        return self.known

    async def deregister(self, service_id: str) -> None:
        if self.hangs:
            await asyncio.sleep(60)
        self._answer()
        self.known = False

    def _answer(self) -> None:
        self.asked += 1
        if self.down:
            raise RegistryError("it is down")


@contextlib.asynccontextmanager
async def kept(registry: Flaky):
    task = asyncio.create_task(keep_registered(registry, SERVICE, TTL_S))  # type: ignore[arg-type]  # of its methods, these
    try:
        yield
    finally:
        assert not task.done(), "it never ends by itself"
        task.cancel()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_registry_that_is_down_at_first_is_tried_until_it_answers(caplog) -> None:
    registry = Flaky()
    registry.down = True
    with caplog.at_level(logging.WARNING):
        async with kept(registry):
            await until(lambda: registry.asked >= 3)
            registry.down = False
            await until(lambda: registry.known)
    assert len([r for r in caplog.records if "registering s goes on" in r.message]) == 1


@pytest.mark.parametrize("down", [False, True], ids=["forgets", "forgets while it is down"])
async def test_what_is_forgotten_is_registered_again(down: bool) -> None:
    registry = Flaky()
    async with kept(registry):
        await until(lambda: registry.known)
        registry.known, registry.down = False, down
        asked = registry.asked
        await until(lambda: registry.asked > asked)
        registry.down = False
        await until(lambda: registry.known)


async def test_leaving_a_registry_that_is_down_or_hangs_holds_nothing_up(monkeypatch) -> None:
    monkeypatch.setattr(registration, "FAREWELL_S", 0.05)
    registry = Flaky()
    registry.down = True
    await withdraw(registry, SERVICE)  # type: ignore[arg-type]
    registry.hangs = True
    async with asyncio.timeout(5):
        await withdraw(registry, SERVICE)  # type: ignore[arg-type]
    registry.down = registry.hangs = False
    registry.known = True
    await withdraw(registry, SERVICE)  # type: ignore[arg-type]
    assert not registry.known


class Open(Flaky):
    """One that tells who may write, once it answers."""

    def __init__(self, who: str | None) -> None:
        super().__init__()
        self.who = who

    async def open_to(self, key: str) -> str | None:
        self._answer()
        self.down = False
        return self.who


@pytest.mark.parametrize("who", ["whoever reaches Consul at http://c:8500: its ACLs are off", None])
async def test_a_registry_that_others_may_write_is_said_once_it_answers(
    who: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "FIRST_PAUSE_S", 0.01)
    registry: Any = Open(who)
    registry.down = True
    task = asyncio.create_task(registration.warn_if_open(registry, "stoker/leader"))
    while registry.asked < 3:
        await asyncio.sleep(0.001)
    registry.down = False
    async with asyncio.timeout(30):
        await task
    said = [r.getMessage() for r in caplog.records if "cluster token" in r.getMessage()]
    assert len(said) == (1 if who else 0)
    if who:
        assert "stoker/leader" in said[0]
        assert "ACLs" in said[0]
