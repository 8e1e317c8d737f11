"""A node's model cache: every model a replica needs, on a local disk, fetched once.

Rules this file keeps:
- one pull per model and node: whoever else wants the model shares it;
- what a replica holds, or a pull counts on, is never evicted; room is made for the pull that needs
  it, and no more;
- the event loop's thread owns all state; disks and sources are touched in others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import msgspec

from agent.cache.cluster import PeerCaches
from agent.cache.errors import CacheError
from agent.cache.policy import freed_bytes, shortage_bytes, victims
from agent.cache.pull import Pull, Tools
from agent.cache.resolve import Wanted, cached_as, look
from agent.cache.sources import Origin
from agent.cache.store import CacheStore, Stored
from runtime.checkpoints.model_files import (
    CacheConfig,
    CachedModel,
    CacheView,
    ModelRef,
    Offer,
    VerifyReport,
    parse_ref,
)
from runtime.contract.config import Config
from runtime.registry.protocol import Registry

log = logging.getLogger("stoker.agent")

STORE_FOLDER = ".store"  # below the model_dir, apart from models that people put there
_FILES_AT_ONCE = 4
_RANGES_AT_ONCE = 40  # reads of 4 files, and a write for each
_REMEMBERED_PULLS = 20


class ModelCache:
    """The cache of one node."""

    def __init__(
        self, store: CacheStore, config: CacheConfig, model_dir: Path, cluster: PeerCaches
    ) -> None:
        """`model_dir`: where relative sources are looked for."""
        self.store = store
        self._config = config
        self._model_dir = model_dir
        self._pulls: dict[str, Pull] = {}
        self._ended: deque[Pull] = deque(maxlen=_REMEMBERED_PULLS)
        self._holds: dict[str, str] = {}  # replica_id -> model_id
        self._room = asyncio.Lock()
        self._files = ThreadPoolExecutor(_FILES_AT_ONCE, "cache-file")
        self._ranges = ThreadPoolExecutor(_RANGES_AT_ONCE, "cache-range")
        self._tools = Tools(store, cluster, self._files, self._ranges, self._make_room)
        self._commits: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ for replicas

    async def ensure(self, source: str, replica_id: str | None = None) -> Path:
        """The local folder of `source`, pulled first if need be; held for `replica_id`.

        A caller that no longer waits does not end the pull: it was wanted, and may be again. Raises
        CacheError; ValueError for a source that can't be one.
        """
        stored = self._find(source)
        while stored is None:
            wanted = await self._look(source)
            if isinstance(wanted, Path):
                return wanted
            await asyncio.shield(self._pull(wanted, refresh=False).task)
            stored = self._find(source)
        model_id = stored.manifest.model_id
        if replica_id:
            self._holds[replica_id] = model_id
        self.store.touch(model_id)
        return self.store.model_folder(model_id)

    def hold(self, source: str, replica_id: str) -> None:
        """A replica that an earlier agent started uses `source`, if that is cached."""
        with contextlib.suppress(ValueError):  # the source of a stub may be anything
            if stored := self._find(source):
                self._holds[replica_id] = stored.manifest.model_id

    def find(self, source: str) -> Path | None:
        """The folder of a cached model; None for one that is not, or is used in place."""
        with contextlib.suppress(ValueError):
            if stored := self._find(source):
                return self.store.model_folder(stored.manifest.model_id)
        return None

    async def in_place(self, source: str) -> Path | None:
        """The folder that `source` is loaded from without a copy. Raises CacheError, ValueError."""
        wanted = await self._look(source)
        return wanted if isinstance(wanted, Path) else None

    def names(self) -> list[str]:
        """Every cached model, as specs name it most shortly."""
        shared = self._config.shared_dir
        return [_short(stored, shared) for stored in self.store.models.values()]

    async def where(self, source: str, *, anywhere: bool = True) -> Path | None:
        """The folder of a model that need not be pulled; None for one that must be. `anywhere`: see
        `look`.

        Raises CacheError, ValueError.
        """
        if stored := self._find(source):
            return self.store.model_folder(stored.manifest.model_id)
        wanted = await self._look(source, anywhere)
        return wanted if isinstance(wanted, Path) else wanted.folder

    async def origin(self, source: str) -> Origin | None:
        """Who has the files of a model that must be pulled first. Raises CacheError, ValueError."""
        wanted = await self._look(source)
        if isinstance(wanted, Path):
            return None
        return await asyncio.to_thread(wanted.origin, None)  # it may import a client library

    def release(self, replica_id: str) -> None:
        """The replica is gone. Idempotent."""
        self._holds.pop(replica_id, None)

    def _find(self, source: str) -> Stored | None:
        """The cached model, where the cache is what `source` is loaded from."""
        ref = cached_as(source, self._config)
        return self.store.find(ref) if ref else None

    async def _look(self, source: str, anywhere: bool = True) -> Path | Wanted:
        return await asyncio.to_thread(
            look, source, self._config, self._model_dir, anywhere=anywhere
        )

    # ------------------------------------------------------------------ for operators

    async def pull(self, source: str, refresh: bool = False) -> Pull | None:
        """Begin (or join) a pull; None for a source that is here: cached, or used in place.

        Raises CacheError or ValueError for a source that can't be pulled at all.
        """
        if not refresh and self._find(source):
            return None
        wanted = await self._look(source, anywhere=False)
        return None if isinstance(wanted, Path) else self._pull(wanted, refresh)

    async def remove(self, source: str) -> int:
        """Forget a model; the bytes that this freed. Raises CacheError, ValueError."""
        model_id = self._stored(source).manifest.model_id
        if holders := self._holders(model_id):
            raise CacheError(
                "in_use",
                f"{source} is in use by {', '.join(holders)}; unload the model, then remove it",
            )
        async with self._room:
            return await self._remove(model_id)

    async def _remove(self, model_id: str) -> int:
        """Call it with `_room` held. The bytes freed."""
        freed = freed_bytes({model_id}, self.store.held(), self._kept())
        await asyncio.to_thread(
            self.store.wipe, model_id, self.store.forget(model_id, self._kept())
        )
        return freed

    async def verify(self, source: str) -> VerifyReport:
        """Read every file again. A damaged model is forgotten, unless a replica uses it.

        Raises CacheError, ValueError.
        """
        manifest = self._stored(source).manifest
        bad = await asyncio.to_thread(self.store.damaged, manifest)
        report = VerifyReport(
            model=source,
            revision=manifest.revision,
            checked_bytes=manifest.size_bytes,
            bad_files=tuple(file.path for file in bad),
        )
        if not bad:
            return report
        log.error("cached model %s is damaged: %s", source, ", ".join(report.bad_files))
        self.store.condemn(file.sha256 for file in bad)
        if holders := self._holders(manifest.model_id):
            note = f"in use by {', '.join(holders)}; unload the model, then remove it"
            return msgspec.structs.replace(report, note=note)
        async with self._room:
            await self._remove(manifest.model_id)
        note = "removed; it is pulled again when it is next wanted"
        return msgspec.structs.replace(report, removed=True, note=note)

    def _stored(self, source: str) -> Stored:
        if stored := self._find(source):
            return stored
        raise CacheError("not_found", f"{source} is not in this node's cache")

    def _holders(self, model_id: str) -> list[str]:
        return sorted(r for r, held in self._holds.items() if held == model_id)

    def view(self, resident_bytes: Callable[[str], int] | None = None) -> CacheView:
        """All there is to see. Reads a few directory entries.

        `resident_bytes`: how much of a source is in the page cache; None: nobody measures it.
        """
        store, now = self.store, time.time()
        held, measured = store.held(), resident_bytes or (lambda source: 0)
        models = [
            CachedModel(
                model=_text(stored),
                revision=stored.manifest.revision,
                model_id=model_id,
                path=str(store.model_folder(model_id)),
                files=len(stored.manifest.files),
                size_bytes=stored.manifest.size_bytes,
                unshared_bytes=freed_bytes({model_id}, held, ()),
                idle_s=max(0.0, now - store.used_at(model_id)),
                held_by=tuple(self._holders(model_id)),
                resident_bytes=measured(_short(stored, self._config.shared_dir)),
            )
            for model_id, stored in sorted(store.models.items())
        ]
        return CacheView(
            folder=str(store.folder),
            limit_bytes=self._config.limit_bytes,
            used_bytes=store.used_bytes(),
            partial_bytes=store.partial_bytes(),
            disk_free_bytes=store.disk_free_bytes(),
            models=tuple(models),
            pulls=tuple(p.view() for p in (*self._pulls.values(), *reversed(self._ended))),
        )

    # ------------------------------------------------------------------ for peers

    async def offer(self, ref: ModelRef, seen: int, wait_s: float) -> Offer | None:
        """What this node has of a model. While it is being pulled, and no more than `seen` files of
        it are here, the answer may take `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            if stored := self.store.find(ref):
                return _complete(stored)
            pull = self._pulling(ref)
            offer = pull.offer() if pull else None
            left_s = deadline - time.monotonic()
            if pull is None or left_s <= 0 or (offer and len(offer.files) > seen):
                return offer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await pull.changed()

    def _pulling(self, ref: ModelRef) -> Pull | None:
        found = self._pulls.get(ref.text)
        same = (
            p
            for p in self._pulls.values()
            if p.ref.source == ref.source and p.revision == ref.asked
        )
        return found or next(same, None)

    # ------------------------------------------------------------------ pulls

    def _pull(self, wanted: Wanted, refresh: bool) -> Pull:
        """The running pull of that model, or a new one."""
        key = wanted.ref.text
        if key not in self._pulls:
            pull = Pull(wanted.ref, self._tools, wanted.origin)
            self._pulls[key] = pull
            pull.task = asyncio.create_task(self._run(pull, wanted.direct, refresh))
            pull.task.add_done_callback(_seen)
        return self._pulls[key]

    async def _run(self, pull: Pull, direct: bool, refresh: bool) -> None:
        try:
            manifest = await pull.run(direct=direct, refresh=refresh)
        except CacheError as error:
            log.warning("the pull of %s failed: %s", pull.ref.text, error)
            self._over(pull)
            if error.kind == "disk_full":
                await self._drop_leftovers()
            raise
        finally:
            self._over(pull)
        log.info("%s is cached", pull.ref.text, extra={"bytes": manifest.size_bytes})
        self._commit_soon(manifest.model_id)

    def _over(self, pull: Pull) -> None:
        if self._pulls.pop(pull.ref.text, None):
            self._ended.appendleft(pull)

    def _commit_soon(self, model_id: str) -> None:
        """A replica need not wait until the files are on the disk, too."""
        task = asyncio.create_task(self._commit(model_id))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    async def _commit(self, model_id: str) -> None:
        try:
            await asyncio.to_thread(self.store.commit, model_id)
        except OSError as error:
            log.error("%s is cached, but a restart will not know it: %s", model_id, error)

    async def close(self) -> None:
        """End every pull; what came is gone on from later."""
        for pull in self._pulls.values():
            pull.stop()
        tasks = [pull.task for pull in self._pulls.values()]
        await asyncio.gather(*tasks, *self._commits, return_exceptions=True)
        for executor in (self._files, self._ranges):
            executor.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    # ------------------------------------------------------------------ room

    def _kept(self) -> set[str]:
        """Blobs that running pulls count on."""
        return {blob for pull in self._pulls.values() for blob in pull.wanted}

    async def _drop_leftovers(self) -> None:
        parts = {part for pull in self._pulls.values() for part in pull.parts}
        async with self._room:
            await asyncio.to_thread(self.store.drop_leftovers, parts, self._kept())

    def _shortage(self, pull: Pull) -> int:
        store = self.store
        here = store.here_bytes(pull.wanted, pull.parts)
        promised = sum(p.left_bytes for p in self._pulls.values() if p is not pull)
        return shortage_bytes(
            need_bytes=max(0, (pull.total_bytes or 0) - here),
            used_bytes=store.used_bytes() + promised,
            limit_bytes=self._config.limit_bytes,
            disk_free_bytes=store.disk_free_bytes() - promised,
        )

    async def _make_room(self, pull: Pull) -> None:
        """Evict what `pull` needs the room of. Raises CacheError where there can't be enough."""
        total, limit = pull.total_bytes or 0, self._config.limit_bytes
        if limit is not None and total > limit:
            raise CacheError(
                "too_big",
                f"{pull.ref.text} has {total} bytes, more than the cache may hold ({limit}); raise"
                " cache.limit_bytes",
            )
        async with self._room:
            if self._shortage(pull) > 0:
                parts = {part for p in self._pulls.values() for part in p.parts}
                await asyncio.to_thread(self.store.drop_leftovers, parts, self._kept())
            short = self._shortage(pull)
            gone = victims(self.store.held(), set(self._holds.values()), self._kept(), short)
            if gone is None:
                raise self._no_room(pull, short)
            for model_id in gone:
                log.info("%s is evicted to make room for %s", model_id, pull.ref.text)
                await self._remove(model_id)

    def _no_room(self, pull: Pull, short: int) -> CacheError:
        holders = ", ".join(sorted(self._holds)) or "no replica"
        return CacheError(
            "disk_full",
            f"{pull.ref.text}: {short} bytes too little room in {self.store.folder} (the cache's"
            f" limit is {self._config.limit_bytes or 'the disk'}, {self.store.disk_free_bytes()}"
            f" bytes of the disk are free), and what is cached is in use by {holders} or does not"
            " suffice; free space there, unload models, or raise cache.limit_bytes",
        )


def open_cache(
    config: Config,
    registry: Registry,
    session: aiohttp.ClientSession,
    own_url: Callable[[], str],
) -> ModelCache:
    """The cache that an agent's configuration names. Blocks. Raises OSError, RuntimeError."""
    model_dir = Path(config.agent.model_dir or Path(config.state_dir) / "models").absolute()
    cluster = PeerCaches(
        registry,
        session,
        token=config.cluster_token,
        prefix=config.registry.prefix,
        own_url=own_url,
    )
    store = CacheStore(model_dir / STORE_FOLDER)
    return ModelCache(store, config.cache, model_dir, cluster)


def _complete(stored: Stored) -> Offer:
    manifest = stored.manifest
    return Offer(
        source=manifest.source,
        revision=manifest.revision,
        complete=True,
        size_bytes=manifest.size_bytes,
        files=manifest.files,
    )


def _text(stored: Stored) -> str:
    """The model as people ask for it."""
    source = stored.manifest.source
    names = [name for name in stored.asked if name]
    return f"{source}@{names[0] if names else stored.manifest.revision}"


def _short(stored: Stored, shared_dir: str) -> str:
    """The shortest name of it that the cache finds it by."""
    source = stored.manifest.source
    if parse_ref(source) is None:
        shared = Path(shared_dir).absolute()
        inside = shared_dir and Path(source).is_relative_to(shared)
        return str(Path(source).relative_to(shared)) if inside else source
    names = [name for name in stored.asked if name]
    if "main" in names or not stored.manifest.source.startswith("hf:"):
        return source
    return f"{source}@{names[0] if names else stored.manifest.revision}"


def _seen(task: asyncio.Task[None]) -> None:
    """Nobody may wait for a pull; its error is in its view then."""
    if not task.cancelled():
        task.exception()
