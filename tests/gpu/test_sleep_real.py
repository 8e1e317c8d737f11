"""vLLM's sleep levels on a real NVIDIA GPU, driven as the agent drives them; skips, and says so,
where there is no GPU or no CUDA build of vLLM.

Set STOKER_GPU_MODEL to a local model folder for figures worth reading; else a tiny one is written.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from agent.devices.inventory import process_bytes
from agent.devices.nvml import NvmlSource
from agent.engines import sleep, wake_canary
from agent.engines.sleep import Controls, Memory
from tests.kits.gpu_engine import BOOKED, CONTROL, GIB, a_gpu, family, ready, started

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def source() -> Iterator[NvmlSource]:
    with a_gpu() as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(
    source: NvmlSource, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """(the process, its URL) of one engine for all tests, launched as an agent launches it."""
    with started(source, tmp_path_factory.mktemp("vllm"), "r") as (process, url, log):
        began = time.monotonic()
        asyncio.run(ready(process, url, log))
        print(f"start: {time.monotonic() - began:.1f} s")
        yield process, url


@pytest.fixture
async def controls(engine: tuple[subprocess.Popen[bytes], str]) -> AsyncIterator[Controls]:
    async with aiohttp.ClientSession() as session:
        yield Controls(session, engine[1], CONTROL)


@pytest.mark.parametrize("level", [1, 2])
async def test_memory_goes_comes_back_and_the_answer_is_the_same(
    engine: tuple[subprocess.Popen[bytes], str],
    controls: Controls,
    source: NvmlSource,
    level: int,
) -> None:
    async def measure() -> Memory:
        reports = await asyncio.to_thread(source.read, {"r": family(engine[0])})
        return Memory(source.replica_bytes().get("r"), reports[0].memory_used_bytes)

    def host() -> int:
        return sum(map(process_bytes, family(engine[0])))

    known = await sleep.take_canary(controls, "m")
    assert known.path == "/v1/completions"
    assert known.logprobs
    before, host_before = await measure(), host()
    began = time.monotonic()
    held = await sleep.put_to_sleep(controls, level, BOOKED, measure)
    slept_s = time.monotonic() - began
    asleep, host_asleep = await measure(), host()
    assert before.all - asleep.all > GIB
    assert await sleep.is_sleeping(controls) is True
    began = time.monotonic()
    phases = await sleep.wake(controls, level, known)
    woke_s = time.monotonic() - began
    assert ("reload" in phases) == (level == 2)
    assert (await measure()).all >= before.all - GIB
    print(
        f"level {level}: sleep {slept_s:.2f} s, wake {woke_s:.2f} s {phases};"
        f" used {before.all / GIB:.2f} -> {asleep.all / GIB:.2f} GiB, residue {held / GIB:.2f};"
        f" host {host_before / GIB:.2f} -> {host_asleep / GIB:.2f} GiB"
    )
    now = await sleep.take_canary(controls, "m")
    assert wake_canary.difference(known, now) is None


async def test_a_plain_wake_after_level_2_does_not_pass_the_canary(controls: Controls) -> None:
    """The trap that the canary is for. Last: the engine is spoilt afterwards."""
    known = await sleep.take_canary(controls, "m")
    await sleep.put_to_sleep(controls, 2, BOOKED, None)
    await controls.post("/wake_up")
    assert await sleep.is_sleeping(controls) is False
    with pytest.raises(sleep.RungFailed, match="canary"):
        await sleep.wake(controls, 2, known)
