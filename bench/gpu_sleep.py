"""Sleep and wake of a real model on a GPU, against a full start; and the wake against PCIe.

    python bench/gpu_sleep.py [--quick] [--json] [--model FOLDER]

Each round starts a plain vLLM (the baseline: process start to first token), puts it to sleep and
wakes it as the agent does (`agent/engines/sleep.py`: freed bytes seen on NVML, the canary passed),
at level 1 and at level 2, and ends it. A wake's seconds are to the first token too. Its GB/s are
the weights' bytes by the time of the wake call alone; the bus is measured by copying pinned memory
to the device with torch. Without a GPU, or without the CUDA build of vLLM, there are no rows, and a
note says why. --model: a folder with a real model; else a random Llama of 3.2 GB is written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import psutil

from agent.devices.nvml import NvmlSource, NvmlUnavailable
from agent.engines import sleep
from agent.engines.ports import free_port
from agent.engines.process import base_environment
from agent.engines.sleep import Controls, Memory
from bench.lib.real_engine import call, first_token, write_llama
from bench.lib.report import Row, print_report
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.agent_messages import DeviceReport
from runtime.wire.model_spec import ModelSpec

ROUNDS = 5
START_S = 600.0
GIB = 2**30
KV_BYTES = 6 * GIB  # of the booking, above the weights
LEVELS = (1, 2)

_BUS = """
import time, torch
host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
device = torch.empty(2**30, dtype=torch.uint8, device="cuda")
best = 1e9
for _ in range(10):
    torch.cuda.synchronize()
    began = time.perf_counter()
    device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    best = min(best, time.perf_counter() - began)
print(2**30 / 1e9 / best)
"""


class Wake(NamedTuple):
    """One sleep and its wake, in seconds."""

    sleep_s: float
    wake_s: float  # of the wake calls alone, the reload of level 2 with them
    first_token_s: float  # from the wake's begin, canary and all


class Round(NamedTuple):
    """One engine's life: seconds of its start to the first token, and a wake for each level."""

    start_s: float
    wakes: dict[int, Wake]


class Engine:
    """A running vLLM."""

    def __init__(self, source: NvmlSource, process: subprocess.Popen[bytes], port: int) -> None:
        self._source = source
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    async def measure(self) -> Memory:
        """See `agent.engines.sleep.Measure`."""
        parent = psutil.Process(self._process.pid)
        pids = [parent.pid, *(child.pid for child in parent.children(recursive=True))]
        reports = await asyncio.to_thread(self._source.read, {"r": pids})
        return Memory(self._source.replica_bytes().get("r"), reports[0].memory_used_bytes)

    def until_ready(self, log: Path) -> None:
        """Return once its health check passes."""
        deadline = time.monotonic() + START_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")
            with contextlib.suppress(OSError):
                call(f"{self.url}/health")
                return
            time.sleep(0.02)


@contextlib.contextmanager
def engine(source: NvmlSource, device: DeviceReport, model: Path, folder: Path) -> Iterator[Engine]:
    """Started as the agent starts it, plainly; its process is there, no more."""
    spec = ModelSpec(name="m", source=str(model), engine_args={"max_model_len": 1024})
    ctx = LaunchContext(
        replica_id="r", host="127.0.0.1", port=free_port("127.0.0.1", ()), route_key="route",
        control_key="control", device_kind="nvml", device_ids=(device.device_id,),
        device_indexes=(0,), device_bytes=weights_bytes(model) + KV_BYTES,
        device_total_bytes=device.memory_total_bytes, model_path=str(model), revision=None,
        python=sys.executable, cache_dir=str(folder / "cache"),
    )  # fmt: skip
    launch = get_engine("vllm").launch(spec, ctx)
    with (folder / "engine.log").open("wb") as output:
        process = subprocess.Popen(
            launch.argv, env=base_environment(os.environ) | launch.env, cwd=folder,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield Engine(source, process, ctx.port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def weights_bytes(model: Path) -> int:
    """Of the model's files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def run_round(source: NvmlSource, device: DeviceReport, model: Path, folder: Path) -> Round:
    """One start, and a sleep and a wake at each level."""
    began = time.monotonic()
    with engine(source, device, model, folder) as running:
        running.until_ready(folder / "engine.log")
        first_token(running.url, "m", "route")
        start_s = time.monotonic() - began
        return Round(start_s, asyncio.run(_sleep_and_wake(running, weights_bytes(model))))


async def _sleep_and_wake(running: Engine, booked_bytes: int) -> dict[int, Wake]:
    wakes = {}
    async with aiohttp.ClientSession() as session:
        controls = Controls(session, running.url, "control")
        known = await sleep.take_canary(controls, "m")
        for level in LEVELS:
            began = time.monotonic()
            await sleep.put_to_sleep(controls, level, booked_bytes, running.measure)
            slept = time.monotonic()
            phases = await sleep.wake(controls, level, known)
            await asyncio.to_thread(first_token, running.url, "m", "route")
            woken_s = time.monotonic() - slept
            moved_s = phases["wake"] + phases.get("reload", 0.0)
            wakes[level] = Wake(slept - began, moved_s, woken_s)
    return wakes


def bus_gb_s() -> float:
    """Pinned host memory to the device, GB/s, in a process that is gone afterwards."""
    done = subprocess.run([sys.executable, "-c", _BUS], capture_output=True, text=True, check=True)
    return float(done.stdout)


def rows_of(rounds: list[Round], gigabytes: float, bus: float) -> list[Row]:
    """Medians."""
    start_s = statistics.median(r.start_s for r in rounds)
    rows = []
    for level in LEVELS:
        wakes = [r.wakes[level] for r in rounds]
        woken_s = statistics.median(w.first_token_s for w in wakes)
        slept_s = statistics.median(w.sleep_s for w in wakes)
        speed = gigabytes / statistics.median(w.wake_s for w in wakes)
        rows += [
            Row(f"wake to first token s, level {level}", woken_s, start_s, "plain vLLM"),
            Row(f"sleep s, level {level}", slept_s, start_s, "plain vLLM"),
            Row(f"GB/s of the wake, level {level}", speed, bus, "pinned copy"),
        ]
    return rows


def why_not() -> str | None:
    """Why there is nothing to measure here; None if there is."""
    try:
        NvmlSource().close()
    except NvmlUnavailable as error:
        return f"no NVIDIA GPU here: {error}"
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vllm, the CUDA build, is not installed: pip install .[vllm]"
    return None


def measure(folder: Path, model: Path | None, rounds: int) -> list[Row]:
    """Every row. Needs a GPU."""
    if model is None:
        tiny = write_model(folder / "models", "tiny")
        model = write_llama(tiny, folder / "models" / "big", hidden=2048, inner=8192, layers=24)
    bus = bus_gb_s()
    source = NvmlSource()
    try:
        device = source.read({})[0]
        lives = [run_round(source, device, model, folder) for _ in range(rounds)]
    finally:
        source.close()
    return rows_of(lives, weights_bytes(model) / 1e9, bus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", type=Path, help="a local folder with a real model")
    options = parser.parse_args()
    note, rows = why_not(), []
    if note is None:
        with tempfile.TemporaryDirectory(prefix="stoker-bench-") as folder:
            rows = measure(Path(folder), options.model, 1 if options.quick else ROUNDS)
    print_report("gpu_sleep", rows, options.json, note)


if __name__ == "__main__":
    main()
