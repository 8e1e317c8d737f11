"""Blocking reads: early on a change by another client, else the current state at the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from runtime.registry.protocol import Registry
from tests.kits.registry_services import service
from tests.kits.registry_waits import eventually, still_waits

Change = Callable[[Registry, str], Awaitable[object]]

CHANGES: dict[str, Change] = {
    "create": lambda r, base: r.put(f"{base}/new", b"2"),
    "overwrite": lambda r, base: r.put(f"{base}/old", b"2"),
    "delete": lambda r, base: r.delete(f"{base}/old"),
}
SERVICE_CHANGES: dict[str, Change] = {
    "register": lambda r, base: r.register(service(base, "new"), ttl_s=60),
    "replace": lambda r, base: r.register(service(base, "old", port=1), ttl_s=60),
    "deregister": lambda r, base: r.deregister(f"{base}-old"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_list_sees_anothers_change(
    registry: Registry, other: Registry, base: str, change: str
):
    await registry.put(f"{base}/old", b"1")
    await registry.put(f"{base}/newest", b"1")
    before, index = await registry.list(f"{base}/")
    waiting = asyncio.create_task(registry.list(f"{base}/", index, wait_s=60))
    assert await still_waits(waiting)
    await CHANGES[change](other, base)
    after, new_index = await asyncio.wait_for(waiting, 20)
    assert after != before
    assert new_index != index
    assert after == (await other.list(f"{base}/"))[0]


@pytest.mark.parametrize("change", SERVICE_CHANGES)
async def test_services_sees_anothers_change(
    registry: Registry, other: Registry, base: str, change: str
):
    await registry.register(service(base, "old"), ttl_s=60)
    before, index = await registry.services(base)
    waiting = asyncio.create_task(registry.services(base, index, wait_s=60))
    assert await still_waits(waiting)
    await SERVICE_CHANGES[change](other, base)
    after, new_index = await asyncio.wait_for(waiting, 20)
    assert after != before
    assert new_index != index


async def test_services_sees_an_expiry(registry: Registry, other: Registry, base: str):
    await other.register(service(base), ttl_s=2)
    found, index = await registry.services(base)
    assert found == (service(base),)
    after, _ = await asyncio.wait_for(registry.services(base, index, wait_s=60), 20)
    assert after == ()


async def test_the_first_entry_below_an_empty_prefix_wakes(
    registry: Registry, other: Registry, base: str
):
    _, index = await registry.list(f"{base}/")
    waiting = asyncio.create_task(registry.list(f"{base}/", index, wait_s=60))
    assert await still_waits(waiting)
    await other.put(f"{base}/a", b"1")
    entries, _ = await asyncio.wait_for(waiting, 20)
    assert [e.key for e in entries] == [f"{base}/a"]


async def test_the_first_service_of_a_name_wakes(registry: Registry, other: Registry, base: str):
    _, index = await registry.services(base)
    waiting = asyncio.create_task(registry.services(base, index, wait_s=60))
    assert await still_waits(waiting)
    await other.register(service(base), ttl_s=60)
    found, _ = await asyncio.wait_for(waiting, 20)
    assert found == (service(base),)


async def test_a_change_before_the_wait_is_not_missed(
    registry: Registry, other: Registry, base: str
):
    await registry.put(f"{base}/a", b"1")
    _, index = await registry.list(f"{base}/")
    await other.put(f"{base}/a", b"2")
    entries, _ = await asyncio.wait_for(registry.list(f"{base}/", index, wait_s=60), 20)
    assert [e.value for e in entries] == [b"2"]


async def test_the_deadline_brings_the_current_state(registry: Registry, base: str):
    await registry.put(f"{base}/a", b"1")
    await registry.register(service(base), ttl_s=60)
    entries, index = await registry.list(f"{base}/")
    waiting = asyncio.create_task(registry.list(f"{base}/", index, wait_s=1))
    assert await still_waits(waiting)
    assert await asyncio.wait_for(waiting, 20) == (entries, index)
    found, index = await registry.services(base)
    waiting_too = asyncio.create_task(registry.services(base, index, wait_s=1))
    assert await still_waits(waiting_too)
    assert await asyncio.wait_for(waiting_too, 20) == (found, index)


async def test_keep_alive_is_no_change(registry: Registry, other: Registry, base: str):
    await registry.register(service(base), ttl_s=60)
    _, index = await registry.services(base)
    waiting = asyncio.create_task(registry.services(base, index, wait_s=60))
    for _ in range(3):
        assert await other.keep_alive(f"{base}-1")
        assert await still_waits(waiting, 0.1)
    waiting.cancel()


async def test_no_change_is_lost_between_two_waits(registry: Registry, other: Registry, base: str):
    seen: list[bytes] = []

    async def watch() -> None:
        index = 0
        while not seen or seen[-1] != b"29":
            entries, index = await registry.list(f"{base}/", index, wait_s=60)
            seen.extend(e.value for e in entries)

    watching = asyncio.create_task(watch())
    for i in range(30):
        await other.put(f"{base}/a", str(i).encode())
    await asyncio.wait_for(watching, 20)
    assert seen == sorted(seen, key=int)


async def test_an_index_of_another_history_recovers(registry: Registry, other: Registry, base: str):
    """As after a lost file or a server restored from an older snapshot."""
    await registry.put(f"{base}/a", b"1")
    entries, index = await asyncio.wait_for(registry.list(f"{base}/", 10**9, wait_s=0.5), 20)
    assert [e.value for e in entries] == [b"1"]
    await other.put(f"{base}/a", b"2")

    async def sees_the_change() -> bool:
        nonlocal entries, index
        entries, index = await registry.list(f"{base}/", index, wait_s=60)
        return entries[0].value == b"2"

    await asyncio.wait_for(eventually(sees_the_change), 20)


async def test_a_cancelled_wait_leaves_the_client_usable(registry: Registry, base: str):
    _, index = await registry.list(f"{base}/")
    waiting = asyncio.create_task(registry.list(f"{base}/", index, wait_s=60))
    assert await still_waits(waiting)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await registry.put(f"{base}/a", b"1")
