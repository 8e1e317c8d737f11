"""The stub's LoRA adapters: names with a label, loaded as vLLM does it.

Rules this file keeps: one is loaded when a request first names it, and stays listed until it is
unloaded, as in vLLM; that vLLM moves the weights of those in and out of its slots is not modelled.
"""

from __future__ import annotations

from runtime.engine.adapter_index import Index


class StubAdapters:
    """What is loaded, by name, and where it came from. No `index`: the engine takes none."""

    def __init__(self, index: Index | None) -> None:
        self._index = index
        self.loaded: dict[str, str] = {}

    async def load(self, name: str) -> bool:
        """False where there is no such adapter. Raises NotYet."""
        if name in self.loaded:
            return True
        folder = await self._index.find(name) if self._index else None
        if folder is not None:
            self.loaded[name] = folder
        return folder is not None

    def unload(self, name: str) -> bool:
        """Whether it was loaded."""
        return self.loaded.pop(name, None) is not None
