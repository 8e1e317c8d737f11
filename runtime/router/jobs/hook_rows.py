"""Webhooks that are to be delivered, in the store.

Rule this file keeps: a webhook is written with the event it tells of, in one transaction.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HookRow:
    """One delivery: `id` is the same for every attempt, so that its receiver can tell."""

    id: str
    url: str
    body: bytes


def insert(db: sqlite3.Connection, url: str, event: tuple[str, bytes]) -> None:
    """`event`: its id and its body."""
    db.execute("INSERT INTO hooks VALUES (?, ?, ?)", (event[0], url, event[1]))


def due(db: sqlite3.Connection, limit: int) -> list[HookRow]:
    """What is not delivered yet, the oldest first."""
    found = db.execute("SELECT id, url, body FROM hooks ORDER BY rowid LIMIT ?", (limit,))
    return [HookRow(*row) for row in found]


def delete(db: sqlite3.Connection, hook_id: str) -> None:
    """It was delivered, or given up on."""
    db.execute("DELETE FROM hooks WHERE id = ?", (hook_id,))
