"""An engine that dies or cannot start, a registry that is down, devices that hang."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import threading

import pytest

import agent.driver
from agent.core.messages import ShutdownRequested
from agent.core.state_machine import AgentCore
from agent.devices.inventory import open_devices
from agent.driver import run_agent
from runtime.registry.protocol import RegistryError
from tests.kits.agent_process import (
    TOKEN,
    alive,
    bearer,
    kill_all,
    make_config,
    processes,
    spec,
    start,
    stop,
    until,
)


async def test_a_killed_engine_is_restarted_and_told(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    second = await scheduler.phase("ready")
    assert second.pid != first.pid
    assert second.key != first.key
    died = next(h for h in scheduler.heartbeats for r in h.replicas if r.phase == "backoff")
    assert died.replicas[0].exit_kind == "killed"
    assert await client.complete(second) == 2
    async with client.session.get(f"{node.url}/metrics", headers=bearer(TOKEN)) as reply:
        text = await reply.text()
    assert 'stoker_agent_exits_total{kind="killed",model="m"} 1.0' in text
    assert 'stoker_agent_replicas{phase="ready"} 1.0' in text


async def test_what_a_killed_api_server_leaves_behind_is_killed(launch, scheduler, client):
    node = await launch(env={"STOKER_TEST_FAMILY": "1"})
    await client.ok(node.url, start())
    first = await scheduler.phase("ready")
    family = processes(node.config)["m-1"]
    assert len(family) == 2
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: scheduler.report().restarts == 1, "a restart")
    assert not any(map(alive, family))
    await scheduler.phase("ready")
    again = processes(node.config)["m-1"]
    assert len(again) == 2
    await client.ok(node.url, stop())
    await scheduler.phase(None)
    assert not any(map(alive, again))


async def test_a_source_that_is_not_there_fails_with_words(launch, scheduler, client):
    node = await launch()
    await client.ok(node.url, start(model=spec("vllm", "/no/such/model")))
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "bad_model"
    assert "/no/such/model" in failed.reason
    assert failed.pid is None
    await client.ok(node.url, stop())
    await scheduler.phase(None)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (start(model=spec(start_minutes=3)), "start_minutes"),
        (start(devices=("GPU-elsewhere",)), "GPU-elsewhere"),
    ],
)
async def test_a_start_that_cannot_be_fails_with_words(launch, scheduler, client, command, words):
    node = await launch()
    await client.ok(node.url, command)
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "bad_argument"
    assert words in failed.reason
    assert processes(node.config) == {}


async def test_an_engine_that_cannot_start_is_given_up_with_its_reason(launch, scheduler, client):
    node = await launch(max_restarts=1)
    await client.ok(node.url, start(model=spec(start_s=0.0, fail_start="oom")))
    failed = await scheduler.phase("failed")
    assert (failed.exit_kind, failed.restarts) == ("oom", 1)
    assert "memory" in failed.reason
    assert scheduler.phases() == ["starting", "backoff", "starting", "failed"]


async def test_a_start_that_takes_too_long_is_ended(launch, scheduler, client):
    node = await launch(start_timeout_s=1.0)
    await client.ok(node.url, start(model=spec(start_s=600.0)))
    failed = await scheduler.phase("failed")
    assert failed.exit_kind == "start_timeout"
    await until(lambda: processes(node.config) == {}, "its process to be gone")


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")
async def test_a_host_where_vllm_cannot_compile_says_so_before_the_first_start(
    launch, scheduler, tmp_path
):
    await launch(devices="cpu:6GiB", env={"PATH": "/without/a/compiler"}, launcher=False)
    log = tmp_path / "agent.log"
    await until(
        lambda: "can't here: there is no g++ on the PATH /without/a" in log.read_text(), "it"
    )
    assert "apt-get install g++ python3-dev" in log.read_text()


class DownRegistry:
    """A registry that can't be reached until `up`."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.up = False

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        async def call(*args, **kwargs):
            if not self.up:
                raise RegistryError("the registry is down")
            return await method(*args, **kwargs)

        return call


@pytest.fixture
async def in_process(tmp_path, scheduler, registry):
    """Runs the agent in this process, to put a hand on its registry or its devices."""
    stop_it, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    tasks = []

    async def run(registry=registry) -> str:
        config = make_config(tmp_path)
        work = run_agent(config, registry, stop=stop_it, on_ready=ready.set_result)
        tasks.append(asyncio.create_task(work))
        await asyncio.wait([ready, *tasks], return_when=asyncio.FIRST_COMPLETED)
        return ready.result()

    yield run
    stop_it.set()
    try:
        await asyncio.wait_for(asyncio.gather(*tasks), 30.0)
        assert processes(make_config(tmp_path)) == {}
    finally:
        kill_all(make_config(tmp_path))


async def test_a_drain_that_fails_ends_the_agent_with_its_error(
    tmp_path, scheduler, registry, monkeypatch
):
    handle = AgentCore.handle

    def fail(self, event):
        if isinstance(event, ShutdownRequested):
            raise KeyError("a fault of ours")
        return handle(self, event)

    monkeypatch.setattr(AgentCore, "handle", fail)
    stop_it, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    work = asyncio.create_task(
        run_agent(make_config(tmp_path), registry, stop=stop_it, on_ready=ready.set_result)
    )
    await asyncio.wait_for(ready, 30)
    stop_it.set()
    with pytest.raises(KeyError, match="a fault of ours"):
        await asyncio.wait_for(work, 30)


async def test_a_registry_that_is_down_stops_nothing(in_process, scheduler, client, registry):
    down = DownRegistry(registry)
    url = await in_process(down)
    await client.ok(url, start())
    async with client.session.get(f"{url}/metrics", headers=bearer(TOKEN)) as reply:
        assert reply.status == 200
    assert scheduler.heartbeats == []
    down.up = True
    await scheduler.phase("ready")
    down.up = False
    await client.ok(url, stop())
    await scheduler.phase(None)


async def test_devices_that_hang_do_not_hold_up_heartbeats(
    in_process, scheduler, client, monkeypatch
):
    hang, release = threading.Event(), threading.Event()

    class Hanging:
        def __init__(self, setting, node_id):
            self._inner = open_devices(setting, node_id)
            self.kind = self._inner.kind

        def read(self, pids):
            if hang.is_set():
                release.wait(60.0)
            return self._inner.read(pids)

        def __getattr__(self, name):
            return getattr(self._inner, name)

    monkeypatch.setattr(agent.driver, "open_devices", Hanging)
    url = await in_process()
    await until(lambda: scheduler.heartbeats, "a heartbeat")
    hang.set()
    try:
        await client.ok(url, start())
        await scheduler.phase("ready")
        count = len(scheduler.heartbeats)
        await until(lambda: len(scheduler.heartbeats) > count + 5, "more heartbeats")
        assert all(d.healthy for d in scheduler.heartbeats[-1].devices)
        await until(
            lambda: not any(d.healthy for d in scheduler.heartbeats[-1].devices),
            "the devices to be told unhealthy",
        )
        assert "has not answered" in scheduler.heartbeats[-1].devices[0].unhealthy_reason
    finally:
        release.set()
