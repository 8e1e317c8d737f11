"""Caches of several nodes over real HTTP: peers, the lease, and a hub that is asked once."""

from __future__ import annotations

import asyncio
import os

import pytest
from aiohttp import web
from huggingface_hub import constants

from agent.cache.errors import CacheError
from runtime.checkpoints.model_files import model_id
from runtime.registry.protocol import RegistryError
from tests.kits.cache_nodes import leftovers, read_model, sha256, until
from tests.kits.fake_hub import LFS_BYTES, FakeHub

MB = 10**6
RANGE = 2**20
MODEL = "hf:org/m"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model-1.safetensors": os.urandom(9 * MB),
    "model-2.safetensors": os.urandom(5 * MB),
    "pytorch_model.bin": b"the same weights again" * 100,
    ".gitattributes": b"x",
}
WANTED = {name: FILES[name] for name in list(FILES)[:3]}


@pytest.fixture
async def hub(monkeypatch):
    hub = FakeHub()
    await hub.open()
    # What HF_ENDPOINT sets, which is read only once in a process.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    yield hub
    await hub.close()


def downloads(hub) -> list[str]:
    return [path for what, path in hub.calls if what == "storage"]


# ------------------------------------------------------------------------------ peers


async def test_a_peer_that_has_the_model_spares_the_hub(nodes, hub) -> None:
    hub.add("org/m", FILES)
    one, two = await nodes.start("one"), await nodes.start("two")
    await one.cache.ensure(MODEL)
    asked = len(hub.calls)
    folder = await two.cache.ensure(MODEL)
    assert read_model(folder) == WANTED
    assert len(hub.calls) == asked
    assert one.url in two.cache.view().pulls[0].origin
    assert leftovers(two) == []


async def test_ranges_are_taken_from_every_peer_that_has_the_file(nodes, hub) -> None:
    hub.add("org/m", FILES)
    one, two, three = [await nodes.start(name) for name in ("one", "two", "three")]
    await one.cache.ensure(MODEL)
    await two.cache.ensure(MODEL)
    one.blobs_served = two.blobs_served = 0
    assert read_model(await three.cache.ensure(MODEL)) == WANTED
    assert one.blobs_served >= 2
    assert two.blobs_served >= 2


