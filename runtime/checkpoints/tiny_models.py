"""Writes tiny random language models, for tests that need a real engine but no real answer.

    python -m runtime.checkpoints.tiny_models DIR [NAME ...]

Each is a Llama of 2 layers and hidden size 256 in bfloat16 (about 3 MB) with a byte-level tokenizer
and a chat template. The name seeds the weights, so the same name is the same model on every host.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import places
from runtime.wire.names import NAME_PATTERN

MAX_MODEL_LEN = 2048
_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|role|>")
_VOCAB_SIZE = 320  # 256 bytes, the specials, and padding to a multiple of 64
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|role|>{{ message['role'] }}\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)


def write_model(root: Path, name: str) -> Path:
    """Write model `name` to `root/name` and return that folder; a complete one is left alone.

    Raises ValueError for a name that is not a model's. A reader never sees half a model.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} is not a model name: use letters, digits, '.', '_' and '-'")
    target = places.below(root, name)
    if all((target / file).is_file() for file in _FILES):
        return target
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".tiny-", dir=root))
    try:
        _save(staging, name)
        _make_readable(staging)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _make_readable(folder: Path) -> None:
    """mkdtemp's 0700 and safetensors' 0600 would hide the model from another user's engine."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _save(folder: Path, name: str) -> None:
    # Seconds to import, so only where a model is really written.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    config = transformers.LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_MODEL_LEN,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _save_tokenizer(folder, transformers)


def _save_tokenizer(folder: Path, transformers: Any) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        model_max_length=MAX_MODEL_LEN,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if not argv or argv[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    for name in argv[1:] or ["tiny"]:
        print(write_model(Path(argv[0]), name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
