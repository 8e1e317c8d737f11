"""The embedded registry's file: who may read it, what happens when it is bad, and its clock."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from pathlib import Path

import pytest

import runtime.registry.embedded
from runtime.contract.config import Config
from runtime.registry.embedded import EmbeddedRegistry
from runtime.registry.open import open_registry
from runtime.registry.protocol import RegistryError, Service

SERVICE = Service(service_id="one", name="stoker-agent", address="127.0.0.1", port=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


class Clock:
    """Stands in for the time module's wall clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("runtime.registry.embedded.time.time", lambda: self.now)


async def test_only_its_owner_may_read_it(tmp_path: Path):
    registry = open_registry(Config(state_dir=str(tmp_path / "new" / "state")))
    before = os.umask(0)
    try:
        await registry.put("a", b"secret")
    finally:
        os.umask(before)
    files = list((tmp_path / "new" / "state").iterdir())
    assert {f.name for f in files} >= {"registry.db", "registry.db-wal"}
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
    await registry.close()


async def test_it_is_still_there_after_a_restart(file: Path):
    registry = EmbeddedRegistry(file)
    await registry.put("a", b"1")
    before = await registry.get("a")
    await registry.close()
    again = EmbeddedRegistry(file)
    assert await again.get("a") == before
    await again.close()


async def test_who_comes_second_does_not_make_the_file_again(file: Path):
    registry = EmbeddedRegistry(file)
    await registry.put("a", b"1")
    await registry.close()
    runtime.registry.embedded._create(file)  # as one that looked before the file was there
    late = EmbeddedRegistry(file)
    assert await late.get("a")
    await late.close()
    assert list(file.parent.iterdir()) == [file]


async def refusal(file: Path) -> str:
    registry = EmbeddedRegistry(file)
    with pytest.raises(RegistryError) as caught:
        await registry.get("a")
    await registry.close()
    assert str(file) in str(caught.value)
    return str(caught.value)


async def test_a_file_that_is_no_database(file: Path):
    file.write_bytes(b"not a database, but long enough to be one " * 100)
    message = await refusal(file)
    assert "file is not a database" in message
    assert "move the file away" in message
    assert file.read_bytes().startswith(b"not a database")  # left for its owner to look at


async def test_a_database_of_somebody_else(file: Path):
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE theirs (x)")
    assert "its format is 0" in await refusal(file)


async def test_a_damaged_file(file: Path):
    registry = EmbeddedRegistry(file)
    for i in range(50):
        await registry.put(f"key/{i}", b"x" * 2000)
    await registry.close()
    data = bytearray(file.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    file.write_bytes(data)
    assert "malformed" in await refusal(file)


async def test_a_folder_in_its_place(file: Path):
    file.mkdir()
    assert "registry.file" in await refusal(file)


async def test_a_closed_one_says_so(file: Path):
    registry = EmbeddedRegistry(file)
    await registry.close()
    await registry.close()
    with pytest.raises(RegistryError, match="it is closed"):
        await registry.get("a")


async def test_a_writer_that_hangs_stops_neither_the_loop_nor_the_reads(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runtime.registry.embedded, "BUSY_S", 0.5)
    registry, reader = EmbeddedRegistry(file), EmbeddedRegistry(file)
    await registry.put("a", b"1")
    assert await reader.get("a")
    hung = sqlite3.connect(file, isolation_level=None)
    hung.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(registry.put("a", b"2"))
    entry = await reader.get("a")
    assert entry is not None
    assert entry.value == b"1"
    assert not writing.done()
    with pytest.raises(RegistryError, match=r"cannot put a: .*another process has held it"):
        await writing
    hung.execute("ROLLBACK")
    hung.close()
    assert await registry.put("a", b"2")
    await registry.close()
    await reader.close()


async def test_nothing_depends_on_the_clock_moving(file: Path, monkeypatch: pytest.MonkeyPatch):
    Clock(monkeypatch)
    registry = EmbeddedRegistry(file)
    versions = []
    for value in (b"1", b"1", b"2"):
        await registry.put("a", value)
        entry = await registry.get("a")
        assert entry is not None
        versions.append(entry.version)
    assert versions == sorted(set(versions))
    await registry.register(SERVICE, ttl_s=10)
    _, index = await registry.services(SERVICE.name)
    await registry.deregister("one")
    assert (await registry.services(SERVICE.name))[1] > index
    first = await registry.acquire("lock", b"1", ttl_s=10)
    assert first is not None
    assert await registry.acquire("lock", b"2", ttl_s=10) is None
    await first.release()
    assert await registry.acquire("lock", b"2", ttl_s=10) is not None
    await registry.close()


async def test_exactly_at_its_end_a_lock_is_lost_and_free(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock(monkeypatch)
    registry = EmbeddedRegistry(file)
    first = await registry.acquire("lock", b"1", ttl_s=10)
    assert first is not None
    clock.now += 9.999
    assert first.held
    assert await registry.acquire("lock", b"2", ttl_s=10) is None
    clock.now = 1010.0
    assert not first.held
    second = await registry.acquire("lock", b"2", ttl_s=10)
    assert second is not None
    assert second.held
    assert not await first.renew()
    await registry.close()


async def test_an_expired_service_moves_the_index_of_every_name_it_had(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock(monkeypatch)
    registry = EmbeddedRegistry(file)
    await registry.register(SERVICE, ttl_s=10)
    _, index = await registry.services(SERVICE.name)
    clock.now += 10
    moved = Service(service_id="one", name="stoker-router", address="127.0.0.1", port=2)
    await registry.register(moved, ttl_s=10)
    found, new_index = await registry.services(SERVICE.name)
    assert found == ()
    assert new_index > index
    await registry.close()


async def test_registering_again_unchanged_wakes_nobody(file: Path):
    registry = EmbeddedRegistry(file)
    await registry.register(SERVICE, ttl_s=10)
    before = await registry.services(SERVICE.name)
    await registry.register(SERVICE, ttl_s=20)
    assert await registry.services(SERVICE.name) == before
    await registry.close()


async def test_a_renewal_under_way_does_not_undo_a_release(file: Path):
    registry = EmbeddedRegistry(file)
    lock = await registry.acquire("lock", b"1", ttl_s=60)
    assert lock is not None
    renewed, _ = await asyncio.gather(lock.renew(), lock.release())
    assert not renewed
    assert not lock.held
    await registry.close()


async def test_a_file_that_others_may_write_is_told(tmp_path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    registry = EmbeddedRegistry(folder / "registry.db")
    assert await registry.open_to("stoker/leader") is None
    await registry.put("a", b"1")
    assert await registry.open_to("stoker/leader") is None
    for path in (folder / "registry.db", folder):
        before = path.stat().st_mode
        path.chmod(before | 0o002)
        assert str(path) in str(await registry.open_to("stoker/leader"))
        path.chmod(before)
    await registry.close()
