"""The model cache on real disks: the shared store, one pull at a time, eviction, errors."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from pathlib import Path

import pytest

from agent.cache import fetch
from agent.cache import store as store_file
from agent.cache.errors import CacheError, SourceError
from agent.cache.sources import FolderSource
from tests.kits.cache_nodes import (
    Nodes,
    committed,
    leftovers,
    read_model,
    sha256,
    until,
    write_model,
)

MB = 10**6


@pytest.fixture
async def nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "RANGE_BYTES", 2**20)
    async with Nodes(tmp_path) as nodes:
        yield nodes


@pytest.fixture
def shared(tmp_path) -> Path:
    folder = tmp_path / "nfs"
    folder.mkdir()
    return folder


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
    monkeypatch.setattr(
        FolderSource, "read_into", lambda *args: (reads.append(args[1].path), read(*args))[1]
    )
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


class Gate:
    """Lets folders be read once `open`; `then` runs in the reading thread before."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.after_bytes = 0
        self.then = lambda: None


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    read = FolderSource.read_into

    def read_into(self, file, start, view):
        if start >= gate.after_bytes:
            gate.reached.set()
            assert gate.open.wait(20)
            gate.then()
        read(self, file, start, view)

    monkeypatch.setattr(FolderSource, "read_into", read_into)
    yield gate
    gate.open.set()


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
    monkeypatch.setattr(
        FolderSource,
        "read_into",
        lambda *args: (starts.append((args[1].path, args[2])), read(*args))[1],
    )
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


# ------------------------------------------------------------------------------ eviction


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


# ------------------------------------------------------------------------------ bad bytes


async def test_wrong_bytes_in_the_shared_store_are_refused(nodes, shared) -> None:
    model = write_model(shared / "m", a=b"not what it was")
    (model / "SHA256SUMS").write_text(f"{sha256(b'what it was')} *a\n")
    node = await nodes.start(shared_dir=str(shared))
    with pytest.raises(CacheError, match=r"/m: a from the folder .* is corrupt: its sha256") as e:
        await node.cache.ensure("m")
    assert e.value.kind == "corrupt"
    assert leftovers(node) == []
    assert node.cache.view().models == ()
    assert node.cache.view().pulls[0].error_kind == "corrupt"


async def test_a_file_that_shrinks_while_it_is_copied_is_noticed(nodes, shared, gate) -> None:
    model = write_model(shared / "m", a=9 * MB)
    gate.after_bytes = 2**20
    gate.then = lambda: os.truncate(model / "a", 5 * MB)
    gate.open.set()
    node = await nodes.start(shared_dir=str(shared))
    with pytest.raises(CacheError, match=r"a ended after .* still being written"):
        await node.cache.ensure("m")


async def test_verify_finds_a_damaged_file_and_forgets_the_model(nodes, shared) -> None:
    write_model(shared / "m", a=b"aaaa", b=b"bbbb")
    node = await nodes.start(shared_dir=str(shared))
    folder = await node.cache.ensure("m", "r1")
    assert (await node.cache.verify("m")).bad_files == ()
    (folder / "a").chmod(0o644)
    (folder / "a").write_bytes(b"axaa")
    report = await node.cache.verify("m")
    assert (report.bad_files, report.removed) == (("a",), False)
    assert "in use by r1" in report.note
    assert node.cache.store.blob(sha256(b"aaaa")) is None  # no peer gets it
    node.cache.release("r1")
    assert (await node.cache.verify("m")).removed
    assert read_model(await node.cache.ensure("m")) == {"a": b"aaaa", "b": b"bbbb"}


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


# ------------------------------------------------------------------------------ links


@pytest.mark.parametrize("copy_shared", [True, False])
@pytest.mark.parametrize("what", ["file", "folder", "chain", "model", "SHA256SUMS"])
async def test_a_link_out_of_the_shared_store_is_refused(
    nodes, shared, tmp_path, what, copy_shared
) -> None:
    """Whoever may write to the store must not have a node's own files copied and served."""
    secret = write_model(tmp_path / "etc", stoker__toml=b"cluster_token")
    model = shared / "org" / "m"
    if what == "model":
        model.parent.mkdir()
        model.symlink_to(secret)
    else:
        write_model(model, config__json=b"{}")
    if what in ("file", "SHA256SUMS"):
        (model / ("notes.txt" if what == "file" else what)).symlink_to(secret / "stoker.toml")
    elif what == "folder":
        (model / "sub").symlink_to(secret)
    elif what == "chain":
        (shared / "hop").symlink_to(secret)
        (model / "sub").symlink_to("../../hop")
    node = await nodes.start(shared_dir=str(shared), copy_shared=copy_shared)
    for source in ("org/m", "hf:org/m", str(model)):
        with pytest.raises(CacheError, match="link that leads out of") as error:
            await node.cache.ensure(source)
        assert error.value.kind == "bad_source"
    assert node.cache.view().models == ()
    assert [p for p in node.folder.rglob("*") if p.is_file() and b"token" in p.read_bytes()] == []


async def test_a_link_that_stays_in_the_shared_store_is_followed(nodes, shared) -> None:
    write_model(shared / "blobs", b1=b"weights")
    model = write_model(shared / "org/m", config__json=b"{}")
    (model / "model.safetensors").symlink_to("../../blobs/b1")
    (model / "again").symlink_to(".")
    node = await nodes.start(shared_dir=str(shared))
    folder = await node.cache.ensure("hf:org/m")
    assert read_model(folder) == {"config.json": b"{}", "model.safetensors": b"weights"}


async def test_a_link_that_is_swapped_between_listing_and_reading(nodes, shared, tmp_path) -> None:
    write_model(shared / "m", a=b"fine")
    write_model(tmp_path / "etc", secret=b"cluster_token")
    source = FolderSource(shared / "m", shared)
    (listed,) = source.listing().files
    (shared / "m" / "a").unlink()
    (shared / "m" / "a").symlink_to(tmp_path / "etc" / "secret")
    with pytest.raises(SourceError, match="leads out of"):
        source.read_into(listed, 0, memoryview(bytearray(4)))


async def test_what_is_no_plain_file_is_refused(nodes, shared) -> None:
    os.mkfifo(write_model(shared / "m", a=b"a") / "pipe")
    node = await nodes.start(shared_dir=str(shared))
    with pytest.raises(CacheError, match="pipe is not a plain file"):
        await node.cache.ensure("m")


@pytest.mark.parametrize(
    "source", ["hf:priv/model@v1/../../../etc", "../etc", "priv/../../etc", "{shared}/../etc"]
)
async def test_a_source_that_climbs_out_of_the_store_is_refused(
    nodes, shared, tmp_path, source
) -> None:
    write_model(tmp_path / "etc", stoker__toml=b"cluster_token")
    write_model(shared / "priv/model@v1", a=b"a")
    node = await nodes.start(shared_dir=str(shared))
    with pytest.raises(ValueError, match="write"):
        await node.cache.pull(source.format(shared=shared))
    assert node.cache.view().pulls == ()
