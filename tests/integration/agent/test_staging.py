"""Staging with the host's real page cache, and an agent process that is told to stage."""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import threading

import aiohttp
import msgspec
import pytest

from agent.weights import page_cache
from agent.weights.disk_models import look_at
from runtime.checkpoints.model_files import CacheConfig
from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.agent_messages import StageModels, Staging
from tests.kits.agent_process import (
    DEVICE,
    TOKEN,
    AgentProcess,
    Client,
    FakeScheduler,
    bearer,
    kill_all,
    make_config,
    spec,
    start,
    until,
)

MIB = 2**20
WEIGHTS = 40 * MIB


@pytest.fixture
def model(tmp_path):
    """A folder with weights on a disk that lets pages go; none of them in the page cache."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, size in (("a.safetensors", 30 * MIB + 5), ("b.safetensors", 10 * MIB - 5)):
        with (folder / name).open("wb") as file:
            file.write(os.urandom(size))
            os.fsync(file.fileno())
    (folder / "config.json").write_text("{}")
    forget(folder)
    if resident(folder):
        pytest.skip(f"{tmp_path} is on a file system that lets no page go (tmpfs?)")
    return folder


def forget(folder):
    for path in folder.iterdir():
        page_cache.drop(path)


def resident(folder):
    return look_at(folder).resident_bytes


def test_load_brings_in_what_is_asked_for_and_no_more(model):
    path = model / "a.safetensors"
    page_cache.load(path, 20 * MIB, threading.Event())
    # The kernel may round up a little, and a host that reclaims all the time takes some back.
    assert 19 * MIB <= page_cache.resident_bytes(path) <= 21 * MIB
    page_cache.load(path, 99 * MIB, threading.Event())
    assert 29 * MIB < page_cache.resident_bytes(path) <= 30 * MIB + 5
    page_cache.drop(path)
    assert page_cache.resident_bytes(path) == 0


def test_where_the_kernel_does_not_read_ahead_it_is_read(model, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: None)
    path = model / "b.safetensors"
    page_cache.load(path, 99 * MIB, threading.Event())
    assert 9 * MIB < page_cache.resident_bytes(path) <= 10 * MIB - 5


def test_a_cancelled_load_stops(model):
    cancelled = threading.Event()
    cancelled.set()
    page_cache.load(model / "a.safetensors", 0, cancelled)
    assert resident(model) == 0


def test_a_file_that_is_gone_has_nothing_resident(tmp_path):
    assert page_cache.resident_bytes(tmp_path / "gone") == 0
    page_cache.drop(tmp_path / "gone")


def test_mapped_files_are_found(model):
    path = model / "b.safetensors"
    inode = path.stat().st_ino
    assert inode not in page_cache.mapped_inodes([os.getpid()])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        assert inode in page_cache.mapped_inodes([os.getpid()])


# ------------------------------------------------------------------------------ the agent


@pytest.fixture
async def node(tmp_path):
    """(an agent process, the scheduler it reports to, a client)"""
    cache = CacheConfig(shared_dir=str(tmp_path / "shared"))
    config = msgspec.structs.replace(
        make_config(tmp_path, host_budget_bytes=512 * MIB), cache=cache
    )
    (tmp_path / "state").mkdir()
    registry = EmbeddedRegistry(config.registry_file())
    scheduler = FakeScheduler()
    await scheduler.open()
    await scheduler.lead(registry)
    agent = AgentProcess(config, tmp_path)
    async with aiohttp.ClientSession() as session:
        yield await agent.ready(), scheduler, Client(session)
    agent.close()
    kill_all(config)
    await scheduler.close()
    await registry.close()
    print((tmp_path / "agent.log").read_text())


def told(scheduler, source):
    models = scheduler.heartbeats[-1].cached if scheduler.heartbeats else ()
    return {m.source: m for m in models}.get(source)


async def test_a_model_is_held_as_wished_and_let_go_again(node, model):
    agent, scheduler, client = node
    source = str(model)
    wish = StageModels(epoch=1, models=(Staging(source=source, bytes=WEIGHTS),))
    await client.ok(agent.url, wish)
    await until(lambda: resident(model) == WEIGHTS, "the weights to be in the page cache")
    await until(
        lambda: (m := told(scheduler, source)) and m.resident_bytes == WEIGHTS, "it to be told"
    )
    assert scheduler.heartbeats[-1].staged == (source,)
    assert told(scheduler, source).disk_bytes == WEIGHTS + 2

    await asyncio.to_thread(forget, model)
    await until(lambda: resident(model) == WEIGHTS, "what was dropped to be read again")

    await client.ok(agent.url, StageModels(epoch=1, models=()))
    await until(lambda: resident(model) == 0, "the weights to be let go")
    await until(lambda: told(scheduler, source).resident_bytes == 0, "that to be told")
    await until(lambda: scheduler.heartbeats[-1].staged == (), "the wish to be told")


async def test_no_more_than_was_booked_is_held(node, model):
    agent, _, client = node
    wish = StageModels(epoch=1, models=(Staging(source=str(model), bytes=16 * MIB),))
    await client.ok(agent.url, wish)
    await until(lambda: resident(model) >= 16 * MIB, "the booked part to be there")
    # A whole round of looking must add nothing to it.
    deadline = asyncio.get_running_loop().time() + 6
    while asyncio.get_running_loop().time() < deadline:
        assert resident(model) <= 17 * MIB
        await asyncio.sleep(0.2)


async def test_a_start_says_where_it_began(node, model):
    agent, scheduler, client = node
    own = spec(source=str(model), start_s=0.0)
    await client.ok(agent.url, start("m-1", model=own))
    assert (await scheduler.phase("ready", "m-1")).started_from == "cached"
    await until(lambda: told(scheduler, str(model)), "the folder of a start to be told")

    wish = StageModels(epoch=1, models=(Staging(source=str(model), bytes=WEIGHTS),))
    await client.ok(agent.url, wish)
    await until(lambda: resident(model) == WEIGHTS, "the weights to be in the page cache")
    await client.ok(agent.url, start("m-2", model=own, devices=(DEVICE.replace(":0", ":1"),)))
    assert (await scheduler.phase("ready", "m-2")).started_from == "staged"


async def test_a_model_that_is_not_here_is_pulled_and_then_held(node, model, tmp_path):
    agent, scheduler, client = node
    there = tmp_path / "shared" / "org" / "name"
    there.parent.mkdir(parents=True)
    model.rename(there)
    own = spec(source="org/name", start_s=0.0)
    await client.ok(agent.url, start("m-1", model=own))
    assert told(scheduler, "org/name") is None
    wish = StageModels(epoch=1, models=(Staging(source="org/name", bytes=WEIGHTS),))
    await client.ok(agent.url, wish)
    await until(
        lambda: (m := told(scheduler, "org/name")) and m.resident_bytes == WEIGHTS, "it to be held"
    )
    await client.ok(agent.url, start("m-2", model=own, devices=(DEVICE.replace(":0", ":1"),)))
    assert (await scheduler.phase("ready", "m-2")).started_from == "staged"
    async with client.session.get(f"{agent.url}/agent/cache", headers=bearer(TOKEN)) as reply:
        (listed,) = (await reply.json())["models"]
    assert listed["resident_bytes"] == WEIGHTS


async def test_a_rung_that_host_memory_has_no_room_for_is_not_offered(node):
    agent, scheduler, client = node
    own = spec(start_s=0.0, host_bytes="1GiB")
    await client.ok(agent.url, start("m-1", model=own))
    report = await scheduler.phase("ready", "m-1")
    assert report.rungs == (2,)
    assert "host_reserve_bytes" in report.disabled["asleep-1"]
    assert scheduler.heartbeats[-1].host_budget_bytes == 512 * MIB


async def test_how_full_an_engine_is_told(node):
    agent, scheduler, client = node
    own = spec(start_s=0.0, kv_requests=2, token_s=0.05, max_tokens=10_000)
    await client.ok(agent.url, start("m-1", model=own))
    report = await scheduler.phase("ready", "m-1")
    await until(lambda: scheduler.report().kv_cache_usage == 0.0, "an idle engine to say so")
    calls = [asyncio.create_task(client.complete(report, 10_000)) for _ in range(3)]
    await until(
        lambda: (scheduler.report().kv_cache_usage, scheduler.report().engine_waiting) == (1.0, 1),
        "a full engine to say so",
    )
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    await until(lambda: scheduler.report().kv_cache_usage == 0.0, "it to be empty again")


async def test_a_model_that_vanishes_is_told_no_more(node, model):
    agent, scheduler, client = node
    wish = StageModels(epoch=1, models=(Staging(source=str(model), bytes=WEIGHTS),))
    await client.ok(agent.url, wish)
    await until(lambda: told(scheduler, str(model)), "it to be told")
    shutil.rmtree(model)
    await until(lambda: told(scheduler, str(model)) is None, "it to be told no more")
    assert agent.popen.poll() is None


async def test_a_wish_that_cannot_be_is_no_harm(node, tmp_path):
    agent, scheduler, client = node
    gone = str(tmp_path / "gone")
    wish = StageModels(epoch=1, models=(Staging(source=gone, bytes=MIB),))
    await client.ok(agent.url, wish)
    await until(
        lambda: scheduler.heartbeats and scheduler.heartbeats[-1].staged == (gone,), "it to be told"
    )
    assert told(scheduler, gone) is None
    await until(
        lambda: "can't be staged" in (tmp_path / "agent.log").read_text(), "the reason to be said"
    )
