"""How full an engine is, read from its own metrics.

Rules this file keeps: only the lines that are asked for are parsed, since vLLM exports thousands.
"""

from __future__ import annotations

from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

_KV_USAGE = "vllm:kv_cache_usage_perc"  # 0 to 1, despite its name
_WAITING = "vllm:num_requests_waiting"


class EngineLoad(Struct, frozen=True, kw_only=True):
    """None: it does not say."""

    kv_cache_usage: float | None = None  # 0 to 1; the fullest of its engine cores
    waiting: int | None = None  # requests, of all engine cores

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and no KV cache is in use."""
        return not self.kv_cache_usage and not self.waiting


def read_load(text: str) -> EngineLoad:
    """From the exposition text of an engine. Raises ValueError where it is invalid."""
    lines = [line for line in text.splitlines() if line.startswith((_KV_USAGE, _WAITING))]
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            values.setdefault(sample.name, []).append(sample.value)
    usage, waiting = values.get(_KV_USAGE), values.get(_WAITING)
    return EngineLoad(
        kv_cache_usage=min(1.0, max(0.0, *usage)) if usage else None,
        waiting=int(sum(waiting)) if waiting else None,
    )
