"""Which engine a spec means."""

from __future__ import annotations

from runtime.engine.contract import Engine


def get_engine(name: str) -> Engine:
    """The engine of that name ("vllm" or "stub"). Raises ValueError for another."""
    # Imported on demand: who has one need not have what the other needs.
    if name == "vllm":
        from runtime.engine.vllm.engine import VllmEngine

        return VllmEngine()
    if name == "stub":
        from runtime.engine.stub.engine import StubEngine

        return StubEngine()
    raise ValueError(f"there is no engine {name!r}; choose vllm or stub")
