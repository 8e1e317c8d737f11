"""Keeps the LoRA adapters of a node's models: their files here, and their engines up to date.

An engine loads an adapter itself when a request first names it, from the folder that a file of ours
names (`runtime/engine/adapter_index.py`): one file per model, which outlives engines and agents.

Rules this file keeps:
- the whole wish comes with every heartbeat's reply; a start's own spec counts until then;
- no start waits for an adapter; a pull that failed is tried again, and what it failed of is said;
- an adapter that is in the wish no more, or has another folder, is unloaded from every engine: it
  leaves the file first, so that it is not loaded again;
- as long as a model may ask for an adapter, the cache does not give its files up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.cache.errors import CacheError
from agent.cache.model_cache import ModelCache
from agent.engines.sleep import Controls, EngineError
from agent.tasks import Tasks
from runtime import places
from runtime.contract.adapters import takes_adapters
from runtime.wire.model_spec import ModelSpec

log = logging.getLogger("stoker.agent")

LOOK_S = 5.0  # at least so often, engines are asked what they have loaded
RETRY_S = 15.0  # after a failed pull


@dataclass(slots=True)
class _Adapter:
    source: str
    path: str | None = None  # None: not here yet
    error: str | None = None
    fetched: bool = False  # by this agent; an earlier one may have left the path
    retry_at: float = 0.0


class Adapters:
    """The adapters of one node. All methods are for the event loop's thread."""

    def __init__(
        self,
        cache: ModelCache,
        folder: Path,
        engines: Callable[[str], Iterable[Controls]],
        tasks: Tasks,
    ) -> None:
        """`folder`: of the index files; `engines`: those of a model that answer now."""
        self._cache = cache
        self._folder = folder
        self._engines = engines
        self._tasks = tasks
        self._models: dict[str, dict[str, _Adapter]] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._poked = asyncio.Event()

    # ------------------------------------------------------------------ told, and asked

    def begin(self, spec: ModelSpec, adopted: bool = False) -> None:
        """A replica of `spec` is about to start, or (`adopted`) an earlier agent started it."""
        if not takes_adapters(spec.engine_args) or spec.name in self._models:
            return
        known = self._written(spec.name) if adopted else None
        declared = {name: _Adapter(source) for name, source in spec.adapters.items()}
        self._models[spec.name] = declared if known is None else known
        self._write(spec.name)
        self._poked.set()

    def tell(self, told: Mapping[str, Mapping[str, str]]) -> None:
        """The scheduler's word: model -> adapter -> source; what it leaves out stays as it is."""
        for model, wish in told.items():
            if model in self._models:
                self._wish(model, wish)

    def end(self, model: str) -> None:
        """No replica of it is here any more."""
        if model in self._models:
            self._wish(model, {})
            del self._models[model]
            with contextlib.suppress(OSError):
                self._file(model).unlink(missing_ok=True)

    def index(self, spec: ModelSpec) -> str:
        """The file that its engine is to read; "" for one that takes no adapters."""
        return str(self._file(spec.name)) if spec.name in self._models else ""

    def _wish(self, model: str, wish: Mapping[str, str]) -> None:
        has = self._models[model]
        if {name: adapter.source for name, adapter in has.items()} == wish:
            return
        log.info("%s: its adapters are to be: %s", model, ", ".join(wish) or "none")
        for name in [n for n, adapter in has.items() if wish.get(n) != adapter.source]:
            self._cache.release(f"{model}:{name}")
            if pull := self._pulls.pop(f"{model}:{name}", None):
                pull.cancel()
            del has[name]
        for name, source in wish.items():
            has.setdefault(name, _Adapter(source))
        self._write(model)
        self._poked.set()

    # ------------------------------------------------------------------ the files

    def _file(self, model: str) -> Path:
        return places.below(self._folder, f"{model}.json")

    def _write(self, model: str) -> None:
        entries = {
            f"{model}:{name}": {"source": a.source, "path": a.path, "error": a.error}
            for name, a in self._models[model].items()
        }
        text = json.dumps({"model": model, "adapters": entries})
        file = self._file(model)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(".new")
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, file)
        except OSError as error:
            log.error("%s can't be written, so its adapters can't be served: %s", file, error)

    def _written(self, model: str) -> dict[str, _Adapter] | None:
        """As an earlier agent knew them, for engines that still run."""
        try:
            entries = json.loads(self._file(model).read_text(encoding="utf-8"))["adapters"]
            return {
                name.partition(":")[2]: _Adapter(entry["source"], entry["path"])
                for name, entry in entries.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    # ------------------------------------------------------------------ its life

    async def run(self) -> None:
        """Fetch what is asked for and unload what is not, until cancelled."""
        while True:
            self._poked.clear()
            self._fetch_missing()
            await asyncio.gather(*map(self._follow, list(self._models)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._poked.wait()

    def _fetch_missing(self) -> None:
        now = time.monotonic()
        for model, adapters in self._models.items():
            for name, adapter in adapters.items():
                key = f"{model}:{name}"
                if not adapter.fetched and key not in self._pulls and now >= adapter.retry_at:
                    self._pulls[key] = self._tasks.start(self._fetch(model, key, adapter))

    async def _fetch(self, model: str, key: str, adapter: _Adapter) -> None:
        try:
            folder = await self._cache.ensure(adapter.source, key)
        except (CacheError, ValueError, OSError) as error:
            if adapter.error != str(error):
                log.warning("adapter %s can't be had: %s", key, error)
            adapter.path, adapter.error = None, str(error)
            adapter.retry_at = time.monotonic() + RETRY_S
        else:
            adapter.path, adapter.error, adapter.fetched = str(folder), None, True
        del self._pulls[key]
        self._write(model)

    async def _follow(self, model: str) -> None:
        """Unload what its engines should not have."""
        for controls in self._engines(model):
            paths = {f"{model}:{n}": a.path for n, a in self._models.get(model, {}).items()}
            try:
                async with asyncio.timeout(LOOK_S):
                    gone = await unload_adapters(controls, model, paths)
            except (EngineError, TimeoutError) as error:
                log.warning("%s: what it has loaded can't be told: %s", model, error or "no answer")
                continue
            if gone:
                log.info("%s: unloaded %s", model, ", ".join(gone))

    async def close(self) -> None:
        """Fetch no more; the files stay for the next agent."""
        pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)


async def unload_adapters(
    controls: Controls, model: str, keep: Mapping[str, str | None]
) -> list[str]:
    """Unload each adapter of `model` that is loaded and not in `keep` (name -> its folder).

    Their names. Raises EngineError.
    """
    listed = await controls.get("/v1/models")
    try:
        loaded = {card["id"]: card.get("root") for card in listed["data"]}
    except (KeyError, TypeError):
        raise EngineError("GET /v1/models answers no list of models") from None
    ours = {name: root for name, root in loaded.items() if name.startswith(f"{model}:")}
    gone = [name for name, root in ours.items() if keep.get(name) != root]
    for name in gone:
        await controls.tell("/v1/unload_lora_adapter", {"lora_name": name})
    return gone
