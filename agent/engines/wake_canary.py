"""One cheap request whose answer is known: a woken engine must still give it. Pure.

Rules this file keeps:
- it is deterministic: one greedy token (with the likeliest ones, where offered), or a vector;
- a difference that rounding explains is none: another batch or kernel may swap a near tie;
- comparing is pure; a model that has no such call has no canary, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

PROMPT = "The capital of France is"
NEAR_TIE = 0.1  # two tokens whose log probabilities are that close may swap places
LOGPROB_SLACK = 0.25  # how far a token's log probability may move
LEAST_COSINE = 0.99

_TOKEN: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "seed": 0}
# What is tried, in order: the first that a model answers is its canary.
ASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    # as ids: different tokens may read alike, as parts of one character do
    ("/v1/completions", _TOKEN | {"logprobs": 5, "return_tokens_as_token_ids": True}),
    ("/v1/completions", _TOKEN),
    ("/v1/embeddings", {"input": PROMPT}),
    ("/pooling", {"input": PROMPT}),
    ("/classify", {"input": PROMPT}),
)


class WakeCanary(Struct, frozen=True, kw_only=True):
    """A call and its answer. `path` is empty where the model answers none of `ASKS`."""

    path: str = ""
    body: dict[str, Any] = {}
    token: str | None = None
    logprobs: dict[str, float] = {}  # of the likeliest tokens, the one chosen among them
    vector: tuple[float, ...] = ()


def read(path: str, body: Mapping[str, Any], answer: Any) -> WakeCanary:
    """The canary that `answer` makes. Raises ValueError if it is not what was asked for."""
    try:
        if path == "/v1/completions":
            choice = answer["choices"][0]
            logprobs = choice.get("logprobs") or {}
            likely = (logprobs.get("top_logprobs") or [{}])[0] or {}
            return WakeCanary(
                path=path,
                body=dict(body),
                token=str((logprobs.get("tokens") or [choice["text"]])[0]),
                logprobs={str(token): float(value) for token, value in likely.items()},
            )
        item = answer["data"][0]
        found = next(item[key] for key in ("embedding", "probs", "data") if key in item)
        return WakeCanary(path=path, body=dict(body), vector=tuple(_flat(found)))
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} gives no answer to compare: {error!r}") from None


def difference(before: WakeCanary, after: WakeCanary) -> str | None:
    """Why `after` cannot come from the same weights, in words; None if it can."""
    if before.vector or after.vector:
        cosine = _cosine(before.vector, after.vector)
        same = cosine >= LEAST_COSINE  # False for a NaN too
        return None if same else f"its vector is another one (cosine {cosine:.3f})"
    if after.token is None or before.token is None:
        return "it gives no answer"
    if after.token != before.token and not _near_tie(before, after.token):
        return f"it answers {after.token!r} where it used to answer {before.token!r}"
    was, now = before.logprobs.get(after.token), after.logprobs.get(after.token)
    if was is not None and now is not None and not abs(was - now) <= LOGPROB_SLACK:
        return f"the log probability of {after.token!r} is {now:.2f}, it used to be {was:.2f}"
    return None


def _near_tie(before: WakeCanary, token: str) -> bool:
    best = before.logprobs.get(before.token or "", -math.inf)
    return best - before.logprobs.get(token, -math.inf) <= NEAR_TIE


def _cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    if len(a) != len(b) or not a:
        return 0.0
    lengths = math.hypot(*a) * math.hypot(*b)
    if lengths == 0:
        return 1.0 if a == b else 0.0
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def _flat(values: Any) -> Iterable[float]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield float(value)
