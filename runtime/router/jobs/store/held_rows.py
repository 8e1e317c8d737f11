"""How many bytes of the store are each tenant's.

Rule this file keeps: the database counts them itself, by triggers, in the transaction that changes
a row; so no way of writing one forgets it, nor does another release that has the file open.
"""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

_ROW_BYTES = 256  # of any row beside its contents: numbers, ids, its places in the indexes


class _Counted(NamedTuple):
    """What the rows of one table hold (`{row}`: NEW or OLD), whose they are, what changes later."""

    size: str
    tenant: str = "{row}.tenant"
    columns: str = ""


def _text(column: str) -> str:
    """The bytes of a column: SQLite's `length` of a TEXT counts up to the first NUL."""
    return f"ifnull(length(CAST({{row}}.{column} AS BLOB)), 0)"


_COUNTED = {
    "files": _Counted("0"),
    "chunks": _Counted("length({row}.data)", "(SELECT tenant FROM files WHERE seq = {row}.file)"),
    "batches": _Counted(f"{_text('metadata')} + {_text('errors')}", columns="errors"),
    "lines": _Counted(
        f"{_text('custom_id')} + {_text('model')} + ifnull(length({{row}}.result), 0)",
        "(SELECT tenant FROM batches WHERE seq = {row}.batch)",
        "result",
    ),
    "jobs": _Counted(
        "ifnull(length({row}.body), 0) + ifnull(length({row}.answer), 0)", columns="body, answer"
    ),
    "hooks": _Counted("length({row}.body)"),
}


def prepare(db: sqlite3.Connection) -> None:
    """Begin to count, with what is there; once in a file's life."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'held'").fetchone():
        return
    db.execute(
        "CREATE TABLE held (tenant TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL) WITHOUT ROWID"
    )
    for table, counted in _COUNTED.items():
        for statement in _statements(table, counted):
            db.execute(statement)


def of(db: sqlite3.Connection, tenant: str) -> int:
    """What the tenant holds."""
    row = db.execute("SELECT size_bytes FROM held WHERE tenant = ?", (tenant,)).fetchone()
    return int(row[0]) if row else 0


def beyond(db: sqlite3.Connection, size_bytes: int) -> frozenset[str]:
    """The tenants that hold so much, or more."""
    found = db.execute("SELECT tenant FROM held WHERE size_bytes >= ?", (size_bytes,))
    return frozenset(row[0] for row in found)


def _statements(table: str, counted: _Counted) -> list[str]:
    """What counts the rows that are there, and from then on every change."""
    new, old, one = (
        (counted.tenant.format(row=row), f"{_ROW_BYTES} + {counted.size}".format(row=row))
        for row in ("NEW", "OLD", table)
    )
    known = "ON CONFLICT (tenant) DO UPDATE SET size_bytes = size_bytes + excluded.size_bytes"
    inserted = (
        f"INSERT INTO held (tenant, size_bytes) SELECT {new[0]}, {new[1]}"
        f" WHERE {new[0]} IS NOT NULL {known}"
    )
    more = f"UPDATE held SET size_bytes = size_bytes + ({new[1]}) WHERE tenant = {new[0]}"
    less = f"UPDATE held SET size_bytes = size_bytes - ({old[1]}) WHERE tenant = {old[0]}"
    made = [
        f"INSERT INTO held (tenant, size_bytes) SELECT tenant, sum(size)"
        f" FROM (SELECT {one[0]} AS tenant, {one[1]} AS size FROM {table})"
        f" WHERE tenant IS NOT NULL GROUP BY tenant {known}",
        f"CREATE TRIGGER held_{table}_more AFTER INSERT ON {table} BEGIN {inserted}; END",
        f"CREATE TRIGGER held_{table}_less AFTER DELETE ON {table} BEGIN {less}; END",
    ]
    if counted.columns:
        changed = f"AFTER UPDATE OF {counted.columns} ON {table}"
        made.append(f"CREATE TRIGGER held_{table}_changed {changed} BEGIN {less}; {more}; END")
    return made
