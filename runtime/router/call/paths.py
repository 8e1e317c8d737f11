"""Which paths of an engine the router offers, and what it knows of each. Pure.

Rule this file keeps: a path reaches an engine only if it is here. What is not is refused before
its body is read: no call to a mistyped path starts an engine.
"""

from __future__ import annotations

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
    "/generative_scoring",
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
)
RESPONSES = "/v1/responses"
STREAMS = frozenset({"/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/messages"})
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
# All that vLLM 0.32 serves below /v1 by POST, without an id in the path, but for what steers it.
V1_PATHS = (
    *(path for path in JSON_PATHS if path.startswith("/v1/")),
    *sorted(FORM_PATHS),
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
)


def engine_target(path: str, query: str) -> str | None:
    """The engine's request target for `path`, which is one of those here; None: a bad query."""
    if not query.isascii():
        return None
    return f"{path}?{query}" if query else path
