"""Works batches off: validates them, sends their lines, ends them.

Rule this file keeps: all that it knows can be read from the store again; it is told nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable

from runtime.router.admission.fairness import BACKGROUND
from runtime.router.call.errors import CallError
from runtime.router.call.request import Caller
from runtime.router.jobs import lines
from runtime.router.jobs.lines import BatchLine, Problem
from runtime.router.jobs.metrics import JobMetrics
from runtime.router.jobs.plan import Item, Key, Plan
from runtime.router.jobs.send import Sender, Sent, send
from runtime.router.jobs.store import batch_rows, file_rows
from runtime.router.jobs.store.database import JobStore, StoreError
from runtime.router.jobs.store.file_rows import ERROR, OK
from runtime.router.jobs.store.rows import BatchRow, LineRow
from runtime.router.jobs.store.tenants import Turns
from runtime.router.jobs.validate import validate
from runtime.router.proxy.serving import Proxy

log = logging.getLogger("stoker.router.jobs")

_TRIES = 3  # of validating a file that fails for no reason that is known
_HEADERS = ((b"Content-Type", b"application/json"),)
_ENDS = {
    "completed": "",
    "cancelled": "the batch was cancelled before this line was answered",
    "expired": "the batch's completion_window ended before this line was answered",
}


class Batches:
    """The batches of one host, in the one process that holds its lock."""

    def __init__(
        self,
        store: JobStore,
        proxy: Proxy,
        metrics: JobMetrics,
        *,
        concurrency: int,
        max_line_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        self._store = store
        self._proxy = proxy
        self._metrics = metrics
        self._ahead = 4 * concurrency  # lines known of a batch
        self._max_line_bytes = max_line_bytes
        self._wake = wake
        self.sender = Sender(Plan(concurrency, 1), self._send, self._line_ended)
        self._rows: dict[int, BatchRow] = {}
        self._lines: dict[Key, LineRow] = {}
        self._read_to: dict[int, int] = {}  # batch -> the last line known
        self._has_room = True
        self._validation: tuple[int, asyncio.Task[None]] | None = None
        self._validated = Turns()
        self._failures: Counter[int] = Counter()  # batch -> validations that failed so

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._rows)

    async def step(self) -> None:
        """Do what the store says is to be done. Raises StoreError."""
        now = time.time()
        rows = await self._store.read(batch_rows.unfinished, now)
        self._rows = {row.seq: row for row in rows}
        for row in rows:
            try:
                await self._step(row, now)
            except StoreError:
                raise
            except Exception:  # it is this batch's alone
                log.exception("batch %s cannot go on", row.id)
        self._validate_next([row for row in rows if row.status == "validating"])
        self._has_room = await self._store.has_room()  # else results could not be kept
        self.sender.plan.paused = await self._store.overdrawn()
        self._pump()

    async def _step(self, row: BatchRow, now: float) -> None:
        if row.status == "cancelling":
            await self._end(row, "cancelled")
        elif row.expires_at <= now:
            await self._end(row, "expired")
        elif row.status != "validating" and await self._refill(row) == 0:
            await self._end(row, "completed")

    async def close(self) -> None:
        """End what is under way."""
        await self._stop_validation()
        await self.sender.close()

    # -------------------------------------------------------------------------------- lines

    async def _refill(self, row: BatchRow) -> int:
        """Know the next lines; how many are known or in flight."""
        plan, batch = self.sender.plan, row.seq
        known = plan.waiting(batch)
        flying = sum(owner == batch for owner, _ in plan.in_flight)
        if known < self._ahead // 2:
            after = self._read_to.get(batch, 0)
            found = await self._store.read(batch_rows.pending, batch, after, self._ahead)
            for line in found:
                self._read_to[batch] = line.line
                self._lines[batch, line.line] = line
                plan.add(Item(batch, line.line, row.tenant, line.model))
            known += len(found)
        return known + flying

    async def _send(self, item: Item) -> Sent:
        key = item[:2]
        row, line = self._rows[item.owner], self._lines[key]
        text = await self._store.read(file_rows.part, row.input, line.start, line.size_bytes)
        sent = await self._sent(row, line.line, lines.read_line(text, row.endpoint))
        if sent.verdict == "broken" and self.sender.plan.last_try(key):
            sent = sent._replace(verdict="given up")
        if sent.verdict in ("answered", "given up"):
            await self._keep(row, line, sent)
            del self._lines[key]
        else:
            self._metrics.line("put_back")
        return sent

    async def _sent(self, row: BatchRow, number: int, read: BatchLine | Problem) -> Sent:
        if isinstance(read, Problem):  # another version of this program found it good
            return Sent("answered", error=CallError(400, read.code, read.message))
        request_id = lines.request_id_of(row.id, number)
        caller = Caller(row.tenant, row.key_id, BACKGROUND)
        return await send(
            self._proxy, request_id, read.model, row.endpoint, _HEADERS, read.body, caller
        )

    async def _keep(self, row: BatchRow, line: LineRow, sent: Sent) -> None:
        outcome = OK if 200 <= sent.status < 400 else ERROR
        if sent.error is not None:
            code, message = sent.error.code, sent.error.message
            result = lines.unanswered(row.id, line.line, line.custom_id, code, message)
        else:
            result = lines.answered(row.id, line.line, line.custom_id, sent.status, sent.body)
        if await self._store.write(batch_rows.finish_line, row.seq, line.line, outcome, result):
            self._metrics.line("completed" if outcome == OK else "failed")

    def _line_ended(self) -> None:
        self._pump()
        self._wake()

    def _pump(self) -> None:
        if self._has_room:
            self.sender.pump()

    async def _end(self, row: BatchRow, status: str) -> None:
        await self._stop_validation(row.seq)
        await self.sender.call_off(row.seq)
        ids = (f"file-{secrets.token_hex(12)}", f"file-{secrets.token_hex(12)}")
        left = await self._store.write(
            batch_rows.end, row.seq, status, time.time(), *ids, _ENDS[status]
        )
        self._forget(row)
        self._metrics.line(status, left)
        log.info("batch %s is %s", row.id, status)
        self._wake()

    def _forget(self, row: BatchRow) -> None:
        self._rows.pop(row.seq, None)
        self._read_to.pop(row.seq, None)
        self._failures.pop(row.seq, None)
        for key in [key for key in self._lines if key[0] == row.seq]:
            del self._lines[key]

    # -------------------------------------------------------------------------------- validation

    def _validate_next(self, rows: list[BatchRow]) -> None:
        """One file at a time, beside the lines that are being sent; tenants take turns, and within
        one those that failed go last."""
        rows = [row for row in rows if row.seq in self._rows]  # the others have just ended
        if self._validation is None and rows:
            tenant = self._validated.next(row.tenant for row in rows)
            mine = (row for row in rows if row.tenant == tenant)
            row = min(mine, key=lambda row: (self._failures[row.seq], row.seq))
            task = asyncio.get_running_loop().create_task(self._validate(row))
            self._validation = (row.seq, task)

    async def _validate(self, row: BatchRow) -> None:
        try:
            await validate(self._store, row, self._max_line_bytes)
        except StoreError:
            await asyncio.sleep(1.0)  # and then again
        except Exception:
            log.exception("batch %s cannot be validated", row.id)
            await self._failed(row)
        finally:
            self._validation = None
            self._wake()

    async def _failed(self, row: BatchRow) -> None:
        """Count a validation that failed for no known reason; after a few, refuse the batch."""
        self._failures[row.seq] += 1
        await asyncio.sleep(1.0)
        if self._failures[row.seq] < _TRIES:
            return
        message = f"the router failed {_TRIES} times at reading the file; its log has more"
        problem = Problem("internal_error", message).shown()
        with contextlib.suppress(StoreError):  # then it is tried once more
            await self._store.write(batch_rows.refuse, row.seq, [problem], time.time())
            del self._failures[row.seq]

    async def _stop_validation(self, batch: int | None = None) -> None:
        """Of this batch, or of whichever it is."""
        if self._validation is not None and batch in (None, self._validation[0]):
            task = self._validation[1]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._validation = None  # it may not have begun
