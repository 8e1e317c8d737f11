"""Reads a new batch's file, once, and notes where its lines lie or what is wrong with them.

Rules this file keeps:
- a file is read piece by piece; no more than a line of it is held;
- a batch whose lines find no room in its tenant's share is refused: they are taken in here, so who
  makes many batches of one file gains nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator

from runtime.router.jobs.lines import Check, Problem, Splitter
from runtime.router.jobs.store import batch_rows, file_rows
from runtime.router.jobs.store.database import JobStore, ShareFull
from runtime.router.jobs.store.rows import BatchRow, LineRow

log = logging.getLogger("stoker.router.jobs")

_INSERTED = 200  # lines checked and written at a time: a few milliseconds


async def validate(store: JobStore, row: BatchRow, max_line_bytes: int) -> None:
    """`row` is in progress or has failed after this; from the beginning if it was broken off.

    Raises StoreError.
    """
    check = Check(row.endpoint, max_line_bytes)
    await store.write(batch_rows.begin_lines, row.seq)
    try:
        await _read(store, row, check, max_line_bytes)
        check.end()
    except ShareFull as error:
        check.problems.append(Problem(str(error.code), error.message))
    if check.problems:
        errors = [problem.shown() for problem in check.problems]
        await store.write(batch_rows.refuse, row.seq, errors, time.time())
        log.info("batch %s has failed: its file has errors", row.id)
    else:
        await store.write(batch_rows.validated, row.seq, check.count, time.time())


async def _read(store: JobStore, row: BatchRow, check: Check, max_line_bytes: int) -> None:
    good: list[LineRow] = []
    async for number, start, text in _lines(store, row, max_line_bytes):
        if text is None:
            check.too_long(number)
        elif (line := check.line(number, text)) is not None:
            good.append(LineRow(number, line.custom_id, line.model, start, len(text)))
        if check.given_up:
            return
        if len(good) == _INSERTED:
            await _take_in(store, row, good)
            good = []
    await _take_in(store, row, good)


async def _take_in(store: JobStore, row: BatchRow, good: list[LineRow]) -> None:
    """Raises ShareFull."""
    await store.write_within(row.tenant, 0, batch_rows.add_lines, row.seq, good)


async def _lines(
    store: JobStore, row: BatchRow, max_line_bytes: int
) -> AsyncIterator[tuple[int, int, bytes | None]]:
    splitter, start = Splitter(max_line_bytes), 0
    while data := await store.read(file_rows.part, row.input, start, file_rows.CHUNK_BYTES):
        start += len(data)
        for line in splitter.feed(data):
            yield line
    for line in splitter.end():
        yield line
