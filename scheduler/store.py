"""Where the scheduler keeps what has to outlive it: the registry, below the cluster's prefix.

Rule this file keeps: a part of a key is a name, never a path (runtime/places.py sees to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from runtime import places
from runtime.registry.protocol import Entry, Registry


class Store:
    """Reads and writes below the prefix. Every method but `key` may raise RegistryError."""

    def __init__(self, registry: Registry, prefix: str) -> None:
        self.registry = registry
        self.prefix = prefix

    def key(self, *parts: str) -> str:
        """The full key of what these parts name, such as `models`, `llama`."""
        return places.key(self.prefix, *parts)

    async def below(self, *folder: str) -> Sequence[Entry]:
        """The entries of a folder, such as `models`, by key."""
        entries, _ = await self.registry.list(self.key(*folder) + "/")
        return entries

    async def put(self, value: Any, *parts: str) -> None:
        """Write a struct, or what JSON has."""
        await self.registry.put(self.key(*parts), msgspec.json.encode(value))

    async def delete(self, *parts: str) -> None:
        """Remove an entry; a missing one is success."""
        await self.registry.delete(self.key(*parts))


def name_of(entry: Entry) -> str:
    """The last part of an entry's key."""
    return entry.key.rsplit("/", 1)[1]
