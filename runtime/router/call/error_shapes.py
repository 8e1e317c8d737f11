"""How an error looks in each protocol, whole and at the end of a stream. Pure.

Rules this file keeps:
- bodies and events of errors are made here and nowhere else (tests/unit/rules says so);
- the path alone says which protocol its caller speaks, whatever else went wrong;
- what ends a stream that has told part of an answer does not look like the end of an answer: no
  `[DONE]`, no event that completes it.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import msgspec

Shape = Literal["openai", "responses", "anthropic"]

# How engines' errors begin, whole and as events.
BEGINNINGS = (b'{"error"', b'data: {"error"', b'{"type":"error"', b"event: error")
_CORE_DIED = (b"EngineCore encountered an issue", b"EngineDeadError")  # vLLM's words


class Failure(NamedTuple):
    """An error, whatever its caller speaks. `kind`: the type that its engine gave it."""

    status: int
    code: str | int | None
    message: str
    param: str | None = None
    kind: str | None = None


_OPENAI_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# The types that Anthropic's clients know.
_ANTHROPIC_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,9})')


def shape_of(target: str) -> Shape:
    """The protocol of a request target, as callers or engines have it, query and all.

    Example: `/models/m/v1/messages?beta=true` is Anthropic's.
    """
    path = target.partition("?")[0]
    if path.startswith("/models/"):
        _, found, tail = path.partition("/v1/")
        path = "/v1/" + tail if found else path
    path = path.rstrip("/")
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path == "/v1/responses" or path.startswith("/v1/responses/"):
        return "responses"
    return "openai"


def whole(shape: Shape, failure: Failure, request_id: str) -> bytes:
    """The body of an answer that is an error."""
    if shape == "anthropic":
        return msgspec.json.encode(_anthropic(failure, request_id))
    return msgspec.json.encode({"error": _openai(failure)})


def last_event(shape: Shape, failure: Failure, request_id: str, sent: bytes) -> bytes:
    """What ends a stream of events whose headers have gone out.

    `sent`: the end of what was told of an answer; b"": nothing, or comments only. b"" comes back
    where that ends within an event: what is written after it could not be read.
    """
    if sent and not sent.endswith(_BOUNDARIES):
        return b""
    if shape == "anthropic":
        return b"event: error\ndata: " + whole(shape, failure, request_id) + b"\n\n"
    if shape == "responses":
        event = {
            "type": "error", "code": _text(failure.code), "message": failure.message,
            "param": failure.param, "sequence_number": _next_number(sent),
        }  # fmt: skip
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    data = b"data: " + whole(shape, failure, request_id) + b"\n\n"
    return data if sent else data + b"data: [DONE]\n\n"


def read(status: int, raw: Any) -> Failure:
    """An engine's decoded error, be it OpenAI's or Anthropic's; anything else is told by status."""
    inner = _inner(raw)
    if inner is None:
        return Failure(status, "engine_error", f"the engine answered with status {status}")
    code, param, kind = inner.get("code"), inner.get("param"), inner.get("type")
    return Failure(
        status,
        code if isinstance(code, str | int) else None,
        inner["message"],
        param if isinstance(param, str) else None,
        kind if isinstance(kind, str) else None,
    )


def core_died(error: bytes) -> bool:
    """Whether an engine's error says that nothing it was asked for will be answered any more: its
    core is a process of its own, and vLLM refers to a stack trace that only its log has."""
    return any(words in error for words in _CORE_DIED)


def _inner(raw: Any) -> dict[str, Any] | None:
    inner = raw.get("error") if isinstance(raw, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        return inner
    return None


def _openai(failure: Failure) -> dict[str, Any]:
    default = "server_error" if failure.status >= 500 else "invalid_request_error"
    kind = failure.kind or _OPENAI_KINDS.get(failure.status, default)
    return {
        "message": failure.message, "type": kind, "param": failure.param, "code": failure.code,
    }  # fmt: skip


def _anthropic(failure: Failure, request_id: str) -> dict[str, Any]:
    """Anthropic's error types: the status chooses, as engines have other names for them."""
    default = "api_error" if failure.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_KINDS.get(failure.status, default)
    return {
        "type": "error",
        "error": {"type": kind, "message": failure.message},
        "request_id": request_id,
    }


def _text(code: str | int | None) -> str | None:
    return None if code is None else str(code)


def _next_number(sent: bytes) -> int:
    """The number of the Responses event after those that were sent."""
    numbers = _SEQUENCE.findall(sent)
    return int(numbers[-1]) + 1 if numbers else 0
