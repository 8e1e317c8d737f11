"""What an adapter's own files say: its rank, and whether it can be used with a base.

Rules this file keeps:
- an adapter is refused for what its files show, never for the name of the base it was made from:
  that is whatever path its trainer had;
- what can't be compared (a quantized base, names that differ) is left to the engine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtime import outside
from runtime.checkpoints import weight_headers
from runtime.contract.adapters import RANKS, flat_name, room_for
from runtime.engine.vllm import memory_estimate
from runtime.wire.agent_messages import SpecProblem
from runtime.wire.model_spec import ModelSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What vLLM 0.32 refuses in an adapter_config.json (`lora/peft_helper.py`).
_REFUSED = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens",
)  # fmt: skip
_PEFT_PREFIX = "base_model.model."


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's adapter_config.json. Raises ValueError saying why it is not a LoRA adapter."""
    try:
        config = outside.model_json((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG}: it is not a LoRA adapter") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{folder / CONFIG} is of peft_type {kind!r}, not LORA")
    if refused := [name for name in _REFUSED if config.get(name)]:
        raise ValueError(f"{folder / CONFIG} has {refused[0]}, which vLLM does not serve")
    rank_of(config)
    return dict(config)


def rank_of(config: dict[str, Any]) -> int:
    """The highest rank of its modules. Raises ValueError."""
    ranks: list[Any] = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise ValueError(f"its rank `r` is {config.get('r')!r}, not a positive number")
    return int(max(ranks))


def misfit(adapter: Path, base: Path) -> str | None:
    """Why the adapter in one folder can't be one of the model in the other; None: it may be."""
    try:
        if memory_estimate.is_quantized(memory_estimate.read_config(base)):
            return None
        has = weight_headers.shapes(base)
    except ValueError:
        return None  # the base's own checks say it
    if not (adapter / WEIGHTS).is_file():
        return None  # older adapters have a .bin
    alike = {_any_layer(name) for name in has}
    for tensor in weight_headers.read_header(adapter / WEIGHTS):
        module, _, part = tensor.name.removeprefix(_PEFT_PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        wanted = has.get(f"{module}.weight")
        if wanted is None and _any_layer(f"{module}.weight") in alike:
            return f"is for another base: this one has no {module}"
        if wanted is None or len(wanted) != 2 or len(tensor.shape) != 2:
            continue
        side, there, here = (
            ("inputs", wanted[1], tensor.shape[1])
            if part == "A.weight"
            else ("outputs", wanted[0], tensor.shape[0])
        )
        if there != here:
            return f"is for another base: {module} has {there} {side} here, {here} there"
    return None


def check(
    spec: ModelSpec, base: Path | None, folders: dict[str, Path]
) -> tuple[list[SpecProblem], int]:
    """(what is wrong with the adapters in `folders`, the highest rank of them).

    `base`: the model's folder, where it is on this node.
    """
    problems, highest = [], 0
    declared = declared_rank(spec)
    for name, folder in folders.items():
        field, source = f"adapters.{name}", spec.adapters[name]
        try:
            rank = rank_of(read_config(folder))
            words = misfit(folder, base) if base else None
        except ValueError as error:
            problems.append(SpecProblem(field=field, value=source, message=str(error)))
            continue
        if words:
            problems.append(SpecProblem(field=field, value=source, message=words))
        if rank > (declared or RANKS[-1]):
            fix = f"raise engine_args.max_lora_rank to {room_for(rank)}" if room_for(rank) else None
            limit = f"engine_args.max_lora_rank, {declared}" if declared else "what vLLM offers"
            message = f"has rank {rank}, more than {limit}"
            problems.append(SpecProblem(field=field, value=source, message=message, fix=fix))
        highest = max(highest, rank)
    return problems, highest


def declared_rank(spec: ModelSpec) -> int | None:
    """The spec's own max_lora_rank, if it is a number; the engine refuses anything else."""
    for key, value in spec.engine_args.items():
        if flat_name(key) == "max_lora_rank" and str(value).isdigit():
            return int(value)
    return None


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
