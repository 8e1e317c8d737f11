"""The models on this node's disk: which there are, and how much of each is in the page cache.

Rules this file keeps:
- disks are only touched in threads; whoever asks what was last measured never waits;
- a model is told of once a spec named it, or the cache has it; of those named, the latest count.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from agent.cache.errors import CacheError
from agent.cache.model_cache import ModelCache
from agent.weights import page_cache
from agent.weights.staging_policy import Seen, WeightFile
from runtime.engine.vllm import memory_estimate
from runtime.wire.agent_messages import CachedModel

_REMEMBERED = 1024  # sources that starts, wishes and inspections named


class DiskModels:
    """The models of one node's disk. All methods are for the event loop's thread."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._named: dict[str, None] = {}
        self._seen: dict[str, Seen] = {}

    def name(self, source: str) -> None:
        """Remember that a spec names its model so: it is told of once it is on the disk."""
        self._named.pop(source, None)
        self._named[source] = None
        while len(self._named) > _REMEMBERED:
            self._named.pop(next(iter(self._named)))

    def cached(self) -> tuple[CachedModel, ...]:
        """Every model on this node's disk, as last measured."""
        return tuple(
            CachedModel(
                source=source, disk_bytes=seen.disk_bytes, resident_bytes=seen.resident_bytes
            )
            for source, seen in sorted(self._seen.items())
        )

    def seen(self, source: str) -> Seen:
        """A model as last measured; all zero for one that is not on the disk."""
        return self._seen.get(source, Seen())

    def resident_bytes(self, source: str) -> int:
        """How much of its weights was last seen in the page cache."""
        return self.seen(source).resident_bytes

    async def look(self, source: str) -> Seen | None:
        """Measure one model now; None where it must be fetched first."""
        self.name(source)
        folder = await self._folder(source)
        if folder is None:
            return None
        seen = self._seen[source] = await asyncio.to_thread(look_at, folder)
        return seen

    async def measure(self) -> None:
        """Measure every model that is cached or was named."""
        found: dict[str, Seen] = {}
        for source in dict.fromkeys([*self._cache.names(), *self._named]):
            if (folder := await self._folder(source)) is not None:
                found[source] = await asyncio.to_thread(look_at, folder)
        self._seen = found

    async def _folder(self, source: str) -> Path | None:
        if folder := self._cache.find(source):
            return folder
        with contextlib.suppress(CacheError, ValueError, OSError):
            return await self._cache.in_place(source)
        return None


def look_at(folder: Path) -> Seen:
    """A model's files, and how much of its weights is in the page cache. Blocks."""
    files = []
    for path in _weight_files(folder):
        with contextlib.suppress(OSError):
            about = path.stat()
            resident = page_cache.resident_bytes(path)
            files.append(WeightFile(str(path), about.st_size, about.st_ino, resident))
    return Seen(disk_bytes=_disk_bytes(folder), files=tuple(files))


def _weight_files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):  # it is being removed
        return memory_estimate.weight_files(folder)
    return []


def _disk_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):  # likewise
        for path in folder.rglob("*"):
            total += path.stat().st_size if path.is_file() else 0
    return total
