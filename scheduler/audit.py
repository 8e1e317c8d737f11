"""The audit trail: who changed what, when and why, kept in the registry.

Rules this file keeps:
- an entry follows its change: what is not in the trail was not done, but for a change whose
  entry the registry has not taken yet, which is tried again with the next one and each tick;
- at most KEPT entries are stored; the oldest go first; numbers are never used twice.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from runtime.outside import decode
from runtime.registry.protocol import RegistryError
from scheduler.store import Store

log = logging.getLogger("stoker.scheduler")

KEPT = 500


class AuditEntry(Struct, frozen=True, kw_only=True):
    """One change. It is stored as it is shown."""

    number: int
    at: str  # ISO 8601, UTC
    who: str  # a token's name, "cluster" for the cluster's own; "canary", "switch": the scheduler
    action: str  # put | remove | switch | switched | switch_failed | step | promote | rollback
    subject: str  # e.g. "route llama"
    reason: str
    old: dict[str, Any] | None = None  # None: there was none
    new: dict[str, Any] | None = None  # None: it is gone


class AuditTrail:
    """The last KEPT entries, oldest first. Its callers take turns (`RuleBook.lock`)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.entries: deque[AuditEntry] = deque()
        self._unsaved: deque[AuditEntry] = deque()
        self._next = 1

    async def load(self) -> None:
        """What is stored. Raises RegistryError."""
        found = []
        for entry in await self._store.below("audit"):
            with contextlib.suppress(ValueError):  # another version of Stoker wrote it
                found.append(decode(entry.value, AuditEntry))
        self.entries = deque(sorted(found, key=lambda e: e.number))
        self._unsaved.clear()
        self._next = max((e.number for e in found), default=0) + 1

    async def note(
        self, who: str, action: str, subject: str, reason: str, old: Any = None, new: Any = None
    ) -> None:
        """Add an entry; `old` and `new` are structs, or None."""
        at = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        entry = AuditEntry(
            number=self._next, at=at, who=who, action=action, subject=subject, reason=reason,
            old=msgspec.to_builtins(old), new=msgspec.to_builtins(new),
        )  # fmt: skip
        self._next += 1
        self.entries.append(entry)
        self._unsaved.append(entry)
        log.info("%s %s by %s: %s", action, subject, who, reason)
        await self.save()

    async def save(self) -> None:
        """Store what is not stored yet, and let go of what is too old."""
        try:
            while self._unsaved:
                await self._store.put(self._unsaved[0], "audit", _name(self._unsaved[0]))
                self._unsaved.popleft()
            while len(self.entries) > KEPT:
                await self._store.delete("audit", _name(self.entries[0]))
                self.entries.popleft()
        except RegistryError as error:
            log.warning("the audit trail is not saved yet: %s", error)


def _name(entry: AuditEntry) -> str:
    return f"{entry.number:012d}"
