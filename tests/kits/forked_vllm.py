"""Real vLLM engines that are forked from one parent, as an agent forks them; on CPU."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from agent.engines import process
from agent.engines.launcher import CannotFork, Launcher
from agent.engines.ports import free_port
from agent.engines.process import Owner
from agent.engines.supervisor import Supervisor
from runtime.engine.contract import LaunchContext
from runtime.engine.select import get_engine
from runtime.wire.model_spec import ModelSpec

GIB = 2**30
START_S = 280.0
CONTROL = "control-secret"
VLLM = get_engine("vllm")


def context(folder: Path, port: int, route_key: str, cache: Path) -> LaunchContext:
    """Where and with what one runs."""
    return LaunchContext(
        replica_id="r", host="127.0.0.1", port=port, route_key=route_key, control_key=CONTROL,
        device_kind="cpu", device_ids=("cpu",), device_indexes=(0,), device_bytes=3 * GIB,
        device_total_bytes=psutil.virtual_memory().total, model_path=str(folder), revision=None,
        python=sys.executable, cache_dir=str(cache),
    )  # fmt: skip


class ForkedVllm:
    """One running engine."""

    def __init__(self, replica_id: str, ctx: LaunchContext) -> None:
        self.replica_id, self.ctx = replica_id, ctx
        self.started_s = 0.0  # from the fork to the first 200 of /health
        self.http = aiohttp.ClientSession(f"http://{ctx.host}:{ctx.port}")

    async def call(
        self, path: str, body: Any = None, key: str = CONTROL, method: str = ""
    ) -> tuple[int, Any]:
        """(status, the answer)."""
        headers = {"Authorization": f"Bearer {key}"}
        verb = method or ("GET" if body is None else "POST")
        async with self.http.request(verb, path, json=body, headers=headers) as got:
            text = await got.text()
        return got.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def repoint(self, spec: ModelSpec, folder: Path, route_key: str) -> tuple[int, Any]:
        """Close the door, change to another model, and open it if that worked."""
        await self.call("/stoker/close", method="POST")
        ctx = context(folder, self.ctx.port, route_key, Path(self.ctx.cache_dir))
        status, told = await self.call("/stoker/repoint", VLLM.repoint(spec, ctx))
        if status == 200:
            assert (await self.call("/stoker/open", method="POST"))[0] == 200
        return status, told


class VllmForge:
    """Forks engines. `folder` holds their logs and caches."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        owner = Owner("node", str(folder))
        self.supervisor = Supervisor(owner, folder / "logs", lambda *ended: None)
        base = process.base_environment(os.environ)
        self._launcher = Launcher(folder / "logs", base, folder)
        self._engines: list[ForkedVllm] = []
        self._count = 0

    async def start(
        self, spec: ModelSpec, folder: Path, route_key: str = "route", **more_env: str
    ) -> ForkedVllm:
        """An engine of the model in `folder`, once it serves."""
        ctx = context(folder, free_port("127.0.0.1", ()), route_key, self._folder / "cache")
        launch = VLLM.launch(spec, ctx)
        self._count += 1
        replica_id = f"{spec.name}-{self._count}"
        env = self.supervisor.environment(replica_id, launch.env | more_env)
        begun = time.monotonic()
        with self.supervisor.open_log(replica_id) as output:
            held = None
            while held is None:  # a busy machine takes longer to import vLLM than an agent waits
                try:
                    held = await self._launcher.fork(launch, env, output.fileno())
                except CannotFork as error:
                    if error.why != "not_ready" or time.monotonic() - begun > START_S:
                        raise
        self.supervisor.release(replica_id, held)
        engine = ForkedVllm(replica_id, ctx)
        self._engines.append(engine)
        while True:
            try:
                if (await engine.call("/health"))[0] == 200:
                    break
            except aiohttp.ClientError:
                pass
            log = self.supervisor.log_tail(replica_id)
            assert time.monotonic() - begun < START_S, log
            await asyncio.sleep(0.01)
        engine.started_s = time.monotonic() - begun
        return engine

    async def end(self, engine: ForkedVllm) -> None:
        """Kill it."""
        self._engines.remove(engine)
        await engine.http.close()
        await self.supervisor.kill_tree(engine.replica_id)

    async def close(self) -> None:
        """End all of it."""
        for engine in self._engines:
            await engine.http.close()
        await self._launcher.close()
        for replica_id in await self.supervisor.trees():
            await self.supervisor.kill_tree(replica_id)
        self.supervisor.close()
