"""The leader lock: one holder, renewed, released, lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from runtime.registry.protocol import Lock, Registry
from tests.kits.registry_waits import eventually

# Consul frees a dead holder's lock after 10 to 20 s, for every ttl up to 10 s (see consul.py).
FREE_AGAIN_S = 45.0


async def lock_value(registry: Registry, key: str) -> bytes | None:
    entry = await registry.get(key)
    return entry.value if entry else None


async def test_one_holder_whom_all_can_read(registry: Registry, other: Registry, base: str):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"http://one", ttl_s=60)
    assert lock is not None
    assert lock.held
    assert await lock_value(other, key) == b"http://one"
    assert await other.acquire(key, b"http://two", ttl_s=60) is None
    assert await registry.acquire(key, b"http://three", ttl_s=60) is None
    assert await lock_value(other, key) == b"http://one"
    another = await other.acquire(f"{base}/another", b"", ttl_s=60)
    assert another is not None
    await another.release()
    await lock.release()


async def test_release_lets_the_next_in_at_once(registry: Registry, other: Registry, base: str):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"one", ttl_s=60)
    assert lock is not None
    await lock.release()
    assert not lock.held
    await lock.release()
    assert not await lock.renew()
    following = await other.acquire(key, b"two", ttl_s=60)
    assert following is not None
    await lock.release()  # must not free the other's
    assert await following.renew()
    assert await lock_value(registry, key) == b"two"
    await following.release()


async def test_renewed_it_outlives_its_ttl(registry: Registry, other: Registry, base: str):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"one", ttl_s=2)
    assert lock is not None
    for _ in range(12):
        await asyncio.sleep(0.3)
        assert await lock.renew()
        assert lock.held
    assert await other.acquire(key, b"two", ttl_s=2) is None
    await lock.release()


async def test_not_renewed_it_is_lost_and_another_gets_it(
    registry: Registry, other: Registry, base: str
):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"one", ttl_s=1)
    assert lock is not None

    async def next_in() -> Lock | None:
        following = await other.acquire(key, b"two", ttl_s=60)
        assert following is None or not lock.held  # never two at a time
        return following

    following = await eventually(next_in, FREE_AGAIN_S)
    assert following is not None
    assert following.held
    assert not await lock.renew()
    assert not lock.held
    assert await following.renew()
    assert await lock_value(registry, key) == b"two"
    await following.release()


async def test_a_renewal_too_late_is_no_renewal(registry: Registry, base: str):
    lock = await registry.acquire(f"{base}/leader", b"one", ttl_s=0.3)
    assert lock is not None

    async def lost() -> bool:
        return not lock.held

    await eventually(lost)
    assert not await lock.renew()
    assert not lock.held


async def test_a_deleted_lock_is_lost(registry: Registry, other: Registry, base: str):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"one", ttl_s=60)
    assert lock is not None
    await other.delete(key)
    assert not await lock.renew()
    assert not lock.held
    assert await other.acquire(key, b"two", ttl_s=60)


async def test_a_release_is_a_change_that_waiters_see(
    registry: Registry, other: Registry, base: str
):
    key = f"{base}/leader"
    lock = await registry.acquire(key, b"one", ttl_s=60)
    assert lock is not None
    _, index = await other.list(key)
    waiting = asyncio.create_task(other.list(key, index, wait_s=60))
    await lock.release()
    await asyncio.wait_for(waiting, 20)
    assert await other.acquire(key, b"two", ttl_s=60)


async def test_a_stale_release_race_keeps_one_holder(
    registry_factory: Callable[[], Registry], base: str
):
    """Twenty tasks over three clients take turns; nobody is ever in with another."""
    clients = [registry_factory() for _ in range(3)]
    key = f"{base}/leader"
    inside = 0
    turns = 0

    async def take_a_turn(client: Registry) -> None:
        nonlocal inside, turns
        lock = await eventually(lambda: client.acquire(key, b"x", ttl_s=60), 60)
        assert lock is not None
        inside += 1
        await asyncio.sleep(0)
        assert inside == 1
        inside -= 1
        turns += 1
        await lock.release()

    await asyncio.wait_for(asyncio.gather(*(take_a_turn(clients[i % 3]) for i in range(20))), 60)
    assert turns == 20
