"""LoRA adapters as part of a model's spec: what an engine must be started with for them. Pure.

Rules this file keeps:
- which adapters there are restarts nothing; only room for them does: whether there are any, and the
  highest rank, rounded up to what vLLM offers;
- what the spec says itself wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from runtime.wire.model_spec import ModelSpec

RANKS = (16, 32, 64, 128, 256, 320, 512)  # vLLM's, from its default on
MAX_LORAS = 4  # adapters that one batch may mix, each in a slot of device memory


def flat_name(key: str) -> str:
    """One spelling of an engine argument: `--max-lora-rank` is `max_lora_rank`."""
    return key.lstrip("-").replace("-", "_")


def room_for(rank: int) -> int | None:
    """The `max_lora_rank` that adapters of up to `rank` need; None where vLLM has none."""
    return next((room for room in RANKS if room >= rank), None)


def with_lora_args(spec: ModelSpec, rank: int) -> ModelSpec:
    """`spec` with the engine arguments that adapters of up to `rank` need, if it has any."""
    if not spec.adapters:
        return spec
    given = {flat_name(key) for key in spec.engine_args}
    wanted: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": MAX_LORAS,
        "max_lora_rank": room_for(rank) or RANKS[-1],
    }
    missing = {key: value for key, value in wanted.items() if key not in given}
    return replace(spec, engine_args={**spec.engine_args, **missing})


def takes_adapters(engine_args: Mapping[str, Any]) -> bool:
    """Whether an engine started with these arguments can be given adapters."""
    return any(flat_name(key) == "enable_lora" and value for key, value in engine_args.items())
