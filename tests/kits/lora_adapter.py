"""Writes LoRA adapters in PEFT's format, for tests: no weights of any use, but real files."""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path
from typing import Any


def write_adapter(
    folder: Path, *, seed: int = 0, rank: int = 8, hidden: int = 256, kv: int = 128,
    layers: int = 2, alpha: int = 64, **config: Any,
) -> Path:  # fmt: skip
    """An adapter of the attention's q_proj and v_proj, random but for its seed, in float32.

    The defaults fit the models of runtime/checkpoints/tiny_models.py. `config` goes into
    adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    tensors: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for module, outputs in (("q_proj", hidden), ("v_proj", kv)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = (rank, hidden)
            tensors[f"{name}.lora_B.weight"] = (outputs, rank)
    header: dict[str, Any] = {}
    data = b""
    for name, shape in tensors.items():
        values = array("f", (chance.gauss(0, 1) for _ in range(shape[0] * shape[1]))).tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    about = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "wherever/it/was",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about | config))
    return folder
