"""vLLM's sleep levels on a real NVIDIA GPU, driven as the agent drives them; skips, and says so,
where there is no GPU or no CUDA build of vLLM.

Set STOKER_GPU_MODEL to a local model folder for figures worth reading; else a tiny one is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import psutil
import pytest

from agent.devices.inventory import process_bytes
from agent.devices.nvml import NvmlSource, NvmlUnavailable
from agent.engines import sleep, wake_canary
from agent.engines.sleep import Controls, Memory
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.timeout(900)]

GIB = 2**30
BOOKED = 8 * GIB
START_S = 600.0
ROUTE, CONTROL = "route-secret", "control-secret"


@pytest.fixture(scope="module")
def source() -> Iterator[NvmlSource]:
    try:
        opened = NvmlSource()
    except NvmlUnavailable as error:
        pytest.skip(f"no NVIDIA GPU here: {error}")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def engine(
    source: NvmlSource, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """(the process, its URL) of one engine for all tests, launched as an agent launches it."""
    try:
        version("vllm")
    except PackageNotFoundError:
        pytest.skip("vllm, the CUDA build, is not installed: pip install .[vllm]")
    folder = tmp_path_factory.mktemp("vllm")
    model = os.environ.get("STOKER_GPU_MODEL") or str(write_model(folder / "models", "tiny"))
    spec = ModelSpec(name="m", source=model, engine_args={"max_model_len": 1024})
    device = source.read({})[0]
    booked = max(BOOKED, 2 * sum(f.stat().st_size for f in Path(model).glob("*.safetensors")))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=port, route_key=ROUTE, control_key=CONTROL,
        device_kind="nvml", device_ids=(device.device_id,), device_indexes=(0,),
        device_bytes=booked, device_total_bytes=device.memory_total_bytes, model_path=model,
        revision=None, python=sys.executable, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    launch = get_engine("vllm").launch(spec, ctx)
    assert get_engine("vllm").rungs(spec, "nvml") == (1, 2)
    base = {n: os.environ[n] for n in ("PATH", "HOME", "LD_LIBRARY_PATH") if n in os.environ}
    log = folder / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv, env=base | launch.env, cwd="/", stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        began = time.monotonic()
        asyncio.run(_ready(process, url, log))
        print(f"start: {time.monotonic() - began:.1f} s")
        yield process, url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(log.read_text(errors="replace")[-20_000:])


async def _ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession(url) as http:
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-8000:]
            assert time.monotonic() < deadline, "it never became ready"
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get("/health") as got:
                    if got.status == 200:
                        return
            await asyncio.sleep(0.2)


@pytest.fixture
async def controls(engine: tuple[subprocess.Popen[bytes], str]) -> AsyncIterator[Controls]:
    async with aiohttp.ClientSession() as session:
        yield Controls(session, engine[1], CONTROL)


def family(process: subprocess.Popen[bytes]) -> list[int]:
    parent = psutil.Process(process.pid)
    return [parent.pid, *(child.pid for child in parent.children(recursive=True))]


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
