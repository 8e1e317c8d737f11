"""Calls that may share one request to an engine, and how its answer is taken apart again. Pure.

Rules this file keeps:
- only calls that differ in nothing but their one text (or list of tokens) share a request;
- each caller gets its own part, whole, as if it had been alone; an answer that has not exactly one
  part for each is used for nobody;
- bytes that need no change are not changed: a vector keeps every digit.

An engine tells tokens for all together. They are divided by the bytes of each call's text (and, for
what was written, of each answer's), rounded so that they add up. Example: 10 tokens for texts of 30
and 70 bytes are 3 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from runtime import outside
from runtime.outside import OutsideError
from runtime.wire.model_spec import Batching

_FIELDS = {"/v1/embeddings": ("embeddings", "input"), "/v1/completions": ("completions", "prompt")}
_ALONE = {"best_of", "prompt_embeds"}
_items: Callable[[bytes], list[msgspec.Raw]] = outside.reader(list[msgspec.Raw])
_usage: Callable[[bytes], dict[str, Any]] = outside.reader(dict[str, Any])
_encode = msgspec.json.Encoder().encode


class Part(NamedTuple):
    """One call's share of a request."""

    alike: tuple[tuple[str, bytes], ...]  # calls of the same may share one
    field: str
    text: bytes  # raw JSON
    body: dict[str, msgspec.Raw]


def part_of(rule: Batching, path: str, body: bytes) -> Part | None:
    """None: this call has to go alone."""
    kind, field = _FIELDS.get(path, ("", ""))
    if kind not in rule.endpoints:
        return None
    try:
        fields = outside.fields(body)
    except OutsideError:
        return None
    text = bytes(fields.get(field, b""))
    one_list = text.startswith(b"[") and text.count(b"[") == 1 and b'"' not in text
    if not (text.startswith(b'"') or (one_list and len(text) > 2)):
        return None
    if bytes(fields.get("n", b"1")) not in (b"1", b"null") or not _ALONE.isdisjoint(fields):
        return None
    if bytes(fields.get("encoding_format", b"")) == b'"bytes"':
        return None
    others = sorted((name, bytes(value)) for name, value in fields.items() if name != field)
    # Pairs, not one text: no name that a caller makes up can pass for another's fields.
    alike = (("", path.encode()), (field, text[:1]), *others)
    return Part(alike, field, text, fields)


def merged(parts: Sequence[Part]) -> bytes:
    """The body of the one request."""
    first = parts[0]
    texts = msgspec.Raw(b"[" + b",".join(part.text for part in parts) + b"]")
    return _encode({**first.body, first.field: texts})


def split(path: str, answer: bytes, parts: Sequence[Part]) -> list[bytes] | None:
    """Each call's own answer, in the order of `parts`; None: it cannot be taken apart."""
    items_name = "data" if path == "/v1/embeddings" else "choices"
    try:
        whole = outside.fields(answer)
        items = [outside.fields(bytes(item)) for item in _items(bytes(whole[items_name]))]
        by_index = {int(bytes(item["index"])): item for item in items}
        usage = _usage(bytes(whole["usage"])) if "usage" in whole else None
    except (KeyError, ValueError):
        return None
    if len(items) != len(parts) or sorted(by_index) != list(range(len(parts))):
        return None
    sizes = [len(part.text) for part in parts]
    written = [len(bytes(by_index[i].get("text", b""))) for i in range(len(parts))]
    usages = [None] * len(parts) if usage is None else _usages(usage, sizes, written)
    return [
        _encode(
            whole
            | {items_name: [by_index[i] | {"index": msgspec.Raw(b"0")}]}
            | ({} if usages[i] is None else {"usage": usages[i]})
        )
        for i in range(len(parts))
    ]  # fmt: skip


def _usages(usage: dict[str, Any], sizes: list[int], written: list[int]) -> list[Any]:
    prompt = shares(_count(usage, "prompt_tokens"), sizes)
    completion = shares(_count(usage, "completion_tokens"), written)
    return [
        usage
        | {"prompt_tokens": p, "total_tokens": p + c}
        | ({"completion_tokens": c} if "completion_tokens" in usage else {})
        for p, c in zip(prompt, completion, strict=True)
    ]


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` by size, in whole numbers that add up (largest remainders get what is left)."""
    weight = sum(sizes) or len(sizes)
    exact = [total * (size if sum(sizes) else 1) / weight for size in sizes]
    out = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (out[i] - exact[i], i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return out
