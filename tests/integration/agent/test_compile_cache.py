"""What is compiled is shared between nodes as archives in a real folder; unsafe ones are not."""

from __future__ import annotations

import io
import sys
import tarfile
import time

import msgspec
import pytest

from agent.engines.launch_plan import Place
from agent.metrics import Metrics
from agent.weights.compile_cache import FOLDER, Compiled, CompileStore, Unsafe, unpack
from agent.weights.compile_share import CompileShare
from runtime.checkpoints.model_files import CacheConfig
from runtime.contract.config import Config
from runtime.wire.agent_messages import DeviceReport
from runtime.wire.model_spec import ModelSpec

COMPILED = Compiled(
    source="hf:org/name", model_path="/m", engine_args={"max_model_len": 8}, tensor_parallel_size=1,
    vllm="0.32.0", torch="2.13.0", python="3.11", device="a CPU; x86_64",
)  # fmt: skip
HASH = "vllm/torch_compile_cache/0123456789"


def compile_on(node, name="rank_0_0/backbone/graph"):
    """What vLLM leaves behind: its folder, Inductor's files; and what others left before."""
    for path in (f"{HASH}/{name}", "inductor/ab/code.so"):
        (node / path).parent.mkdir(parents=True, exist_ok=True)
        (node / path).write_bytes(path.encode())
    return f"INFO Using cache directory: {node}/{HASH}/rank_0_0/backbone for vLLM's torch.compile"


@pytest.fixture
def nodes(tmp_path):
    """(cache_dir, the store through it) of two nodes"""
    shared = tmp_path / "shared"
    return [(tmp_path / n, CompileStore(shared, tmp_path / n)) for n in ("a", "b")]


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "compiled" not in p.parts
    }


def test_what_one_node_compiled_another_has(nodes):
    (a, at_a), (b, at_b) = nodes
    old = a / "inductor" / "old" / "of_another_model.so"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    time.sleep(0.01)
    since = time.time()
    log = compile_on(a)
    assert at_b.fetch(COMPILED.key) is None
    assert at_a.push(COMPILED, log, since) > 0
    assert at_a.has(COMPILED.key)
    assert at_b.fetch(COMPILED.key) == 2
    assert contents(b) == {
        f"{HASH}/rank_0_0/backbone/graph": f"{HASH}/rank_0_0/backbone/graph".encode(),
        "inductor/ab/code.so": b"inductor/ab/code.so",
    }
    assert at_b.fetch(COMPILED.key) == 0, "it is not fetched again"
    assert not list(b.glob(".compiled-*")), "nothing half-made is left"


def test_a_file_that_is_there_is_not_replaced(nodes):
    (a, at_a), (b, at_b) = nodes
    at_a.push(COMPILED, compile_on(a), 0)
    (b / "inductor/ab").mkdir(parents=True)
    (b / "inductor/ab/code.so").write_bytes(b"its own")
    assert at_b.fetch(COMPILED.key) == 1
    assert (b / "inductor/ab/code.so").read_bytes() == b"its own"


def test_a_start_that_compiled_nothing_shares_nothing(nodes):
    (a, at_a), _ = nodes
    log = compile_on(a)
    assert at_a.push(COMPILED, log, time.time() + 1) is None
    assert at_a.push(COMPILED, "no folder is named", 0) is None
    assert not at_a.has(COMPILED.key)


@pytest.mark.parametrize(
    "change",
    [
        {"source": "hf:org/other"},
        {"engine_args": {"max_model_len": 9}},
        {"vllm": "0.33.0"},
        {"torch": "2.14.0"},
        {"device": "another CPU; x86_64"},
        {"tensor_parallel_size": 2},
    ],
)
def test_what_depends_on_something_else_has_another_key(change):
    assert msgspec.structs.replace(COMPILED, **change).key != COMPILED.key
    assert msgspec.structs.replace(COMPILED).key == COMPILED.key


def test_an_archive_that_was_changed_or_is_gone_is_refused(nodes, tmp_path):
    (a, at_a), (b, at_b) = nodes
    at_a.push(COMPILED, compile_on(a), 0)
    (archive,) = (tmp_path / "shared" / FOLDER).glob("*.tar.gz")
    good = archive.read_bytes()
    archive.write_bytes(good[:-1] + b"x")
    with pytest.raises(Unsafe, match="does not have the content"):
        at_b.fetch(COMPILED.key)
    archive.unlink()
    with pytest.raises(Unsafe, match="missing"):
        at_b.fetch(COMPILED.key)
    (tmp_path / "shared" / FOLDER / f"{COMPILED.key}.json").write_text("{")
    with pytest.raises(Unsafe, match="damaged"):
        at_b.fetch(COMPILED.key)
    assert contents(b) == {}


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("/etc/passwd"), "leaves the cache"),
        (member(f"{HASH}/../../../../x"), "leaves the cache"),
        (member(f"{HASH}/link", tarfile.SYMTYPE, "/etc/passwd"), "neither a file nor a folder"),
        (member(f"{HASH}/link", tarfile.LNKTYPE, "x"), "neither a file nor a folder"),
        (member(f"{HASH}/dev", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("pythonpath/runtime.py"), "is in none of"),
    ],
)
def test_an_unsafe_archive_writes_nothing(tmp_path, bad, words):
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w:gz") as tar:
        for info in (member(f"{HASH}/good"), bad):
            tar.addfile(info, io.BytesIO(b"data") if info.size else None)
    with pytest.raises(Unsafe, match=words):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "archive").write_bytes(b"not an archive")
    with pytest.raises(Unsafe, match="can't be read"):
        unpack(tmp_path / "archive", tmp_path / "out")


