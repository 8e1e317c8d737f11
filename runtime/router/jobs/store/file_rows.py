"""Files in the store: uploads in chunks, and outputs that are read from their batch's lines.

Rule this file keeps: a file is there for its tenant only, and only once it is whole.
"""

from __future__ import annotations

import sqlite3

from runtime.router.jobs.store.rows import FileRow
from runtime.router.jobs.store.tenants import Owner

CHUNK_BYTES = 64 * 1024
_PAGE = 200  # output lines read at once

OK, ERROR = 1, 2  # outcomes of a line; 0: it has none yet

_COLUMNS = (
    "seq, id, tenant, filename, purpose, size_bytes, created_at, expires_at, batch, outcome, key_id"
)


def begin(db: sqlite3.Connection, file_id: str, owner: Owner, now: float) -> int:
    """A file that is still coming in; returns its `seq`."""
    made = db.execute(
        "INSERT INTO files (id, tenant, filename, purpose, size_bytes, created_at, expires_at,"
        " whole, key_id) VALUES (?, ?, '', '', 0, ?, ?, 0, ?)",
        (file_id, owner.tenant, now, now, owner.key_id),
    )
    assert made.lastrowid is not None
    return made.lastrowid


def add_chunks(db: sqlite3.Connection, file: int, number: int, data: bytes) -> int:
    """Append `data` as chunks from `number` on, all but the last whole; returns the next number."""
    for start in range(0, len(data), CHUNK_BYTES):
        piece = data[start : start + CHUNK_BYTES]
        db.execute("INSERT INTO chunks VALUES (?, ?, ?)", (file, number, piece))
        number += 1
    return number


def end(
    db: sqlite3.Connection, file: int, filename: str, purpose: str, size: int, until: float
) -> FileRow:
    """The upload is whole."""
    db.execute(
        "UPDATE files SET filename = ?, purpose = ?, size_bytes = ?, expires_at = ?, whole = 1"
        " WHERE seq = ?",
        (filename, purpose, size, until, file),
    )
    return _one(db, "seq = ?", file)


def add_output(
    db: sqlite3.Connection, file_id: str, owner: Owner, batch: int, outcome: int, now: float,
    until: float,
) -> str | None:  # fmt: skip
    """The file of a batch's lines with this outcome; None where there is no such line."""
    count, size = db.execute(
        "SELECT count(*), sum(length(result) + 1) FROM lines WHERE batch = ? AND outcome = ?",
        (batch, outcome),
    ).fetchone()
    if not count:
        return None
    name = f"{file_id}_{'output' if outcome == OK else 'error'}.jsonl"
    db.execute(
        "INSERT INTO files (id, tenant, filename, purpose, size_bytes, created_at, expires_at,"
        " batch, outcome, whole, key_id) VALUES (?, ?, ?, 'batch_output', ?, ?, ?, ?, ?, 1, ?)",
        (file_id, owner.tenant, name, size, now, until, batch, outcome, owner.key_id),
    )
    return file_id


def get(db: sqlite3.Connection, owner: Owner, file_id: str) -> FileRow | None:
    """The owner's file of that id."""
    query = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND whole"
    found = db.execute(query, (file_id,)).fetchone()
    row = FileRow(*found) if found else None
    return row if row is not None and owner.sees(row.tenant, row.key_id) else None


def page(
    db: sqlite3.Connection, owner: Owner, purpose: str | None, after: int | None, limit: int,
    descending: bool,
) -> list[FileRow]:  # fmt: skip
    """At most `limit` files after the one whose seq is `after`."""
    side, order = ("<", "DESC") if descending else (">", "ASC")
    query = (
        f"SELECT {_COLUMNS} FROM files WHERE tenant = :tenant AND whole"
        " AND (:key IS NULL OR key_id = :key)"
        " AND (:purpose IS NULL OR purpose = :purpose)"
        f" AND (:after IS NULL OR seq {side} :after) ORDER BY seq {order} LIMIT :limit"
    )
    asked = {
        "tenant": owner.tenant, "key": owner.key_id, "purpose": purpose, "after": after,
        "limit": limit,
    }  # fmt: skip
    return [FileRow(*row) for row in db.execute(query, asked)]


def content(db: sqlite3.Connection, file: FileRow, position: int) -> tuple[bytes, int | None]:
    """A piece of the content, and the position of the next; 0 is the first, None is after the end.

    It ends early where the file was deleted meanwhile.
    """
    if file.batch is None:
        query = "SELECT data FROM chunks WHERE file = ? AND number = ?"
        row = db.execute(query, (file.seq, position)).fetchone()
        return (row[0], position + 1) if row else (b"", None)
    rows, size = [], 0
    for line, result in db.execute(
        "SELECT line, result FROM lines WHERE batch = ? AND outcome = ? AND line > ?"
        " ORDER BY line LIMIT ?",
        (file.batch, file.outcome, position, _PAGE),
    ):
        rows.append(result + b"\n")
        size += len(result)
        position = line
        if size > CHUNK_BYTES:
            break
    return b"".join(rows), (position if rows else None)


def part(db: sqlite3.Connection, file: int, start: int, size: int) -> bytes:
    """`size` bytes of an upload from `start` on."""
    first, last = start // CHUNK_BYTES, (start + size - 1) // CHUNK_BYTES
    rows = db.execute(
        "SELECT data FROM chunks WHERE file = ? AND number BETWEEN ? AND ? ORDER BY number",
        (file, first, last),
    )
    data = b"".join(row[0] for row in rows)
    begin_at = start - first * CHUNK_BYTES
    return data[begin_at : begin_at + size]


def delete_unused(db: sqlite3.Connection, file: FileRow) -> str | None:
    """Delete the file, unless an unfinished batch reads it: the id of that is returned."""
    query = "SELECT id FROM batches WHERE input = ? AND ended_at IS NULL"
    row = db.execute(query, (file.seq,)).fetchone()
    if row is None:
        delete(db, file.seq)
        return None
    batch: str = row[0]
    return batch


def delete(db: sqlite3.Connection, file: int) -> None:
    """The file and its content."""
    row = db.execute("SELECT batch, outcome FROM files WHERE seq = ?", (file,)).fetchone()
    if row and row[0] is not None:
        db.execute("DELETE FROM lines WHERE batch = ? AND outcome = ?", row)
    db.execute("DELETE FROM chunks WHERE file = ?", (file,))
    db.execute("DELETE FROM files WHERE seq = ?", (file,))


def expired(db: sqlite3.Connection, now: float, upload_s: float) -> list[int]:
    """Files whose time is over and that no unfinished batch reads, and uploads given up on."""
    query = (
        "SELECT seq FROM files WHERE iif(whole, expires_at < :now, created_at < :now - :upload)"
        " AND seq NOT IN (SELECT input FROM batches WHERE ended_at IS NULL)"
    )
    return [row[0] for row in db.execute(query, {"now": now, "upload": upload_s})]


def _one(db: sqlite3.Connection, where: str, value: object) -> FileRow:
    return FileRow(*db.execute(f"SELECT {_COLUMNS} FROM files WHERE {where}", (value,)).fetchone())
