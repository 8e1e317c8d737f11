"""One model's way onto this node: from peers, and from its origin where this node holds the lease.

Rules this file keeps:
- a source that fails is left out, and the pull goes on from what there is with the next one;
- room is made before bytes are asked for, once the size is known;
- a pull that ends badly says which model, which source and what to do; it leaves parts to go on
  from, but none where the disk is full.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from agent.cache.cluster import Lease, PeerCaches
from agent.cache.errors import CacheError, SourceError
from agent.cache.fetch import Fetch
from agent.cache.policy import (
    Complete,
    FromOrigin,
    FromPeers,
    LeaseState,
    PeerOffer,
    Rate,
    next_step,
)
from agent.cache.sources import Listing, Origin, PeerSource, RemoteFile, Source
from agent.cache.store import CacheStore
from runtime.checkpoints.model_files import (
    Manifest,
    ModelFile,
    ModelRef,
    Offer,
    PullState,
    PullView,
)
from runtime.registry.protocol import RegistryError

log = logging.getLogger("stoker.agent")

_FOLLOW_S = 5.0  # how long a peer that is pulling may keep a question open
_ASK_ALL_S = 10.0  # between two rounds of asking every node
_POLL_S = 0.2  # between two questions to a peer that does not keep one open
_CORRUPT_TRIES = 2  # of the origin, for one file
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Tools(Struct, frozen=True):
    """What every pull of a node shares."""

    store: CacheStore
    cluster: PeerCaches
    files: Executor  # a thread per file under way
    ranges: Executor  # a thread per range under way
    make_room: Callable[[Pull], Awaitable[None]]  # for its total_bytes; raises CacheError


class _Listed(Protocol):
    @property
    def path(self) -> str: ...

    @property
    def sha256(self) -> str | None: ...


class Pull:
    """One pull. Its `files` are checked and here; `task` is set by whoever runs it."""

    def __init__(self, ref: ModelRef, tools: Tools, origin: Callable[[str | None], Origin]) -> None:
        """`origin` makes the source that is asked last, for a revision or the one asked for."""
        self.ref = ref
        self.task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.revision: str | None = None
        self.files: dict[str, ModelFile] = {}  # by path
        self.wanted: set[str] = set()  # sha256 of every file known to belong to it
        self.parts: set[Path] = set()
        self.total_bytes: int | None = None
        self.state: PullState = "waiting"
        self.error: CacheError | None = None
        self._tools = tools
        self._make_origin = origin
        self._origin_words = "nobody yet"
        self._stop = threading.Event()
        self._open: set[Source] = set()
        self._peers: dict[str, PeerSource] = {}
        self._bad_peers: dict[str, str] = {}  # url -> what it failed of
        self._lease: Lease | None = None
        self._progress: dict[str, int] = {}  # path -> bytes; each is counted by its own thread
        self._rate = Rate()
        self._started_at = time.monotonic()
        self._asked_all_at = -_ASK_ALL_S
        self._changed = asyncio.Event()

    @property
    def _done_bytes(self) -> int:
        return sum(self._progress.values())

    # ------------------------------------------------------------------ seen from outside

    def view(self) -> PullView:
        """How far it is."""
        now = time.monotonic()
        if self.state == "pulling":
            self._rate.seen(now, self._done_bytes)
        return PullView(
            model=self.ref.text,
            revision=self.revision,
            state=self.state,
            origin=self._origin_words,
            done_bytes=self._done_bytes,
            total_bytes=self.total_bytes,
            rate_bytes_per_s=self._rate.bytes_per_s(),
            eta_s=self._rate.eta_s(self.left_bytes) if self.state == "pulling" else None,
            age_s=now - self._started_at,
            error=str(self.error) if self.error else None,
            error_kind=self.error.kind if self.error else None,
        )

    def offer(self) -> Offer | None:
        """What this node can already give to others; None before anything is known."""
        if self.revision is None or self.total_bytes is None:
            return None
        return Offer(
            source=self.ref.source,
            revision=self.revision,
            complete=False,
            size_bytes=self.total_bytes,
            files=tuple(self.files.values()),
        )

    @property
    def left_bytes(self) -> int:
        """Still to come, as far as it is known."""
        return max(0, (self.total_bytes or 0) - self._done_bytes)

    async def changed(self) -> None:
        """Returns when a file has come, or it has ended."""
        await self._changed.wait()

    def stop(self) -> None:
        """End it soon; threads that read are woken."""
        self._stop.set()
        for source in list(self._open):
            source.close()

    # ------------------------------------------------------------------ its run

    async def run(self, *, direct: bool, refresh: bool = False) -> Manifest:
        """The model is in the store when this returns.

        `direct`: nobody but the origin is asked. `refresh`: the origin says again what a name such
        as "main" means. Raises CacheError.
        """
        try:
            manifest = await self._direct() if direct else await self._from_cluster(refresh)
            await asyncio.to_thread(self._tools.store.link, manifest)
            self._tools.store.add(manifest, self.ref.asked)
            self.state = "ready"
            return manifest
        except SourceError as error:
            self.error = CacheError(error.kind, f"{self.ref.text}: {error}{self._tried()}")
        except OSError as error:
            self.error = self._disk_failed(error)
        except CacheError as error:
            self.error = error
        finally:
            await self._ended()
        raise self.error

    async def _ended(self) -> None:
        self.stop()
        if self.state != "ready":
            self.state = "failed"
        self._tell()
        if self._lease:  # not before: others must see at once what this node has
            await self._lease.release()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _direct(self) -> Manifest:
        await self._from_origin(None)
        return self._manifest()

    def _manifest(self) -> Manifest:
        files = tuple(sorted(self.files.values(), key=lambda f: f.path))
        return Manifest(source=self.ref.source, revision=self.revision or "", files=files)

    async def _from_cluster(self, refresh: bool) -> Manifest:
        """Follow `next_step` until all files are here."""
        pinned = await self._pinned(refresh)
        ref = ModelRef(source=self.ref.source, asked=pinned or self.ref.asked)
        lease: LeaseState = "none"
        while True:
            offers = await self._offers(ref, wait=lease == "other")
            match next_step(self._have(), offers, lease):
                case Complete(offer):
                    await self._will_take(offer.revision, offer.size_bytes, offer.files)
                    self.files = {file.path: file for file in offer.files}
                    return self._manifest()
                case FromOrigin():
                    await self._from_origin(self.revision or pinned)
                    await self._pin(self.revision or "")
                    return self._manifest()
                case FromPeers(files):
                    await self._from_peers(files, offers)
                case _:
                    lease = await self._try_lease()

    async def _pinned(self, refresh: bool) -> str | None:
        """The commit that a name means to every node; None where it is not known or no name."""
        if refresh:
            revision = (await self._list(self._origin(None))).revision
            await self._pin(revision)
            return revision
        return await self._tools.cluster.pinned(self.ref) if self.ref.is_name else None

    async def _pin(self, revision: str) -> None:
        if self.ref.is_name:
            await self._tools.cluster.pin(self.ref, revision)

    async def _try_lease(self) -> LeaseState:
        try:
            self._lease = await self._tools.cluster.lease(self.ref)
        except RegistryError as error:
            log.warning("%s: no lease can be had (%s); asking the origin", self.ref.text, error)
            return "unknown"
        if self._lease:
            return "mine"
        self._origin_words = "another node, which asks the origin"
        return "other"

    async def _offers(self, ref: ModelRef, wait: bool) -> list[PeerOffer]:
        """What peers have; while another node asks the origin, it is the one to wait for."""
        cluster, now = self._tools.cluster, time.monotonic()
        holder = await cluster.holder(self.ref) if wait else None
        if holder and now - self._asked_all_at < _ASK_ALL_S:
            found = await cluster.offers(ref, [holder], seen=len(self.files), wait_s=_FOLLOW_S)
            if not found:
                await asyncio.sleep(_POLL_S)  # it has not begun, or is gone
        else:
            self._asked_all_at = now
            found = await cluster.offers(ref, await cluster.peers())
        return [o for o in found if o.url not in self._bad_peers]

    def _have(self) -> set[str]:
        return {file.sha256 for file in self.files.values()}

    async def _will_take(self, revision: str, size_bytes: int, files: Sequence[_Listed]) -> None:
        """Make room, and see to it that none of `files` is evicted from here on."""
        self.revision = revision
        self.wanted.update(file.sha256 for file in files if file.sha256)
        part = self._tools.store.part
        self.parts.update(part(self.ref, revision, file.path) for file in files)
        self.total_bytes = size_bytes
        await self._tools.make_room(self)
        self.state = "pulling"
        self._tell()

    # ------------------------------------------------------------------ files

    async def _from_origin(self, revision: str | None) -> None:
        origin = self._origin(revision)
        listing = await self._list(origin)
        if self.revision != listing.revision:
            self.files.clear()
        await self._will_take(listing.revision, listing.size_bytes, listing.files)
        self._origin_words = origin.name
        missing = [file for file in listing.files if file.path not in self.files]
        done = await asyncio.gather(
            *(self._one_from_origin(file, origin) for file in missing), return_exceptions=True
        )
        failed = [error for error in done if error is not None]
        # The first to fail stops the others, which then say "cancelled": that is not the cause.
        failed.sort(key=lambda e: isinstance(e, SourceError) and e.kind == "cancelled")
        if failed:
            raise failed[0]

    async def _one_from_origin(self, file: RemoteFile, origin: Source) -> None:
        try:
            for tries_left in reversed(range(_CORRUPT_TRIES)):
                try:
                    return await self._fetch(file, [origin])
                except SourceError as error:
                    if error.kind != "corrupt" or not tries_left:
                        raise
                    log.warning("%s: %s; it is fetched again", self.ref.text, error)
        except BaseException:
            self._stop.set()
            raise

    async def _from_peers(
        self,
        files: Sequence[tuple[ModelFile, tuple[str, ...]]],
        offers: Sequence[PeerOffer],
    ) -> None:
        """Take what peers offer; a peer that fails is not asked again by this pull."""
        offer = next(o.offer for o in offers if o.url == files[0][1][0])
        await self._will_take(offer.revision, offer.size_bytes, [file for file, _ in files])
        urls = sorted({url for _, urls in files for url in urls})
        self._origin_words = ", ".join(f"peer {url}" for url in urls)
        done = await asyncio.gather(
            *(self._one_from_peers(file, urls) for file, urls in files), return_exceptions=True
        )
        for error in done:
            if error is not None:
                self._stop.set()
                raise error

    async def _one_from_peers(self, file: ModelFile, urls: Sequence[str]) -> None:
        remote = RemoteFile(
            path=file.path, size_bytes=file.size_bytes, check=f"sha256:{file.sha256}"
        )
        try:
            await self._fetch(remote, [self._peer(url) for url in urls])
        except SourceError as error:
            if error.kind == "cancelled":
                raise
            if error.kind != "corrupt":
                return  # whoever failed is left out already
            if len(urls) == 1:
                self._leave_out(urls[0], error)
                return
            for url in urls:  # one of them serves wrong bytes: which?
                await self._one_from_peers(file, [url])
                if file.path in self.files:
                    return

    def _leave_out(self, url: str, error: SourceError) -> None:
        if url not in self._bad_peers and error.kind != "cancelled":
            log.warning("%s: %s; not asked again for this model", self.ref.text, error)
            self._bad_peers[url] = str(error)

    async def _fetch(self, file: RemoteFile, sources: list[Source]) -> None:
        """The file is here and checked when this returns. Raises SourceError, OSError."""
        store, loop = self._tools.store, asyncio.get_running_loop()
        part = store.part(self.ref, self.revision or "", file.path)
        self._progress[file.path] = 0

        def on_bytes(gained: int) -> None:
            self._progress[file.path] += gained

        def work() -> ModelFile:
            if file.sha256 and store.prove(file.sha256):
                on_bytes(file.size_bytes)
                return ModelFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
            fetch = Fetch(file, sources, part, self._tools.ranges, self._stop, on_bytes)
            try:
                sha256 = fetch.run()
            finally:
                failed.update(fetch.failed)
            kept = ModelFile(path=file.path, sha256=sha256, size_bytes=file.size_bytes)
            store.keep(part, kept)
            return kept

        failed: dict[str, SourceError] = {}
        try:
            kept = await loop.run_in_executor(self._tools.files, work)
        finally:
            for url, source in self._peers.items():
                if source.name in failed:
                    self._leave_out(url, failed[source.name])
        self.files[file.path] = kept
        self.wanted.add(kept.sha256)
        self._tell()

    # ------------------------------------------------------------------ sources and words

    async def _list(self, origin: Origin) -> Listing:
        self._origin_words = origin.name
        return await asyncio.to_thread(origin.listing)

    def _origin(self, revision: str | None) -> Origin:
        origin = self._make_origin(revision)
        self._open.add(origin)
        return origin

    def _peer(self, url: str) -> PeerSource:
        if url not in self._peers:
            self._peers[url] = PeerSource(url, self._tools.cluster.token)
            self._open.add(self._peers[url])
        return self._peers[url]

    def _tried(self) -> str:
        if not self._bad_peers:
            return ""
        return f". Before that, peers failed: {'; '.join(self._bad_peers.values())}"

    def _disk_failed(self, error: OSError) -> CacheError:
        store = self._tools.store
        if error.errno not in _FULL:
            return CacheError(
                "bad_source", f"{self.ref.text}: {store.folder} can't be written: {error}"
            )
        for part in self.parts:
            part.unlink(missing_ok=True)
        return CacheError(
            "disk_full",
            f"{self.ref.text}: the disk of {store.folder} is full ({error.strerror}) with"
            f" {self.left_bytes} bytes still to come; free space there, or set cache.limit_bytes"
            " so that the cache leaves room for what else is on that disk",
        )
