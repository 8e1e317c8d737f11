"""Real vLLM on a real NVIDIA GPU, launched as an agent launches it; skips, and says so, where there
is no GPU or no CUDA build of vLLM.

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
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
import psutil
import pytest

from agent.devices.nvml import NvmlSource, NvmlUnavailable
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
BOOKED = 8 * GIB
START_S = 600.0
ROUTE, CONTROL = "route-secret", "control-secret"


@contextlib.contextmanager
def a_gpu() -> Iterator[NvmlSource]:
    """What reads the first GPU; skips where there is none."""
    try:
        opened = NvmlSource()
    except NvmlUnavailable as error:
        pytest.skip(f"no NVIDIA GPU here: {error}")
    yield opened
    opened.close()


@contextlib.contextmanager
def started(
    source: NvmlSource, folder: Path, replica_id: str, kv_bytes: int | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """(the process, its URL, its log) of an engine that was just started; see `ready`."""
    try:
        version("vllm")
    except PackageNotFoundError:
        pytest.skip("vllm, the CUDA build, is not installed: pip install .[vllm]")
    model = os.environ.get("STOKER_GPU_MODEL") or str(write_model(folder / "models", "tiny"))
    spec = ModelSpec(name="m", source=model, engine_args={"max_model_len": 1024})
    device = source.read({})[0]
    booked = max(BOOKED, 2 * sum(f.stat().st_size for f in Path(model).glob("*.safetensors")))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ctx = LaunchContext(
        replica_id=replica_id, host="127.0.0.1", port=port, route_key=ROUTE, control_key=CONTROL,
        device_kind="nvml", device_ids=(device.device_id,), device_indexes=(0,),
        device_bytes=booked, device_total_bytes=device.memory_total_bytes, model_path=model,
        revision=None, python=sys.executable, cache_dir=str(folder / "cache"), kv_bytes=kv_bytes,
    )  # fmt: skip
    launch = get_engine("vllm").launch(spec, ctx)
    assert get_engine("vllm").rungs(spec, "nvml") == (1, 2)
    base = {n: os.environ[n] for n in ("PATH", "HOME", "LD_LIBRARY_PATH") if n in os.environ}
    log = folder / f"vllm-{replica_id}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.argv, env=base | launch.env, cwd="/", stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(log.read_text(errors="replace")[-20_000:])


async def ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until it answers; an AssertionError shows the end of its log."""
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


def family(process: subprocess.Popen[bytes]) -> list[int]:
    """The pids of an engine's processes."""
    parent = psutil.Process(process.pid)
    return [parent.pid, *(child.pid for child in parent.children(recursive=True))]
