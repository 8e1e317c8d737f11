"""Batches and their lines in the store.

Rules this file keeps:
- a line gets its result once: whoever comes second changes nothing, counts included;
- a batch ends once, and with its end every line has a result and both output files are there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

import msgspec

from runtime.router.jobs.store import file_rows, hook_rows, shapes
from runtime.router.jobs.store.file_rows import ERROR, OK
from runtime.router.jobs.store.rows import BatchRow, FileRow, LineRow
from runtime.router.jobs.store.tenants import Owner, oldest_of_each

PER_TENANT = 4  # batches of one tenant that are worked on at a time, the oldest first

_COLUMNS = (
    "seq, id, tenant, key_id, endpoint, input, input_id, metadata, created_at, expires_at, keep_s,"
    " webhook, status, stamps, errors, total, completed, failed, output_id, error_id"
)


def insert(
    db: sqlite3.Connection, batch_id: str, tenant: str, key_id: str | None, endpoint: str,
    file: FileRow, metadata: dict[str, str] | None, now: float, window_s: float,
    keep_s: float, webhook: str | None,
) -> BatchRow | None:  # fmt: skip
    """A batch that waits for its validation; None where its file was deleted meanwhile."""
    if file_rows.get(db, Owner(tenant), file.id) is None:
        return None
    made = db.execute(
        "INSERT INTO batches (id, tenant, key_id, endpoint, input, input_id, metadata, created_at,"
        " expires_at, keep_s, webhook, status)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'validating')",
        (
            batch_id, tenant, key_id, endpoint, file.seq, file.id, _text(metadata), now,
            now + window_s, keep_s, webhook,
        ),
    )  # fmt: skip
    assert made.lastrowid is not None
    return by_seq(db, made.lastrowid)


def get(db: sqlite3.Connection, owner: Owner, batch_id: str) -> BatchRow | None:
    """The owner's batch of that id."""
    found = db.execute(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch_id,)).fetchone()
    row = _row(found) if found else None
    return row if row is not None and owner.sees(row.tenant, row.key_id) else None


def by_seq(db: sqlite3.Connection, batch: int) -> BatchRow:
    """The batch, which must be there."""
    return _row(db.execute(f"SELECT {_COLUMNS} FROM batches WHERE seq = ?", (batch,)).fetchone())


def page(db: sqlite3.Connection, owner: Owner, after: int | None, limit: int) -> list[BatchRow]:
    """At most `limit` batches older than the one whose seq is `after`, the newest first."""
    query = (
        f"SELECT {_COLUMNS} FROM batches WHERE tenant = :tenant"
        " AND (:key IS NULL OR key_id = :key)"
        " AND (:after IS NULL OR seq < :after) ORDER BY seq DESC LIMIT :limit"
    )
    asked = {"tenant": owner.tenant, "key": owner.key_id, "after": after, "limit": limit}
    return [_row(row) for row in db.execute(query, asked)]


def unfinished(db: sqlite3.Connection, now: float) -> list[BatchRow]:
    """The PER_TENANT oldest of each tenant, and all that are to end now."""
    query = (
        f"SELECT {_COLUMNS} FROM batches WHERE ended_at IS NULL"
        " AND (status = 'cancelling' OR expires_at <= ?)"
    )
    found = oldest_of_each(db, "batches", _COLUMNS, PER_TENANT)
    rows = {row[0]: row for row in (*found, *db.execute(query, (now,)))}
    return [_row(rows[seq]) for seq in sorted(rows)]


def waiting(db: sqlite3.Connection, tenant: str) -> int:
    """How many of the tenant's batches have not ended."""
    query = "SELECT count(*) FROM batches WHERE ended_at IS NULL AND tenant = ?"
    return int(db.execute(query, (tenant,)).fetchone()[0])


# ------------------------------------------------------------------------------------ validation


def begin_lines(db: sqlite3.Connection, batch: int) -> None:
    """Forget the lines of a validation that was broken off."""
    db.execute("DELETE FROM lines WHERE batch = ?", (batch,))


def add_lines(db: sqlite3.Connection, batch: int, lines: Iterable[LineRow]) -> None:
    """Lines that are in order."""
    db.executemany(
        "INSERT INTO lines (batch, line, custom_id, model, start, size_bytes)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        ((batch, *line) for line in lines),
    )


def validated(db: sqlite3.Connection, batch: int, total: int, now: float) -> None:
    """All lines are there: they may be sent, unless it was cancelled meanwhile."""
    db.execute("UPDATE batches SET total = ? WHERE seq = ?", (total, batch))
    _enter(db, batch, "in_progress", now, only="validating")


