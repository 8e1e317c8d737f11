"""Works jobs off: calls of /invoke that nobody waits for on a connection.

Rule this file keeps: a job is sent until it has an answer, is cancelled, or its time is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from runtime.router.call.request import Caller
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.plan import Item, Plan
from runtime.router.jobs.send import Sender, Sent, send
from runtime.router.jobs.store import job_rows
from runtime.router.jobs.store.database import JobStore
from runtime.router.jobs.store.rows import JobRow
from runtime.router.proxy.serving import Proxy

log = logging.getLogger("stoker.router.jobs")

WINDOW_S = 24 * 3600.0  # what has no answer by then gets none
IN_FLIGHT = 64
PER_MODEL = 16  # at first
KNOWN = 200  # of each tenant, its oldest
_OVERDRAWN = "room for its answer (router.store_tenant_share); delete files and jobs"
_HEADERS = ((b"Content-Type", b"application/json"),)


class Invokes:
    """The jobs of one host, in the one process that holds its lock."""

    def __init__(
        self,
        store: JobStore,
        proxy: Proxy,
        metrics: JobMetrics,
        *,
        keep_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._proxy = proxy
        self._metrics = metrics
        self._keep_s = keep_s
        self._wake = wake
        self.sender = Sender(Plan(IN_FLIGHT, PER_MODEL), self._send, self._ended)
        self._rows: dict[int, JobRow] = {}
        self.busy = False  # whether there is anything to do

    async def step(self) -> None:
        """Do what the store says is to be done. Raises StoreError."""
        now = time.time()
        found = await self._store.read(job_rows.unfinished, KNOWN)
        self.busy = bool(found)
        rows = {row.seq: row for row in found if row.deadline_at > now}
        for job in [job for job in self._rows if job not in rows]:  # over, or cancelled meanwhile
            await self.sender.call_off(job)
            del self._rows[job]
        for row in found:
            if row.deadline_at <= now:
                await self._end(row, "expired", None, None)
            elif row.seq not in self._rows:
                self._rows[row.seq] = row
                self.sender.plan.add(Item(row.seq, 0, row.tenant, row.model))
        self.sender.plan.paused = await self._store.overdrawn()
        await self._say_paused(rows.values())
        self.sender.pump()

    async def _say_paused(self, rows: Iterable[JobRow]) -> None:
        """Jobs that wait for room say so, each once."""
        plan = self.sender.plan
        for row in rows:
            waits = row.tenant in plan.paused and (row.seq, 0) not in plan.in_flight
            if waits and row.waits_for != _OVERDRAWN:
                await self._store.write(job_rows.put_back, row.seq, _OVERDRAWN)

    async def close(self) -> None:
        """End what is under way."""
        await self.sender.close()

    async def _send(self, item: Item) -> Sent:
        row = self._rows[item.owner]
        body = await self._store.write(job_rows.start, row.seq, time.time())
        if body is None:  # it was cancelled just now
            return Sent("answered")
        caller = Caller(row.tenant, row.key_id, row.priority)
        sent = await send(
            self._proxy, row.id, row.model, row.path, _HEADERS, body, caller, counted=True
        )
        if sent.verdict == "broken" and self.sender.plan.last_try(item[:2]):
            sent = sent._replace(verdict="given up")
        if sent.verdict in ("answered", "given up"):
            await self._answer(row, sent)
        else:
            assert sent.error is not None
            await self._store.write(job_rows.put_back, row.seq, sent.error.message)
            self._metrics.job("put_back")
        return sent

    async def _answer(self, row: JobRow, sent: Sent) -> None:
        code, body = sent.status, sent.body
        if sent.error is not None:
            code, body = sent.error.status, sent.error.body()
        await self._end(row, "completed" if code < 400 else "failed", code, body)

    async def _end(self, row: JobRow, status: str, code: int | None, body: bytes | None) -> None:
        if await self._store.write(
            job_rows.end, row.seq, status, code, body, time.time(), self._keep_s
        ):
            self._metrics.job(status)

    def _ended(self) -> None:
        self.sender.pump()
        self._wake()
