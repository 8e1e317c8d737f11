"""What makes room in a node's cache, what never does, and a disk that is full."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from agent.cache.errors import CacheError
from tests.kits.cache_nodes import leftovers, read_model, until, write_model

MB = 10**6


def names(node) -> set[str]:
    return {s.manifest.source.rsplit("/")[-1] for s in node.cache.store.models.values()}


async def test_the_least_recently_used_model_makes_room_for_the_next(nodes, shared) -> None:
    for name in ("m1", "m2", "m3", "m4"):
        write_model(shared / name, a=100)
    node = await nodes.start(shared_dir=str(shared), limit_bytes=300)
    for name in ("m1", "m2", "m3", "m1", "m4"):
        await node.cache.ensure(name)
    assert names(node) == {"m1", "m3", "m4"}
    assert node.cache.view().used_bytes == 300
    assert len(list((node.folder / "store" / "blobs").iterdir())) == 3
    assert len(list((node.folder / "store" / "snapshots").iterdir())) == 3


async def test_a_model_in_use_is_never_evicted(nodes, shared) -> None:
    for name in ("m1", "m2", "m3"):
        write_model(shared / name, a=100)
    node = await nodes.start(shared_dir=str(shared), limit_bytes=200)
    held = await node.cache.ensure("m1", "r1")
    await node.cache.ensure("m2")
    await node.cache.ensure("m3")
    assert names(node) == {"m1", "m3"}
    assert (held / "a").stat().st_size == 100
    await node.cache.ensure("m3", "r2")
    with pytest.raises(CacheError, match=r"m2.*100 bytes too little.*in use by r1, r2.*unload"):
        await node.cache.ensure("m2")
    with pytest.raises(CacheError, match=r"in use by r1; unload"):
        await node.cache.remove("m1")
    node.cache.release("r1")
    await node.cache.ensure("m2")
    assert names(node) == {"m2", "m3"}


async def test_a_file_that_two_models_share_stays_for_the_other(nodes, shared) -> None:
    common = os.urandom(100)
    write_model(shared / "base", w=common, c=10)
    tuned = write_model(shared / "tuned", w=common, c=20)
    write_model(shared / "big", w=150)
    node = await nodes.start(shared_dir=str(shared), limit_bytes=300)
    await node.cache.ensure("base")
    folder = await node.cache.ensure("tuned", "r1")
    assert node.cache.view().used_bytes == 130
    await node.cache.ensure("big")
    assert names(node) == {"base", "tuned", "big"}
    assert await node.cache.remove("base") == 10
    assert read_model(folder) == read_model(tuned)


async def test_two_pulls_at_once_do_not_promise_the_same_room(nodes, shared, gate) -> None:
    for name in ("m1", "m2"):
        write_model(shared / name, a=100)
    node = await nodes.start(shared_dir=str(shared), limit_bytes=150)
    first = await node.cache.pull("m1")
    await until(gate.reached.is_set, "the first pull to have its room")
    with pytest.raises(CacheError, match="too little room"):
        await node.cache.ensure("m2")
    gate.open.set()
    await first.task
    assert names(node) == {"m1"}


async def test_a_model_larger_than_the_limit_is_refused_and_evicts_nothing(nodes, shared) -> None:
    write_model(shared / "small", a=50)
    write_model(shared / "huge", a=500)
    node = await nodes.start(shared_dir=str(shared), limit_bytes=100)
    await node.cache.ensure("small")
    with pytest.raises(CacheError, match=r"huge has 500 bytes, more than .* \(100\); raise") as e:
        await node.cache.ensure("huge")
    assert e.value.kind == "too_big"
    assert names(node) == {"small"}
    assert leftovers(node) == []


# ------------------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "stoker-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_model_that_does_not_fit_on_the_disk_is_refused_before(
    nodes, shared, small_disk
) -> None:
    write_model(shared / "m", a=30 * MB)
    node = await nodes.start("one", small_disk, shared_dir=str(shared))
    with pytest.raises(CacheError, match=r"m: \d+ bytes too little room .* free space there") as e:
        await node.cache.ensure("m")
    assert e.value.kind == "disk_full"
    assert leftovers(node) == []


async def test_what_is_cached_goes_when_the_disk_is_short(nodes, shared, small_disk) -> None:
    write_model(shared / "m1", a=12 * MB)
    write_model(shared / "m2", a=12 * MB)
    node = await nodes.start("one", small_disk, shared_dir=str(shared))
    await node.cache.ensure("m1")
    await node.cache.ensure("m2")
    assert names(node) == {"m2"}


async def test_a_disk_that_others_fill_meanwhile(nodes, shared, small_disk, gate) -> None:
    write_model(shared / "m", a=12 * MB, b=b"b")
    write_model(shared / "small", a=b"a")

    others, others_are_done = threading.Lock(), threading.Event()

    def fill() -> None:
        with others, (small_disk / "ballast").open("ab") as out:
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            if not others_are_done.is_set():
                os.posix_fallocate(out.fileno(), out.tell(), max(1, free))

    gate.after_bytes = 2**20
    gate.then = fill
    gate.open.set()
    node = await nodes.start("one", small_disk, shared_dir=str(shared))
    with pytest.raises(CacheError, match=r"m: the disk of .*store is full .* free space") as e:
        await node.cache.ensure("m")
    assert e.value.kind == "disk_full"
    assert leftovers(node) == []
    await until(lambda: not node.cache.view().used_bytes, "what came to be removed")
    with others:  # a read that is still under way fills nothing after this
        others_are_done.set()
        (small_disk / "ballast").unlink()
    await until(lambda: node.cache.store.disk_free_bytes() > 15 * MB, "the disk to be free")
    assert (await node.cache.ensure("m")).is_dir()