def refuse(db: sqlite3.Connection, batch: int, errors: list[dict[str, Any]], now: float) -> None:
    """End a batch whose file is wrong: no line is sent."""
    db.execute("UPDATE batches SET errors = ? WHERE seq = ?", (_text(errors), batch))
    begin_lines(db, batch)
    if _enter(db, batch, "failed", now, only="validating"):
        _over(db, batch, now)


# ------------------------------------------------------------------------------------ its lines


def pending(db: sqlite3.Connection, batch: int, after: int, limit: int) -> list[LineRow]:
    """The next lines after line `after` that have no result."""
    query = (
        "SELECT line, custom_id, model, start, size_bytes FROM lines"
        " WHERE batch = ? AND outcome = 0 AND line > ? ORDER BY line LIMIT ?"
    )
    return [LineRow(*row) for row in db.execute(query, (batch, after, limit))]


def finish_line(db: sqlite3.Connection, batch: int, line: int, outcome: int, result: bytes) -> bool:
    """A line's result; False where it has one already."""
    done = db.execute(
        "UPDATE lines SET outcome = ?, result = ? WHERE batch = ? AND line = ? AND outcome = 0",
        (outcome, result, batch, line),
    )
    if not done.rowcount:
        return False
    column = "completed" if outcome == OK else "failed"
    db.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE seq = ?", (batch,))
    return True


# ------------------------------------------------------------------------------------ its end


def cancel(db: sqlite3.Connection, owner: Owner, batch_id: str, now: float) -> BatchRow | None:
    """Ask for its end; the batch as it is then."""
    row = get(db, owner, batch_id)
    if row is not None and row.status in ("validating", "in_progress"):
        _enter(db, row.seq, "cancelling", now, only=row.status)
    return get(db, owner, batch_id)


def end(
    db: sqlite3.Connection, batch: int, status: str, now: float, output_id: str, error_id: str,
    why: str,
) -> int:  # fmt: skip
    """End a batch as `status`; lines without a result get `why`. Returns how many these were."""
    row = by_seq(db, batch)
    if "in_progress" not in row.stamps:
        begin_lines(db, batch)  # a validation that was broken off
    left = db.execute(
        "UPDATE lines SET outcome = ?, result = CAST(json_object('id', ? || '_' || line,"
        " 'custom_id', custom_id, 'response', NULL, 'error', json_object('code', ?,"
        " 'message', ?)) AS BLOB) WHERE batch = ? AND outcome = 0",
        (ERROR, row.id.replace("batch_", "batch_req_"), f"batch_{status}", why, batch),
    ).rowcount
    if row.status != "cancelling":
        _enter(db, batch, "finalizing", now, only=row.status)
    until = now + row.keep_s
    owner = Owner(row.tenant, row.key_id)
    output = file_rows.add_output(db, output_id, owner, batch, OK, now, until)
    errors = file_rows.add_output(db, error_id, owner, batch, ERROR, now, until)
    db.execute(
        "UPDATE batches SET output_id = ?, error_id = ?, failed = failed + ? WHERE seq = ?",
        (output, errors, left, batch),
    )
    _enter(db, batch, status, now)
    _over(db, batch, now)
    return left


def expired(db: sqlite3.Connection, now: float) -> list[int]:
    """Finished batches that are kept no longer."""
    query = "SELECT seq FROM batches WHERE ended_at + keep_s < ?"
    return [row[0] for row in db.execute(query, (now,))]


def delete(db: sqlite3.Connection, batch: int) -> None:
    """The batch, its lines and what they gave."""
    db.execute("DELETE FROM lines WHERE batch = ?", (batch,))
    db.execute("DELETE FROM files WHERE batch = ?", (batch,))
    db.execute("DELETE FROM batches WHERE seq = ?", (batch,))


def _over(db: sqlite3.Connection, batch: int, now: float) -> None:
    db.execute("UPDATE batches SET ended_at = ? WHERE seq = ?", (now, batch))
    row = by_seq(db, batch)
    if row.webhook is not None:
        event = shapes.event(f"batch.{row.status}", row.id, shapes.batch_object(row), now)
        hook_rows.insert(db, row.tenant, row.webhook, event)


def _enter(
    db: sqlite3.Connection, batch: int, status: str, now: float, only: str | None = None
) -> bool:
    """Change its status (if it is `only`), and note when."""
    changed = db.execute(
        "UPDATE batches SET status = ?, stamps = json_set(stamps, '$.' || ?, ?)"
        " WHERE seq = ? AND (? IS NULL OR status = ?)",
        (status, status, now, batch, only, only),
    )
    return bool(changed.rowcount)


def _text(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _row(row: tuple[Any, ...]) -> BatchRow:
    values = dict(zip(BatchRow.__slots__, row, strict=True))
    for name in ("metadata", "stamps", "errors"):
        text = values[name]
        values[name] = None if text is None else msgspec.json.decode(text)
    return BatchRow(**values)
