"""The models of a simulated cluster: sizes for names that come without any. Pure.

A size is a number of parameters in bfloat16; what it books is the rule of
runtime/engine/vllm/memory_estimate.py with a typical KV cache: weights + 5 % + 2 GiB a device +
(2 GiB + 0.25 GiB per 10^9 parameters).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from runtime.sim.profile import ModelFacts
from runtime.sizes import GIB
from runtime.wire.agent_messages import MemoryEstimate
from runtime.wire.model_spec import ModelSpec
from scheduler.state.messages import StoredModel

# Billions of parameters and the share of models: a mix of small ones, an assumption.
MIX = ((0.5, 0.1), (1.5, 0.2), (3.0, 0.2), (8.0, 0.35), (14.0, 0.1), (32.0, 0.05))


def sized(name: str, billions: float, tensor_parallel: int = 1, **spec: object) -> StoredModel:
    """A model of that size; `spec`: further fields of ModelSpec."""
    weights = int(2e9 * billions)
    kv = int((2 + 0.25 * billions) * GIB)
    overhead = 2 * GIB * tensor_parallel + weights // 20
    total = weights + kv + overhead
    estimate = MemoryEstimate(
        weights_bytes=weights, kv_bytes=kv, overhead_bytes=overhead, total_bytes=total,
        explanation=f"{billions:g}e9 parameters in bfloat16 (simulated)",
    )  # fmt: skip
    fields: dict[str, object] = {
        "name": name, "source": f"hf:sim/{name}", "tensor_parallel_size": tensor_parallel,
    }  # fmt: skip
    return StoredModel(spec=ModelSpec(**(fields | spec)), estimate=estimate)  # type: ignore[arg-type]


def drawn(names: Iterable[str], random: Random, **spec: object) -> list[StoredModel]:
    """A model for each name, its size drawn from MIX."""
    sizes = [size for size, _ in MIX]
    shares = [share for _, share in MIX]
    return [sized(name, random.choices(sizes, shares)[0], **spec) for name in names]  # type: ignore[arg-type]


def facts(
    models: Sequence[StoredModel], architectures: Sequence[str] = ()
) -> dict[str, ModelFacts]:
    """What the timings need, from the estimates. `architectures`: by model; (): each its own."""
    named = architectures or [""] * len(models)
    return {
        stored.spec.name: ModelFacts(stored.estimate.weights_bytes, architecture=architecture)
        for stored, architecture in zip(models, named, strict=True)
        if stored.estimate is not None
    }
