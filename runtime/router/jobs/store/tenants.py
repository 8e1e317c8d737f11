"""Whose a row of the store is, and the window that each tenant has of a queue in it.

Rules this file keeps:
- a queue is read by `oldest_of_each` alone: so many of each tenant, the oldest first, so that no
  length of one tenant's queue keeps another's work from being seen;
- what a key with a scope of its own may see is what that key made itself; a key without one sees
  all that is its tenant's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any, NamedTuple


class Owner(NamedTuple):
    """Whose rows are asked for: a tenant's, or only those that one of its keys made."""

    tenant: str
    key_id: str | None = None

    def sees(self, tenant: str, key_id: str | None) -> bool:
        """Whether a row that `key_id` of `tenant` made is one of them."""
        return tenant == self.tenant and self.key_id in (None, key_id)


def oldest_of_each(
    db: sqlite3.Connection, table: str, columns: str, count: int, only: str = "ended_at IS NULL"
) -> list[tuple[Any, ...]]:
    """The `count` oldest rows of each tenant, of those for which `only` holds.

    Each tenant costs a look-up in the index on (tenant) or (tenant, seq) and its own rows, however
    many the others have.
    """
    found: list[tuple[Any, ...]] = []
    tenant = ""
    while True:
        query = f"SELECT min(tenant) FROM {table} WHERE ({only}) AND tenant > ?"
        if (after := db.execute(query, (tenant,)).fetchone()[0]) is None:
            return found
        tenant = after
        query = (
            f"SELECT {columns} FROM {table} WHERE ({only}) AND tenant = ? ORDER BY rowid LIMIT ?"
        )
        found += db.execute(query, (tenant, count)).fetchall()


class Turns:
    """Whose turn it is, of tenants of whom only one is served at a time."""

    def __init__(self) -> None:
        self._last = ""

    def next(self, tenants: Iterable[str]) -> str | None:
        """The tenant that follows the one served last, in a circle; None: there is none."""
        waiting = sorted(set(tenants))
        if not waiting:
            return None
        self._last = next((tenant for tenant in waiting if tenant > self._last), waiting[0])
        return self._last
