"""Holds models' weights in the page cache, as the scheduler wishes.

Rules this file keeps:
- the whole wish comes every time: what is in it no longer is let go, unless an engine of ours has
  it mapped or is loading it;
- a model that is not on the disk is pulled first; a pull that failed is tried again after a minute;
- disks are only touched in threads, and reads wait for everybody else's;
- nothing is remembered across a restart of the agent: the scheduler wishes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent.cache.errors import CacheError
from agent.cache.model_cache import ModelCache
from agent.metrics import Metrics
from agent.weights import page_cache
from agent.weights.disk_models import DiskModels
from agent.weights.staging_policy import WeightFile, pause_s, to_drop, to_read
from runtime.wire.agent_messages import Staging

log = logging.getLogger("stoker.agent")

MEASURE_S = 5.0  # at most so often
_SHARE = 0.05  # of the time may go into measuring
_RETRY_S = 60.0


class Stager:
    """The page cache of one node. All methods are for the event loop's thread."""

    def __init__(
        self,
        cache: ModelCache,
        on_disk: DiskModels,
        metrics: Metrics,
        pids: Callable[[], set[int]],
        loading: Callable[[], set[str]],
    ) -> None:
        """`pids`: of our engines; `loading`: the sources that starts read right now."""
        self._cache = cache
        self._on_disk = on_disk
        self._metrics = metrics
        self._pids = pids
        self._loading = loading
        self._wish: dict[str, int] = {}
        self._held: dict[str, tuple[WeightFile, ...]] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._failed_at: dict[str, float] = {}
        self._dropped_rounds = 0
        self._whole: set[str] = set()  # wished, and seen to be all there
        self._poked = asyncio.Event()
        self._changed = threading.Event()  # the wish: a thread that reads stops
        self._reader = ThreadPoolExecutor(1, "staging", initializer=page_cache.calm_thread)

    # ------------------------------------------------------------------ told, and asked

    def wish(self, models: Iterable[Staging]) -> None:
        """Hold these, and no others."""
        wish = {m.source: m.bytes for m in models}
        for source in wish:
            self._on_disk.name(source)
        if wish == self._wish:
            return
        log.info("to be held in the page cache: %s", ", ".join(wish) or "nothing")
        self._wish = wish
        self._dropped_rounds = 0
        self._whole &= wish.keys()
        self._changed.set()
        self._poked.set()

    def staged(self) -> tuple[str, ...]:
        """What is to be held."""
        return tuple(self._wish)

    # ------------------------------------------------------------------ its life

    async def run(self) -> None:
        """Hold what is asked for, and measure, until cancelled."""
        await asyncio.gather(self._hold(), self._measure())

    async def _hold(self) -> None:
        while True:
            self._poked.clear()
            self._changed.clear()
            dropped = False
            for source, limit_bytes in list(self._wish.items()):
                if not self._changed.is_set():
                    dropped |= await self._hold_one(source, limit_bytes)
            await self._let_go()
            self._dropped_rounds = self._dropped_rounds + 1 if dropped else 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s(self._dropped_rounds)):
                    await self._poked.wait()

    async def _hold_one(self, source: str, limit_bytes: int) -> bool:
        """Whether the kernel had dropped some of what was all there before."""
        seen = await self._on_disk.look(source)
        if seen is None:
            self._pull(source)
            return False
        self._held[source] = seen.files
        wanted = to_read(seen.files, limit_bytes)
        there = {f.path: f.resident_bytes for f in seen.files}
        missing = sum(max(0, size - there[path]) for path, size in wanted)
        if missing == 0:
            self._whole.add(source)
            return False
        work = asyncio.get_running_loop().run_in_executor(
            self._reader, _load, wanted, self._changed
        )
        began = time.monotonic()
        try:
            await asyncio.shield(work)
        except OSError as error:
            log.warning("%s can't be read into the page cache: %s", source, error)
            return False
        had_it_all = source in self._whole
        if not self._changed.is_set():
            self._whole.add(source)
            self._metrics.staged_read_bytes.inc(missing)
            took_s = time.monotonic() - began
            log.info("%s: %d bytes read into the page cache in %.2f s", source, missing, took_s)
            await self._on_disk.look(source)
        return had_it_all

    def _pull(self, source: str) -> None:
        now = time.monotonic()
        if source in self._pulls or now - self._failed_at.get(source, -_RETRY_S) < _RETRY_S:
            return
        self._pulls[source] = asyncio.create_task(self._pulled(source))

    async def _pulled(self, source: str) -> None:
        try:
            await self._cache.ensure(source)
        except (CacheError, ValueError, OSError) as error:
            self._failed_at[source] = time.monotonic()
            log.warning("%s can't be staged: %s", source, error)
        else:
            self._poked.set()
        finally:
            del self._pulls[source]

    async def _let_go(self) -> None:
        if self._held.keys() <= self._wish.keys():
            return
        used = await asyncio.to_thread(page_cache.mapped_inodes, self._pids())
        gone = to_drop(self._held, self._wish, used, self._loading())
        for source, paths in gone.items():
            await asyncio.to_thread(_drop, paths)
            del self._held[source]
            log.info("%s is no longer held in the page cache", source)
            await self._on_disk.look(source)

    async def _measure(self) -> None:
        while True:
            began = time.monotonic()
            await self._on_disk.measure()
            resident = sum(map(self._on_disk.resident_bytes, self._wish))
            self._metrics.staged(sum(self._wish.values()), resident)
            took_s = time.monotonic() - began
            await asyncio.sleep(max(MEASURE_S, took_s / _SHARE))

    async def close(self) -> None:
        """Read and pull no more; what is in the page cache stays there."""
        self._wish = {}
        self._changed.set()
        for pull in self._pulls.values():
            pull.cancel()
        await asyncio.gather(*self._pulls.values(), return_exceptions=True)
        self._reader.shutdown(wait=False, cancel_futures=True)


def _load(reads: list[tuple[str, int]], cancelled: threading.Event) -> None:
    for path, size in reads:
        page_cache.load(Path(path), size, cancelled)


def _drop(paths: list[str]) -> None:
    for path in paths:
        page_cache.drop(Path(path))
