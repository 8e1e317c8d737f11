"""The store: values, versions, compare-and-set, prefixes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from runtime.registry.protocol import Entry, Registry


async def put_and_get(registry: Registry, key: str, value: bytes) -> Entry:
    assert await registry.put(key, value)
    entry = await registry.get(key)
    assert entry is not None
    assert (entry.key, entry.value) == (key, value)
    return entry


async def test_a_value_is_read_by_another_client(registry: Registry, other: Registry, base: str):
    assert await registry.get(f"{base}/a") is None
    written = await put_and_get(registry, f"{base}/a", b"one")
    assert await other.get(f"{base}/a") == written
    assert written.version > 0


@pytest.mark.parametrize("value", [b"", b"\x00\xff\xfe", bytes(range(256)) * 40, "é漢".encode()])
async def test_any_bytes_come_back(registry: Registry, base: str, value: bytes):
    await put_and_get(registry, f"{base}/a", value)
    entries, _ = await registry.list(f"{base}/")
    assert [e.value for e in entries] == [value]


@pytest.mark.parametrize("name", ["qwen2.5:0.5b", "org/model@main", "100% é?&=#+", "a b"])
async def test_any_name_comes_back(registry: Registry, base: str, name: str):
    await put_and_get(registry, f"{base}/{name}", b"x")
    entries, _ = await registry.list(f"{base}/")
    assert [e.key for e in entries] == [f"{base}/{name}"]
    assert await registry.delete(f"{base}/{name}", version=entries[0].version)
    assert await registry.get(f"{base}/{name}") is None


async def test_every_write_changes_the_version(registry: Registry, base: str):
    versions = [(await put_and_get(registry, f"{base}/a", b"same")).version for _ in range(3)]
    assert versions == sorted(set(versions))


async def test_version_zero_only_creates(registry: Registry, base: str):
    assert await registry.put(f"{base}/a", b"one", version=0)
    assert not await registry.put(f"{base}/a", b"two", version=0)
    entry = await registry.get(f"{base}/a")
    assert entry is not None
    assert entry.value == b"one"


async def test_a_stale_version_changes_nothing(registry: Registry, other: Registry, base: str):
    first = await put_and_get(registry, f"{base}/a", b"one")
    second = await put_and_get(other, f"{base}/a", b"two")
    assert not await registry.put(f"{base}/a", b"three", version=first.version)
    assert not await registry.delete(f"{base}/a", version=first.version)
    assert await registry.get(f"{base}/a") == second
    assert await registry.put(f"{base}/a", b"three", version=second.version)


async def test_versions_grow_across_delete_and_create(registry: Registry, base: str):
    first = await put_and_get(registry, f"{base}/a", b"one")
    assert await registry.delete(f"{base}/a")
    assert await registry.get(f"{base}/a") is None
    assert not await registry.put(f"{base}/a", b"back", version=first.version)
    assert await registry.put(f"{base}/a", b"one", version=0)
    again = await registry.get(f"{base}/a")
    assert again is not None
    assert again.version > first.version


async def test_delete(registry: Registry, base: str):
    assert await registry.delete(f"{base}/missing")
    assert await registry.delete(f"{base}/missing", version=0)
    assert not await registry.delete(f"{base}/missing", version=7)
    entry = await put_and_get(registry, f"{base}/a", b"one")
    assert not await registry.delete(f"{base}/a", version=0)
    assert await registry.delete(f"{base}/a", version=entry.version)
    assert not await registry.delete(f"{base}/a", version=entry.version)


async def test_list_is_sorted_and_keeps_to_its_prefix(registry: Registry, base: str):
    for name in ("a/b/2", "a/bc", "a/b/1", "a/b/é", "a/b", "a/c/1", "A/b/1", "a/b/1/deep", "a/b0"):
        await registry.put(f"{base}/{name}", name.encode())
    await registry.delete(f"{base}/a/b/2")
    entries, index = await registry.list(f"{base}/a/b/")
    assert [e.key.removeprefix(f"{base}/") for e in entries] == ["a/b/1", "a/b/1/deep", "a/b/é"]
    assert index > 0
    assert await registry.get(f"{base}/a/b/1") == entries[0]


async def test_list_takes_no_character_for_a_pattern(registry: Registry, base: str):
    for name in ("a_b/1", "axb/1", "a%/1", "a*/1", "a[x]/1"):
        await registry.put(f"{base}/{name}", b"")
    for prefix in ("a_b/", "a%/", "a*/", "a[x]/"):
        entries, _ = await registry.list(f"{base}/{prefix}")
        assert [e.key for e in entries] == [f"{base}/{prefix}1"]


async def test_list_of_nothing(registry: Registry, base: str):
    entries, index = await registry.list(f"{base}/")
    assert entries == ()
    assert index > 0  # 0 would mean: do not wait


async def test_of_twenty_creators_one_wins(registry_factory: Callable[[], Registry], base: str):
    clients = [registry_factory() for _ in range(3)]
    won = await asyncio.gather(
        *(clients[i % 3].put(f"{base}/a", str(i).encode(), version=0) for i in range(20))
    )
    assert sum(won) == 1
    entry = await clients[0].get(f"{base}/a")
    assert entry is not None
    assert entry.value == str(won.index(True)).encode()


async def test_of_twenty_writers_one_wins_each_version(
    registry_factory: Callable[[], Registry], base: str
):
    clients = [registry_factory() for _ in range(3)]
    key = f"{base}/counter"
    await clients[0].put(key, b"0")
    won: list[int] = []

    async def count(client: Registry, times: int) -> None:
        while times:
            entry = await client.get(key)
            assert entry is not None
            if await client.put(key, str(int(entry.value) + 1).encode(), version=entry.version):
                won.append(entry.version)
                times -= 1

    await asyncio.gather(*(count(clients[i % 3], 4) for i in range(20)))
    assert len(won) == len(set(won)) == 80
    entry = await clients[1].get(key)
    assert entry is not None
    assert entry.value == b"80"


async def test_of_twenty_who_change_nothing_one_wins(
    registry_factory: Callable[[], Registry], base: str
):
    clients = [registry_factory() for _ in range(2)]
    entry = await put_and_get(clients[0], f"{base}/a", b"same")
    won = await asyncio.gather(
        *(clients[i % 2].put(f"{base}/a", b"same", version=entry.version) for i in range(20))
    )
    assert sum(won) == 1


async def test_of_twenty_deleters_one_wins(registry_factory: Callable[[], Registry], base: str):
    clients = [registry_factory() for _ in range(2)]
    entry = await put_and_get(clients[0], f"{base}/a", b"x")
    won = await asyncio.gather(
        *(clients[i % 2].delete(f"{base}/a", version=entry.version) for i in range(20))
    )
    assert sum(won) == 1
