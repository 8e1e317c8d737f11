"""What a vLLM engine answers to a fixed set of greedy requests, so that two can be compared."""

from __future__ import annotations

import re
from typing import Any

from tests.kits.forked_vllm import ForkedVllm

PROMPTS = 50
# Longer than a block of the KV cache, so that what another model left in a cache would be used.
_PREFIX = "the same beginning of all that is asked here, over and over again; " * 3
_GREEDY = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy", "the"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_IDS = re.compile(r"^(chatcmpl|cmpl|modelperm|resp|msg|tokenize|chatcmpl-tool)-")


async def answers(engine: ForkedVllm, model: str, prompts: int = PROMPTS) -> dict[str, Any]:
    """All of them by what was asked, less ids and times."""
    told = {}
    for name, path, body in _requests(model, prompts):
        status, found = await engine.call(path, body)
        assert status == 200, (name, found)
        told[name] = less_ids(found)
    _, metrics = await engine.call("/metrics")
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:")]
    told["metrics"] = sorted({line.rpartition(" ")[0] for line in lines} - {""})
    return told


def less_ids(value: Any) -> Any:
    """An answer without what is another each time."""
    if isinstance(value, dict):
        return {
            key: less_ids(item)
            for key, item in value.items()
            if key != "created" and not (isinstance(item, str) and _IDS.match(item))
        }
    return [less_ids(item) for item in value] if isinstance(value, list) else value


def _requests(model: str, prompts: int) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for i in range(prompts):
        text = f"{_PREFIX} number {i * 37}: {'the ' * (i % 5)}"
        if i % 2:
            body = {"prompt": text, "logprobs": 3, "echo": i == 1}
            found.append((f"completion {i}", "/v1/completions", body))
        else:
            body = {"messages": _messages(text), "logprobs": True, "top_logprobs": 3}
            found.append((f"chat {i}", "/v1/chat/completions", body))
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}
    regex = {"regex": r'\{"a":"(x|yy|the)","b":(true|false)\}'}
    choice = {"choice": ["the red one", "the blue one", "neither"]}
    asked = {"messages": _messages("what is it?")}
    found += [
        ("schema", "/v1/chat/completions",
         {**asked, "response_format": schema, "max_tokens": 40}),
        ("regex", "/v1/chat/completions",
         {**asked, "structured_outputs": regex, "max_tokens": 40}),
        ("choice", "/v1/chat/completions",
         {**asked, "structured_outputs": choice, "max_tokens": 40}),
        ("defaults", "/v1/completions", {"prompt": "the", "temperature": None, "seed": 7}),
        ("stop", "/v1/completions", {"prompt": _PREFIX, "stop": ["e", "th"], "max_tokens": 30}),
        ("tokens", "/tokenize", {"prompt": "the <|eos|> thing", "return_token_strs": True}),
        ("tokens of messages", "/tokenize", {"messages": _messages("the thing")}),
        ("text", "/detokenize", {"tokens": [1, 2, 3, 70, 80, 256, 257, 258, 259, 260]}),
    ]  # fmt: skip
    whole = [(n, p, {"model": model, **(_GREEDY if p.startswith("/v1") else {}), **b})
             for n, p, b in found]  # fmt: skip
    return [*whole, ("models", "/v1/models", None)]


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "be the best"}, {"role": "user", "content": text}]
