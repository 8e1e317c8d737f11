"""The agent with a real vLLM: its processes are found and killed, also without their parent."""

from __future__ import annotations

import importlib.util
import os
import signal

import aiohttp
import pytest

from runtime.checkpoints.tiny_models import write_model
from runtime.registry.embedded import EmbeddedRegistry
from runtime.wire.model_spec import ModelSpec
from tests.kits.agent_process import (
    NODE,
    AgentProcess,
    Client,
    FakeScheduler,
    alive,
    kill_all,
    make_config,
    processes,
    start,
    stop,
    until,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed"),
    pytest.mark.timeout(600),
]
START_S = 280.0  # five processes import torch on a busy machine


async def test_engine_core_does_not_outlive_a_killed_api_server(tmp_path):
    folder = write_model(tmp_path, "tiny")
    config = make_config(tmp_path, devices="cpu:8GiB")
    (tmp_path / "state").mkdir()
    registry, scheduler = EmbeddedRegistry(config.registry_file()), FakeScheduler()
    await scheduler.open()
    await scheduler.lead(registry)
    node = AgentProcess(config, tmp_path)
    model = ModelSpec(
        name="m",
        source=str(folder),
        engine_args={"enforce_eager": True, "max_model_len": 256},
        device_memory_bytes=4 * 2**30,
    )
    try:
        await node.ready()
        async with aiohttp.ClientSession() as session:
            client = Client(session)
            await client.ok(node.url, start(devices=(f"cpu:{NODE}",), model=model))
            await until(lambda: scheduler.phases()[1:], "the end of its start", START_S)
            ready = await scheduler.phase("ready")
            assert await client.complete(ready) == 2
            family = processes(config)["m-1"]
            assert len(family) >= 2, "vLLM's EngineCore must bear the replica's marks"
            await until(lambda: scheduler.report().memory_used_bytes, "its memory to be measured")
            os.kill(ready.pid, signal.SIGKILL)
            await until(lambda: scheduler.report().restarts == 1, "a restart")
            assert not any(map(alive, family))
            await client.ok(node.url, stop())
            await scheduler.phase(None)
            assert processes(config) == {}
    finally:
        node.close()
        kill_all(config)
        await scheduler.close()
        await registry.close()
        print((tmp_path / "agent.log").read_text())
