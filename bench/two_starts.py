"""Two starts of real vLLM at once on one device (the CPU), against one after the other.

    python bench/two_starts.py [--json] [--rounds N] [--compiled]

Engines are forked as an agent does, each with its KV cache's bytes given, so that none measures
what is free. A round is one start alone, then two at once, then two one after the other; figures
are medians of the rounds. `slowdown` is what scheduler/signals/climb_times.py begins with for
`cpu`: seconds of a start beside another one over seconds of a start alone. Company is a gain only
where it is below 1.5 (scheduler/policy/device_turns.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import psutil

from agent.engines import process
from agent.engines.launcher import CannotFork, HeldProcess, Launcher
from agent.engines.ports import free_port
from agent.engines.process import Owner
from agent.engines.supervisor import Supervisor
from bench.lib.real_engine import write_438_mb
from bench.lib.report import Row, print_report
from runtime.checkpoints.tiny_models import write_model
from runtime.engine.contract import Launch, LaunchContext
from runtime.engine.select import get_engine
from runtime.engine.vllm.memory_estimate import estimate
from runtime.wire.model_spec import ModelSpec

LIMIT_S = 600.0
MIB = 2**20


class Engines:
    """Forked engines of one model, as many as asked for."""

    def __init__(self, folder: Path, model: Path, eager: bool) -> None:
        self._model, self._eager, self._folder = model, eager, folder
        self._supervisor = Supervisor(
            Owner("bench", str(folder)), folder / "logs", lambda *ended: None
        )
        base = process.base_environment(os.environ)
        self._launcher = Launcher(folder / "logs", base, folder)
        self._made = 0

    def _launch(self) -> tuple[str, Launch, str]:
        self._made += 1
        name = f"r{self._made}"
        args: dict[str, object] = {"max_model_len": 512}
        if self._eager:
            args["enforce_eager"] = True
        spec = ModelSpec(name="m", source=str(self._model), engine_args=args)
        port = free_port("127.0.0.1", ())
        booked = estimate(spec, self._model, "cpu").total_bytes
        context = LaunchContext(
            replica_id=name, host="127.0.0.1", port=port, route_key="route", control_key="control",
            device_kind="cpu", device_ids=("cpu:here",), device_indexes=(0,), device_bytes=booked,
            device_total_bytes=psutil.virtual_memory().total, model_path=str(self._model),
            revision=None, python=sys.executable, cache_dir=str(self._folder / "cache"),
        )  # fmt: skip
        return name, get_engine("vllm").launch(spec, context), f"http://127.0.0.1:{port}"

    async def start(self) -> tuple[str, float]:
        """(its name, seconds until it is healthy)."""
        name, launch, url = self._launch()
        began = time.monotonic()
        env = self._supervisor.environment(name, launch.env)
        with self._supervisor.open_log(name) as output:
            held = await self._forked(launch, env, output.fileno())
        self._supervisor.release(name, held)
        async with aiohttp.ClientSession(url) as http:
            while time.monotonic() - began < LIMIT_S:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get("/health") as got:
                        if got.status == 200:
                            return name, time.monotonic() - began
                await asyncio.sleep(0.02)
        raise TimeoutError(self._supervisor.log_tail(name))

    async def _forked(self, launch: Launch, env: dict[str, str], log: int) -> HeldProcess:
        while True:
            try:
                return await self._launcher.fork(launch, env, log)
            except CannotFork as error:
                if error.why != "not_ready":
                    raise

    async def end(self, *names: str) -> None:
        """End engines and wait until they are gone."""
        for name in names:
            await self._supervisor.kill_tree(name)
            self._supervisor.forget(name)

    async def pss_bytes(self, name: str) -> int:
        """Memory of its processes, shared pages by their share."""
        pids = (await self._supervisor.trees())[name]
        return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)

    async def close(self) -> None:
        """End everything."""
        await self._launcher.close()
        for name in await self._supervisor.trees():
            await self._supervisor.kill_tree(name)
        self._supervisor.close()


async def measure(engines: Engines, rounds: int) -> list[Row]:
    """The figures, after one uncounted start."""
    name, _ = await engines.start()
    await engines.end(name)
    alone, beside, in_turn, one_mib, two_mib = [], [], [], [], []
    for _ in range(rounds):
        name, seconds = await engines.start()
        alone.append(seconds)
        one_mib.append(await engines.pss_bytes(name) / MIB)
        await engines.end(name)
        both = await asyncio.gather(engines.start(), engines.start())
        beside += [seconds for _, seconds in both]
        names = [name for name, _ in both]
        two_mib.append(sum([await engines.pss_bytes(n) / MIB for n in names]))
        await engines.end(*names)
        first, first_s = await engines.start()
        second, second_s = await engines.start()
        in_turn += [first_s, first_s + second_s]
        await engines.end(first, second)
    return [
        Row("slowdown: s of a start beside another", statistics.median(beside),
            statistics.median(alone), "alone", "<= 1.5"),
        Row("mean s until two are ready, at once", statistics.mean(beside),
            statistics.mean(in_turn), "one after the other", "<= 1"),
        Row("MiB of two engines (Pss)", statistics.median(two_mib),
            2 * statistics.median(one_mib), "twice one"),
    ]  # fmt: skip


async def _run(rounds: int, compiled: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="stoker-bench-") as given:
        folder = Path(given)
        tiny = write_model(folder / "models", "tiny")
        model = write_438_mb(folder / "models", tiny) if compiled else tiny
        engines = Engines(folder, model, eager=not compiled)
        try:
            return await measure(engines, rounds)
        finally:
            await engines.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--compiled", action="store_true", help="438 MB with torch.compile")
    options = parser.parse_args()
    rows = asyncio.run(_run(options.rounds, options.compiled))
    print_report("two starts", rows, options.json)


if __name__ == "__main__":
    main()
