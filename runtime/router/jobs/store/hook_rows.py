"""Webhooks that are to be delivered, in the store.

Rule this file keeps: a webhook is written with the event it tells of, in one transaction.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from runtime.router.jobs.store.tenants import oldest_of_each


@dataclass(frozen=True, slots=True)
class HookRow:
    """One delivery: `id` is the same for every attempt, so that its receiver can tell."""

    id: str
    url: str
    body: bytes
    tenant: str


def insert(db: sqlite3.Connection, tenant: str, url: str, event: tuple[str, bytes]) -> None:
    """`event`: its id and its body, of something that is the tenant's."""
    query = "INSERT INTO hooks (id, url, body, tenant) VALUES (?, ?, ?, ?)"
    db.execute(query, (event[0], url, event[1], tenant))


def due(db: sqlite3.Connection, limit: int) -> list[HookRow]:
    """What is not delivered yet: at most `limit` of each tenant, its oldest first."""
    found = oldest_of_each(db, "hooks", "id, url, body, tenant", limit, "TRUE")
    return [HookRow(*row) for row in found]


def delete(db: sqlite3.Connection, hook_id: str) -> None:
    """Remove a webhook that was delivered or given up on."""
    db.execute("DELETE FROM hooks WHERE id = ?", (hook_id,))
