"""Jobs and batches of one router: its handlers, and on one process of a host those who do the work.

Rules this file keeps:
- whoever holds the lock on `<state_dir>/jobs.lock` does the work, alone on its host; the kernel
  frees the lock when its holder dies, and the next takes over with what the store says;
- a store that cannot be used stops nothing else: it is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from aiohttp import web

from runtime.contract.config import Config
from runtime.contract.schema import SchemaError
from runtime.router.jobs import signing
from runtime.router.jobs.batches import Batches
from runtime.router.jobs.handlers.batches import BatchHandlers
from runtime.router.jobs.handlers.files import FileHandlers
from runtime.router.jobs.handlers.jobs import JobHandlers
from runtime.router.jobs.invokes import Invokes
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.store import batch_rows, file_rows, job_rows
from runtime.router.jobs.store.database import JobStore, StoreError
from runtime.router.jobs.webhooks import Webhooks
from runtime.router.proxy.serving import Proxy
from runtime.wire.agent_messages import SpecProblem

log = logging.getLogger("stoker.router.jobs")

POLL_S = 0.5  # between two looks at what other processes wrote, and at the lock
ROUND_S = 0.02  # the least time between two rounds: ends that come together are one
PAUSE_S = 5.0  # after one that failed
SWEEP_S = 60.0
UPLOAD_S = 3600.0  # an upload that is not whole by then is given up on


class Jobs:
    """`run` does the work, `routes` (and `handlers`, for /invoke) take it in.

    Raises SchemaError for a bad webhook_secret.
    """

    def __init__(self, config: Config, proxy: Proxy) -> None:
        settings, folder = config.router, Path(config.state_dir)
        self._config = config
        self._proxy = proxy
        self._master = _master(settings.webhook_secret)
        self._lock_file = folder / "jobs.lock"
        self._store = JobStore(
            folder / "jobs.db", settings.store_max_bytes, settings.store_tenant_share
        )
        self._woken = asyncio.Event()
        self._metrics = JobMetrics()
        proxy.metrics.include(self._metrics)
        wake = self._woken.set
        self.handlers = JobHandlers(self._store, settings, proxy.keys, self._metrics, wake)
        self._files = FileHandlers(self._store, settings, proxy.keys, proxy.memory)
        self._batches = BatchHandlers(self._store, settings, proxy.keys, wake)

    def routes(self) -> list[web.RouteDef]:
        """For the application, before its catch-all below /v1."""
        return [*self._files.routes(), *self._batches.routes(), *self.handlers.routes()]

    async def run(self) -> None:
        """Until cancelled. What is under way then is done again by whoever runs next."""
        async with self._alone():
            workers = self._workers()
            try:
                await self._rounds(*workers)
            finally:
                await asyncio.gather(*(worker.close() for worker in workers))

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    def _workers(self) -> tuple[Batches, Invokes, Webhooks]:
        settings = self._config.router
        store, proxy, metrics, wake = self._store, self._proxy, self._metrics, self._woken.set

        batches = Batches(
            store, proxy, metrics, concurrency=settings.batch_concurrency,
            max_line_bytes=settings.max_body_bytes, wake=wake,
        )  # fmt: skip
        invokes = Invokes(store, proxy, metrics, keep_s=settings.results_keep_s, wake=wake)
        hooks = Webhooks(store, metrics, master=self._master, private=settings.webhook_private)
        return batches, invokes, hooks

    async def _rounds(self, batches: Batches, invokes: Invokes, hooks: Webhooks) -> None:
        swept_at = 0.0
        while True:
            self._woken.clear()
            steps = [batches.step, invokes.step, hooks.step]
            if time.monotonic() >= swept_at + SWEEP_S:
                swept_at = time.monotonic()
                steps.append(self._sweep)
            whole = [await self._stepped(step) for step in steps]
            if not all(whole):
                await asyncio.sleep(PAUSE_S)
                continue
            await asyncio.sleep(ROUND_S)
            await self._until_work(batches.busy or invokes.busy, swept_at + SWEEP_S)

    async def _stepped(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether it went well; where it did not, the others go on."""
        try:
            await step()
        except StoreError:
            return False
        except Exception:
            log.exception("a round of jobs and batches failed")
            return False
        return True

    async def _until_work(self, busy: bool, due_at: float) -> None:
        """While there is work, rounds come every POLL_S: models stop resting, times run out."""
        while time.monotonic() < due_at:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._woken.wait()
                return
            except TimeoutError:
                pass
            with contextlib.suppress(StoreError):
                if busy or await self._store.changed():
                    return

    async def _sweep(self) -> None:
        """Remove what is kept no longer, each in a transaction of its own."""
        store, now = self._store, time.time()
        files = await store.read(file_rows.expired, now, UPLOAD_S)
        for file in files:
            await store.write(file_rows.delete, file)
        batches = await store.read(batch_rows.expired, now)
        for batch in batches:
            await store.write(batch_rows.delete, batch)
        jobs = await store.write(job_rows.sweep, now)
        if files or batches or jobs:
            log.info("removed %d files, %d batches, %d jobs", len(files), len(batches), jobs)
            await store.shrink()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """The host's lock, as soon as nobody has it."""
        descriptor = -1
        while descriptor < 0:
            try:
                descriptor = _locked(self._lock_file)
            except BlockingIOError:
                await asyncio.sleep(POLL_S)
            except OSError as error:
                log.error("no jobs are worked on: cannot lock %s: %s", self._lock_file, error)
                await asyncio.sleep(SWEEP_S)
        log.info("this process works on its host's jobs and batches")
        try:
            yield
        finally:
            os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock. Raises BlockingIOError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _master(secret: str) -> bytes | None:
    if not secret:
        return None
    try:
        return signing.key_of(secret)
    except ValueError as error:
        problem = SpecProblem(field="router.webhook_secret", message=str(error))
        raise SchemaError([problem]) from None
