"""Where the scheduler keeps what has to outlive it: the registry, below the cluster's prefix."""

from __future__ import annotations

from runtime import places
from runtime.registry.protocol import Registry


class Store:
    """`registry` may be asked for anything that `key` names."""

    def __init__(self, registry: Registry, prefix: str) -> None:
        self.registry = registry
        self.prefix = prefix

    def key(self, *parts: str) -> str:
        """The full key of what these parts name, such as `models`, `llama`."""
        return places.key(self.prefix, *parts)
