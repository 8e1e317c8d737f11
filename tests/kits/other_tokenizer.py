"""Turns a tiny model into one of the same architecture with another tokenizer, chat template and
generation config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] | upper }}] {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)
# More ids that end an answer, so that random answers do end, and other sampling by default.
GENERATION = {
    "eos_token_id": [259, *range(100, 160)],
    "temperature": 0.6,
    "repetition_penalty": 1.3,
}


def vary(folder: Path) -> Path:
    """Rewrite the model's files; the weights stay."""
    tokenizer = _read(folder / "tokenizer.json")
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    # Other ids for the same bytes, and a merge: other lengths too.
    turned = {word: len(vocab) - 1 - number for word, number in vocab.items()}
    tokenizer["model"]["vocab"] = turned | {"th": 260}
    tokenizer["model"]["merges"] = [["t", "h"]]
    ids = {"<|pad|>": 258, "<|bos|>": 256, "<|eos|>": 259, "<|role|>": 257}
    for token in tokenizer["added_tokens"]:
        token["id"] = ids[token["content"]]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "generation_config.json", {"bos_token_id": 256, **GENERATION})
    config = _read(folder / "config.json")
    _write(
        folder / "config.json",
        config | {"pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 259},
    )
    about = _read(folder / "tokenizer_config.json")
    about.pop("added_tokens_decoder", None)
    _write(folder / "tokenizer_config.json", about)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
