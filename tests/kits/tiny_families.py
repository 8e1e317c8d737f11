"""Tiny random models of several architectures, with the tiny Llama's tokenizer."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258,
}  # fmt: skip
# By a name: the classes' stem in transformers, and what its config has beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True}),
    "phi3": ("Phi3", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {"tie_word_embeddings": True, "sliding_window": 64}),
}  # fmt: skip


def write_family(target: Path, family: str, seed: int, tiny: Path) -> Path:
    """Write a model into `target`; `tiny` is a folder of `tiny_models`."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    stem, more = FAMILIES[family]
    shutil.copytree(tiny, target)
    (target / "model.safetensors").unlink()
    kind = f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(
        getattr(transformers, kind)(**_SIZES | more)
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: they begin as constants
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(torch.bfloat16).save_pretrained(target)
    return target
