"""Fetches what was compiled for a start elsewhere, and shares what a start compiled here.

Rules this file keeps: a start never fails or waits long for it: what goes wrong is said, and vLLM
compiles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from agent.engines.launch_plan import Place
from agent.metrics import Metrics
from agent.weights.compile_cache import Compiled, CompileStore, Unsafe, torch_version
from runtime.contract.config import Config
from runtime.engine.vllm import arguments
from runtime.wire.agent_messages import DeviceReport
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")

_FETCH_S = 20.0  # compiling takes as long


class _Start(Struct, frozen=True):
    compiled: Compiled
    since: float


class CompileShare:
    """One node's part in it. All methods are for the event loop's thread."""

    def __init__(self, config: Config, place: Place, metrics: Metrics) -> None:
        """Raises ValueError where it is on and there is no shared store."""
        self._store: CompileStore | None = None
        if config.cache.share_compile:
            if not config.cache.shared_dir:
                raise ValueError(
                    "cache.share_compile = true needs a store to share in: set cache.shared_dir to"
                    " a mounted folder that every node may write to, or leave it out"
                )
            self._store = CompileStore(Path(config.cache.shared_dir), Path(place.cache_dir))
        self._python = place.python
        self._metrics = metrics
        self._torch: str | None = None
        self._starts: dict[str, _Start] = {}

    async def before(
        self,
        replica_id: str,
        spec: ModelSpec,
        model_path: str,
        engine_version: str | None,
        device: DeviceReport,
    ) -> None:
        """A start is about to be made: bring what others compiled for it."""
        eager = arguments.flat_args(spec.engine_args).get("enforce_eager") is True
        if self._store is None or spec.engine != "vllm" or eager or engine_version is None:
            return
        if self._torch is None:
            self._torch = await asyncio.to_thread(torch_version, self._python)
        compiled = Compiled(
            source=spec.source,
            model_path=model_path,
            engine_args=spec.engine_args,
            tensor_parallel_size=spec.tensor_parallel_size,
            env=spec.env,
            vllm=engine_version,
            torch=self._torch or "",
            python=platform.python_version(),
            device=f"{device.name}; {device.compute_capability or platform.machine()}",
        )
        self._starts[replica_id] = _Start(compiled, time.time())
        try:
            async with asyncio.timeout(_FETCH_S):
                found = await asyncio.to_thread(self._store.fetch, compiled.key)
        except (Unsafe, OSError, TimeoutError) as error:
            self._count("refused")
            words = str(error) or f"it took longer than {_FETCH_S:.0f} s"
            log.warning("%s: what was compiled for it elsewhere is not used: %s", replica_id, words)
            return
        if found is not None:
            self._count("fetched" if found else "present")
            log.info("%s: %d compiled files came from the shared store", replica_id, found)

    async def after(self, replica_id: str, log_text: Callable[[], str]) -> None:
        """Share what a replica compiled that is ready, unless somebody has."""
        start = self._starts.pop(replica_id, None)
        if self._store is None or start is None:
            return
        try:
            if await asyncio.to_thread(self._store.has, start.compiled.key):
                return
            text = await asyncio.to_thread(log_text)
            pushed = await asyncio.to_thread(self._store.push, start.compiled, text, start.since)
        except OSError as error:
            self._count("failed")
            log.warning("%s: what it compiled can't be shared: %s", replica_id, error)
            return
        if pushed is not None:
            self._count("pushed")
            log.info("%s: %d bytes of compiled files are shared", replica_id, pushed)

    def forget(self, replica_id: str) -> None:
        """Forget a start that is over."""
        with contextlib.suppress(KeyError):
            del self._starts[replica_id]

    def _count(self, what: str) -> None:
        self._metrics.compile_caches.labels(what).inc()
