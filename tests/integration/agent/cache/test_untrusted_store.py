"""A shared store that holds wrong bytes, or links and names that lead out of it."""

from __future__ import annotations

import os

import pytest

from agent.cache.errors import CacheError, SourceError
from agent.cache.sources import FolderSource
from tests.kits.cache_nodes import leftovers, read_model, sha256, write_model

MB = 10**6


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
