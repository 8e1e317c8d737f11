"""Which paths of an engine the router offers, and what it knows of each.

Rule this file keeps: a path reaches an engine only if it is here, or below /v1 and made of plain
segments: never one of an engine's control routes.
"""

from __future__ import annotations

import re

# What vLLM serves outside /v1 for clients, the model in the body of each. An engine's own guard
# (runtime/engine/guard.py) has to list them too.
ROOT_PATHS = (
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v2/rerank",
    "/v2/embed",
)
STREAMS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
JSON_PATHS = (
    *STREAMS,
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/v1/score",
    "/v1/rerank",
    *ROOT_PATHS,
)
# What takes a multipart form; whatever else is known takes JSON.
FORM_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
# The raw request targets that the front answers itself.
PLAIN_PATHS = {path.encode(): path for path in JSON_PATHS}

_SEGMENTS = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_CONTROL = {"load_lora_adapter", "unload_lora_adapter"}


def v1_target(tail: str, query: str) -> str | None:
    """The engine's request target for `/v1/{tail}?{query}`; None: it is not offered."""
    if not _SEGMENTS.fullmatch(tail) or tail.lower() in _CONTROL or not query.isascii():
        return None
    return f"/v1/{tail}?{query}" if query else f"/v1/{tail}"
