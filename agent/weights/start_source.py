"""Where a start begins: its model's files, the format they are read in, and compiled code.

Rules this file keeps: what makes a start quicker never makes it fail; only a model that can't be
had does.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import msgspec
from msgspec import Struct

from agent.cache.errors import PASSING, CacheError
from agent.cache.model_cache import ModelCache
from agent.engines.launch_plan import BadStart, Place
from agent.metrics import Metrics
from agent.weights.compile_share import CompileShare
from agent.weights.disk_models import DiskModels
from agent.weights.load_format_policy import Known
from agent.weights.load_formats import LoadFormats, importable
from agent.weights.staging_policy import Seen, start_rung
from runtime.contract.config import Config
from runtime.wire.agent_messages import DeviceReport, StartRung
from runtime.wire.model_spec import ModelSpec


class StartSource(Struct, frozen=True, kw_only=True):
    """What a start loads, where that was when it began, and the seconds of each phase before."""

    model_path: str
    rung: StartRung = "cached"
    load_format: str | None = None
    phases: dict[str, float] = {}


class StartSources:
    """The sources of one node's starts. All methods are for the event loop's thread."""

    def __init__(
        self,
        config: Config,
        place: Place,
        cache: ModelCache,
        on_disk: DiskModels,
        known: dict[str, Known],
        save: Callable[[dict[str, Known]], None],
        metrics: Metrics,
    ) -> None:
        """`known`: of load formats, as `save` was given it last. Raises ValueError for settings
        that can't be."""
        self._python = place.python
        self._cache = cache
        self._on_disk = on_disk
        self._formats = LoadFormats(place.device_kind, known, save, metrics)
        self._compiled = CompileShare(config, place, metrics)

    async def find(
        self,
        replica_id: str,
        spec: ModelSpec,
        device: DeviceReport | None,
        engine_version: str | None,
    ) -> StartSource:
        """What its engine is told to load: a folder on this node, fetched first if need be.

        Raises BadStart.
        """
        source = await self.folder(replica_id, spec)
        if spec.engine == "stub":
            return source
        folder = source.model_path
        files = await asyncio.to_thread(os.listdir, folder)
        chosen = self._formats.choose(replica_id, spec, files, source.rung)
        if device:
            await self._compiled.before(replica_id, spec, folder, engine_version, device)
        return msgspec.structs.replace(source, load_format=chosen)

    async def folder(self, replica_id: str, spec: ModelSpec) -> StartSource:
        """Where its model is on this node, fetched first if need be. Raises BadStart."""
        began = time.monotonic()
        seen = await self._on_disk.look(spec.source)
        looked = time.monotonic()
        if spec.engine == "stub":  # it loads nothing, but its folder may be a real one
            rung = start_rung(True, seen) if seen else "cached"
            return StartSource(model_path=spec.source, rung=rung)
        try:
            folder = await self._cache.ensure(spec.source, replica_id)
        except ValueError as error:
            raise BadStart("bad_model", str(error)) from None
        except CacheError as error:
            kind = "crash" if error.kind in PASSING else "bad_model"
            raise BadStart(kind, str(error)) from None
        phases = {"stage": looked - began, "fetch": time.monotonic() - looked}
        rung = start_rung(seen is not None, seen or Seen())
        return StartSource(model_path=str(folder), rung=rung, phases=phases)

    async def ready(
        self, replica_id: str, weights_s: float | None, log_text: Callable[[], str]
    ) -> None:
        """Learn how long the weights took of a replica that serves, and share what it compiled."""
        self._formats.measured(replica_id, weights_s)
        await self._compiled.after(replica_id, log_text)

    def failed(self, replica_id: str, words: str) -> bool:
        """Learn that a start died; whether another may go better for a choice of ours."""
        return self._formats.failed(replica_id, words)

    def forget(self, replica_id: str) -> None:
        """Forget a start that is over."""
        self._formats.forget(replica_id)
        self._compiled.forget(replica_id)

    async def find_formats(self) -> None:
        """Learn which load formats the engines' interpreter has."""
        self._formats.modules = await asyncio.to_thread(importable, self._python)
