"""Request bodies: the two fields routing needs, and how to set a field without touching the rest.

Rule this file keeps: bytes that need no change are not changed; values that are kept are kept as
they were written, digits and escapes included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import UNSET, Struct

from runtime.router.errors import NOT_JSON, ApiError

_FORM_FIELDS = ("model", "stream")
_SENT = ("prompt", "messages", "input")
_TARGETS = {
    "prompt": "/v1/completions",
    "messages": "/v1/chat/completions",
    "input": "/v1/embeddings",
}


class Head(Struct):
    """What the router reads of a JSON body; after `read_head` the first two are checked.

    The others are hints, whatever they hold: the engine judges them. All other fields are skipped.
    """

    model: Any = UNSET
    stream: Any = None
    user: Any = None
    prompt_cache_key: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    temperature: Any = None
    seed: Any = None


class Invocation(NamedTuple):
    """What `/invoke/{model}` stands for in OpenAI's terms."""

    path: str
    body: bytes
    head: Head


_read_head = msgspec.json.Decoder(Head).decode
_read_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_head(body: bytes) -> Head:
    """The head of a JSON body. Raises ApiError (400) naming `model` or `stream`."""
    head = _head(body)
    head.model, head.stream = _model(head.model), _stream(head.stream)
    return head


def _head(body: bytes) -> Head:
    try:
        return _read_head(body)
    except NOT_JSON as error:
        raise _not_json(error) from None


async def read_form(body: bytes, headers: Mapping[str, str]) -> Head:
    """The head of a multipart form. Raises ApiError (400) naming the field."""
    found: dict[str, str] = {}
    try:
        form = MultipartReader(headers, _stream_of(body))
        while len(found) < len(_FORM_FIELDS) and (part := await form.next()) is not None:
            if isinstance(part, BodyPartReader) and part.name in _FORM_FIELDS:
                found[part.name] = (await part.text(encoding="utf-8")).strip()
    except (ValueError, AssertionError, RuntimeError, LookupError, HttpProcessingError) as error:
        message = f"the multipart body cannot be read: {error}"
        raise ApiError(400, "invalid_body", message) from None
    stream = found.get("stream", "").lower() in ("true", "1")
    return Head(model=_model(found.get("model", UNSET)), stream=stream)


def _stream_of(body: bytes) -> StreamReader:
    """The library reads forms from a stream only."""
    loop = asyncio.get_running_loop()
    stream = StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)
    stream.feed_data(body)
    stream.feed_eof()
    return stream


def with_model(body: bytes, model: str) -> tuple[bytes, Head]:
    """The body with its `model` replaced, and its head. Raises as `read_head` does."""
    fields = _fields(body)
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    return changed, read_head(changed)


def invocation(body: bytes, model: str, stream: bool | None) -> Invocation:
    """The OpenAI call that `/invoke/{model}` with this body makes; `stream` wins over the body's.

    Raises ApiError (400) unless exactly one of prompt, messages and input is there.
    """
    fields = _fields(body)
    sent = [name for name in _SENT if name in fields]
    if len(sent) != 1:
        got = f"got {' and '.join(sent)}" if sent else "got none of them"
        message = f"send exactly one of prompt, messages or input ({got})"
        raise ApiError(400, "invalid_body", message, param=sent[1] if sent else "prompt")
    if stream is not None:
        fields["stream"] = _raw(stream)
    fields["model"] = _raw(model)
    changed = msgspec.json.encode(fields)
    head = read_head(changed)
    if head.stream and sent[0] == "input":
        raise ApiError(400, "invalid_body", "embeddings (input) cannot be streamed", param="stream")
    return Invocation(_TARGETS[sent[0]], changed, head)


def _fields(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _read_fields(body)
    except NOT_JSON as error:
        raise _not_json(error) from None


def _raw(value: str | bool) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _not_json(error: Exception) -> ApiError:
    return ApiError(400, "invalid_json", f"the body is not a JSON object: {error}")


def _model(value: Any) -> str:
    if value is UNSET:
        raise ApiError(400, "missing_field", "the body has no model; add it", param="model")
    if not isinstance(value, str) or not value:
        message = f"model must be a model's name, got {_shown(value)}"
        raise ApiError(400, "invalid_field", message, param="model")
    return value


def _stream(value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    message = f"stream must be true or false, got {_shown(value)}"
    raise ApiError(400, "invalid_field", message, param="stream")


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:80] + "…"