# ------------------------------------------------------------------------------ around a start


def share_of(tmp_path, node, **cache):
    place = Place(
        host="127.0.0.1", device_kind="cpu", python=sys.executable,
        cache_dir=str(tmp_path / node),
    )  # fmt: skip
    return CompileShare(Config(cache=CacheConfig(**cache)), place, Metrics())


async def start_on(share, node, spec):
    device = DeviceReport(
        device_id="d", index=0, kind="cpu", name="a CPU", memory_total_bytes=1, memory_used_bytes=0
    )
    await share.before("r-1", spec, "/m", "0.32.0", device)
    had = (node / HASH).exists()
    await share.after("r-1", lambda: compile_on(node, "later" if had else "graph"))
    return had


async def test_a_start_finds_what_another_node_compiled(tmp_path):
    spec = ModelSpec(name="m", source="m", device_memory_bytes=1)
    on = {"shared_dir": str(tmp_path / "shared"), "share_compile": True}
    assert not await start_on(share_of(tmp_path, "a", **on), tmp_path / "a", spec)
    assert await start_on(share_of(tmp_path, "b", **on), tmp_path / "b", spec)
    eager = msgspec.structs.replace(spec, engine_args={"enforce-eager": True})
    assert not await start_on(share_of(tmp_path, "c", **on), tmp_path / "c", eager)
    off = {"shared_dir": str(tmp_path / "shared")}
    assert not await start_on(share_of(tmp_path, "d", **off), tmp_path / "d", spec)


async def test_a_store_that_is_damaged_costs_no_start(tmp_path):
    spec = ModelSpec(name="m", source="m", device_memory_bytes=1)
    on = {"shared_dir": str(tmp_path / "shared"), "share_compile": True}
    await start_on(share_of(tmp_path, "a", **on), tmp_path / "a", spec)
    (archive,) = (tmp_path / "shared" / FOLDER).glob("*.tar.gz")
    archive.write_bytes(b"")
    assert not await start_on(share_of(tmp_path, "b", **on), tmp_path / "b", spec)


def test_sharing_without_a_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cache\.share_compile = true needs .* cache\.shared_dir"):
        share_of(tmp_path, "a", share_compile=True)


def test_a_link_in_the_shared_store_or_in_the_cache_leads_nowhere(nodes, tmp_path):
    """An engine may leave links in its cache; others may in the store."""
    (a, at_a), (b, at_b) = nodes
    secret = tmp_path / "secret"
    secret.write_text("cluster_token")
    since = time.time()
    log = compile_on(a)
    (a / HASH / "link").symlink_to(secret)
    (a / HASH / "folder").symlink_to(tmp_path)
    at_a.push(COMPILED, log, since)
    (b / "inductor").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (b / "inductor" / "ab").symlink_to(outside)
    with pytest.raises(Unsafe, match="leads out of"):
        at_b.fetch(COMPILED.key)
    assert list(outside.iterdir()) == []
    entry = tmp_path / "shared" / FOLDER / f"{COMPILED.key}.json"
    entry.rename(tmp_path / "entry.json")
    entry.symlink_to(tmp_path / "entry.json")
    with pytest.raises(Unsafe, match="leads out of"):
        at_b.fetch(COMPILED.key)
    with tarfile.open(next((tmp_path / "shared" / FOLDER).glob("*.tar.gz"))) as tar:
        assert not any("link" in name or "folder" in name for name in tar.getnames())


def test_an_entry_whose_digest_is_a_path_is_damaged(nodes, tmp_path):
    (a, at_a), (_, at_b) = nodes
    at_a.push(COMPILED, compile_on(a), 0)
    entry = tmp_path / "shared" / FOLDER / f"{COMPILED.key}.json"
    told = msgspec.json.decode(entry.read_bytes())
    entry.write_bytes(msgspec.json.encode({**told, "sha256": "../../secret"}))
    with pytest.raises(Unsafe, match="damaged"):
        at_b.fetch(COMPILED.key)
