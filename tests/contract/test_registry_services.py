"""Registrations: found by others, kept alive, expired, removed."""

from __future__ import annotations

import asyncio

from runtime.registry.protocol import Registry
from tests.kits.registry_services import service
from tests.kits.registry_waits import eventually


async def test_another_client_finds_it_whole(registry: Registry, other: Registry, base: str):
    assert (await registry.services(base))[0] == ()
    await registry.register(service(base), ttl_s=60)
    found, index = await other.services(base)
    assert found == (service(base),)
    assert index > 0


async def test_without_meta_and_port(registry: Registry, base: str):
    bare = service(base, meta={}, port=0)
    await registry.register(bare, ttl_s=60)
    assert (await registry.services(base))[0] == (bare,)


async def test_sorted_by_id_and_only_of_that_name(registry: Registry, base: str):
    for suffix in ("b", "a", "c"):
        await registry.register(service(base, suffix), ttl_s=60)
    await registry.register(service(base, "other", name=f"{base}-other"), ttl_s=60)
    found, _ = await registry.services(base)
    assert [s.service_id for s in found] == [f"{base}-{x}" for x in "abc"]


async def test_registering_again_replaces(registry: Registry, other: Registry, base: str):
    await registry.register(service(base), ttl_s=60)
    await registry.register(service(base), ttl_s=60)
    moved = service(base, port=4001, meta={"a": "b"})
    await other.register(moved, ttl_s=60)
    assert (await registry.services(base))[0] == (moved,)
    renamed = service(base, name=f"{base}-new")
    await other.register(renamed, ttl_s=60)
    assert (await registry.services(base))[0] == ()
    assert (await registry.services(f"{base}-new"))[0] == (renamed,)


async def test_deregister(registry: Registry, base: str):
    await registry.register(service(base), ttl_s=60)
    await registry.deregister(f"{base}-1")
    assert (await registry.services(base))[0] == ()
    await registry.deregister(f"{base}-1")
    await registry.deregister(f"{base}-never")


async def test_keep_alive_of_an_unknown_one_says_so(registry: Registry, base: str):
    assert not await registry.keep_alive(f"{base}-never")
    await registry.register(service(base), ttl_s=60)
    await registry.deregister(f"{base}-1")
    assert not await registry.keep_alive(f"{base}-1")


async def test_it_expires_unless_kept_alive(registry: Registry, other: Registry, base: str):
    await registry.register(service(base, "kept"), ttl_s=2)
    await registry.register(service(base, "dropped"), ttl_s=2)

    async def dropped() -> bool:
        assert await registry.keep_alive(f"{base}-kept")
        found, _ = await other.services(base)
        assert service(base, "kept") in found
        return service(base, "dropped") not in found

    await eventually(dropped)


async def test_an_expired_one_can_come_back(registry: Registry, base: str):
    await registry.register(service(base), ttl_s=0.5)

    async def gone() -> bool:
        return (await registry.services(base))[0] == ()

    await eventually(gone)
    if not await registry.keep_alive(f"{base}-1"):
        await registry.register(service(base), ttl_s=60)

    async def back() -> bool:
        return (await registry.services(base))[0] == (service(base),)

    await eventually(back)


async def test_registrations_survive_their_client(registry: Registry, other: Registry, base: str):
    await registry.register(service(base), ttl_s=60)
    await registry.close()
    assert (await other.services(base))[0] == (service(base),)
    assert await asyncio.wait_for(other.keep_alive(f"{base}-1"), 10)