async def test_many_nodes_at_once_ask_the_hub_once(nodes, hub) -> None:
    hub.add("org/m", FILES)
    started = [await nodes.start(f"n{i}") for i in range(5)]
    folders = await asyncio.gather(*(node.cache.ensure(MODEL) for node in started))
    assert all(read_model(folder) == WANTED for folder in folders)
    assert hub.count("info") == 1
    in_storage = [data for data in WANTED.values() if len(data) >= LFS_BYTES]
    assert len(downloads(hub)) == sum(-(-len(data) // RANGE) for data in in_storage)


async def test_files_are_taken_from_a_node_that_is_still_pulling(nodes, hub) -> None:
    hub.add("org/m", FILES)
    held = asyncio.Event()

    async def hold(path):
        if path == "model-1.safetensors":
            await held.wait()

    hub.before_bytes = hold
    one, two = await nodes.start("one"), await nodes.start("two")
    first = await one.cache.pull(MODEL)
    await until(lambda: len(first.files) == 2, "all but the held file")
    second = await two.cache.pull(MODEL)
    await until(lambda: len(second.files) == 2, "the files that the first node has")
    assert second.view().total_bytes == sum(map(len, WANTED.values()))
    held.set()
    await asyncio.gather(first.task, second.task)
    assert hub.count("info") == 1
    assert read_model(await two.cache.ensure(MODEL)) == WANTED


async def test_when_the_node_that_asks_the_hub_fails_another_takes_over(nodes, hub) -> None:
    files = WANTED | {
        "model-1.safetensors": os.urandom(20 * RANGE)
    }  # more than is under way at once
    hub.add("org/m", files)
    held = asyncio.Event()

    async def hold(path):
        if path == "model-1.safetensors":
            await held.wait()

    hub.before_bytes = hold
    one, two = await nodes.start("one"), await nodes.start("two")
    first = await one.cache.pull(MODEL)
    await until(lambda: len(first.files) == 2, "all but the held file")
    second = await two.cache.pull(MODEL)
    await until(lambda: len(second.files) == 2, "the files that the first node has")
    before = downloads(hub)
    first.stop()
    held.set()
    with pytest.raises(CacheError, match="cancelled"):
        await first.task
    await second.task
    assert read_model(await two.cache.ensure(MODEL)) == files
    assert set(downloads(hub)[len(before) :]) == {"model-1.safetensors"}


async def test_a_peer_that_vanishes_in_the_middle_is_replaced_by_another(nodes, hub) -> None:
    hub.add("org/m", FILES)
    one, two, three = [await nodes.start(name) for name in ("one", "two", "three")]
    await one.cache.ensure(MODEL)
    await two.cache.ensure(MODEL)
    asked = len(hub.calls)
    two.before_blob = cut
    assert read_model(await three.cache.ensure(MODEL)) == WANTED
    assert len(hub.calls) == asked
    assert leftovers(three) == []


async def cut(request):
    """Half an answer, then the connection is gone."""
    wanted = request.http_range
    size = wanted.stop - wanted.start
    answer = web.StreamResponse(status=206)
    answer.content_length = size
    await answer.prepare(request)
    await answer.write(bytes(size // 2))
    request.transport.abort()
    return answer


async def test_a_vanished_peer_and_no_hub_is_an_error_in_words(nodes, hub, monkeypatch) -> None:
    hub.add("org/m", FILES)
    one, two = await nodes.start("one"), await nodes.start("two")
    await one.cache.ensure(MODEL)
    one.before_blob = cut
    await hub.close()
    with pytest.raises(CacheError) as raised:
        await two.cache.ensure(MODEL)
    words = str(raised.value)
    assert raised.value.kind == "unreachable"
    assert words.startswith("hf:org/m@main: the hub http://127.0.0.1")
    assert "check the network of this node, HF_ENDPOINT" in words
    assert f"peers failed: peer {one.url} stopped answering in" in words
    assert two.cache.view().models == ()
    one.before_blob = None  # what came is gone on from
    assert read_model(await two.cache.ensure(MODEL)) == WANTED


async def test_wrong_bytes_of_a_peer_are_found_and_taken_from_another(nodes, hub) -> None:
    hub.add("org/m", FILES)
    one, two, three = [await nodes.start(name) for name in ("one", "two", "three")]
    await one.cache.ensure(MODEL)
    await two.cache.ensure(MODEL)
    spoil(two, "model-1.safetensors")
    asked = len(hub.calls)
    assert read_model(await three.cache.ensure(MODEL)) == WANTED
    assert len(hub.calls) == asked


async def test_wrong_bytes_of_the_only_peer_are_taken_from_the_hub(nodes, hub, caplog) -> None:
    hub.add("org/m", FILES)
    one, two = await nodes.start("one"), await nodes.start("two")
    await one.cache.ensure(MODEL)
    spoil(one, "model-1.safetensors")
    before = len(hub.calls)
    assert read_model(await two.cache.ensure(MODEL)) == WANTED
    assert {path for what, path in hub.calls[before:] if what == "storage"} == {
        "model-1.safetensors"
    }
    assert f"model-1.safetensors from peer {one.url} is corrupt" in caplog.text


def spoil(node, path: str) -> None:
    blob = node.cache.store.blob(sha256(WANTED[path]))
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(RANGE + 10)
        file.write(b"\0\1\2\3")


async def test_another_cluster_token_is_an_error_in_words(nodes, hub, caplog) -> None:
    hub.add("org/m", FILES)
    one = await nodes.start("one")
    await one.cache.ensure(MODEL)
    two = await nodes.start("two", token="another")
    await hub.close()
    with pytest.raises(CacheError, match="the hub"):
        await two.cache.ensure(MODEL)
    assert f"{one.url} refuses this node's cluster_token" in caplog.text


async def test_a_registry_that_is_down_costs_the_lease_only(nodes, hub, monkeypatch) -> None:
    hub.add("org/m", FILES)
    one = await nodes.start("one")

    async def down(*args, **options):
        raise RegistryError("it is down")

    for call in ("services", "get", "put", "acquire"):
        monkeypatch.setattr(nodes.registry, call, down)
    assert read_model(await one.cache.ensure(MODEL)) == WANTED


async def test_evicting_while_a_peer_reads_breaks_no_one(nodes, hub) -> None:
    hub.add("org/m", FILES)
    one, two = await nodes.start("one"), await nodes.start("two")
    await one.cache.ensure(MODEL)

    async def forget(request):
        if one.cache.store.models:
            await one.cache.remove(MODEL)

    one.before_blob = forget
    assert read_model(await two.cache.ensure(MODEL)) == WANTED


# ------------------------------------------------------------------------------ the hub


async def test_a_revision_is_pinned_for_every_node_until_it_is_refreshed(nodes, hub) -> None:
    old = hub.add("org/m", {"a": b"old"})
    one, two = await nodes.start("one"), await nodes.start("two")
    await one.cache.ensure(MODEL)
    await one.cache.remove(MODEL)
    new = hub.add("org/m", {"a": b"new"})
    assert read_model(await two.cache.ensure(MODEL)) == {"a": b"old"}
    assert two.cache.view().models[0].revision == old
    pull = await one.cache.pull(MODEL, refresh=True)
    await pull.task
    assert read_model(await one.cache.ensure(MODEL)) == {"a": b"new"}
    pull = await two.cache.pull(MODEL, refresh=True)
    await pull.task
    assert two.cache.view().models[-1].revision in (old, new)
    assert read_model(await two.cache.ensure(MODEL)) == {"a": b"new"}


async def test_a_commit_may_be_asked_for(nodes, hub) -> None:
    old = hub.add("org/m", {"a": b"old"})
    hub.add("org/m", {"a": b"new"})
    node = await nodes.start("one")
    assert read_model(await node.cache.ensure(f"{MODEL}@{old}")) == {"a": b"old"}
    assert read_model(await node.cache.ensure(MODEL)) == {"a": b"new"}


async def test_each_address_is_asked_for_once_a_file_and_again_when_it_expires(nodes, hub) -> None:
    hub.add("org/m", {"a.safetensors": os.urandom(7 * RANGE)})
    seen = 0

    async def expire_once(path):
        nonlocal seen
        seen += 1
        if seen == 3:
            hub.expire()

    hub.before_bytes = expire_once
    node = await nodes.start("one")
    await node.cache.ensure(MODEL)
    assert hub.places == 2
    assert not hub.storage_saw_token


async def test_a_hub_that_is_busy_is_tried_again(nodes, hub) -> None:
    hub.add("org/m", FILES)
    failures = iter([503, 500])

    async def busy(path):
        status = next(failures, None)
        return web.Response(status=status) if status else None

    hub.before_bytes = busy
    node = await nodes.start("one")
    assert read_model(await node.cache.ensure(MODEL)) == WANTED


async def test_wrong_bytes_of_the_hub_are_refused(nodes, hub) -> None:
    hub.add("org/m", {"config.json": b"small", "a.safetensors": os.urandom(2000)})

    async def spoiled(path):
        return web.Response(body=b"smelt", status=200) if path == "config.json" else None

    hub.before_bytes = spoiled
    node = await nodes.start("one")
    with pytest.raises(CacheError, match=r"config.json from the hub .* corrupt: its git-sha1"):
        await node.cache.ensure(MODEL)
    assert node.cache.view().models == ()


async def test_a_wrong_token_is_an_error_in_words(nodes, hub, monkeypatch) -> None:
    hub.add("org/m", FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    node = await nodes.start("one")
    with pytest.raises(CacheError, match=r"org/m@main with 401: its token is wrong.*HF_TOKEN") as e:
        await node.cache.ensure(MODEL)
    assert e.value.kind == "unauthorized"
    assert "hf_wrong" not in str(e.value)
    assert leftovers(node) == []


async def test_no_such_model_or_revision(nodes, hub) -> None:
    hub.add("org/m", FILES)
    node = await nodes.start("one")
    with pytest.raises(CacheError, match=r"has no org/none@main, or does not show it"):
        await node.cache.ensure("hf:org/none")
    with pytest.raises(CacheError, match=r"has no revision 'v9' of org/m"):
        await node.cache.ensure(f"{MODEL}@v9")


async def test_a_failed_pull_gives_the_lease_back(nodes, hub) -> None:
    node = await nodes.start("one")
    with pytest.raises(CacheError):
        await node.cache.ensure(MODEL)
    lock = await nodes.registry.acquire(
        f"stoker/cache/leases/{model_id('hf:org/m', 'main')}", b"someone else", 5.0
    )
    assert lock is not None
    await lock.release()
