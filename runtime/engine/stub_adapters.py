"""The stub's LoRA adapters, modelled on vLLM's with its traps.

Rules this file keeps:
- one is loaded when a request first names it, and stays so until it is unloaded;
- a level-2 sleep drops what was loaded, and nothing says so: it answers nonsense until it is
  unloaded and loaded again.
"""

from __future__ import annotations

from runtime.engine.adapter_index import Index


class StubAdapters:
    """What is loaded, by name, and where it came from. No `index`: the engine takes none."""

    def __init__(self, index: Index | None) -> None:
        self._index = index
        self.loaded: dict[str, str] = {}
        self.lost: set[str] = set()

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
        self.lost.discard(name)
        return self.loaded.pop(name, None) is not None

    def drop_weights(self) -> None:
        """The engine slept at level 2."""
        self.lost = set(self.loaded)
