"""The model cache on real disks: the shared store, one pull at a time, and restarts."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from agent.cache import store as store_file
from agent.cache.errors import CacheError
from agent.cache.sources import FolderSource
from tests.kits.cache_nodes import committed, leftovers, read_model, sha256, until, write_model

MB = 10**6


async def test_a_shared_model_is_copied_and_loaded_from_the_node(nodes, shared) -> None:
    model = write_model(shared / "org/m", config__json=b"{}", model__safetensors=9 * MB)
    write_model(model / "sub", extra__txt=b"x", empty=b"")
    node = await nodes.start(shared_dir=str(shared))
    folder = await node.cache.ensure("hf:org/m")
    assert folder.is_relative_to(node.folder)
    assert read_model(folder) == read_model(model)
    weights = folder / "model.safetensors"
    blob = node.cache.store.blob(sha256(weights.read_bytes()))
    assert blob.stat().st_ino == weights.stat().st_ino  # kept once
    assert leftovers(node) == []


@pytest.mark.parametrize("source", ["org/m", "{shared}/org/m", "hf:org/m", "hf:org/m@v1"])
async def test_names_of_the_shared_store(nodes, shared, source) -> None:
    write_model(shared / "org/m", a=b"main")
    write_model(shared / "org/m@v1", a=b"v1")
    node = await nodes.start(shared_dir=str(shared))
    folder = await node.cache.ensure(source.format(shared=shared))
    assert folder.is_relative_to(node.folder)
    assert (folder / "a").read_bytes() == (b"v1" if "@" in source else b"main")


async def test_copying_from_the_shared_store_is_a_choice(nodes, shared) -> None:
    model = write_model(shared / "org/m", a=b"a")
    node = await nodes.start(shared_dir=str(shared), copy_shared=False)
    assert await node.cache.ensure("hf:org/m") == model
    assert node.cache.view().models == ()


async def test_a_local_folder_is_used_in_place(nodes, tmp_path, shared, monkeypatch) -> None:
    node = await nodes.start(shared_dir=str(shared))
    model = write_model(tmp_path / "elsewhere", a=b"a")
    assert await node.cache.ensure(str(model)) == model
    named = write_model(node.folder / "models" / "named", a=b"a")
    assert await node.cache.ensure("named") == named
    monkeypatch.chdir(tmp_path)
    assert await node.cache.ensure("elsewhere") == model
    with pytest.raises(CacheError, match=r"'nowhere' is not a folder.*nfs/nowhere.*put the model"):
        await node.cache.ensure("nowhere")


async def test_who_only_asks_cannot_tell_whether_a_folder_elsewhere_is_there(
    nodes, tmp_path, shared, monkeypatch
) -> None:
    """Of a plan or a pull, which operators may ask for; the model folders are no secret."""
    node = await nodes.start(shared_dir=str(shared), copy_shared=False)
    write_model(tmp_path / "elsewhere", a=b"a")
    monkeypatch.chdir(tmp_path)

    async def told(source: str) -> list[str]:
        words = []
        for ask in (node.cache.where(source, anywhere=False), node.cache.pull(source)):
            with pytest.raises(CacheError, match="only for a model that is declared") as caught:
                await ask
            words.append(str(caught.value).replace(source, "SOURCE"))
        return words

    assert await told(f"{tmp_path}/elsewhere") == await told(f"{tmp_path}/missing")
    assert await told("elsewhere") == await told("missing")
    with pytest.raises(ValueError, match="is not a plain path"):
        await node.cache.where(f"{node.folder}/models/../../elsewhere", anywhere=False)
    for folder, source in (
        (node.folder / "models/named", "named"), (shared / "kept", "kept"),
        (node.folder / "models/full", f"{node.folder}/models/full"),
    ):  # fmt: skip
        model = write_model(folder, a=b"a")
        assert await node.cache.where(source, anywhere=False) == model
        assert await node.cache.pull(source) is None


async def test_a_cached_model_needs_no_shared_store(nodes, shared) -> None:
    model = write_model(shared / "m", a=b"a")
    node = await nodes.start(shared_dir=str(shared))
    folder = await node.cache.ensure("m")
    (model / "a").unlink()
    model.rmdir()
    assert await node.cache.ensure("m") == folder


async def test_a_changed_shared_model_is_pulled_again_when_asked_to(nodes, shared) -> None:
    model = write_model(shared / "m", a=b"old", b=b"same")
    node = await nodes.start(shared_dir=str(shared))
    old = await node.cache.ensure("m")
    (model / "a").write_bytes(b"new!")
    assert await node.cache.ensure("m") == old
    pull = await node.cache.pull("m", refresh=True)
    await pull.task
    new = await node.cache.ensure("m")
    assert (new / "a").read_bytes() == b"new!"
    assert (old / "a").read_bytes() == b"old"  # a replica may still load it
    await committed(node)


async def test_two_writers_of_one_record_take_turns(nodes, shared, monkeypatch) -> None:
    """A commit in its thread, and a name that now means another revision."""
    write_model(shared / "m", a=b"x")
    node = await nodes.start(shared_dir=str(shared))
    await node.cache.ensure("m")
    await committed(node)
    store = node.cache.store
    (model_id,) = store.models
    first_in, second_done = threading.Event(), threading.Event()
    sync = store_file._sync

    def slow_sync(path: Path) -> None:
        if not first_in.is_set():
            first_in.set()
            second_done.wait(0.5)  # long enough for the other, if nothing held it up
        sync(path)

    monkeypatch.setattr(store_file, "_sync", slow_sync)
    first = asyncio.create_task(asyncio.to_thread(store._write, model_id))
    await asyncio.to_thread(first_in.wait, 10)
    await asyncio.to_thread(store._write, model_id)
    second_done.set()
    await first  # it raised FileNotFoundError: the other had renamed its file away


# ------------------------------------------------------------------------------ one pull


async def test_requests_at_once_share_one_pull(nodes, shared, monkeypatch) -> None:
    write_model(shared / "m", a=b"a", b=b"b")
    reads = []
    read = FolderSource.read_into

    def noted(source, file, start, view):
        reads.append(file.path)
        read(source, file, start, view)

    monkeypatch.setattr(FolderSource, "read_into", noted)
    node = await nodes.start(shared_dir=str(shared))
    folders = await asyncio.gather(*(node.cache.ensure("m") for _ in range(20)))
    assert len(set(folders)) == 1
    assert sorted(reads) == ["a", "b"]


async def test_a_caller_that_leaves_does_not_end_the_pull(nodes, shared, gate) -> None:
    write_model(shared / "m", a=b"a")
    node = await nodes.start(shared_dir=str(shared))
    first = asyncio.create_task(node.cache.ensure("m"))
    second = asyncio.create_task(node.cache.ensure("m"))
    await until(gate.reached.is_set, "the pull to read")
    first.cancel()
    gate.open.set()
    assert (await second / "a").read_bytes() == b"a"


async def test_progress_is_seen(nodes, shared, gate) -> None:
    write_model(shared / "m", a=9 * MB)
    gate.after_bytes = 8 * 2**20
    node = await nodes.start(shared_dir=str(shared))
    pull = await node.cache.pull("m")
    await until(lambda: pull.view().done_bytes == 8 * 2**20, "two ranges to be written")
    (seen,) = node.cache.view().pulls
    assert (seen.state, seen.total_bytes) == ("pulling", 9 * MB)
    assert str(shared) in seen.origin
    assert node.cache.view().partial_bytes == 8 * 2**20
    gate.open.set()
    await pull.task
    (seen,) = node.cache.view().pulls
    assert (seen.state, seen.done_bytes, seen.eta_s) == ("ready", 9 * MB, None)
    (model,) = node.cache.view().models
    assert (model.files, model.size_bytes, model.unshared_bytes) == (1, 9 * MB, 9 * MB)


async def test_a_pull_that_was_cut_off_goes_on(nodes, shared, gate, monkeypatch, tmp_path) -> None:
    model = write_model(shared / "m", a=40 * MB, b=b"b")
    gate.after_bytes = 8 * 2**20
    node = await nodes.start("one", tmp_path / "disk", shared_dir=str(shared))
    pull = await node.cache.pull("m")
    await until(lambda: pull.view().done_bytes == 8 * 2**20 + 1, "what can be written")
    closing = asyncio.create_task(node.cache.close())
    gate.open.set()
    await closing
    with pytest.raises(CacheError, match="cancelled"):
        await pull.task
    assert len(leftovers(node)) == 1

    starts = []
    read = FolderSource.read_into

    def noted(source, file, start, view):
        starts.append((file.path, start))
        read(source, file, start, view)

    monkeypatch.setattr(FolderSource, "read_into", noted)
    again = await nodes.start("two", tmp_path / "disk", shared_dir=str(shared))
    assert read_model(await again.cache.ensure("m")) == read_model(model)
    assert min(start for path, start in starts if path == "a") >= 8 * 2**20
    assert leftovers(again) == []


# ------------------------------------------------------------------------------ restarts


async def test_a_restart_knows_what_is_cached_and_when_it_was_used(nodes, shared, tmp_path) -> None:
    for name in ("m1", "m2"):
        write_model(shared / name, a=10)
    one = await nodes.start("one", tmp_path / "disk", shared_dir=str(shared))
    await one.cache.ensure("m1")
    await one.cache.ensure("m2")
    await committed(one)
    await one.cache.ensure("m1")
    await one.cache.close()
    two = await nodes.start("two", tmp_path / "disk", shared_dir=str(shared))
    assert two.cache.view().models[0].size_bytes == 10
    oldest = min(two.cache.store.held(), key=lambda m: m.used_at)
    assert two.cache.store.models[oldest.model_id].manifest.source.endswith("m2")


async def test_a_model_that_lost_a_file_is_pulled_again(nodes, shared, tmp_path) -> None:
    model = write_model(shared / "m", a=b"aa", b=b"bb")
    one = await nodes.start("one", tmp_path / "disk", shared_dir=str(shared))
    await one.cache.ensure("m")
    await committed(one)
    blob = one.cache.store.blob(sha256(b"aa"))
    blob.chmod(0o644)
    os.truncate(blob, 1)  # as a power cut may leave it
    await one.cache.close()
    two = await nodes.start("two", tmp_path / "disk", shared_dir=str(shared))
    assert two.cache.view().models == ()
    assert read_model(await two.cache.ensure("m")) == read_model(model)


async def test_blobs_of_a_pull_that_was_cut_off_are_hashed_before_use(
    nodes, shared, tmp_path
) -> None:
    model = write_model(shared / "m", a=b"good", b=b"right", c=b"c")
    sums = "".join(f"{sha256((model / n).read_bytes())}  {n}\n" for n in "abc")
    (model / "SHA256SUMS").write_text(sums)
    blobs = tmp_path / "disk" / "store" / "blobs"
    write_model(blobs, **{sha256(b"good"): b"good", sha256(b"right"): b"wrong"})
    node = await nodes.start("one", tmp_path / "disk", shared_dir=str(shared))
    assert node.cache.store.blob(sha256(b"good")) is None
    folder = await node.cache.ensure("m")
    assert read_model(folder) == {"a": b"good", "b": b"right", "c": b"c"}


async def test_two_agents_do_not_share_one_cache_folder(nodes, tmp_path) -> None:
    await nodes.start("one", tmp_path / "disk")
    with pytest.raises(RuntimeError, match=r"another agent uses .*store; give each its own"):
        await nodes.start("two", tmp_path / "disk")
